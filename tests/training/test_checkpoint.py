"""The checkpoint folder: written completely or not at all, and its errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from offramp.models.decoder import DecoderNetwork
from offramp.training.checkpoint import (
    BadCheckpoint,
    Checkpoint,
    TextFacts,
    load_checkpoint,
    load_exits,
    save_checkpoint,
    save_exits,
)


def _save(folder: Path, family: str = "bert") -> Checkpoint:
    tokenizer = folder.with_name("tokenizer.json")
    tiny.tokenizer().save(str(tokenizer))
    checkpoint = Checkpoint(tiny.network(family), TextFacts("q: ", 0, 64), tokenizer, {"recipe": "joint"})
    save_checkpoint(checkpoint, folder)
    return checkpoint


@pytest.mark.parametrize("family", ["bert", "mpnet", "electra"])
def test_a_loaded_checkpoint_equals_the_saved_one(tmp_path: Path, family: str) -> None:
    saved = _save(tmp_path / "ckpt", family)
    loaded = load_checkpoint(tmp_path / "ckpt")
    assert loaded.text == saved.text and loaded.training == saved.training
    with torch.no_grad():
        after, before = loaded.network(tiny.inputs(family)), saved.network(tiny.inputs(family))
        torch.testing.assert_close(
            (after.logits, after.gate_logits), (before.logits, before.gate_logits), atol=0, rtol=0
        )


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="no such folder"):
        load_checkpoint(tmp_path / "none")


@pytest.mark.parametrize("name", ["weights.safetensors", "network.json", "tokenizer.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    _save(tmp_path / "ckpt")
    (tmp_path / "ckpt" / name).unlink()
    with pytest.raises(BadCheckpoint, match=name):
        load_checkpoint(tmp_path / "ckpt")


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    _save(tmp_path / "ckpt")
    facts = (
        (tmp_path / "ckpt/network.json")
        .read_text()
        .replace('"intermediate_size": 64', '"intermediate_size": 48')
    )
    (tmp_path / "ckpt/network.json").write_text(facts)
    with pytest.raises(BadCheckpoint, match="does not fit"):
        load_checkpoint(tmp_path / "ckpt")


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    _save(tmp_path / "ckpt")
    weights = tmp_path / "ckpt/weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(BadCheckpoint, match=r"weights\.safetensors"):
        load_checkpoint(tmp_path / "ckpt")


def test_saving_again_replaces_the_folder_and_leaves_no_other(tmp_path: Path) -> None:
    _save(tmp_path / "ckpt")
    _save(tmp_path / "ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "tokenizer.json"]


def test_exits_are_saved_and_loaded(tmp_path: Path) -> None:
    network = DecoderNetwork(tiny.decoder("llama"))
    save_exits(network, tmp_path)
    assert not list(tmp_path.iterdir())  # the model has no exits
    network.add_exits((1, 2), policies=True)
    with torch.no_grad():
        network.exits["1"].weight.fill_(0.5)  # type: ignore[operator, union-attr]
    save_exits(network, tmp_path)
    loaded = DecoderNetwork(tiny.decoder("llama"))
    load_exits(loaded, tmp_path)
    assert sorted(loaded.exits) == sorted(loaded.policies) == ["1", "2"]
    assert float(loaded.exits["1"].weight.detach()[0, 0]) == 0.5  # type: ignore[union-attr, index]
    (tmp_path / "exits.safetensors").write_bytes(b"nothing")
    with pytest.raises(BadCheckpoint, match="does not fit the model beside it"):
        load_exits(DecoderNetwork(tiny.decoder("llama")), tmp_path)


def test_exits_of_a_larger_model_are_refused(tmp_path: Path) -> None:
    network = DecoderNetwork(tiny.decoder("llama"))
    network.add_exits((1, 3))
    network.exits["7"] = network.exits.pop("3")
    save_exits(network, tmp_path)
    with pytest.raises(BadCheckpoint, match="it is for block 7, the model has 3"):
        load_exits(DecoderNetwork(tiny.decoder("llama")), tmp_path)
