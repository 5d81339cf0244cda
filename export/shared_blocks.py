"""Blocks that share their weights: each is one graph that all segments run, so its weights are written once.

ONNX Runtime cannot hold weights once that several graphs have: every session packs them into its own copy.
Therefore segments share the whole graph of such a block, in the bundle and in memory. What differs between
them, the exits, is a small graph of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from offramp.export.classifier_modules import ClassifierSegment
from offramp.export.segments import Segment
from offramp.models.families.family import Family
from offramp.models.network import EarlyExitNetwork
from offramp.runtime.bundle.manifest import NEXT, Macs, Tensor

PROBED = {"batch": 2, "seq": 1}


class SharedBlock(nn.Module):
    """One block as a graph; it reads hidden and tensors of the context, and returns the new hidden state."""

    def __init__(self, family: Family, block: nn.Module, reads: Sequence[str]) -> None:
        super().__init__()
        self.family, self.reads = family, tuple(reads)
        self.blocks = nn.ModuleList([block])  # the name by which variants find products of blocks

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the block; tensors: its inputs, in the order of `reads`."""
        context = dict(zip(self.reads, tensors, strict=True))
        hidden = context.pop("hidden")
        return (self.family.run_block(self.blocks[0], hidden, context),)


def cut_shared_blocks(
    network: EarlyExitNetwork, segment: Segment, make: Callable[[Sequence[str], int], ClassifierSegment]
) -> Segment:
    """Give a segment its parts: the shared blocks with which it begins, and the rest of it.

    A block is shared where the network lists its module several times. make: makes the module of the segment
    without its first blocks, from names of inputs and the number of these blocks. A segment that begins with
    no shared block is returned as it is.
    """
    assert isinstance(segment.module, ClassifierSegment)
    first_head = min(map(int, segment.module.heads))  # it reads what the block before it gives
    listed = list(network.blocks)
    first_places = [next(n for n, other in enumerate(listed) if other is block) for block in listed]
    parts: list[Segment] = []
    for number, block in enumerate(segment.blocks[:first_head]):
        place = first_places[block - 1]
        if first_places.count(place) == 1:
            break
        parts.append(_block_part(network, segment, segment.module.blocks[number], place + 1))
    if not parts:
        return segment
    done = len(parts)
    every = [tensor.name for tensor in segment.inputs]
    inputs = _inputs_read(segment.inputs, make(every, done).eval())
    left = segment.blocks[done:]
    rest = Segment(
        segment.name,
        make([tensor.name for tensor in inputs], done).eval(),
        inputs,
        tuple(tensor for tensor in segment.outputs if left or tensor.name != f"{NEXT}hidden"),
        left,
        Macs(),
        segment.longest,
        always_first=not left,  # variants differ in blocks alone
    )
    return replace(segment, parts=(*parts, rest))


def _block_part(network: EarlyExitNetwork, segment: Segment, block: nn.Module, number: int) -> Segment:
    """The graph of a block; number: of the first block (1-based) that has these weights."""
    probe = SharedBlock(network.family, block, [tensor.name for tensor in segment.inputs]).eval()
    inputs = _inputs_read(segment.inputs, probe)
    module = SharedBlock(network.family, block, [tensor.name for tensor in inputs]).eval()
    (hidden,) = (tensor for tensor in inputs if tensor.name == "hidden")
    outputs = (Tensor(NEXT + hidden.name, hidden.dtype, hidden.shape),)
    return Segment(f"block_{number:02}", module, inputs, outputs, (number,), Macs(), segment.longest)


class _ReadsOf(TorchDispatchMode):
    """Mode in which the names of those tensors are collected that some operator reads."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tensors, self.names = tensors, set[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        values = torch.utils._pytree.tree_leaves((args, kwargs))
        self.names |= {
            name for name, tensor in self._tensors.items() if any(tensor is value for value in values)
        }
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _inputs_read(tensors: Sequence[Tensor], module: nn.Module) -> tuple[Tensor, ...]:
    """Those of a module's inputs that it reads; TensorRT removes inputs that nothing reads."""
    values = {
        tensor.name: torch.ones(
            [PROBED[size] if isinstance(size, str) else size for size in tensor.shape],
            dtype=getattr(torch, tensor.dtype),
        )
        for tensor in tensors
    }
    with _ReadsOf(values) as reads:
        module(*values.values())
    return tuple(tensor for tensor in tensors if tensor.name in reads.names)
