"""Export the same network as one graph, the baseline of every walk."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from offramp.export.bundle import BadTarget
from offramp.export.options import ExportOptions
from offramp.export.precision import write_variant
from offramp.export.segments import Exportable, Segment, SplitNetwork, total_macs
from offramp.export.to_onnx import to_onnx
from offramp.runtime.bundle.manifest import NEW, NEXT, PAST, Tensor

STACKED = ("logits", "answer")  # a row's signals, of which a graph with several exits gives all


class Monolith(nn.Module):
    """A module that runs stem, segments and, for a decoder's last token, the head one after another.

    outputs: the tensors it returns. If there are several exits, "logits", "answer" and "gates" are those of
    all exits, stacked in axis 1.
    """

    def __init__(self, split: SplitNetwork, reads: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
        super().__init__()
        # The blocks first: the exporter names a module that occurs twice by its first place, and variants
        # choose products by these names.
        self.segments = nn.ModuleList(segment.module for segment in split.segments)
        self.stem = split.stem.module
        self.head = None if split.head is None else split.head.module
        self._split, self._reads = split, [tensor.name for tensor in reads]
        self._outputs = [tensor.name for tensor in outputs]

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the whole network; tensors: in the order of the segment's inputs."""
        values = dict(zip(self._reads, tensors, strict=True))
        _store(values, self._split.stem, self.stem(*self._split.stem.reads(values)))
        exits: dict[str, list[torch.Tensor]] = {"logits": [], "answer": [], "gate": []}
        for segment, module in zip(self._split.segments, self.segments, strict=True):
            _store(values, segment, module(*segment.reads(values)))
            for tensor in segment.outputs:
                if tensor.name in exits:
                    exits[tensor.name].append(values[tensor.name])
        if self.head is not None:
            (values["logits"],) = self.head(values["hidden"][:, -1:])
        for name in STACKED:
            if len(exits[name]) > 1:
                values[name] = torch.stack(exits[name], 1)
        if len(exits["gate"]) > 0:
            values["gates"] = torch.stack(exits["gate"], 1)
        return tuple(values[name] for name in self._outputs)


def _store(values: dict[str, torch.Tensor], segment: Segment, outputs: tuple[torch.Tensor, ...]) -> None:
    for tensor, value in zip(segment.outputs, outputs, strict=True):
        values[tensor.name.removeprefix(NEXT)] = value


def join_segments(split: SplitNetwork, name: str = "monolith") -> Segment:
    """Join all segments of a split network into one segment.

    Inputs: those of the stem, further tensors that segments read and no graph puts out (lengths and tables of
    a cache in place), and the past keys and values of all blocks. Outputs: logits or answer or both, as the
    segments give them, and new keys and values. Logits are [batch, classes] with one exit; [batch,
    segments, classes] with several, and then gates [batch, segments - 1] where there are policies; [batch, 1,
    vocabulary], of the last token, for a decoder.
    """
    last = split.segments[-1]
    past = [tensor for s in split.segments for tensor in s.inputs if tensor.name.startswith(PAST)]
    new = [tensor for s in split.segments for tensor in s.outputs if tensor.name.startswith(NEW)]
    outputs = [*_signals(split), *new]
    count = len(split.segments)
    if count > 1 and split.head is None and any(t.name == "gate" for t in split.segments[0].outputs):
        outputs.append(Tensor("gates", "float32", ("batch", count - 1)))
    computed = {tensor.name for tensor in (*split.stem.outputs, *past)}
    others = {tensor: None for s in split.segments for tensor in s.inputs if tensor.name not in computed}
    inputs = (*split.stem.inputs, *others, *past)
    module = Monolith(split, inputs, tuple(outputs)).eval()
    heads = [split.head] if split.head is not None else []
    macs = total_macs(segment.macs for segment in (split.stem, *split.segments, *heads))
    blocks = tuple(block for segment in split.segments for block in segment.blocks)
    vendor = any(segment.vendor_operators for segment in split.segments)
    return Segment(name, module, inputs, tuple(outputs), blocks, macs, last.longest, vendor_operators=vendor)


def _signals(split: SplitNetwork) -> list[Tensor]:
    if split.head is not None:
        return [Tensor("logits", "float32", ("batch", 1, split.head.outputs[0].shape[-1]))]
    signals = [tensor for tensor in split.segments[-1].outputs if tensor.name in STACKED]
    if (count := len(split.segments)) > 1:
        return [Tensor(t.name, t.dtype, (t.shape[0], count, *t.shape[1:])) for t in signals]
    return signals


def whole_network(source: Exportable, *, exits: bool = False) -> Segment:
    """Build the segment of the whole network, with its last exit alone or with every exit and policy."""
    source.network.float()
    return join_segments(source.split("each" if exits else (source.network.block_count,)))


def write_monolith(
    source: Exportable, path: Path, options: ExportOptions | None = None, *, exits: bool = False
) -> Mapping[str, Path]:
    """Write the whole network as one graph for each variant, and return the files by variant.

    fp32 is written at `path`, other variants beside it as <stem>_<variant><suffix>; decoders have no fp16.
    Inputs and outputs: see join_segments. exits: with every exit and policy inside. Exporter and code for
    variants are those of the segments, but for int8: see to_one_scale_int8. The file at `path` is replaced
    last and at once, so that a new file there means that all are written. Raises BadTarget if something other
    than a file is there.
    """
    options = options or ExportOptions()
    names = [
        name for name in options.variants if name != "fp32" and not (source.weights_only and name == "fp16")
    ]
    places = {name: path.with_name(f"{path.stem}_{name}{path.suffix}") for name in names}
    target = Path(os.path.realpath(path))  # through a link, as plain writing goes
    if target.exists() and not target.is_file():
        raise BadTarget(f"{path} is no regular file; choose another")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        graph = Path(scratch) / "fp32.onnx"
        to_onnx(whole_network(source, exits=exits), graph)
        for name in names:
            write_variant(
                name,
                graph,
                Path(scratch) / f"{name}.onnx",
                weights_only=source.weights_only,
                reduce_range=options.reduce_range,
                baseline=True,
            )
        for name, place in places.items():
            shutil.move(Path(scratch) / f"{name}.onnx", place)  # no rename where a link led to another disk
        graph.replace(target)
    return {"fp32": path, **places}
