"""The segments that a network is cut into, each of which becomes one graph. Nothing here uses a disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import nn

from offramp.models.decoder import DecoderNetwork
from offramp.models.macs import MacTerms
from offramp.models.network import EarlyExitNetwork
from offramp.runtime.bundle.manifest import (
    APPENDED,
    ImageInput,
    Macs,
    OperatingPoint,
    RotationFacts,
    RuleSpec,
    StepCosts,
    Tensor,
    TextInput,
)

Values = dict[str, torch.Tensor]
# (what an exit gives, the same in another precision) -> where both mean the same labels
SameAnswers = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# Allowed difference of fp32 graphs from the network. SmolLM2-135M stays below 1e-5 of its largest values.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Segment:
    """A part of a network that becomes one graph: a module, and descriptions of its inputs and outputs.

    The module takes and returns plain tensors in the order of `inputs` and `outputs`. blocks: 1-based, empty
    for stem and heads. macs: multiply-accumulates of one row, exit and policy included. longest: most tokens
    of a row. The module shares the network's parameters; only folded exits and policies are copies.

    parts: where the segment begins with blocks whose weights other blocks have too (see shared_blocks), it is
    written as several graphs, which run one after another; parts of other segments with the same name are the
    same graph. always_first: all variants run the graph of the first variant. vendor_operators: the graph may
    hold operators of ONNX Runtime beside ONNX's own.
    """

    name: str
    module: nn.Module
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    blocks: tuple[int, ...]
    macs: Macs
    longest: int
    parts: tuple[Segment, ...] = ()
    always_first: bool = False
    vendor_operators: bool = False

    @property
    def graphs(self) -> tuple[Segment, ...]:
        """What is written as one graph each, in the order in which they run: the parts, or the segment."""
        return self.parts or (self,)

    def reads(self, values: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Take the segment's inputs from `values` by name, in the order of `inputs`."""
        return [values[tensor.name] for tensor in self.inputs]


@dataclass(frozen=True)
class SplitNetwork:
    """All segments that a network was cut into; decoders have cache fills and heads, too.

    cache_fills: for every segment but the first, the graph that computes keys and values of tokens that skip
    it. draft: a head of fewer ids, None if the vocabulary is small. draft_block: the block of a draft head,
    if the network has one. cache, rotations, windows: see runtime.bundle.manifest.DecoderFacts.
    """

    stem: Segment
    segments: tuple[Segment, ...]
    cache_fills: tuple[Segment, ...] = ()
    head: Segment | None = None
    draft: Segment | None = None
    cache: str = APPENDED
    rotations: Mapping[str, RotationFacts] = field(default_factory=dict)
    windows: tuple[int, ...] = ()
    draft_block: Segment | None = None

    def __iter__(self) -> Iterator[Segment]:
        draft_blocks = () if self.draft_block is None else (self.draft_block,)
        return iter((self.stem, *self.segments, *self.cache_fills, *self.heads, *draft_blocks))

    @property
    def heads(self) -> tuple[Segment, ...]:
        """The head and the draft head, those that exist; empty for a classifier."""
        return tuple(head for head in (self.head, self.draft) if head is not None)

    def in_walking_order(self) -> Iterator[Segment]:
        """Iterate over all segments in the order in which a walk can run them.

        A segment comes after those whose outputs it reads, a cache fill before the segment that it replaces;
        a draft block reads the output of the stem.
        """
        cache_fills = {segment.blocks: segment for segment in self.cache_fills}
        yield self.stem
        if self.draft_block is not None:
            yield self.draft_block
        for segment in self.segments:
            if segment.blocks in cache_fills:
                yield cache_fills[segment.blocks]
            yield segment
        yield from self.heads


class Sample(NamedTuple):
    """A batch on which a split network is verified.

    inputs: the stem's inputs, and caches. kept: tokens whose hidden states are compared [batch, seq].
    expected: the network's own outputs, a dict for each segment in walking order.
    """

    inputs: Values
    kept: torch.Tensor
    expected: Iterator[Values]


@dataclass(frozen=True)
class ManifestFacts:
    """The fields of a manifest that come from the checkpoint; see Manifest.

    training: the contents of training.json. provenance: entries that only this kind of network has. stop_ids:
    ids that end a decoder's answer.
    """

    task: str
    labels: tuple[str, ...]
    input: TextInput | ImageInput
    rule: RuleSpec
    points: tuple[OperatingPoint, ...]
    costs: dict[str, StepCosts]
    training: Mapping[str, object]
    provenance: Mapping[str, object]
    stop_ids: tuple[int, ...] = ()
    thresholds: tuple[float, ...] = ()


class Exportable(Protocol):
    """A trained network with everything that its bundle needs: ExportableClassifier or ExportableDecoder."""

    @property
    def weights_only(self) -> bool:
        """Whether int8 and int4 quantize weights and no activations."""
        ...

    @property
    def tolerances(self) -> Mapping[str, float]:
        """The difference from the network that verification allows, by variant.

        A variant without an entry is measured only.
        """
        ...

    @property
    def same_answers(self) -> SameAnswers | None:
        """Compare what an exit gives in two precisions; None if it gives numbers and no labels."""
        ...

    @property
    def network(self) -> EarlyExitNetwork | DecoderNetwork:
        """The trained network, in evaluation mode, with float32 weights."""
        ...

    @property
    def files(self) -> Mapping[str, Path | bytes]:
        """Files that a bundle holds in addition to its graphs, or their contents, by their names there."""
        ...

    def split(self, cuts: str | Sequence[int], variants: Sequence[str] | None = None) -> SplitNetwork:
        """Cut the network after these blocks; raises ValueError for cuts that are impossible.

        variants: the variants that will be written (None: all that the network can have).
        """
        ...

    def facts(self, split: SplitNetwork, variants: Sequence[str]) -> ManifestFacts:
        """The facts that the manifest of the split holds in addition to its segments."""
        ...

    def samples(
        self, split: SplitNetwork, variants: Sequence[str], texts: Sequence[str] | None
    ) -> Iterator[Sample]:
        """Samples on which the split is verified, from texts or paths of images (None: built-in samples)."""
        ...


def same_label(right: torch.Tensor, actual: torch.Tensor) -> torch.Tensor:
    """Whether the largest of two rows of logits [..., classes] is the same [...]."""
    return right.argmax(-1) == actual.argmax(-1)


def total_macs(costs: Iterable[MacTerms]) -> Macs:
    """Sum of multiply-accumulates, as a manifest states them."""
    listed = list(costs)
    return Macs(sum(c.token for c in listed), sum(c.pair for c in listed), sum(c.row for c in listed))


def file_name(segment: str, variant: str) -> str:
    """Name of the file of a segment's graph in a bundle."""
    return f"{segment}.onnx" if variant == "fp32" else f"{segment}_{variant}.onnx"


def files_of(segment: Segment, variant: str, variants: Sequence[str]) -> list[tuple[Segment, str]]:
    """The graphs that a segment runs in a variant, each with its file; variants: those of the bundle."""
    return [
        (graph, file_name(graph.name, variant if variant in variants_of(graph, variants) else variants[0]))
        for graph in segment.graphs
    ]


def variants_of(segment: Segment, variants: Sequence[str]) -> list[str]:
    """The variants in which a segment is written: a head not in fp16.

    A stem is written in the first one alone, unless it may hold operators of ONNX Runtime, of which one reads
    embeddings of few bits.
    """
    if segment.always_first or (segment.name == "stem" and not segment.vendor_operators):
        return list(variants[:1])
    return [name for name in variants if segment.blocks or name != "fp16"]


def require_float32(network: nn.Module) -> None:
    """Raise ValueError unless the network's weights are float32."""
    if (dtype := next(network.parameters()).dtype) != torch.float32:
        raise ValueError(
            f"the network's weights are {dtype}; segments are float32: call network.float() first"
        )


def describe_tensors(
    small: Mapping[str, torch.Tensor], large: Mapping[str, torch.Tensor], axes: Mapping[tuple[int, int], str]
) -> tuple[Tensor, ...]:
    """Describe the tensors of a module that ran at two sizes; an axis whose size differs is symbolic.

    axes: the axis's name by (size in small, size in large). A family can therefore give its blocks any tensor
    to read, and no family's tensors are named in this package.
    """
    tensors = []
    for name, value in small.items():
        sizes = zip(value.shape, large[name].shape, strict=True)
        shape = tuple(a if a == b else axes[a, b] for a, b in sizes)
        tensors.append(Tensor(name, str(value.dtype).removeprefix("torch."), shape))
    return tuple(tensors)
