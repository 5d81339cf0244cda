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
from offramp.runtime.bundle.manifest import NEXT, Macs, Tensor


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
    """Ids and attention mask, or pixels -> hidden, mask and whatever else every segment reads."""

    def __init__(self, network: EarlyExitNetwork, *, evidence: bool) -> None:
        super().__init__()
        self.network = network
        self.reads = stem_inputs(network)
        self.evidence = evidence

    def named(self, *tensors: torch.Tensor) -> Context:
        """What it puts out, by name; tensors as stem_inputs() names them."""
        hidden, context = self.network.stem(dict(zip(self.reads, tensors, strict=True)))
        made = {"hidden": hidden, **context}
        seen = self.network.no_evidence(hidden) if self.evidence else None
        if seen is not None:
            made["evidence"] = seen
        return made

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.named(*tensors).values())


class Stretch(nn.Module):
    """Blocks, the exit after them and, at every exit but the last, its policy or its error forecast.

    ahead: exits behind this one that are kept, as numbers from here (0: the next of the network's). variants:
    numbers of those between which the forecast chooses.
    """

    def __init__(
        self,
        network: EarlyExitNetwork,
        blocks: range,
        exit_index: int,
        reads: Sequence[str],
        ahead: Sequence[int] = (),
        variants: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.family = network.family
        self.reads = tuple(reads)
        self.last = blocks.stop == network.block_count
        self.blocks = nn.ModuleList(network.blocks[block] for block in blocks)
        self.norm, self.pooler = network.norm, network.pooler
        self.exit = network.exits[exit_index].folded()  # type: ignore[operator]
        self.policy: nn.Module | None = None
        if not self.last and len(network.policies):
            classes = len(network.spec.labels)
            self.policy = network.policies[exit_index].folded(classes)  # type: ignore[operator]
        self.forecast: nn.Module | None = None
        if not self.last and len(network.forecasts) and ahead:
            self.forecast = network.forecasts[exit_index].folded(variants, ahead)  # type: ignore[operator]

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        context = dict(zip(self.reads, tensors, strict=True))
        hidden, evidence = context.pop("hidden"), context.pop("evidence", None)
        for block in self.blocks:
            hidden = self.family.call(block, hidden, context)  # [batch, seq, hidden]
        pooled = pool(hidden, context.get("pool"), self.norm)  # [batch, hidden]
        if self.pooler is not None:
            pooled = self.pooler(pooled)
        logits = self.exit(pooled)  # [batch, classes]
        if self.last:
            return (logits,)
        foreseen = () if self.forecast is None else (self.forecast(logits),)
        if self.policy is None:
            return hidden, logits, *foreseen
        opening, seen = self.policy(pooled, logits, evidence)
        gate = opening.sigmoid()  # [batch]
        said = (hidden,) if evidence is None else (hidden, seen)
        return *said, logits, gate, *foreseen


def split(
    network: EarlyExitNetwork, exits: Sequence[int] | None = None, variants: Sequence[str] | None = None
) -> list[Segment]:
    """Cut a network at its exits: the stem first, then one segment a kept exit.

    exits: 1-based blocks, exits of the network (None: all); the last block is always added. Where exits are
    dropped, evidence flows through the kept ones alone, though the policies learned with all. variants: those
    that will be written, which a network with error forecasts must know (None: all that it knows); others and
    dropped exits vanish from the forecasts. The network is put into evaluation mode. Raises ValueError for an
    exit or a forecast that the network lacks, and for weights that are not float32.
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
    chosen = network.spec.forecast if variants is None else tuple(variants)
    strange = [name for name in chosen if name not in network.spec.forecast]
    if network.spec.forecast and strange:
        knows = ", ".join(network.spec.forecast)
        raise ValueError(
            f"there is no error forecast for variant {strange[0]}: this checkpoint knows {knows}"
        )
    flows = network.evidence_size > 0 and len(kept) > 1
    stem = _stem(network, evidence=flows)
    segments = [stem]
    for number, (start, end) in enumerate(zip((0, *kept), kept, strict=False)):
        name = f"segment_{number:02}"
        segments.append(_stretch(network, name, range(start, end), stem.outputs, kept, chosen))
    return segments


def kept_exits(network: EarlyExitNetwork, wish: str) -> tuple[int, ...]:
    """Blocks to cut after, from "each" (every exit there is), "every N" or "2,4,6"; ValueError otherwise."""
    if wish.strip() == "each":
        return network.spec.exits
    return parse_exits(wish, network.block_count)


def stem_inputs(network: EarlyExitNetwork) -> tuple[str, ...]:
    """Names of the tensors that the stem reads: integers [batch, seq], or pixel_values."""
    first, *others = network.family.inputs
    return (first, "attention_mask", *others) if network.family.vision is None else (first,)


def _stem(network: EarlyExitNetwork, *, evidence: bool) -> Segment:
    module = Stem(network, evidence=evidence).eval()
    inputs, outputs = _probe(module)
    return Segment("stem", module, inputs, outputs, (), Macs(**vars(stem_macs(network))), network.longest)


def _stretch(
    network: EarlyExitNetwork,
    name: str,
    blocks: range,
    made: Sequence[Tensor],
    kept: Sequence[int],
    chosen: Sequence[str],
) -> Segment:
    exit_index = network.spec.exits.index(blocks.stop)
    behind = network.spec.exits[exit_index + 1 :]
    ahead = [number for number, block in enumerate(behind) if block in kept]
    variants = [network.spec.forecast.index(variant) for variant in chosen if network.spec.forecast]
    last = blocks.stop == network.block_count
    inputs = tuple(tensor for tensor in made if not (last and tensor.name == "evidence"))
    reads = [tensor.name for tensor in inputs]
    module = Stretch(network, blocks, exit_index, reads, ahead, variants).eval()
    outputs = [Tensor("logits", "float32", ("batch", len(network.spec.labels)))]
    if not last:
        anew = [tensor for tensor in inputs if tensor.name in ("hidden", "evidence")]
        outputs[:0] = [Tensor(NEXT + tensor.name, tensor.dtype, tensor.shape) for tensor in anew]
        if module.policy is not None:
            outputs.append(Tensor("gate", "float32", ("batch",)))
        if module.forecast is not None:
            paths = len(variants) * (1 + len(variants) * len(ahead))
            outputs.append(Tensor("forecast", "float32", ("batch", paths)))
    macs = exit_macs(network, exit_index)
    for block in blocks:
        macs = macs + block_macs(network, block)
    numbers = tuple(block + 1 for block in blocks)
    return Segment(name, module, inputs, tuple(outputs), numbers, Macs(**vars(macs)), network.longest)


@torch.no_grad()
def _probe(stem: Stem) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What the stem reads and puts out, run at two sizes: an axis that grew with batch or length is symbolic.

    So a family can add any tensor to what its blocks read, and no name of a family stands here.
    """
    small, large = ((2, 5), (3, 7)) if stem.network.longest >= 7 else ((2, 1), (3, 2))
    axes = {(small[0], large[0]): "batch", (small[1], large[1]): "seq"}
    given, made = [], []
    for size in (small, large):
        blank = stem.network.blank(*size)
        given.append({name: blank[name] for name in stem.reads})
        made.append(stem.named(*given[-1].values()))

    def facts(small: Context, large: Context) -> tuple[Tensor, ...]:
        found = []
        for name, value in small.items():
            pairs = zip(value.shape, large[name].shape, strict=True)
            shape = tuple(a if a == b else axes[a, b] for a, b in pairs)
            found.append(Tensor(name, str(value.dtype).removeprefix("torch."), shape))
        return tuple(found)

    return facts(*given), facts(*made)


__all__ = ["Segment", "Stem", "Stretch", "kept_exits", "split", "stem_inputs"]
