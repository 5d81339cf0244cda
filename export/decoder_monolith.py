"""A decoder as one graph with cache: what a bundle of segments is measured against."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from offramp.export.bundle import BadTarget
from offramp.export.decoder import DecoderParts, split_decoder
from offramp.export.precision import WEIGHTS_ALONE, weights_alone
from offramp.export.split import Segment
from offramp.export.to_onnx import to_onnx
from offramp.models.decoder import DecoderNetwork
from offramp.runtime.bundle.manifest import Macs, Tensor


class Whole(nn.Module):
    """Stem, all blocks and the head of the last token, as a bundle has them in files."""

    def __init__(self, parts: DecoderParts) -> None:
        super().__init__()
        self.stem, self.head = parts.stem.module, parts.head.module
        self.stretches = nn.ModuleList(segment.module for segment in parts.segments)
        self.counts = [len(segment.blocks) for segment in parts.segments]

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (hidden, *context), past = self.stem(*tensors[:3]), tensors[3:]
        added: list[torch.Tensor] = []
        for count, stretch in zip(self.counts, self.stretches, strict=True):
            hidden, *new = stretch(hidden, *context, *past[: 2 * count])
            past, added = past[2 * count :], added + new
        return *self.head(hidden[:, -1:]), *added


def whole_of(network: DecoderNetwork) -> Segment:
    """One graph: input_ids, position_ids, past_valid and all pasts -> logits [batch, 1, vocabulary] of the
    last token, and what is added to the cache.
    """
    parts = split_decoder(network, (network.block_count,))
    (segment,) = parts.segments
    past = tuple(tensor for tensor in segment.inputs if tensor.name.startswith("past_"))
    new = tuple(tensor for tensor in segment.outputs if tensor.name.startswith("new_"))
    logits = Tensor("logits", "float32", ("batch", 1, network.vocab_size))
    token = segment.macs.token + parts.head.macs.token
    return Segment(
        "monolith",
        Whole(parts).eval(),
        (*parts.stem.inputs, *past),
        (logits, *new),
        segment.blocks,
        Macs(token=token, pair=segment.macs.pair),
        network.longest,
    )


def write_monolith(network: DecoderNetwork, path: Path, variants: Sequence[str]) -> dict[str, Path]:
    """Write the graph at `path`, other variants beside it as <stem>_<variant><suffix>; gives the files.

    fp16 has none: a head is not halved. The file at `path` comes last and at once: where a new one stands,
    all is written. Raises BadTarget where something else than a file stands there, and as split_decoder does.
    """
    if path.exists() and not path.is_file():
        raise BadTarget(f"{path} is no regular file; choose another")
    whole = whole_of(network)
    path.parent.mkdir(parents=True, exist_ok=True)
    files = {name: path.with_name(f"{path.stem}_{name}{path.suffix}") for name in variants if name != "fp16"}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        source = Path(scratch) / "whole.onnx"
        to_onnx(whole, source)
        for name, file in files.items():
            if name in WEIGHTS_ALONE:
                weights_alone(name, source, Path(scratch) / "small.onnx")
                os.replace(Path(scratch) / "small.onnx", file)
        files["fp32"] = path
        os.replace(source, path)
    return files
