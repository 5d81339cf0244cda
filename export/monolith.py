"""The same network as one graph without exits: what a walk has to beat."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

from offramp.export.precision import VARIANTS, to_int8
from offramp.export.split import Segment, Stem, Stretch, split
from offramp.export.to_onnx import to_onnx
from offramp.models.network import EarlyExitNetwork
from offramp.runtime.manifest import Macs
from offramp.training.checkpoint import Checkpoint


class Monolith(nn.Module):
    """Ids and attention mask -> the last exit's logits: the stem and one stretch over all blocks."""

    def __init__(self, stem: Stem, stretch: Stretch) -> None:
        super().__init__()
        # The blocks first: an exporter names what is in two places by the first, and int8 goes by that name.
        self.stretch, self.stem = stretch, stem

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        made = self.stem.named(*tensors)
        return self.stretch(*(made[name] for name in self.stretch.reads))  # type: ignore[no-any-return]


def monolith(network: EarlyExitNetwork) -> Segment:
    """The network with its last exit alone, as one segment from ids to logits."""
    stem, stretch = split(network, (network.block_count,))
    assert isinstance(stem.module, Stem) and isinstance(stretch.module, Stretch)
    macs = Macs(*(getattr(stem.macs, f) + getattr(stretch.macs, f) for f in ("token", "pair", "row")))
    module = Monolith(stem.module, stretch.module)
    return Segment("monolith", module, stem.inputs, stretch.outputs, stretch.blocks, macs, network.longest)


def write_monolith(
    checkpoint: Checkpoint, path: Path, variant: str = "fp32", *, reduce_range: bool | None = None
) -> None:
    """Write the graph: input_ids, attention_mask (token_type_ids) [batch, seq] -> logits [batch, classes].

    Made by the same exporter, and for int8 by the same quantizer, as the segments are.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}; choose one of {', '.join(VARIANTS)}")
    whole = monolith(checkpoint.network.float())
    if variant == "fp32":
        to_onnx(whole, path)
        return
    with tempfile.TemporaryDirectory() as scratch:
        to_onnx(whole, Path(scratch) / "monolith.onnx")
        to_int8(Path(scratch) / "monolith.onnx", path, reduce_range=reduce_range)
