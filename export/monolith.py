"""The same network as one graph: what a walk has to beat."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from offramp.export.bundle import BadTarget
from offramp.export.precision import VARIANTS, to_variant
from offramp.export.split import Segment, Stem, Stretch, split
from offramp.export.to_onnx import to_onnx
from offramp.models.macs import block_macs, exit_macs, linear_weights
from offramp.models.network import EarlyExitNetwork
from offramp.runtime.bundle.manifest import NEXT, Macs, Tensor
from offramp.training.checkpoint import Checkpoint


class Monolith(nn.Module):
    """Ids and attention mask -> the last exit's logits: the stem and one stretch over all blocks."""

    def __init__(self, stem: Stem, stretch: Stretch) -> None:
        super().__init__()
        # The blocks first: an exporter names what is in two places by the first, and variants go by it.
        self.stretch, self.stem = stretch, stem

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        made = self.stem.named(*tensors)
        return self.stretch(*(made[name] for name in self.stretch.reads))  # type: ignore[no-any-return]


class WithExits(nn.Module):
    """Ids and attention mask -> logits [batch, segments, classes] and gates [batch, segments - 1]: all that a
    full walk says, in one graph.
    """

    def __init__(self, stem: Stem, stages: Sequence[Segment]) -> None:
        super().__init__()
        self.stretches = nn.ModuleList(stage.module for stage in stages)
        self.stem = stem  # the blocks first, as above
        self.names = [[tensor.name for tensor in stage.outputs] for stage in stages]

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        made = self.stem.named(*tensors)
        said: dict[str, list[torch.Tensor]] = {"logits": [], "gate": []}
        for stretch, names in zip(self.stretches, self.names, strict=True):
            assert isinstance(stretch, Stretch)
            for name, value in zip(names, stretch(*(made[n] for n in stretch.reads)), strict=True):
                if name in said:
                    said[name].append(value)
                else:
                    made[name.removeprefix(NEXT)] = value
        logits, gates = torch.stack(said["logits"], 1), said["gate"]
        return (logits, torch.stack(gates, 1)) if gates else (logits,)


def monolith(network: EarlyExitNetwork, *, exits: bool = False) -> Segment:
    """The network with its last exit alone (or with all of them), as one segment from ids to logits."""
    if exits:
        return _with_exits(network)
    stem, stretch = split(network, (network.block_count,))
    assert isinstance(stem.module, Stem) and isinstance(stretch.module, Stretch)
    macs = Macs(*(getattr(stem.macs, f) + getattr(stretch.macs, f) for f in ("token", "pair", "row")))
    module = Monolith(stem.module, stretch.module)
    return Segment("monolith", module, stem.inputs, stretch.outputs, stretch.blocks, macs, network.longest)


def truncated(network: EarlyExitNetwork, block: int) -> Segment:
    """The network cut off after a block with that block's exit, as one segment: the static rival at a depth.

    Raises ValueError where there is no exit after the block.
    """
    if block not in network.spec.exits:
        raise ValueError(f"there is no exit after block {block}: exits are after {list(network.spec.exits)}")
    stem = split(network, (network.block_count,))[0]
    index = network.spec.exits.index(block)
    stretch = Stretch(network, range(block), index, [tensor.name for tensor in stem.outputs]).eval()
    stretch.last, stretch.policy = True, None
    assert isinstance(stem.module, Stem)
    costs = [stem.macs, exit_macs(network, index), *(block_macs(network, at) for at in range(block))]
    if index < len(network.policies):  # counted with the exit, but nothing here asks it
        costs.append(Macs(row=-linear_weights(network.policies[index])))
    macs = Macs(*(sum(getattr(cost, f) for cost in costs) for f in ("token", "pair", "row")))
    outputs = (Tensor("logits", "float32", ("batch", len(network.spec.labels))),)
    blocks = tuple(range(1, block + 1))
    module = Monolith(stem.module, stretch).eval()
    return Segment(f"truncated_{block:02}", module, stem.inputs, outputs, blocks, macs, network.longest)


def _with_exits(network: EarlyExitNetwork) -> Segment:
    stem, *stages = split(network)
    assert isinstance(stem.module, Stem)
    module = WithExits(stem.module, stages)
    count, classes = len(stages), len(network.spec.labels)
    outputs = [Tensor("logits", "float32", ("batch", count, classes))]
    if count > 1 and len(network.policies):
        outputs.append(Tensor("gates", "float32", ("batch", count - 1)))
    macs = stem.macs
    for stage in stages:
        macs = Macs(*(getattr(macs, f) + getattr(stage.macs, f) for f in ("token", "pair", "row")))
    blocks = tuple(range(1, network.block_count + 1))
    return Segment("monolith", module, stem.inputs, tuple(outputs), blocks, macs, network.longest)


def write_monolith(
    checkpoint: Checkpoint,
    path: Path,
    variant: str = "fp32",
    *,
    exits: bool = False,
    reduce_range: bool | None = None,
) -> None:
    """Write the graph: input_ids, attention_mask (token_type_ids) [batch, seq], or pixel_values [batch, 3,
    height, width] -> logits [batch, classes].

    exits: with every exit and policy inside, logits [batch, segments, classes], gates [batch, segments - 1].
    Made by the same exporter, and in other variants by the same code, as the segments are.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}; choose one of {', '.join(VARIANTS)}")
    whole = monolith(checkpoint.network.float(), exits=exits)
    if variant == "fp32":
        to_onnx(whole, path)
        return
    with tempfile.TemporaryDirectory() as scratch:
        to_onnx(whole, Path(scratch) / "monolith.onnx")
        to_variant(variant, Path(scratch) / "monolith.onnx", path, reduce_range=reduce_range)


def write_monoliths(
    checkpoint: Checkpoint, path: Path, variants: Sequence[str], *, reduce_range: bool | None = None
) -> None:
    """Write the graph without exits at `path`, fp32, and every other of the variants beside it as
    <stem>_<variant><suffix>. The file at `path` comes last and at once: where a new one stands, all is
    written. Raises BadTarget where something else than a file stands there.
    """
    places = {name: path.with_name(f"{path.stem}_{name}{path.suffix}") for name in variants if name != "fp32"}
    path = Path(os.path.realpath(path))  # through a link, as plain writing goes
    if path.exists() and not path.is_file():
        raise BadTarget(f"{path} is no regular file; choose another")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        whole = Path(scratch) / "fp32.onnx"
        write_monolith(checkpoint, whole)
        for name in places:
            to_variant(name, whole, Path(scratch) / f"{name}.onnx", reduce_range=reduce_range)
        for name, place in places.items():
            shutil.move(Path(scratch) / f"{name}.onnx", place)  # no rename where a link led to another disk
        whole.replace(path)
