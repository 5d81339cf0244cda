"""Images from class folders to checkpoint, bundle and answers, by the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner

from offramp.export.cli import main as split
from offramp.models import EarlyExitNetwork
from offramp.runtime import load
from offramp.runtime.cli import main as run
from offramp.runtime.tuning.bench import measure_classifier
from offramp.runtime.tuning.calibrate import main as calibrate
from offramp.training.batches import encode_rows
from offramp.training.checkpoint import load_checkpoint
from offramp.training.cli import evaluate, train
from offramp.training.collect import collect
from offramp.training.data import load_data

KINDS = {"vit": "mean", "deit": "cls", "dinov2": "mean"}
SETS = ["epochs=6", "batch_size=8", "lr=0.002", "heads_lr=0.01", "policy_epochs=10", "policy_lr=0.01"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)  # torch's threads and ONNX Runtime's would compete for the same cores
    folder = tmp_path_factory.mktemp("images")
    tiny.image_folder(folder / "data")
    return folder


@pytest.fixture(scope="module", params=tiny.with_slow(sorted(KINDS)))
def family_root(root: Path, request: pytest.FixtureRequest) -> Path:
    """A folder with ckpt and bundle of one family; DINOv2 at another size than the model's."""
    family: str = request.param
    folder = root / family
    model = tiny.image_model_folder(folder / "model", family)
    words = ["--model", str(model), "--data", str(root / "data"), "--out", str(folder / "ckpt")]
    words += ["--recipe", "consistentee_plus"]
    words += ["--precision", "fp32", "--pooling", KINDS[family], "--augment", "flip,crop"]
    words += ["--image-size", "24", "--no-crop"] if family == "dinov2" else []
    words += [word for name in SETS for word in ("--set", name)]
    trained = CliRunner().invoke(train, words)
    assert trained.exit_code == 0, trained.output
    words = [str(folder / "ckpt"), "--out", str(folder / "bundle")]
    # int8 and points by the engine once: exporting takes seconds.
    words += ["--dev", str(root / "data" / "dev")] if family == "vit" else ["--variants", "fp32"]
    done = CliRunner().invoke(split, words)
    assert done.exit_code == 0, done.output
    return folder


def pictures(count: int) -> list[Any]:
    return [tiny.image(number % 2, 5000 + number, (20, 23)) for number in range(count)]


def test_it_answers_with_the_learned_labels(family_root: Path) -> None:
    images = pictures(20)
    with load(family_root / "bundle") as session:
        answers = list(session.map(images, batch_size=8))
    right = [answer.label == ("red", "blue")[at % 2] for at, answer in enumerate(answers)]
    assert sum(right) >= 18


def test_torch_and_the_walk_agree(family_root: Path, root: Path) -> None:
    """From the files to the logits and gates of every exit, one by one and in batches."""
    checkpoint = load_checkpoint(family_root / "ckpt")
    rows = load_data(str(root / "data")).split("test")
    collected = collect(checkpoint.network, encode_rows(checkpoint, rows))
    assert rows.images is not None and collected.gate_logits is not None
    with load(family_root / "bundle", rule="never") as session:
        trace, tokens = session.at_full_depth(rows.images.files)
        alone = [session(file) for file in rows.images.files[:4]]
        together = list(session.map(rows.images.files[:4], batch_size=4))
    np.testing.assert_allclose(trace.logits, collected.logits.numpy(), atol=2e-4)
    np.testing.assert_allclose(trace.gates[:, :-1], collected.gate_logits.sigmoid().numpy(), atol=2e-4)
    assert set(tokens) == {checkpoint.network.longest}
    for single, batched in zip(alone, together, strict=True):
        assert (single.label, single.exit) == (batched.label, batched.exit)
        assert single.score == pytest.approx(batched.score, abs=1e-5)


def test_early_exits_are_those_of_torch(family_root: Path, root: Path) -> None:
    rows = load_data(str(root / "data")).split("test")
    assert rows.images is not None
    with load(family_root / "bundle", rule="never") as session:
        trace, _ = session.at_full_depth(rows.images.files)
        threshold = float(np.median(trace.gates[:, 0]))
    with load(family_root / "bundle", rule="gate", threshold=threshold) as session:
        answers = list(session.map(rows.images.files, batch_size=5))
    expected = np.where(trace.gates[:, 0] > threshold, 1, 2)
    assert {1, 2} == set(expected), "the threshold must separate the rows"
    assert [answer.exit for answer in answers] == expected.tolist()


def test_ee_run_names_the_file_of_every_answer(family_root: Path, root: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no")
    files = [root / "data/test/red/000.png", tmp_path / "broken.jpg", root / "data/test/blue/001.png"]
    words = ["--bundle", str(family_root / "bundle"), *map(str, files)]
    for more in ([], ["--batch-size", "4"]):
        done = CliRunner().invoke(run, [*words, *more])
        assert done.exit_code == 1, done.output
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        assert [line["file"] for line in lines] == [str(file) for file in files]
        assert [line.get("label") for line in lines] == ["red", None, "blue"]
        assert "broken.jpg" in lines[1]["error"] and "item" not in lines[1]["error"]


def test_ee_run_takes_lists(family_root: Path, root: Path) -> None:
    data = root / "data"
    (data / "list.txt").write_text("test/red/000.png\n\ntest/blue/001.png\n")
    (data / "list.jsonl").write_text('{"image": "test/red/000.png"}\n{"text": "no"}\n')
    words = ["--bundle", str(family_root / "bundle"), str(data / "list.txt"), str(data / "list.jsonl")]
    done = CliRunner().invoke(run, words)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line.get("label", line.get("error")) for line in lines] == [
        "red",
        "empty line",
        "blue",
        "red",
        '"image": expected a string, found nothing',
    ]
    assert done.exit_code == 1
    listed = f"{data}/test/red/000.png\n"
    done = CliRunner().invoke(run, ["--bundle", str(family_root / "bundle"), "-"], input=listed)
    assert done.exit_code == 0 and json.loads(done.stdout)["file"] == listed.strip()
    done = CliRunner().invoke(run, ["--bundle", str(family_root / "bundle"), str(data / "nowhere.txt")])
    assert done.exit_code == 2 and "nowhere.txt" in done.stderr


def test_points_come_from_folders_and_from_lines(family_root: Path, root: Path) -> None:
    data = root / "data"
    rows = [
        {"image": f"dev/{label}/{number:03}.png", "label": label}
        for number in range(24)
        for label in ["blue" if number % 2 else "red"]
    ]
    (data / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tables = []
    for source in (data / "dev", data / "dev.jsonl"):
        done = CliRunner().invoke(calibrate, [str(source), "--bundle", str(family_root / "bundle")])
        assert done.exit_code == 0, done.output
        tables.append(done.stdout)
    (data / "dev.jsonl").unlink()
    assert tables[0] == tables[1] and "default" in tables[0]


def test_ee_eval_measures_it(family_root: Path, root: Path, tmp_path: Path) -> None:
    words = [str(family_root / "ckpt"), "--data", str(root / "data"), "--json", str(tmp_path / "e.json")]
    done = CliRunner().invoke(evaluate, [*words, "--picture", str(tmp_path / "e.png")])
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "e.json").read_text())["split"] == "test"


def test_the_preprocessing_is_the_models(family_root: Path) -> None:
    checkpoint = load_checkpoint(family_root / "ckpt")
    facts = checkpoint.input
    assert isinstance(checkpoint.network, EarlyExitNetwork) and checkpoint.tokenizer is None
    resized = checkpoint.network.config.model_type == "dinov2"
    assert facts == json_facts(family_root)
    assert (facts.height, facts.resize) == ((24, (24, 24)) if resized else (16, (18,)))  # type: ignore[union-attr]
    assert facts.mean == (0.5, 0.4, 0.3) and facts.std == (0.2, 0.3, 0.4)  # type: ignore[union-attr]


def json_facts(family_root: Path) -> Any:
    with load(family_root / "bundle") as session:
        return session.manifest.input


def test_ee_bench_measures_images(family_root: Path, root: Path, tmp_path: Path) -> None:
    file = root / "data" / "bench.jsonl"
    file.write_text(
        '{"image": "test/red/000.png", "label": "red"}\n{"image": "test/blue/001.png", "label": 0}\n'
    )
    figures = measure_classifier(family_root / "bundle", file, rounds=1, starts=1)
    full = next(c for c in figures["candidates"] if c["kind"] == "full")
    assert full["accuracy"] == 100.0 and figures["about"]["rows"] == 2
    assert figures["about"]["mean_tokens"] == load_checkpoint(family_root / "ckpt").network.longest
