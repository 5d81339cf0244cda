"""Each adapter against transformers' own forward, block by block."""

from __future__ import annotations

import pytest
import tiny
import torch

from offramp.models import EarlyExitNetwork, NetworkSpec, family_of, supported_families
from offramp.models.families import UnsupportedFamily


@pytest.mark.parametrize("family", sorted(tiny.CONFIGS))
def test_every_block_matches_transformers(family: str) -> None:
    base = tiny.backbone(family)
    inputs = tiny.inputs(family)
    family_inputs = {name: inputs[name] for name in ("attention_mask", *family_of(family).inputs)}
    with torch.no_grad():
        reference = base(**family_inputs, output_hidden_states=True).hidden_states
        network = EarlyExitNetwork(base, NetworkSpec(("a", "b"), (1, 2, 3))).eval()
        hidden, context = network.stem(inputs)
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(hidden[real], reference[0][real], atol=1e-5, rtol=0)
        for block in range(network.block_count):
            hidden = network.run_block(block, hidden, context)
            torch.testing.assert_close(hidden[real], reference[block + 1][real], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", sorted(tiny.CONFIGS))
def test_padding_changes_nothing(family: str) -> None:
    network = tiny.network(family)
    inputs = tiny.inputs(family)
    short = {name: value[1:2, :4] for name, value in inputs.items()}
    with torch.no_grad():
        torch.testing.assert_close(network(inputs).logits[1:2], network(short).logits, atol=1e-5, rtol=0)


def test_longest_input_is_accepted_and_numbered_from_padding() -> None:
    for family in tiny.CONFIGS:
        network = tiny.network(family)
        ids = torch.full((1, network.longest), 6)
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "token_type_ids": torch.zeros_like(ids),
        }
        assert network(inputs).logits.shape == (1, 3, 2)


def test_every_family_has_its_twin() -> None:
    assert set(supported_families()) == set(tiny.CONFIGS) | set(tiny.VISION)


def test_unsupported_family_lists_the_supported() -> None:
    with pytest.raises(
        UnsupportedFamily, match="bert, deit, dinov2, distilbert, electra, mpnet, roberta, vit"
    ):
        family_of("gpt2")
    assert "mpnet" in supported_families()
