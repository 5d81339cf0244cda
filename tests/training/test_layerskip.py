"""layerskip: layer dropout, curricula, and a trained folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from offramp.export.cli import main as split
from offramp.models.decoder import DecoderNetwork
from offramp.runtime.bundle.files import open_bundle
from offramp.training.cli import train
from offramp.training.decoder import keep_large_blocks, load_decoder
from offramp.training.lm_data import IGNORED, TokenRows, load_token_rows
from offramp.training.loop import Run
from offramp.training.options import BadModel
from offramp.training.recipes import layerskip
from offramp.training.recipes.layerskip import LayerSkipSettings, layer_dropout, trained_exits

SENTENCES = ["the film was good and warm", "a bad scene is not very good at all", "the plot is quite dull"]


def test_deep_blocks_drop_out_more() -> None:
    torch.manual_seed(0)
    hidden, skipped = torch.zeros(4000, 3, 1), []
    for _ in range(2):
        block_mask = layer_dropout(4000, 5, 0.4, torch.device("cpu"))
        masks = [block_mask(block, hidden) for block in range(5)]
        skipped.append([0.0 if mask is None else 1 - float(mask[:, 0].mean()) for mask in masks])
        for mask in masks[1:]:
            assert mask is not None and (mask[:, :1] == mask).all()  # a row as a whole
    expected = [0.4 * (2 ** (block / 4) - 1) for block in range(5)]
    for rates in skipped:
        assert rates == pytest.approx(expected, abs=0.03)
    assert all(layer_dropout(3, 5, 0.0, torch.device("cpu"))(block, hidden[:3]) is None for block in range(5))


def test_curricula() -> None:
    exits = [4, 8, 12]
    assert [trained_exits(exits, "rotational", step, 9) for step in range(4)] == [[4], [8], [12], [4]]
    assert trained_exits(exits, "all", 0, 9) == exits and trained_exits([], "rotational", 3, 9) == []
    gradual = [trained_exits(exits, "gradual", step, 12) for step in range(12)]
    assert gradual[0] == [12] and gradual[2] == [8, 12] and gradual[5:] == [exits] * 7


def test_invalid_settings_are_refused() -> None:
    for setting in (
        {"dropout": 1.0},
        {"scale": 0.0},
        {"curriculum": "none"},
        {"target": "other"},
        {"lr": 0.0},
    ):
        with pytest.raises(ValueError, match=next(iter(setting))):
            LayerSkipSettings(**setting)  # type: ignore[arg-type]


def test_a_batch_without_learned_tokens_changes_nothing(tmp_path: Path) -> None:
    """A prompt that is as long as its row: its loss is 0 and no number of the network becomes NaN."""
    network = DecoderNetwork(tiny.decoder("llama"))
    run = Run(network, tmp_path, seed=0)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    rows = TokenRows([[5, 6, 7, 8]] * 2, [4, 4])
    assert (rows.batch([0, 1])[1] == IGNORED).all()
    layerskip.train(run, {"train": rows}, (1, 3), LayerSkipSettings(batch_size=2, dropout=0.0))
    for name, value in network.state_dict().items():
        assert torch.isfinite(value).all() and torch.allclose(value, before[name], atol=1e-3)


def test_large_blocks_are_kept_with_glibc() -> None:
    import platform

    assert keep_large_blocks() == (platform.libc_ver()[0] == "glibc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder, and texts."""
    root = tmp_path_factory.mktemp("layerskip")
    tiny.decoder("llama").save_pretrained(root / "model")
    tiny.hub_tokenizer().save_pretrained(root / "model")
    rows = [{"text": SENTENCES[n % 3]} for n in range(60)]
    tiny.write_rows(root / "data", *rows)
    tiny.write_rows(root / "data", *rows[:6], split="dev")
    return root


def trained(folder: Path, out: str, *words: str, exits: str = "1") -> Any:
    options = ["--model", str(folder / "model"), "--data", str(folder / "data"), "--out", str(folder / out)]
    options += ["--precision", "fp32"]  # as the other trainings of this process
    sets = ["--set", "lr=0.01", "--set", "batch_size=4", "--set", "curriculum=all"]
    return CliRunner().invoke(
        train, [*options, "--recipe", "layerskip", "--exits", exits, "--max-length", "16", *sets, *words]
    )


@pytest.mark.slow
def test_exits_learn_and_the_folder_is_a_model(folder: Path) -> None:
    done = trained(folder, "ckpt", "--set", "epochs=6", "--set", "target=model")
    assert done.exit_code == 0, done.output
    training = json.loads((folder / "ckpt" / "training.json").read_text(encoding="utf-8"))
    assert (
        training["recipe"] == "layerskip"
        and training["exits"] == [1, 3]
        and training["data"]["rows"]["train"] > 20
    )
    network, _ = load_decoder(str(folder / "model"))
    run = Run(network, folder / "scratch", seed=0)
    before = layerskip.measure_exits(
        run, load_token_rows(str(folder / "data"), tiny.hub_tokenizer(), 16)["dev"], [1]
    )
    assert training["dev"]["exits"] == [1, 3]
    assert training["dev"]["loss"][0] < before["loss"][0] - 0.5 and training["dev"]["agrees"][0] > 0.6
    model = AutoModelForCausalLM.from_pretrained(folder / "ckpt")
    ids = AutoTokenizer.from_pretrained(folder / "ckpt")("the film was", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3


@pytest.mark.slow
def test_its_bundle_drafts(folder: Path) -> None:
    done = trained(folder, "drafting", "--set", "epochs=1")
    assert done.exit_code == 0, done.output
    words = [str(folder / "drafting"), "--out", str(folder / "bundle"), "--variants", "fp32"]
    done = CliRunner().invoke(split, words)
    assert done.exit_code == 0, done.output
    manifest = open_bundle(folder / "bundle").manifest
    assert [segment.blocks for segment in manifest.segments] == [(1,), (2, 3)]
    assert manifest.rule.name == "speculative" and manifest.provenance["recipe"] == "layerskip"


def test_ee_train_refuses_unusable_models_and_data(folder: Path, tmp_path: Path) -> None:
    done = trained(folder, "none", exits="9")
    assert done.exit_code == 2 and "block 9 does not exist" in done.output
    tiny.write_rows(tmp_path / "data", {"text": "a film"}, split="dev")
    words = ["--recipe", "layerskip", "--out", str(tmp_path / "out"), "--data", str(tmp_path / "data")]
    words += ["--precision", "fp32"]
    done = CliRunner().invoke(train, ["--model", str(folder / "model"), *words])
    assert done.exit_code == 2 and "has no train split" in done.output
    tiny.model_folder(tmp_path / "encoder")
    done = CliRunner().invoke(train, ["--model", str(tmp_path / "encoder"), *words])
    assert done.exit_code == 2 and "supported: gemma2, " in done.output
    with pytest.raises(BadModel, match="nowhere"):
        load_decoder(str(tmp_path / "nowhere"))
    assert not (tmp_path / "out").exists()
