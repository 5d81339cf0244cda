"""Where the graphs of a segment read and write the tensors that they update."""

from __future__ import annotations

import pytest

from offramp.runtime.bundle.manifest import NEXT, Tensor, Variant
from offramp.runtime.engines.tensors import SPARE, sides_of

HIDDEN = Tensor("hidden", "float32", ("batch", "seq", 8))
EVIDENCE = Tensor("evidence", "float32", ("batch", 2))
MASK = Tensor("mask", "float32", ("batch", 1, 1, "seq"))
LOGITS = Tensor("logits", "float32", ("batch", 2))


def following(tensor: Tensor) -> Tensor:
    return Tensor(NEXT + tensor.name, tensor.dtype, tensor.shape)


BLOCK = Variant("block.onnx", (HIDDEN, MASK), (following(HIDDEN),))
EXIT = (HIDDEN, EVIDENCE), (following(EVIDENCE), LOGITS)


@pytest.mark.parametrize("side", [0, 1])
def test_one_graph_reads_a_side_and_writes_the_other(side: int) -> None:
    whole = Variant("segment.onnx", (HIDDEN, MASK, EVIDENCE), (following(HIDDEN), *EXIT[1]))
    ((graph, reads, writes),) = sides_of(whole, side)
    assert graph is whole and set(reads.values()) == {side}
    assert writes == {"hidden": 1 - side, "evidence": 1 - side}


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("blocks", [1, 2, 3, 4])
def test_however_many_blocks_end_on_the_other_side(blocks: int, side: int) -> None:
    *before, (last, exit_reads, exit_writes) = sides_of(Variant("exit.onnx", *EXIT, (BLOCK,) * blocks), side)
    newest = side
    for graph, reads, writes in before:
        assert graph is BLOCK and reads["hidden"] == newest != writes["hidden"]
        newest = writes["hidden"]
        assert newest in ((1 - side, SPARE) if blocks > 1 else (1 - side,))
    assert newest == 1 - side and len(before) == blocks
    assert last == Variant("exit.onnx", *EXIT)
    assert exit_reads == {"hidden": 1 - side, "evidence": side} and exit_writes["evidence"] == 1 - side
