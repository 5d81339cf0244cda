"""Compare a split network with the original, segment by segment, in torch and in ONNX Runtime."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnxruntime
import torch

from offramp.export.segments import (
    TOLERANCE,
    Exportable,
    SameAnswers,
    Sample,
    Segment,
    SplitNetwork,
    Values,
    files_of,
)
from offramp.runtime.bundle.manifest import EXIT_HIDDEN, NEW, NEXT
from offramp.runtime.engines.threads import share_global_pool

TORCH, GRAPHS = "torch whole vs torch segments", "torch whole vs ORT segments"


class NotVerified(ValueError):
    """A segment's outputs differ from those of the network by more than is allowed."""


@dataclass(frozen=True)
class OutputDifference:
    """The largest difference between one output of a segment and the network's value.

    pair: what was compared. Hidden states are compared at real tokens alone. allowed: the largest difference
    that verification accepts.
    """

    segment: str
    tensor: str
    pair: str
    difference: float
    allowed: float

    @property
    def too_large(self) -> bool:
        """Whether the difference is larger than allowed, or NaN."""
        return not self.difference <= self.allowed

    def __str__(self) -> str:
        return f"{self.segment}, tensor {self.tensor}, {self.pair}: max abs difference {self.difference:.3g}"


@dataclass(frozen=True)
class PrecisionLoss:
    """Change of what one segment's exit gives in a variant other than fp32.

    agreement: share of rows (of labels, of tokens) that are answered as in fp32; None where the answer is a
    number or an embedding. difference: the largest change of a logit, or of another number of the answer.
    """

    segment: str
    variant: str
    agreement: float | None
    difference: float


@dataclass
class VerificationReport:
    """Results of a verification: differences of all outputs in walking order, losses of other variants."""

    differences: list[OutputDifference] = field(default_factory=list)
    losses: list[PrecisionLoss] = field(default_factory=list)

    @property
    def first_bad(self) -> OutputDifference | None:
        """The first difference that is larger than allowed, or None."""
        return next((entry for entry in self.differences if entry.too_large), None)

    def require_good(self) -> None:
        """Raise NotVerified, which names the first difference that is not allowed, if there is one."""
        if (bad := self.first_bad) is not None:
            raise NotVerified(f"{bad}, allowed are {bad.allowed:.3g}")

    def worst(self, segment: str) -> float:
        """The largest difference of a segment's outputs from the network's in fp32."""
        pairs = (TORCH, GRAPHS)
        return max(
            entry.difference for entry in self.differences if entry.segment == segment and entry.pair in pairs
        )


@torch.no_grad()
def verify(
    source: Exportable,
    folder: Path,
    split: SplitNetwork,
    variants: Sequence[str],
    texts: Sequence[str] | None = None,
) -> VerificationReport:
    """Run samples through the network and through the graphs in `folder`, and compare every output.

    texts: texts or paths of images, None: built-in samples. Each walk continues with its own values, so
    differences add up as they do in use. Differences up to the source's tolerance for the variant are
    allowed; for hidden states, keys, values and a decoder's logits the tolerance is multiplied by their
    largest magnitude if it is above 1, as float32 has no more digits; for gates in variants that round, 0.5
    or more is allowed.
    """
    source.network.float().eval()
    samples = list(source.samples(split, variants, texts))
    walks = {name: [dict(sample.inputs) for sample in samples] for name in ("torch", *variants)}
    pairs = {GRAPHS if name == "fp32" else f"{GRAPHS}, variant {name}": name for name in variants}
    report = VerificationReport()
    for segment in split.in_walking_order():
        for values in walks["torch"]:
            _update(values, segment, segment.module(*segment.reads(values)))
        for name in variants:
            for graph, file in files_of(segment, name, variants):
                _run_graph(graph, folder / file, walks[name])
        expected = [next(sample.expected) for sample in samples]
        for tensor in segment.outputs:
            scaled = _is_scaled(tensor.name, segment)
            for pair, name in {TORCH: "torch", **pairs}.items():
                tolerance = source.tolerances.get("fp32" if name == "torch" else name)
                if tolerance is not None:
                    difference, scale = _difference(tensor.name, expected, walks[name], samples)
                    allowed = tolerance * max(1.0, scale) if scaled else _unscaled(tolerance)
                    report.differences.append(
                        OutputDifference(segment.name, tensor.name, pair, difference, allowed)
                    )
        names = {tensor.name for tensor in segment.outputs}
        if answer := next((name for name in ("answer", "logits") if name in names), None):
            for name in variants[1:]:
                walked = zip(walks["fp32"], walks[name], samples, strict=True)
                given = [(_real(w[answer], sample), _real(v[answer], sample)) for w, v, sample in walked]
                report.losses.append(_loss(segment.name, name, given, source.same_answers))
    return report


def _unscaled(tolerance: float) -> float:
    """The allowed difference of a gate; a gate near its threshold may change by a lot if a variant rounds."""
    return tolerance if tolerance <= TOLERANCE else max(tolerance, 0.5)


def _is_scaled(tensor: str, segment: Segment) -> bool:
    names = (NEXT + "hidden", "hidden", EXIT_HIDDEN, "answer")
    return tensor in names or tensor.startswith(NEW) or (tensor == "logits" and not segment.blocks)


def _run_graph(segment: Segment, path: Path, walk: Sequence[Values]) -> None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # torch's threads need the cores too
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    share_global_pool(options)  # a process that has walked has one pool for all sessions
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [tensor.name for tensor in segment.outputs]
    for values in walk:
        outputs = session.run(names, {t.name: values[t.name].numpy() for t in segment.inputs})
        _update(values, segment, [torch.from_numpy(output) for output in outputs])


def _update(values: Values, segment: Segment, outputs: Sequence[torch.Tensor]) -> None:
    """Store outputs under the names by which the next segment reads them."""
    for tensor, value in zip(segment.outputs, outputs, strict=True):
        values[tensor.name.removeprefix(NEXT)] = value


def _difference(
    tensor: str, expected: Sequence[Values], walk: Sequence[Values], samples: Sequence[Sample]
) -> tuple[float, float]:
    """The largest difference and the largest expected magnitude; NaN if shapes differ or a value is NaN."""
    largest, scale = 0.0, 0.0
    for whole, values, sample in zip(expected, walk, samples, strict=True):
        right, actual = whole[tensor], values[tensor.removeprefix(NEXT)]
        if right.shape != actual.shape:
            return math.nan, scale
        if tensor.removeprefix(NEXT) in ("hidden", "answer"):
            right, actual = _real(right, sample), _real(actual, sample)
        scale = max(scale, float(right.abs().max()))
        difference = float((right - actual).abs().max())
        if math.isnan(difference):
            return difference, scale
        largest = max(largest, difference)
    return largest, scale


def _real(tensor: torch.Tensor, sample: Sample) -> torch.Tensor:
    """A tensor [batch, seq, size] without padding [real tokens, size]; others as they are."""
    return tensor[sample.kept] if tensor.shape[:-1] == sample.kept.shape else tensor


def _loss(
    segment: str, variant: str, given: Sequence[tuple[torch.Tensor, torch.Tensor]], same: SameAnswers | None
) -> PrecisionLoss:
    """Compare what an exit gives in fp32 and in a variant, a pair for each batch."""
    difference = max(float((right - actual).abs().max()) for right, actual in given)
    if same is None:
        return PrecisionLoss(segment, variant, None, difference)
    answers = torch.cat([same(right, actual).flatten() for right, actual in given])
    return PrecisionLoss(segment, variant, float(answers.float().mean()), difference)
