"""Cut a network into a stem and stretches of blocks that end with an exit. As a script: ee-split."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # first of all: what stands below needs the installed package
    # A script's own folder comes first on the path, where verify.py, cli.py and the rest would pass for
    # top-level modules.
    sys.path[:] = [place for place in sys.path if place != os.path.dirname(os.path.abspath(__file__))]
    try:
        from offramp.export.cli import main
    except ModuleNotFoundError as missing:
        sys.stderr.write(f"{missing}: run pip install -e '.[export,cpu]' first\n")
        sys.exit(2)
    main(prog_name="export/split.py")

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from offramp.models.exits import pool
from offramp.models.families.family import Context
from offramp.models.macs import block_macs, exit_macs, stem_macs
from offramp.models.network import EarlyExitNetwork, parse_exits
from offramp.runtime.manifest import NEXT, Macs, Tensor


@dataclass(frozen=True)
class Segment:
    """One graph to be: a module that takes and gives plain tensors, in the order of `inputs` and `outputs`.

    blocks: 1-based, empty for the stem. longest: most tokens a row. macs: of one row, exit and policy
    included. The module's parts are the network's own: nothing is copied but the exit's folded classifier.
    """

    name: str
    module: nn.Module
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    blocks: tuple[int, ...]
    macs: Macs
    longest: int


class Stem(nn.Module):
    """Ids and attention mask -> hidden, mask and whatever else every segment reads."""

    def __init__(self, network: EarlyExitNetwork, *, evidence: bool) -> None:
        super().__init__()
        self.network = network
        self.reads = stem_inputs(network)
        self.evidence = evidence

    def named(self, *tensors: torch.Tensor) -> Context:
        """What it puts out, by name; tensors are int64 [batch, seq]."""
        hidden, context = self.network.stem(dict(zip(self.reads, tensors, strict=True)))
        made = {"hidden": hidden, **context}
        seen = self.network.no_evidence(hidden) if self.evidence else None
        if seen is not None:
            made["evidence"] = seen
        return made

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.named(*tensors).values())


class Stretch(nn.Module):
    """Blocks, the exit after them and, at every exit but the last, its policy."""

    def __init__(
        self, network: EarlyExitNetwork, blocks: range, exit_index: int, reads: Sequence[str]
    ) -> None:
        super().__init__()
        self.family = network.family
        self.reads = tuple(reads)
        self.last = blocks.stop == network.block_count
        self.blocks = nn.ModuleList(network.blocks[block] for block in blocks)
        self.pooler = network.pooler
        self.exit = network.exits[exit_index].folded()  # type: ignore[operator]
        self.policy: nn.Module | None = None
        if not self.last and len(network.policies):
            classes = len(network.spec.labels)
            self.policy = network.policies[exit_index].folded(classes)  # type: ignore[operator]

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        context = dict(zip(self.reads, tensors, strict=True))
        hidden, evidence = context.pop("hidden"), context.pop("evidence", None)
        for block in self.blocks:
            hidden = self.family.call(block, hidden, context)  # [batch, seq, hidden]
        pooled = pool(hidden, context.get("pool"))  # [batch, hidden]
        if self.pooler is not None:
            pooled = self.pooler(pooled)
        logits = self.exit(pooled)  # [batch, classes]
        if self.last:
            return (logits,)
        if self.policy is None:
            return hidden, logits
        opening, seen = self.policy(pooled, logits, evidence)
        gate = opening.sigmoid()  # [batch]
        return (hidden, logits, gate) if evidence is None else (hidden, seen, logits, gate)


def split(network: EarlyExitNetwork, exits: Sequence[int] | None = None) -> list[Segment]:
    """Cut a network at its exits: the stem first, then one segment a kept exit.

    exits: 1-based blocks, exits of the network (None: all); the last block is always added. Where exits are
    dropped, evidence flows through the kept ones alone, though the policies learned with all. The network is
    put into evaluation mode. Raises ValueError for an exit that the network lacks, and for weights that are
    not float32.
    """
    dtype = next(network.parameters()).dtype
    if dtype != torch.float32:
        raise ValueError(
            f"the network's weights are {dtype}; segments are float32: call network.float() first"
        )
    network.eval()
    kept = network.spec.exits if exits is None else (*sorted({*exits, network.block_count}),)
    missing = [block for block in kept if block not in network.spec.exits]
    if missing:
        has = ", ".join(map(str, network.spec.exits))
        raise ValueError(f"there is no exit after block {missing[0]}: this checkpoint has exits after {has}")
    flows = network.evidence_size > 0 and len(kept) > 1
    stem = _stem(network, evidence=flows)
    segments = [stem]
    for number, (start, end) in enumerate(zip((0, *kept), kept, strict=False)):
        segments.append(_stretch(network, f"segment_{number:02}", range(start, end), stem.outputs))
    return segments


def kept_exits(network: EarlyExitNetwork, wish: str) -> tuple[int, ...]:
    """Blocks to cut after, from "each" (every exit there is), "every N" or "2,4,6"; ValueError otherwise."""
    if wish.strip() == "each":
        return network.spec.exits
    return parse_exits(wish, network.block_count)


def stem_inputs(network: EarlyExitNetwork) -> tuple[str, ...]:
    """Names of the integer tensors [batch, seq] that the stem reads."""
    first, *others = network.family.inputs
    return (first, "attention_mask", *others)


def _stem(network: EarlyExitNetwork, *, evidence: bool) -> Segment:
    module = Stem(network, evidence=evidence).eval()
    inputs = tuple(Tensor(name, "int64", ("batch", "seq")) for name in module.reads)
    return Segment(
        "stem", module, inputs, _probe(module), (), Macs(**vars(stem_macs(network))), network.longest
    )


def _stretch(network: EarlyExitNetwork, name: str, blocks: range, made: Sequence[Tensor]) -> Segment:
    exit_index = network.spec.exits.index(blocks.stop)
    last = blocks.stop == network.block_count
    inputs = tuple(tensor for tensor in made if not (last and tensor.name == "evidence"))
    module = Stretch(network, blocks, exit_index, [tensor.name for tensor in inputs]).eval()
    outputs = [Tensor("logits", "float32", ("batch", len(network.spec.labels)))]
    if not last:
        anew = [tensor for tensor in inputs if tensor.name in ("hidden", "evidence")]
        outputs[:0] = [Tensor(NEXT + tensor.name, tensor.dtype, tensor.shape) for tensor in anew]
        if module.policy is not None:
            outputs.append(Tensor("gate", "float32", ("batch",)))
    macs = exit_macs(network, exit_index)
    for block in blocks:
        macs = macs + block_macs(network, block)
    numbers = tuple(block + 1 for block in blocks)
    return Segment(name, module, inputs, tuple(outputs), numbers, Macs(**vars(macs)), network.longest)


@torch.no_grad()
def _probe(stem: Stem) -> tuple[Tensor, ...]:
    """What the stem puts out, run at two sizes: an axis that grew with batch or length is symbolic.

    So a family can add any tensor to what its blocks read, and no name of a family stands here.
    """
    small, large = ((2, 5), (3, 7)) if stem.network.longest >= 7 else ((2, 1), (3, 2))
    axes = {(small[0], large[0]): "batch", (small[1], large[1]): "seq"}
    runs = []
    for size in (small, large):
        ids = torch.ones(size, dtype=torch.int64)
        runs.append(stem.named(*(ids if name == "attention_mask" else ids * 0 for name in stem.reads)))
    found = []
    for name, value in runs[0].items():
        pairs = zip(value.shape, runs[1][name].shape, strict=True)
        shape = tuple(a if a == b else axes[a, b] for a, b in pairs)
        found.append(Tensor(name, str(value.dtype).removeprefix("torch."), shape))
    return tuple(found)


__all__ = ["Segment", "Stem", "Stretch", "kept_exits", "split", "stem_inputs"]
