"""ee-train and ee-eval as commands, on a tiny model and data learnable in seconds."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from offramp.models import tasks
from offramp.runtime.bundle.row_samples import row_hashes, row_sample
from offramp.runtime.errors import BadSetting
from offramp.runtime.rules.sweep import SWEPT
from offramp.training import cli
from offramp.training.checkpoint import load_checkpoint
from offramp.training.classifier import ClassifierTraining
from offramp.training.cli import evaluate, train
from offramp.training.features import FILE as FEATURES

RECIPE = ["--recipe", "consistentee_plus"]
FAST = ["--set", "epochs=10", "--set", "batch_size=8", "--set", "lr=0.002", "--set", "heads_lr=0.01"]


def _run(command: object, *words: str) -> Result:
    return CliRunner().invoke(command, list(words))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is no folder must fail at once here, not after the hub's retries."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("training")
    tiny.model_folder(root / "model")
    tiny.data_folder(root / "data")
    return root


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    words = [
        "--model",
        str(folder / "model"),
        "--data",
        str(folder / "data"),
        "--out",
        str(folder / "ckpt"),
        *RECIPE,
        *FAST,
    ]
    result = _run(train, *words, "--set", "policy_epochs=5", "--set", "rounds=1", "--precision", "fp32")
    assert result.exit_code == 0, result.output
    return folder / "ckpt"


def test_a_training_writes_a_complete_checkpoint(trained: Path) -> None:
    checkpoint = load_checkpoint(trained)
    assert checkpoint.training["dev"]["full_depth"] > 80
    names = [point["name"] for point in checkpoint.training["operating_points"]]
    assert names[:2] == ["default", "full"] and names[-1] == "trained"
    assert (trained / "log.jsonl").read_text().count("policy last") > 0
    assert not trained.with_name("ckpt.partial").exists()


def test_a_training_stores_samples_of_the_rows_that_it_used(trained: Path, folder: Path) -> None:
    samples = load_checkpoint(trained).training["rows_sample"]
    assert [(sample["split"], sample["data"], sample["rows"]) for sample in samples] == [
        ("train", "data", 64),
        ("dev", "data", 32),
    ]
    for sample in samples:
        lines = (folder / "data" / f"{sample['split']}.jsonl").read_text().splitlines()
        assert sample["hashes"] == row_sample(row_hashes(json.loads(line)["text"] for line in lines))


@pytest.mark.slow
def test_eval_writes_table_json_and_picture(trained: Path, folder: Path, tmp_path: Path) -> None:
    files = ["--json", str(tmp_path / "e.json"), "--picture", str(tmp_path / "e.png")]
    result = _run(evaluate, str(trained), "--data", str(folder / "data"), *files)
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "e.json").read_text())
    assert set(figures["chosen_on_dev"]) <= set(SWEPT)
    assert figures["oracle"]["accuracy"] >= figures["full_depth"]["accuracy"]
    full = next(point for point in figures["operating_points"] if point["name"] == "full")
    assert full["random_same_depth"] == pytest.approx(figures["full_depth"]["accuracy"], abs=0.01)
    assert (tmp_path / "e.png").stat().st_size > 5000


def test_a_finished_checkpoint_is_not_overwritten_without_the_option(trained: Path, folder: Path) -> None:
    result = _run(train, "--model", "x", "--data", str(folder / "data"), "--out", str(trained))
    assert result.exit_code == 2 and "--overwrite" in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "no/such-model"], "no/such-model"),
        (["--model", "MODEL", *RECIPE, "--set", "alfa=1"], "alpha=0.015"),
        (["--model", "MODEL", "--set", "epochs=many"], "expected int"),
        ([], "--model"),
        (["--model", "MODEL", "--exits", "9"], "block 9 does not exist"),
    ],
)
def test_unusable_options_give_one_line_and_exit_code_2(
    folder: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    words = [str(folder / "model") if word == "MODEL" else word for word in words]
    result = _run(train, "--data", str(folder / "data"), "--out", str(tmp_path / "c"), *words)
    assert result.exit_code == 2 and message in result.output, result.output


@pytest.mark.slow
def test_a_killed_training_resumes_to_the_same_weights(folder: Path, tmp_path: Path) -> None:
    """Killed with SIGKILL in the middle, then run again: bit for bit the weights of an
    uninterrupted run.
    """
    script = "import torch; torch.set_num_threads(1); from offramp.training.cli import train; train()"
    flags = [
        "--model",
        str(folder / "model"),
        "--data",
        str(folder / "data"),
        *RECIPE,
        *FAST,
        "--set",
        "policy_epochs=3",
    ]
    flags += ["--precision", "fp32", "--save-every", "0"]
    command = [sys.executable, "-c", script, *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, "--out", str(tmp_path / "whole")], env=environment, check=True, capture_output=True
    )
    resumed_run = [*command, "--out", str(tmp_path / "resumed_run")]
    first = subprocess.Popen(
        resumed_run, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    state = tmp_path / "resumed_run.partial" / "state.json"
    while first.poll() is None and not (state.is_file() and json.loads(state.read_text())["step"] >= 5):
        time.sleep(0.002)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not (tmp_path / "resumed_run").exists()
    again = subprocess.run(resumed_run, env=environment, check=True, capture_output=True, text=True)
    assert "going on from" in again.stderr
    whole = load_file(tmp_path / "whole" / "weights.safetensors")
    resumed = load_file(tmp_path / "resumed_run" / "weights.safetensors")
    assert whole.keys() == resumed.keys()
    assert all((whole[name] == resumed[name]).all() for name in whole)


def test_a_resume_with_another_command_is_refused(folder: Path, tmp_path: Path) -> None:
    partial = tmp_path / "c.partial"
    partial.mkdir()
    words = [
        "--data",
        str(folder / "data"),
        "--out",
        str(tmp_path / "c"),
        "--model",
        str(folder / "model"),
        *FAST,
    ]
    (partial / "command.json").write_text('{"seed": 9}')
    (partial / "state.json").write_text("{}")
    result = _run(train, *words)
    assert result.exit_code == 2 and "unfinished run" in result.output


def stopped(self: ClassifierTraining, run: object) -> None:
    """In place of ClassifierTraining.run_recipe: a run that ends after its first state."""
    (self.config.partial / "state.json").write_text("{}")
    raise BadSetting("stopped")


def test_a_resume_with_other_rows_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder / "data", tmp_path / "data")
    words = ["--model", str(folder / "model"), "--data", str(tmp_path / "data"), "--precision", "fp32"]
    words += ["--out", str(tmp_path / "c")]
    with monkeypatch.context() as patch:
        patch.setattr(ClassifierTraining, "run_recipe", stopped)
        assert "stopped" in _run(train, *words).output
    with (tmp_path / "data" / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"text": "one more", "label": 0}\n')
    result = _run(train, *words)
    assert result.exit_code == 2 and "another content of --data" in result.output


def leave_features(self: ClassifierTraining, run: object) -> None:
    """In place of ClassifierTraining.run_recipe: a run that ends before its first state."""
    (self.config.partial / FEATURES).touch()
    raise BadSetting("stopped")


@pytest.mark.parametrize("change", [None, "model", "data", "seed"])
def test_what_a_run_computed_before_its_first_state_is_used_by_the_same_run_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str | None
) -> None:
    for name in ("model", "data"):
        shutil.copytree(folder / name, tmp_path / name)
    words = [
        "--model",
        str(tmp_path / "model"),
        "--data",
        str(tmp_path / "data"),
        "--out",
        str(tmp_path / "c"),
    ]
    words += ["--precision", "fp32"]
    monkeypatch.setattr(ClassifierTraining, "run_recipe", leave_features)
    _run(train, *words)
    if change == "model":
        os.utime(tmp_path / "model" / "model.safetensors", (1, 1))
    if change == "data":
        with (tmp_path / "data" / "train.jsonl").open("a", encoding="utf-8") as file:
            file.write('{"text": "one more", "label": 0}\n')
    monkeypatch.setattr(ClassifierTraining, "run_recipe", stopped)
    _run(train, *words, *(["--seed", "1"] if change == "seed" else []))
    partial = tmp_path / "c.partial"
    assert (partial / "state.json").is_file() and (partial / FEATURES).exists() == (change is None)


def test_a_folder_of_something_else_is_not_touched(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "c.partial").mkdir()
    (tmp_path / "c.partial" / "letter.txt").write_text("dear")
    words = ["--model", str(folder / "model"), "--data", str(folder / "data")]
    result = _run(train, *words, "--out", str(tmp_path / "c"))
    assert result.exit_code == 2 and "is not the folder of a training" in result.output
    assert (tmp_path / "c.partial" / "letter.txt").is_file()


def test_a_run_of_an_older_version_is_resumed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--model", str(folder / "model"), "--data", str(folder / "data"), "--precision", "fp32"]
    monkeypatch.setattr(ClassifierTraining, "run_recipe", stopped)
    _run(train, *words, "--out", str(tmp_path / "c"))
    file = tmp_path / "c.partial" / "command.json"
    before = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in before.items() if "content" not in name}))
    output = _run(train, *words, "--out", str(tmp_path / "c")).output
    assert "cannot go on from this state" in output, "the command is the same, the state is none"


def test_a_place_that_cannot_be_written_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "c"
    result = _run(train, "--model", str(folder / "model"), "--data", str(folder / "data"), "--out", str(out))
    assert result.exit_code == 2 and f"--out {out}" in result.output and "Not a directory" in result.output


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offramp.training.cli.find_spec", lambda name: None)
    result = _run(train, "--model", "x", "--data", "y")
    assert result.exit_code == 2 and "offramp[train]" in result.output


def test_the_tasks_of_the_command_are_those_of_networks() -> None:
    assert tuple(tasks.TASKS) == cli.TASKS
