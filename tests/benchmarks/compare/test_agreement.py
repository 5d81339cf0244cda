"""Tests of benchmarks.compare.agreement: torch's own loop against the tables of training, and bundles against
it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import documents
import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from offramp.benchmarks.compare import agreement
from offramp.benchmarks.compare.exit_outputs import ensure_bundle, weights_digest
from offramp.runtime.rules import RuleSpec, bind, simulate
from offramp.runtime.walker import Trace
from offramp.training.batches import EncodedText
from offramp.training.checkpoint import load_checkpoint
from offramp.training.cli import train
from offramp.training.collect import collect, exit_table

SHORT = ("epochs=1", "batch_size=8", "lr=0.002", "heads_lr=0.01")
GATE, PATIENCE = RuleSpec("gate", {"threshold": 0.5}), RuleSpec("patience", {"patience": 1})


@pytest.mark.parametrize("spec", [GATE, PATIENCE])
def test_a_walk_through_torch_takes_the_exits_of_the_table(spec: RuleSpec) -> None:
    network = tiny.network("bert", policy="statistics")
    random = np.random.default_rng(0)
    ids = [random.integers(5, 60, length).tolist() for length in (4, 9, 4, 6, 9, 4, 7, 8)]
    rows = EncodedText(ids, [[0] * len(row) for row in ids], random.integers(0, 2, len(ids)), 0)
    table, rule = exit_table(collect(network, rows)), bind(spec, 3)
    plans = agreement.walk_torch(network, rows, ("fp32",), rule, 0).variants
    assert ((plans >= 0).sum(1) - 1 == simulate(rule, table.logits, table.gates)).all()


def trace(exits: int, top: float, label: int = 0) -> Trace:
    plan = np.where(np.arange(3) < exits, 0, -1).astype(np.int8)[None]
    logits = np.zeros((1, 3, 2), np.float32)
    logits[..., label] = np.log(top / (1 - top))
    return Trace(plan, logits, np.full((1, 3), np.nan, np.float32), np.zeros(1))


def test_a_tie_is_a_difference_without_a_difference_of_signals() -> None:
    def counts(walk: Trace, other: Trace) -> tuple[int, int, int]:
        figures = agreement.compare_walks(walk, other)
        return figures["same"], figures["ties"], figures["other"]

    assert counts(trace(2, 0.8), trace(2, 0.8001)) == (1, 0, 0)
    assert counts(trace(2, 0.8), trace(3, 0.800001)) == (0, 1, 0)
    assert counts(trace(2, 0.8), trace(3, 0.8001)) == (0, 0, 1)
    assert counts(trace(2, 0.500001), trace(2, 0.500001, label=1)) == (0, 1, 0)
    assert counts(trace(2, 0.8), trace(2, 0.8, label=1)) == (0, 0, 1)


@pytest.mark.slow
def test_a_bundle_of_other_weights_disagrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    tiny.model_folder(tmp_path / "model", "bert", blocks=2)  # each takes seconds to export
    data, runs = tiny.data_folder(tmp_path / "data"), tmp_path / "runs"
    words = ["--data", str(data), "--seed", "0", "--precision", "fp32"]
    begin = ["--model", str(tmp_path / "model"), *(w for s in SHORT for w in ("--set", s))]
    for recipe, start in (("joint", begin), ("quee", ["--init", str(runs / "joint_0")])):
        out = ["--recipe", recipe, "--out", str(runs / f"{recipe}_0")]
        done = CliRunner().invoke(train, [*out, *start, *words])
        assert done.exit_code == 0, done.output

    with monkeypatch.context() as patched:
        documents.run_heavy_here(patched)
        for folder in (runs / "joint_0", runs / "quee_0"):
            ensure_bundle(folder, load_checkpoint(folder).network.spec.forecast or ("fp32",))

    words = [str(runs), "--data", str(data), "--rows", "30", "--json", str(tmp_path / "figures.json")]

    def compare() -> subprocess.CompletedProcess[str]:
        """A process of its own: it walks on one thread, and this process may have a larger thread pool."""
        command = [sys.executable, "-m", "offramp.benchmarks.compare.agreement", *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    good = compare()
    assert good.returncode == 0, good.stderr
    lines = json.loads((tmp_path / "figures.json").read_text())["lines"]
    in_fp32 = [line for line in lines if line["variants"] == "fp32"]
    assert {line["checkpoint"] for line in in_fp32} == {"joint_0", "quee_0"}
    assert all(line["same"] + line["ties"] == line["rows"] == 30 for line in in_fp32)
    rounded = {line["torch_against"] for line in lines if line["variants"] == "fp32,int8"}
    assert rounded == {"bundle", "float64"}
    # The two classes are swapped in the checkpoint, and the key claims that the old bundle has the new
    # weights.
    weights = runs / "joint_0" / "weights.safetensors"
    tensors = load_file(weights)
    save_file(
        {name: t.roll(1, 0) if len(t.shape) and len(t) == 2 else t for name, t in tensors.items()}, weights
    )
    (runs / "joint_0.bundle.key").write_text(f"{weights_digest(runs / 'joint_0')} fp32")
    (runs / "quee_0").rename(tmp_path / "quee_0")  # it has been compared
    bad = compare()
    assert bad.returncode == 1, bad.stderr
