"""Milliseconds of methods' bundles: every method walks the same rows, in turns, beside the whole graph.

Batch 1, settings that were chosen on dev; accuracy is not measured here but on all of test.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.benchmarks.contest import Choice, Entry
from offramp.benchmarks.heard import digest_of
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.classifier import Session
from offramp.runtime.loading import load
from offramp.runtime.rules import bind
from offramp.runtime.tuning.baselines import MONOLITH, open_rival, read_rivals
from offramp.runtime.tuning.timing import Batches, Contender, one_by_one, walking
from offramp.training.batches import Encoded

TARGETS = (0.0, 30.0, 40.0, 50.0, 60.0, 70.0)  # per cent of multiply-accumulates saved on dev, about
TURNS = 3
BOTH = ("fp32", "int8")


def bundle_of(checkpoint: Path, variants: tuple[str, ...], *, rivals: bool = False) -> Path:
    """The checkpoint's bundle beside it, split now unless one of these weights has all of that."""
    bundle = checkpoint.with_name(f"{checkpoint.name}.bundle")
    key_file, asked = checkpoint.with_name(f"{checkpoint.name}.bundle.key"), {*variants}
    asked |= {"rivals"} if rivals else set()
    weights, *there = key_file.read_text(encoding="utf-8").split() if key_file.is_file() else ("",)
    if weights != digest_of(checkpoint) or not asked <= {*there}:
        words = ["--out", str(bundle), "--variants", ",".join(variants), "--overwrite"]
        words += ["--rivals", str(rivals_of(checkpoint))] if rivals else []
        command = [str(Path(sys.executable).parent / "ee-split"), str(checkpoint), *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        key_file.write_text(" ".join([digest_of(checkpoint), *sorted(asked)]), encoding="utf-8")
    return bundle


def rivals_of(checkpoint: Path) -> Path:
    """Where the single graphs of a checkpoint are put."""
    return checkpoint.with_name(f"{checkpoint.name}.rivals")


def picked(choices: list[Choice]) -> list[int]:
    """Numbers of the settings nearest to TARGETS, each once."""
    saved = np.array([choice.macs_saved for choice in choices])
    return sorted({int(np.abs(saved - target).argmin()) for target in TARGETS})


def timed(entries: Mapping[str, Entry], whole: Path, rows: Encoded, sample: int) -> dict[str, Any]:
    """By method, a point for each picked setting; share: of the monolith's time, in per cent.

    whole: the checkpoint whose single graph is the measure. sample: rows of test, drawn by chance.
    Walks of one bundle share its weights: each answers a row untimed before its turn (see one_by_one).
    """
    chosen = np.sort(np.random.default_rng(0).permutation(len(rows))[:sample])
    manifest = open_bundle(bundle_of(whole, BOTH, rivals=True)).manifest
    names = [tensor.name for tensor in next(iter(manifest.stem.variants.values())).inputs]
    singles: list[Batches] = [[(np.zeros(1, np.int64), _arrays(rows, int(row), names))] for row in chosen]
    sessions: dict[tuple[Path, str], Session] = {}
    contenders: list[Contender] = []
    places = {}
    for name, entry in entries.items():
        variants = BOTH if {choice.variant for choice in entry.choices} - {"fp32"} else BOTH[:1]
        same = entry.checkpoint == whole
        bundle = bundle_of(entry.checkpoint, BOTH if same else variants, rivals=same)
        for at in picked(entry.choices):
            choice = entry.choices[at]
            if (bundle, choice.variant) not in sessions:
                sessions[bundle, choice.variant] = load(bundle, rule="never", variant=choice.variant)
            session = sessions[bundle, choice.variant]
            rule = bind(choice.rule, len(session.manifest.segments), session.manifest.costs)
            label = f"{name} {at}"
            contenders.append(walking(session, label, "walk", rule))
            places[label] = (name, at)
    graph = next(graph for graph in read_rivals(rivals_of(whole), manifest).graphs if graph.kind == MONOLITH)
    contenders.append(open_rival(rivals_of(whole), graph, manifest, threads=None, threshold=None))
    for contender in contenders:
        contender.run(singles[0], 1, 1)
    found = one_by_one(contenders, singles, TURNS)
    ms = {name: 1e3 * float(np.median(one.seconds, axis=0).mean()) for name, one in found.items()}
    points: dict[str, list[dict[str, float]]] = {name: [] for name in entries}
    for label, (name, at) in places.items():
        settings = entries[name].settings
        spared = 1 - float(settings.spent["macs"][at].sum() / settings.full["macs"].sum())
        right = float((found[label].labels[0] == rows.label[chosen]).mean())
        figures = {
            "ms": ms[label],
            "share": 100 * ms[label] / ms[graph.name],
            "accuracy": 100 * float(settings.right[at].mean()),
            "accuracy_of_walked": 100 * right,
            "macs_saved": 100 * spared,
        }
        points[name].append({key: round(value, 3) for key, value in figures.items()})
    return {"rows": len(chosen), "monolith_ms": round(ms[graph.name], 4), "points": points}


def _arrays(rows: Encoded, row: int, names: list[str]) -> dict[str, NDArray[Any]]:
    """What the stem reads of one row, batch 1."""
    inputs, _ = rows.batch([row])
    return {name: inputs[name].numpy() for name in names}
