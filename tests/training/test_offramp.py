"""Recipe offramp: ordinary fine-tuning, then exits on the frozen network, then everything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from offramp.runtime.errors import BadSetting
from offramp.training.cli import train
from offramp.training.options import parse_settings
from offramp.training.recipes.offramp import OfframpSettings

FAST = ("epochs=4", "batch_size=8", "lr=0.002", "heads_lr=0.01", "exit_epochs=4", "joint_epochs=1")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("offramp")
    tiny.model_folder(root / "model")
    tiny.data_folder(root / "data")
    return root


def run(root: Path, name: str, *settings: str, start: str = "--model", model: str = "model") -> Path:
    words = [start, str(root / model), "--data", str(root / "data"), "--out", str(root / name)]
    flags = [word for setting in (*FAST, *settings) for word in ("--set", setting)]
    done = CliRunner().invoke(train, [*words, "--recipe", "offramp", "--precision", "fp32", *flags])
    assert done.exit_code == 0, done.output
    return root / name


@pytest.fixture(scope="module")
def trained(root: Path) -> Path:
    return run(root, "trained")


def phases(folder: Path) -> list[str]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return list(dict.fromkeys(line["phase"] for line in lines if "phase" in line))


def test_the_exits_pool_by_attention_and_have_two_layers(trained: Path) -> None:
    spec = json.loads((trained / "network.json").read_text(encoding="utf-8"))["network"]
    assert (spec["pooling"], spec["head"], spec["policy"]) == ("attention", "mlp", None)
    training = json.loads((trained / "training.json").read_text(encoding="utf-8"))
    assert training["rule"] == "max_probability"
    assert training["dev"]["full_depth"] > 80


def test_fine_tuning_comes_first_and_everything_last(trained: Path) -> None:
    assert phases(trained) == ["fine-tuning", "exits", "everything"]


@pytest.mark.slow
def test_without_the_last_phase_full_depth_is_that_of_fine_tuning(root: Path) -> None:
    alone = load_file(run(root, "alone", "joint_epochs=0", "exit_epochs=1") / "weights.safetensors")
    more = load_file(run(root, "more", "joint_epochs=0", "exit_epochs=3") / "weights.safetensors")
    changed = {name for name in alone if not torch.equal(alone[name], more[name])}
    assert changed and all(name.startswith(("exits.0.", "exits.1.")) for name in changed)


@pytest.mark.slow
def test_everything_is_trained_by_all_rows_where_the_disk_holds_few(root: Path) -> None:
    folder = run(root, "small_disk", "disk_gb=0.00002", "exit_epochs=1", "exit_batch=8")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = {line["phase"]: line["of"] for line in lines if "phase" in line}
    assert steps["fine-tuning"] == 4 * 8  # 64 rows in batches of 8
    assert steps["exits"] < 8
    assert steps["everything"] == 8


@pytest.mark.slow
def test_a_checkpoint_is_trained_further_without_fine_tuning(root: Path, trained: Path) -> None:
    assert phases(run(root, "further", start="--init", model=trained.name)) == ["exits", "everything"]


@pytest.mark.parametrize(
    "word", ["epochs=-1", "joint_epochs=-1", "distill=2", "temperature=0", "gradient=none", "exit_batch=0"]
)
def test_a_setting_out_of_range_is_refused(word: str) -> None:
    with pytest.raises(BadSetting):
        parse_settings(OfframpSettings, (word,))
