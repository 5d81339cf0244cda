"""Bundles that are checked in under tests/data, and texts for them; needs no torch."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

DATA = Path(__file__).parent / "data"
CLASSIFIER, GENERATOR = DATA / "tiny_bundle", DATA / "tiny_generator"
GENERATOR_NATIVE = DATA / "tiny_generator_native"  # its cache grows in place
# Of the other tasks, each folder named by what it answers.
MULTI_LABEL, TOKENS, REGRESSION, EMBEDDING = (
    DATA / "tiny_tasks" / name for name in ("multi_label", "tokens", "regression", "embedding")
)
WORDS = ["the", "a", "film", "plot", "was", "very", "not", "at", "all", "good", "warm", "bad", "poor", "cold"]


def baselines_of(bundle: Path) -> Path:
    """The folder of single graphs of a bundle of tiny_tasks."""
    return bundle.with_name(f"{bundle.name}_baselines")


def texts(count: int, seed: int = 0) -> list[str]:
    """Random texts of 1 to 29 words."""
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, random.integers(1, 30))) for _ in range(count)]


def bundle_with_points(folder: Path, *, guaranteed: bool = False, rows: int = 300) -> Path:
    """A copy of CLASSIFIER in a folder, with points gate-1 to gate-3 of rule gate, measured on random texts.

    guaranteed: each point guarantees a disagreement of at most half way from what was seen to 1.
    """
    from offramp.runtime import load_classifier
    from offramp.runtime.bundle.manifest import Guarantee, OperatingPoint, RuleSpec
    from offramp.runtime.rules import bind, simulate

    path = folder / "bundle"
    shutil.copytree(CLASSIFIER, path)
    with load_classifier(path, rule="never") as session:
        manifest = session.manifest
        trace, _ = session.at_full_depth(texts(rows, seed=1))
    gates, blocks = trace.gates[:, :-1], np.array([segment.blocks[-1] for segment in manifest.segments])
    labels, points = trace.logits.argmax(-1), []
    for number, share in enumerate((0.2, 0.5, 0.8), 1):
        rule = RuleSpec("gate", {"threshold": float(np.quantile(gates, share))})
        exits = simulate(bind(rule, len(blocks)), trace.logits, gates)
        loss = float((labels[np.arange(rows), exits] != labels[:, -1]).mean())
        measured = {"agreement": 100 - 100 * loss, "mean_exit": float(blocks[exits].mean())}
        limit = (1 + loss) / 2
        promise = Guarantee("disagreement", limit, 0.95, rows, loss, limit, "clopper-pearson")
        points.append(
            OperatingPoint(
                f"gate-{number}",
                rule,
                "fp32",
                "random texts",
                "dev",
                measured,
                guarantee=promise if guaranteed else None,
                exit_rows=tuple(np.bincount(exits, minlength=len(blocks)).tolist()),
            )
        )
    new = replace(manifest, points=tuple(points), rule=points[0].rule)
    (path / "manifest.json").write_text(new.to_json(), encoding="utf-8")
    return path
