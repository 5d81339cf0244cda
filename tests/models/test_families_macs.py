"""Multiply-accumulates of each family, stated by its adapter, against torch's own counter."""

from __future__ import annotations

import pytest
import tiny
import tiny_families
import torch
from torch.utils.flop_counter import FlopCounterMode

from offramp.models.macs import block_macs, stem_macs

TEXT = [*sorted(tiny.CONFIGS), *sorted(tiny_families.TEXT), *tiny_families.FORMS]
IMAGES = [*sorted(tiny.VISION), *sorted(tiny_families.IMAGES), *tiny_families.IMAGE_FORMS]


@pytest.mark.parametrize("name", [*TEXT, *IMAGES])
def test_stem_and_blocks_cost_what_the_counter_counts(name: str) -> None:
    network = tiny_families.network(name, "cls")  # without weights of pooling, which the stem computes
    network.config._attn_implementation = "eager"  # written out, so that the counter sees both products
    inputs = tiny.pixel_values(1) if name in IMAGES else tiny_families.text_inputs(name, rows=1)
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            hidden, context = network.stem(inputs)
        tokens = hidden.shape[1]
        # The rotations of all positions are no products of weights and are made once: none is counted.
        assert counter.get_total_flops() == 2 * stem_macs(network).of(tokens)
        for number, block in enumerate(network.blocks):
            exported = network.family.folded(block)
            with FlopCounterMode(display=False) as counter:
                hidden = network.family.run_block(exported, hidden, context)
            assert counter.get_total_flops() == 2 * block_macs(network, number).of(tokens)
