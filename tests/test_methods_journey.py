"""JEI-DNN and BERxiT from data to answers; torch and the bundle decide the same, row by row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner

from offramp.export.cli import main as split
from offramp.runtime import load
from offramp.runtime.bundle.manifest import RuleSpec
from offramp.runtime.rules import bind, simulate
from offramp.runtime.rules.sweep import ExitTable
from offramp.training.batches import encode_texts
from offramp.training.checkpoint import load_checkpoint
from offramp.training.cli import train
from offramp.training.collect import collect, exit_table
from offramp.training.data import Rows

SETTINGS = {
    "jei_dnn": ["warm_epochs=2", "turn_epochs=6", "turn_steps=400"],
    "berxit": [],
}


@dataclass(frozen=True)
class Journey:
    """A trained checkpoint's bundle, new rows, and torch's outputs for them."""

    bundle: Path
    rows: list[dict[str, object]]
    reference: ExitTable


@pytest.fixture(scope="module", params=tiny.with_slow(sorted(SETTINGS)))
def journey(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Journey:
    root = tmp_path_factory.mktemp(request.param)
    model, data = tiny.model_folder(root / "model", "distilbert"), tiny.data_folder(root / "data")
    torch.set_num_threads(1)
    sets = ["epochs=8", "batch_size=8", "lr=0.002", "heads_lr=0.01", *SETTINGS[request.param]]
    words = ["--model", str(model), "--data", str(data), "--recipe", request.param, "--precision", "fp32"]
    flags = [word for setting in sets for word in ("--set", setting)]
    trained = CliRunner().invoke(train, [*words, "--out", str(root / "ckpt"), *flags])
    assert trained.exit_code == 0, trained.output
    exported = CliRunner().invoke(
        split, [str(root / "ckpt"), "--out", str(root / "bundle"), "--variants", "fp32"]
    )
    assert exported.exit_code == 0, exported.output
    checkpoint = load_checkpoint(root / "ckpt")
    rows = tiny.rows(60, seed=9)
    labels = np.array([row["label"] for row in rows])
    encoded = encode_texts(
        Rows([str(row["text"]) for row in rows], None, labels), tiny.tokenizer(), checkpoint.text
    )
    return Journey(root / "bundle", rows, exit_table(collect(checkpoint.network, encoded)))


def test_the_bundle_answers_by_the_learned_gate(journey: Journey) -> None:
    with load(journey.bundle, point="trained") as session:
        assert session.rule == RuleSpec("gate", {"threshold": 0.5})
        answers = list(session.map([str(row["text"]) for row in journey.rows], batch_size=8))
    right = [a.label == str(row["label"]) for a, row in zip(answers, journey.rows, strict=True)]
    assert sum(right) >= 50


def test_gates_of_the_engine_are_those_of_torch(journey: Journey) -> None:
    with load(journey.bundle, rule="never") as session:
        trace, _ = session.at_full_depth([str(row["text"]) for row in journey.rows], "fp32")
    assert journey.reference.gates is not None
    np.testing.assert_allclose(trace.gates[:, :-1], journey.reference.gates[:, :-1], atol=1e-4)
    np.testing.assert_allclose(trace.logits, journey.reference.logits, atol=1e-4)


def test_the_walk_exits_where_torch_does(journey: Journey) -> None:
    """At thresholds between the gates, so that rows exit at several segments."""
    assert journey.reference.gates is not None
    exits_taken = set()
    for share in (0.2, 0.5, 0.8):
        gates = np.unique(journey.reference.gates[:, :-1])
        at = min(int(share * len(gates)), len(gates) - 2)
        spec = RuleSpec("gate", {"threshold": float((gates[at] + gates[at + 1]) / 2)})
        expected = simulate(bind(spec, 3), journey.reference.logits, journey.reference.gates)
        with load(journey.bundle, rule=spec) as session:
            walked = [session(str(row["text"])) for row in journey.rows]
        ties = np.abs(journey.reference.gates - spec.parameters["threshold"]).min(1) < 1e-5
        assert ties.sum() <= 6
        exits = np.array([answer.exit - 1 for answer in walked])
        assert (exits == expected)[~ties].all()
        labels = journey.reference.logits[np.arange(60), expected].argmax(-1)
        assert [a.label for a, tie in zip(walked, ties, strict=True) if not tie] == [
            str(label) for label, tie in zip(labels, ties, strict=True) if not tie
        ]
        exits_taken |= set(exits.tolist())
    assert len(exits_taken) >= 2
