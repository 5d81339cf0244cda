"""A user's fine-tuned model gets exits, becomes a bundle, and answers at full depth as it did before."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from offramp.export.cli import main as split
from offramp.runtime import load
from offramp.training.cli import train

pytestmark = pytest.mark.slow  # exports a network of each family; the parts have default tests of their own


@pytest.fixture(scope="module", params=["bert", "roberta", "electra", "distilbert", "mpnet"])
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("attach")
    torch.set_num_threads(1)
    folder = tiny.classifier_folder(root / "model", request.param, blocks=2)  # each takes seconds to export
    (root / "traffic.txt").write_text("".join(row["text"] + "\n" for row in tiny.rows(60, 5)))
    command = ["--model", str(folder), "--data", str(root / "traffic.txt"), "--out", str(root / "ckpt")]
    trained = CliRunner().invoke(train, [*command, "--precision", "fp32", "--set", "epochs=20"])
    assert trained.exit_code == 0, trained.output
    written = CliRunner().invoke(
        split, [str(root / "ckpt"), "--out", str(root / "bundle"), "--variants", "fp32"]
    )
    assert written.exit_code == 0, written.output
    return root


def test_full_depth_answers_are_those_of_transformers_pipeline(root: Path) -> None:
    texts = [row["text"] for row in tiny.rows(24, 9)]
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    model = AutoModelForSequenceClassification.from_pretrained(root / "model")
    expected = pipeline("text-classification", model=model, tokenizer=tokenizer)(texts)
    with load(root / "bundle", point="full") as session:
        answers = list(session.map(texts, batch_size=8))
    assert [answer.label for answer in answers] == [one["label"] for one in expected]
    np.testing.assert_allclose(
        [answer.score for answer in answers], [one["score"] for one in expected], atol=1e-4
    )


def test_points_state_how_often_they_agree_with_full_depth(root: Path) -> None:
    manifest = json.loads((root / "bundle" / "manifest.json").read_text())
    measured = {point["name"]: point["measured"] for point in manifest["points"]}
    assert measured["full"]["agreement"] == 100
    for name, figures in measured.items():
        if name.startswith("dev-"):
            assert figures["agreement"] >= 100 - float(name.removeprefix("dev-"))
    assert "accuracy" not in measured["full"]
