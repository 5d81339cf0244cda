"""Each adapter of a text family against transformers' own forward, block by block."""

from __future__ import annotations

import pytest
import tiny
import tiny_families
import torch

from offramp.models import family_of, supported_families
from offramp.models.families import DECODERS, UnsupportedFamily

NAMES = [*sorted(tiny.CONFIGS), *sorted(tiny_families.TEXT), *tiny_families.FORMS]


@pytest.mark.parametrize("name", NAMES)
def test_every_block_matches_transformers(name: str) -> None:
    base, inputs = tiny_families.backbone(name), tiny_families.text_inputs(name)
    family_inputs = {
        key: inputs[key] for key in ("attention_mask", *family_of(base.config.model_type).inputs)
    }
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        reference = base(**family_inputs, output_hidden_states=True).hidden_states
        network = tiny_families.network(name)
        hidden, context = network.stem(inputs)
        torch.testing.assert_close(hidden[real], reference[0][real], atol=1e-5, rtol=0)
        layers = (len(reference) - 1) // network.block_count  # a block of ALBERT may have several
        for block in range(network.block_count):
            hidden = network.run_block(block, hidden, context)
            # transformers states the last hidden state after the last norm, which exits apply, too.
            norm = network.norm if block + 1 == network.block_count else None
            states = hidden if norm is None else norm(hidden)
            expected = reference[layers * (block + 1)]
            torch.testing.assert_close(states[real], expected[real], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_nothing(name: str) -> None:
    network, inputs = tiny_families.network(name), tiny_families.text_inputs(name)
    short = {key: value[1:2, :16] for key, value in inputs.items()}
    with torch.no_grad():
        torch.testing.assert_close(network(inputs).logits[1:2], network(short).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_longest_input_is_accepted(name: str) -> None:
    network = tiny_families.network(name)
    kin_of_roberta = network.config.pad_token_id == 1
    assert network.longest == (68 if kin_of_roberta else 70)
    ids = torch.full((1, network.longest), 6)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
    }
    with torch.no_grad():
        assert torch.isfinite(network(inputs).logits).all()


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_of_the_blocks_learns(name: str) -> None:
    network = tiny_families.network(name)
    network(tiny_families.text_inputs(name)).logits.square().sum().backward()
    idle = [key for key, weight in network.blocks.named_parameters() if weight.grad is None]
    assert idle == []


def test_every_family_has_its_twin() -> None:
    twins = set(tiny.CONFIGS) | set(tiny.VISION) | set(tiny_families.TEXT) | set(tiny_families.IMAGES)
    assert set(supported_families()) == twins


def test_unsupported_family_lists_the_supported_and_says_how_to_add_one() -> None:
    with pytest.raises(UnsupportedFamily) as raised:
        family_of("gpt2")
    known, decoders = ", ".join(supported_families()), ", ".join(sorted(DECODERS))
    assert str(raised.value) == (
        f"no adapter for model type 'gpt2'; supported families: {known}; language models, for ee-split: "
        f"{decoders}; docs/add-a-family.md shows how to add one"
    )
