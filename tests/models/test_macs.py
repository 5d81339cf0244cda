"""Counted multiply-accumulates against torch's own counter."""

from __future__ import annotations

import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

from offramp.models.macs import segment_macs


def test_segment_macs_match_the_flop_counter() -> None:
    network = tiny.network(
        "mpnet", policy=None
    )  # its attention is written out, so the counter counts both products
    length = 9
    ids = torch.full((1, length), 6)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(inputs)
    counted = sum(cost.of(length) for cost in segment_macs(network))
    assert counter.get_total_flops() == 2 * counted
