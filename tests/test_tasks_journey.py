"""Each task from data to answers by the commands, on two families: train, attach, split, run, calibrate."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_tasks
import torch
from click.testing import CliRunner
from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification

from offramp.export.cli import main as split
from offramp.models.tasks import EMBEDDING, MULTI_LABEL, REGRESSION, TOKENS
from offramp.runtime import load
from offramp.runtime.cli import main as run
from offramp.runtime.tuning.bench import main as bench
from offramp.runtime.tuning.calibrate import main as calibrate
from offramp.training.cli import evaluate, train

pytestmark = pytest.mark.slow  # eight trainings

FAMILIES = ("bert", "roberta")
QUALITY = {MULTI_LABEL: "f1", TOKENS: "f1", REGRESSION: "spearman", EMBEDDING: "agreement"}


def command(name: Any, *words: str | Path) -> str:
    result = CliRunner().invoke(name, [str(word) for word in words])
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result.stdout


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data of every task."""
    folder = tmp_path_factory.mktemp("tasks")
    for task in tiny_tasks.NAMES:
        tiny_tasks.data_folder(folder / task, task)
    return folder


def bundle_of(work: Path, task: str, family: str, recipe: str) -> Path:
    """The bundle of a tiny model trained by a recipe, made once; attach begins with a model of the task."""
    name = f"{task}-{family}-{recipe}"
    out = work / f"{name}.bundle"
    if out.is_dir():
        return out
    model = work / f"{task}-{family}.model"
    if recipe == "attach":
        if not model.is_dir():
            tiny_tasks.model_folder(model, task, family)
    elif not (model := work / f"{family}.model").is_dir():
        tiny.model_folder(model, family)
    words = ["--model", model, "--data", work / task, "--out", work / f"{name}.ckpt", "--precision", "fp32"]
    if recipe == "attach":
        words += ["--set", "epochs=4"] + (["--task", EMBEDDING] if task == EMBEDDING else [])
    else:
        words += ["--recipe", recipe, "--set", "epochs=12", "--set", "lr=3e-3", "--set", "batch_size=16"]
    command(train, *words)
    command(split, work / f"{name}.ckpt", "--out", out, "--variants", "fp32,int8")
    return out


CASES = [
    (task, family, recipe)
    for task in tiny_tasks.NAMES
    for family, recipe in zip(FAMILIES, ("attach", "offramp"), strict=True)
    if not (task == EMBEDDING and recipe != "attach")
] + [(EMBEDDING, "mpnet", "attach")]


@pytest.mark.parametrize(("task", "family", "recipe"), CASES)
def test_full_depth_of_the_bundle_gives_the_answers_of_the_checkpoint(
    work: Path, task: str, family: str, recipe: str
) -> None:
    bundle = bundle_of(work, task, family, recipe)
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["task"] == task
    assert (
        QUALITY[task] in manifest["points"][0]["measured"] or "agreement" in manifest["points"][0]["measured"]
    )
    texts = [
        " ".join(row["tokens"]) if task == TOKENS else row["text"] for row in tiny_tasks.rows(task, 24, 5)
    ]
    with load(bundle, rule="never") as session:
        answers = list(session.map(texts, batch_size=8))
        alone = session(texts[3])
    assert all(answer.exit == 3 for answer in answers)
    assert alone.as_json().keys() == answers[3].as_json().keys()


def texts_of(task: str, count: int = 24) -> list[str]:
    rows = tiny_tasks.rows(task, count, 5)
    return [" ".join(row["tokens"]) if task == TOKENS else row["text"] for row in rows]


def model_inputs(texts: list[str]) -> dict[str, torch.Tensor]:
    reader = tiny.tokenizer()
    reader.enable_padding()
    encoded = reader.encode_batch(texts)
    return {
        "input_ids": torch.tensor([e.ids for e in encoded]),
        "attention_mask": torch.tensor([e.attention_mask for e in encoded]),
    }


@torch.no_grad()
def test_attached_several_labels_are_those_of_the_model_at_full_depth(work: Path) -> None:
    bundle, texts = bundle_of(work, MULTI_LABEL, "bert", "attach"), texts_of(MULTI_LABEL)
    model = AutoModelForSequenceClassification.from_pretrained(work / f"{MULTI_LABEL}-bert.model").eval()
    expected = model(**model_inputs(texts)).logits.sigmoid().numpy()
    with load(bundle, rule="never") as session:
        answers = list(session.map(texts))
    scores = np.array([[answer.scores[name] for name in session.labels] for answer in answers])
    np.testing.assert_allclose(scores, expected, atol=1e-5)


@torch.no_grad()
def test_attached_tokens_have_the_labels_of_the_model_at_full_depth(work: Path) -> None:
    bundle, texts = bundle_of(work, TOKENS, "bert", "attach"), texts_of(TOKENS)
    model = AutoModelForTokenClassification.from_pretrained(work / f"{TOKENS}-bert.model").eval()
    inputs = model_inputs(texts)
    numbers = model(**inputs).logits.argmax(-1)
    with load(bundle, rule="never") as session:
        for row, (text, answer) in enumerate(zip(texts, session.map(texts), strict=True)):
            words = text.split()
            expected = [session.labels[int(number)] for number in numbers[row, 1 : 1 + len(words)]]
            assert [token[2] for token in answer.tokens] == expected
            assert [text[token[0] : token[1]] for token in answer.tokens] == words


@torch.no_grad()
def test_an_attached_value_is_that_of_the_model_at_full_depth(work: Path) -> None:
    bundle, texts = bundle_of(work, REGRESSION, "bert", "attach"), texts_of(REGRESSION)
    model = AutoModelForSequenceClassification.from_pretrained(work / f"{REGRESSION}-bert.model").eval()
    expected = model(**model_inputs(texts)).logits[:, 0].numpy()
    with load(bundle, rule="never") as session:
        values = [answer.value for answer in session.map(texts)]
    np.testing.assert_allclose(values, expected, atol=1e-5)


@torch.no_grad()
def test_an_attached_embedding_is_the_first_token_at_length_one(work: Path) -> None:
    bundle, texts = bundle_of(work, EMBEDDING, "bert", "attach"), texts_of(EMBEDDING)
    model = AutoModel.from_pretrained(work / f"{EMBEDDING}-bert.model").eval()
    first = model(**model_inputs(texts)).last_hidden_state[:, 0]
    expected = torch.nn.functional.normalize(first).numpy()
    with load(bundle, rule="never") as session:
        embeddings = np.stack([answer.embedding for answer in session.map(texts)])
    np.testing.assert_allclose(embeddings, expected, atol=1e-5)


@pytest.mark.parametrize(("task", "family", "recipe"), CASES)
def test_a_bundle_is_calibrated_and_measured(
    work: Path, tmp_path: Path, task: str, family: str, recipe: str
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(bundle_of(work, task, family, recipe), bundle)
    table = command(calibrate, work / task / "dev.jsonl", "--bundle", bundle)
    quality = "agreement" if task == EMBEDDING else QUALITY[task]
    assert quality in table and "int8-default" in table
    figures = tmp_path / "bench.json"
    command(
        *(bench, "--bundle", bundle, "--data", work / task / "test.jsonl", "--rows", "8", "--turns", "1"),
        *("--json", figures, "--report", tmp_path / "bench.html"),
    )
    assert json.loads(figures.read_text())["candidates"]


@pytest.mark.parametrize("task", tiny_tasks.NAMES)
def test_a_checkpoint_is_evaluated_by_the_quality_of_its_task(work: Path, tmp_path: Path, task: str) -> None:
    bundle_of(work, task, "bert", "attach")
    json_file = tmp_path / "eval.json"
    command(
        *(evaluate, work / f"{task}-bert-attach.ckpt", "--data", work / task),
        *("--json", json_file, "--picture", tmp_path / "eval.png"),
    )
    figures = json.loads(json_file.read_text())
    assert figures["quality"] == QUALITY[task]
    assert len(figures[f"exit_{QUALITY[task]}"]) == 3


@pytest.mark.parametrize("task", [MULTI_LABEL, TOKENS, REGRESSION])
def test_labels_are_learned(work: Path, task: str) -> None:
    bundle_of(work, task, "roberta", "offramp")
    training = json.loads((work / f"{task}-roberta-offramp.ckpt" / "training.json").read_text())
    assert training["dev"]["full_depth"] > 80


def test_ee_run_answers_in_the_fields_of_the_task(work: Path, tmp_path: Path) -> None:
    lines = tmp_path / "input.txt"
    lines.write_text("the film was good\n")
    fields = {MULTI_LABEL: "labels", TOKENS: "entities", REGRESSION: "value", EMBEDDING: "embedding"}
    for task, field in fields.items():
        answer = json.loads(command(run, lines, "--bundle", bundle_of(work, task, "bert", "attach")))
        assert field in answer and {"exit", "depth", "ms"} <= answer.keys()


@pytest.mark.parametrize(
    ("task", "words", "message"),
    [
        (TOKENS, ["--recipe", "deebert"], "recipe deebert is for classification"),
        (TOKENS, ["--pooling", "mean"], "exits of token-classification read each token"),
        (TOKENS, ["--balance"], "--balance repeats rows by their one label"),
        (EMBEDDING, ["--task", EMBEDDING, "--recipe", "joint"], "recipe joint learns from labels"),
    ],
)
def test_what_a_task_has_not_is_refused_by_name(
    work: Path, tmp_path: Path, task: str, words: list[str], message: str
) -> None:
    tiny.model_folder(tmp_path / "model")
    options = ["--model", tmp_path / "model", "--data", work / task, "--out", tmp_path / "ckpt", *words]
    result = CliRunner().invoke(train, [str(option) for option in options])
    assert result.exit_code == 2
    assert message in result.output
