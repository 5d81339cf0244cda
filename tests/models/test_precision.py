"""Grids of the simulated precisions; tests/export compares them with ONNX Runtime."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn

from offramp.models.macs import RowMacs, bit_operations
from offramp.models.precision import (
    PRECISIONS,
    in_precision,
    quantize_activation_blocks,
    quantize_vectors,
    quantize_weight_blocks,
)


@pytest.mark.parametrize("bits", [6, 8])
def test_weights_are_on_a_symmetric_grid_an_output(bits: int) -> None:
    weight = torch.randn(5, 40) * torch.tensor([[0.01], [1], [1], [5], [1]])
    rounded = quantize_vectors(weight, bits)
    step = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    torch.testing.assert_close(rounded / step, (rounded / step).round(), atol=1e-3, rtol=0)
    assert ((rounded - weight).abs() <= step / 2 + 1e-6).all()
    torch.testing.assert_close(rounded.abs().amax(1), weight.abs().amax(1))


def test_activations_keep_zero_exactly_and_are_scaled_by_token() -> None:
    values = torch.stack([torch.rand(3, 4) + 2, torch.randn(3, 4) * 10])
    values[:, 0, 0] = 0
    rounded = quantize_vectors(values, 8)
    assert (rounded[:, 0, 0] == 0).all()
    for row in range(2):
        for token in range(3):
            alone = quantize_vectors(values[row, token], 8)
            torch.testing.assert_close(rounded[row, token], alone, atol=0, rtol=0)
    assert ((rounded - values).abs() <= values.abs().amax(-1, keepdim=True) / 254 + 1e-6).all()
    assert quantize_vectors(torch.zeros(2, 3), 8).eq(0).all()


def test_the_last_int4_block_of_a_row_may_be_shorter() -> None:
    weight = torch.randn(3, 200)
    rounded = quantize_weight_blocks(weight)
    assert rounded.shape == weight.shape
    for part in (slice(0, 128), slice(128, 200)):
        assert all(len(row.unique()) <= 16 for row in rounded[:, part])
        peak = weight[:, part].abs().amax(1)
        torch.testing.assert_close(rounded[:, part].abs().amax(1), peak)
    assert quantize_activation_blocks(torch.zeros(2, 130)).eq(0).all()


def test_copies_are_rounded_and_the_network_is_not_touched() -> None:
    network = tiny.network("bert", policy=None)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    copies = in_precision(network.blocks, "int6")
    assert not [layer for layer in copies.modules() if isinstance(layer, nn.Linear)]
    assert in_precision(network.blocks, "fp32") is network.blocks
    with torch.no_grad():
        hidden, context = network.stem(tiny.inputs("bert"))
        plain, rounded = hidden, hidden
        for block, copy in zip(network.blocks, copies, strict=True):
            plain = network.family.run_block(block, plain, context)
            rounded = network.family.run_block(copy, rounded, context)
    assert 0 < (plain - rounded).abs().max() < 1
    assert all((before[name] == value).all() for name, value in network.state_dict().items())


def test_bit_operations_charge_the_precision_inside_blocks_alone() -> None:
    macs = RowMacs(token=100, pair=10, row=7)
    outside = (10 * 9 + 7) * 1024
    assert bit_operations(macs, "fp32", 3) == 300 * 1024 + outside
    assert bit_operations(macs, "int8", 3) == 300 * 64 + outside
    assert bit_operations(macs, "int4", 3) == 300 * 32 + outside
    assert next(iter(PRECISIONS)) == "fp32"
