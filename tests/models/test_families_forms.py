"""What is special in one family: shared blocks, distances, windows, refused configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_families
import torch
from safetensors.torch import load_file
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

from offramp.models import family_of
from offramp.models.families import UnsupportedFamily, deberta
from offramp.runtime.inputs.images import ImageInput
from offramp.training.checkpoint import WEIGHTS, Checkpoint, TextFacts, load_checkpoint, save_checkpoint

NAMES = [*sorted(tiny_families.TEXT), *tiny_families.FORMS]
IMAGES = [*sorted(tiny_families.IMAGES), *tiny_families.IMAGE_FORMS]


def save(network: Any, folder: Path) -> None:
    """Save a network as a checkpoint, of texts or of images."""
    if network.family.vision is not None:
        facts = ImageInput(16, 16, (16, 16), "bicubic", "RGB", 1 / 255, (0.5,) * 3, (0.5,) * 3)
        save_checkpoint(Checkpoint(network, facts, None), folder)
        return
    tiny.tokenizer().save(str(folder.with_name("tokenizer.json")))
    facts = TextFacts("", network.config.pad_token_id, 64)
    save_checkpoint(Checkpoint(network, facts, folder.with_name("tokenizer.json")), folder)


@pytest.mark.parametrize("name", [*NAMES, *IMAGES])
def test_a_loaded_checkpoint_equals_the_saved_one(name: str, tmp_path: Path) -> None:
    network = tiny_families.network(name, policy="both")
    save(network, tmp_path / "ckpt")
    loaded = load_checkpoint(tmp_path / "ckpt").network
    inputs = tiny.pixel_values() if name in IMAGES else tiny_families.text_inputs(name)
    with torch.no_grad():
        after, before = loaded(inputs), network(inputs)
    torch.testing.assert_close(
        (after.logits, after.gate_logits), (before.logits, before.gate_logits), atol=0, rtol=0
    )


def test_blocks_of_albert_share_weights_that_exist_and_are_saved_once(tmp_path: Path) -> None:
    network = tiny_families.network("albert", num_hidden_layers=4)
    blocks = network.blocks
    assert [blocks[0] is blocks[1], blocks[1] is blocks[2], blocks[2] is blocks[3]] == [True, False, True]
    save(network, tmp_path / "ckpt")
    saved = load_file(tmp_path / "ckpt" / WEIGHTS)
    assert set(saved) == set(network.state_dict())
    in_blocks = [key for key in saved if ".albert_layers." in key and key.endswith("ffn.weight")]
    assert len(in_blocks) == 2, "two groups"
    backbone = [value for key, value in saved.items() if key.startswith("backbone.")]
    weights = {id(weight): weight.numel() for weight in network.backbone.parameters()}
    assert sum(value.numel() for value in backbone) == sum(weights.values())
    assert {id(weight) for weight in blocks.parameters()} <= set(weights), "an optimizer gets each once"


@pytest.mark.parametrize("name", ["deberta", "deberta-v2", "deberta, one product", "deberta-v2, token types"])
def test_a_folded_block_of_deberta_is_the_same_block(name: str) -> None:
    network, family = tiny_families.network(name), family_of(tiny_families.config(name).model_type)
    with torch.no_grad():
        hidden, context = network.stem(tiny_families.text_inputs(name))
        for block in network.blocks:
            folded = family.folded(block)
            expected = family.run_block(block, hidden, context)
            torch.testing.assert_close(family.run_block(folded, hidden, context), expected, atol=1e-6, rtol=0)
            assert not any("rel_embeddings" in key for key in folded.state_dict())


@pytest.mark.parametrize(("buckets", "farthest"), [(256, 512), (32, 128), (8, 70)])
def test_buckets_of_distances_are_those_of_transformers(buckets: int, farthest: int) -> None:
    distances = torch.arange(-farthest, farthest + 1)
    expected = buckets + make_log_bucket_position(distances, buckets, farthest).long()
    rows = deberta._rows(2 * buckets, buckets, farthest, farthest)
    assert rows == expected.clamp(0, 2 * buckets - 1).tolist()


def test_blocks_of_modernbert_alternate_between_all_tokens_and_a_window() -> None:
    network, inputs = tiny_families.network("modernbert"), tiny_families.text_inputs("modernbert", rows=1)
    far = dict(inputs, input_ids=inputs["input_ids"].clone())
    far["input_ids"][0, -1] = 7 if far["input_ids"][0, -1] != 7 else 8
    with torch.no_grad():
        (one, context), (other, _) = network.stem(inputs), network.stem(far)
        changed = []
        for block in range(network.block_count):
            first, second = (network.run_block(block, hidden, context)[0, 0] for hidden in (one, other))
            changed.append(not torch.equal(first, second))
    assert changed == [True, False, True], "the first token reads the last one in blocks of global attention"


def test_rotations_that_change_with_the_length_are_refused() -> None:
    rotations = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1000.0}
    config = tiny_families.config("nomic_bert", rope_parameters=rotations)
    with pytest.raises(UnsupportedFamily, match="nomic_bert with rotations of type 'dynamic'"):
        family_of("nomic_bert").longest(config)
    local = {"full_attention": rotations, "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0}}
    with pytest.raises(UnsupportedFamily, match="modernbert with rotations of type 'dynamic'"):
        family_of("modernbert").longest(tiny_families.config("modernbert", rope_parameters=local))


def test_talking_heads_are_refused() -> None:
    base = tiny_families.backbone("deberta")
    base.config.talking_head = True
    with pytest.raises(UnsupportedFamily, match="deberta with talking_head"):
        family_of("deberta").blocks(base)
