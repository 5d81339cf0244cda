"""Hold a split to its network: torch whole, torch segments and ONNX Runtime, seam by seam, on samples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from offramp.export.samples import Values, batches
from offramp.export.split import Segment, split
from offramp.models.forecasts import path_columns
from offramp.models.network import EarlyExitNetwork
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import NEXT
from offramp.runtime.engines.threads import fit
from offramp.training.checkpoint import Checkpoint

TOLERANCE = 1e-4
PAIRS = ("torch whole vs torch segments", "torch whole vs ORT segments")


@dataclass(frozen=True)
class Seam:
    """The largest difference of one tensor behind one segment; hidden states count at real tokens alone."""

    segment: str
    tensor: str
    pair: str
    difference: float
    allowed: float

    @property
    def bad(self) -> bool:
        """Beyond what is allowed; a NaN is."""
        return not self.difference <= self.allowed

    def __str__(self) -> str:
        return f"{self.segment}, tensor {self.tensor}, {self.pair}: max abs difference {self.difference:.3g}"


@dataclass(frozen=True)
class Precision:
    """What a variant other than fp32 does to one exit: share of labels kept, largest change of a logit."""

    segment: str
    variant: str
    agreement: float
    difference: float


@dataclass
class Report:
    """Every seam in walking order, and what the other precisions do; these are told, not judged."""

    seams: list[Seam] = field(default_factory=list)
    precisions: list[Precision] = field(default_factory=list)

    @property
    def first_bad(self) -> Seam | None:
        """The seam where it goes wrong first, or None."""
        return next((seam for seam in self.seams if seam.bad), None)

    def worst(self, segment: str) -> float:
        """The largest difference behind a segment."""
        return max(seam.difference for seam in self.seams if seam.segment == segment)


def file_name(segment: str, variant: str) -> str:
    """Name of a segment's graph in a bundle."""
    return f"{segment}.onnx" if variant == "fp32" else f"{segment}_{variant}.onnx"


@torch.no_grad()
def verify(
    checkpoint: Checkpoint,
    folder: Path,
    segments: Sequence[Segment] | None = None,
    variants: Sequence[str] | None = None,
    texts: Sequence[str] | None = None,
    tolerance: float = TOLERANCE,
) -> Report:
    """Walk samples through the network and the graphs in `folder`, and compare what every segment puts out.

    texts: texts or paths of images, None: what comes along (see export.samples). segments, variants: as they
    were exported; None: as the finished bundle in `folder` says. Each kind walks on with its own values, so
    differences add up as they would in use. logits, gate, mask and evidence may differ by `tolerance`; hidden
    by that times its largest magnitude where that is above 1, as float32 has no more digits.
    """
    network = checkpoint.network.float().eval()
    if segments is None or variants is None:
        manifest = open_bundle(folder).manifest
        variants = manifest.variants
        segments = split(network, [stage.blocks[-1] for stage in manifest.segments], variants)
    names = [tensor.name for tensor in segments[0].inputs]
    samples = list(batches(checkpoint, texts))
    given = [{name: batch[name] for name in names} for batch, _ in samples]
    real = [tokens for _, tokens in samples]
    wholes = [_whole(network, segments, variants, batch) for batch in given]
    others = {variant: [dict(batch) for batch in given] for variant in variants if variant != "fp32"}
    walks = {"torch": [dict(batch) for batch in given], "fp32": given, **others}
    report = Report()
    for segment in segments:
        _advance_torch(segment, walks["torch"])
        for variant in variants:
            path = folder / file_name(segment.name, variant if segment.blocks else "fp32")
            _advance_ort(segment, path, walks[variant])
        truth = [next(whole) for whole in wholes]
        for tensor in segment.outputs:
            for pair, walk in zip(PAIRS, (walks["torch"], walks["fp32"]), strict=True):
                report.seams.append(_seam(segment.name, tensor.name, pair, truth, walk, real, tolerance))
        if segment.blocks:
            for variant, walk in others.items():
                report.precisions.append(_precision(segment.name, variant, walks["fp32"], walk))
    return report


def _whole(
    network: EarlyExitNetwork,
    segments: Sequence[Segment],
    variants: Sequence[str],
    batch: Mapping[str, torch.Tensor],
) -> Iterator[Values]:
    """What the network itself says behind stem and segments, by its own methods: the truth for both."""
    hidden, context = network.stem(batch)
    seen = network.no_evidence(hidden)
    yield {"hidden": hidden, **context} | ({} if seen is None else {"evidence": seen})
    for segment in segments[1:]:
        for block in segment.blocks:
            hidden = network.run_block(block - 1, hidden, context)
        exit_index = network.spec.exits.index(segment.blocks[-1])
        pooled = network.pooled(hidden, context)
        said = {NEXT + "hidden": hidden, "logits": network.classify(exit_index, pooled)}
        if exit_index < len(network.policies):
            gate, seen = network.gate(exit_index, pooled, said["logits"], seen)
            said |= {"gate": gate.sigmoid()} | ({} if seen is None else {NEXT + "evidence": seen})
        if exit_index < len(network.forecasts):
            kept = {block for later in segments for block in later.blocks[-1:]}
            behind = network.spec.exits[exit_index + 1 :]
            ahead = [at for at, block in enumerate(behind) if block in kept]
            knows = network.spec.forecast
            numbers = [knows.index(variant) for variant in variants]
            columns = path_columns(numbers, len(knows), ahead, len(behind))
            said["forecast"] = network.forecasts[exit_index](said["logits"]).sigmoid()[:, columns]
        yield said


def _advance_torch(segment: Segment, walk: Sequence[Values]) -> None:
    for state in walk:
        out = segment.module(*(state[tensor.name] for tensor in segment.inputs))
        _take_in(state, segment, out)


def _advance_ort(segment: Segment, path: Path, walk: Sequence[Values]) -> None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # torch's threads need the cores too
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    fit(options)  # a process that has walked has one pool for all sessions
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [tensor.name for tensor in segment.outputs]
    for state in walk:
        out: list[NDArray[np.float32]] = session.run(
            names, {t.name: state[t.name].numpy() for t in segment.inputs}
        )
        _take_in(state, segment, [torch.from_numpy(value) for value in out])


def _take_in(state: Values, segment: Segment, out: Sequence[torch.Tensor]) -> None:
    """New values under the names that the next segment reads."""
    for tensor, value in zip(segment.outputs, out, strict=True):
        state[tensor.name.removeprefix(NEXT)] = value


def _seam(
    segment: str,
    tensor: str,
    pair: str,
    truth: Sequence[Values],
    walk: Sequence[Values],
    real: Sequence[torch.Tensor],
    tolerance: float,
) -> Seam:
    largest, allowed = 0.0, tolerance
    for whole, state, tokens in zip(truth, walk, real, strict=True):
        expected, found = whole[tensor], state[tensor.removeprefix(NEXT)]
        if tensor.removeprefix(NEXT) == "hidden":
            expected, found = expected[tokens], found[tokens]  # [real tokens, hidden]
            allowed = max(allowed, tolerance * float(expected.abs().max()))
        if expected.shape != found.shape:
            return Seam(segment, tensor, pair, float("nan"), allowed)
        difference = float((expected - found).abs().max())
        if math.isnan(difference):
            return Seam(segment, tensor, pair, difference, allowed)
        largest = max(largest, difference)
    return Seam(segment, tensor, pair, largest, allowed)


def _precision(segment: str, variant: str, reference: Sequence[Values], walk: Sequence[Values]) -> Precision:
    expected = torch.cat([state["logits"] for state in reference])
    found = torch.cat([state["logits"] for state in walk])
    agreement = float((expected.argmax(-1) == found.argmax(-1)).float().mean())
    return Precision(segment, variant, agreement, float((expected - found).abs().max()))
