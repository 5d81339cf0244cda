"""The checkpoint folder: written completely or not at all, and its errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from offramp.training.checkpoint import BadCheckpoint, Checkpoint, TextFacts, load_checkpoint, save_checkpoint


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
