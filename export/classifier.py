"""The parts of an export that only classifiers have: segments with exits and policies, manifest facts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from offramp.export.classifier_modules import ClassifierSegment, ClassifierStem, no_logits
from offramp.export.samples import verification_batches
from offramp.export.segments import (
    TOLERANCE,
    ManifestFacts,
    SameAnswers,
    Sample,
    Segment,
    SplitNetwork,
    Values,
    describe_tensors,
    require_float32,
    total_macs,
)
from offramp.export.shared_blocks import cut_shared_blocks
from offramp.models.forecasts import path_columns
from offramp.models.macs import (
    MacTerms,
    bit_operations,
    block_macs,
    exit_macs,
    linear_weights,
    stem_macs,
)
from offramp.models.network import EarlyExitNetwork, parse_exits
from offramp.models.tasks import CLASSIFICATION, MULTI_LABEL, threshold_logits
from offramp.runtime.bundle.manifest import (
    NEXT,
    ImageInput,
    Macs,
    OperatingPoint,
    RuleSpec,
    StepCosts,
    Tensor,
    TextInput,
)
from offramp.training.checkpoint import TOKENIZER, Checkpoint

if TYPE_CHECKING:
    from pathlib import Path

TOKENS = 32  # the length for which step costs are stated where training names none


def split_classifier(
    network: EarlyExitNetwork, exits: Sequence[int] | None = None, variants: Sequence[str] | None = None
) -> SplitNetwork:
    """Cut a classifier at its exits into a stem and a segment for each kept exit.

    exits: 1-based blocks, exits of the network (None: all); the last block is always added. Where exits are
    dropped, evidence flows through the kept ones alone, though the policies were trained with all. variants:
    the variants that will be written, for which a network with error forecasts needs forecasts (None: all for
    which it has them); columns of other variants and of dropped exits are removed from the forecasts. The
    network is put into evaluation mode. Raises ValueError for an exit or a forecast that the network lacks,
    and for weights that are not float32.
    """
    require_float32(network)
    network.eval()
    kept = network.spec.exits if exits is None else (*sorted({*exits, network.block_count}),)
    missing = [block for block in kept if block not in network.spec.exits]
    if missing:
        known = ", ".join(map(str, network.spec.exits))
        raise ValueError(
            f"there is no exit after block {missing[0]}: this checkpoint has exits after {known}"
        )
    forecast = network.spec.forecast
    chosen = forecast if variants is None else tuple(variants)
    unknown = [name for name in chosen if name not in forecast]
    if forecast and unknown:
        raise ValueError(
            f"there is no error forecast for variant {unknown[0]}: this checkpoint knows "
            f"{', '.join(forecast)}"
        )
    if forecast and [name for name in forecast if name in chosen] != list(chosen):
        raise ValueError(f"name the variants in the order of the error forecasts: {', '.join(forecast)}")
    stem = _stem(network, walks=len(kept) > 1)
    ends = zip((0, *kept), kept, strict=False)
    return SplitNetwork(
        stem,
        tuple(
            _segment(network, f"segment_{number:02}", range(*blocks), stem.outputs, kept, chosen)
            for number, blocks in enumerate(ends)
        ),
    )


def truncate(network: EarlyExitNetwork, block: int) -> SplitNetwork:
    """Split the network cut off after a block (1-based), whose exit becomes the last; no policy, no forecast.

    Raises ValueError where there is no exit after the block.
    """
    if block not in network.spec.exits:
        raise ValueError(f"there is no exit after block {block}: exits are after {list(network.spec.exits)}")
    network.eval()
    stem = _stem(network, walks=False)
    return SplitNetwork(stem, (_segment(network, "segment_00", range(block), stem.outputs, (block,), ()),))


def parse_cuts(network: EarlyExitNetwork, text: str) -> tuple[int, ...]:
    """Parse option --segments of a classifier into the blocks (1-based) after which segments end.

    text: "each" (every exit of the network), "every N" or "2,4,6". Raises ValueError for anything else.
    """
    return network.spec.exits if text.strip() == "each" else parse_exits(text, network.block_count)


def _stem(network: EarlyExitNetwork, *, walks: bool) -> Segment:
    module = ClassifierStem(network, walks=walks).eval()
    inputs, outputs = _probe(module)
    return Segment("stem", module, inputs, outputs, (), total_macs([stem_macs(network)]), network.longest)


def _segment(
    network: EarlyExitNetwork,
    name: str,
    blocks: range,
    stem_outputs: Sequence[Tensor],
    kept: Sequence[int],
    variants: Sequence[str],
) -> Segment:
    """Build a segment from 0-based blocks.

    kept: all blocks (1-based) whose exit is kept; the segment of the last one outputs logits alone.
    """
    exit_index = network.spec.exits.index(blocks.stop)
    later = network.spec.exits[exit_index + 1 :]
    exits_ahead = [number for number, block in enumerate(later) if block in kept]
    numbers = [network.spec.forecast.index(name) for name in variants if network.spec.forecast]
    last = blocks.stop == kept[-1]
    inputs = tuple(tensor for tensor in stem_outputs if not (last and tensor.name == "evidence"))
    reads = [tensor.name for tensor in inputs]

    def make(names: Sequence[str], done: int) -> ClassifierSegment:
        parts = blocks, exit_index, names, exits_ahead, numbers
        return ClassifierSegment(network, *parts, last=last, done=done)

    module = make(reads, 0).eval()
    outputs = _signals(network)
    inner = [n for n, end in enumerate(network.spec.exits) if blocks.start < end < blocks.stop]
    costs: list[MacTerms] = [exit_macs(network, exit_index), *(block_macs(network, at) for at in blocks)]
    if network.spec.ensemble:
        costs += [exit_macs(network, number) for number in inner]
    if last and exit_index < len(network.policies):  # counted with the exit, but not in this graph
        costs.append(Macs(row=-linear_weights(network.policies[exit_index])))
    if not last:
        flows = [tensor for tensor in inputs if tensor.name in ("hidden", "evidence", "ensemble")]
        outputs[:0] = [Tensor(NEXT + tensor.name, tensor.dtype, tensor.shape) for tensor in flows]
        if module.policy is not None:
            outputs.append(Tensor("gate", "float32", ("batch",)))
        if module.forecast is not None:
            paths = len(numbers) * (1 + len(numbers) * len(exits_ahead))
            outputs.append(Tensor("forecast", "float32", ("batch", paths)))
    outputs += _answers(network)
    numbered = tuple(block + 1 for block in blocks)
    macs = total_macs(costs)
    segment = Segment(name, module, inputs, tuple(outputs), numbered, macs, network.longest)
    return cut_shared_blocks(network, segment, make)


def _signals(network: EarlyExitNetwork) -> list[Tensor]:
    """The logits that rules read, if the task has any."""
    if network.task.certainty is not None:
        return [Tensor("logits", "float32", ("batch", 2))]
    return [Tensor("logits", "float32", ("batch", network.outputs))] if network.task.least_labels else []


def _answers(network: EarlyExitNetwork) -> list[Tensor]:
    """The output that answers are made from, where that is not the logits."""
    if network.spec.task == CLASSIFICATION:
        return []
    axes = ("batch", "seq") if network.task.per_token else ("batch",)
    return [Tensor("answer", "float32", (*axes, network.outputs))]


@torch.no_grad()
def _probe(stem: ClassifierStem) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Find names, types and shapes of the stem's inputs and outputs by running it at two sizes."""
    small, large = ((2, 5), (3, 7)) if stem.network.longest >= 7 else ((2, 1), (3, 2))
    axes = {(small[0], large[0]): "batch", (small[1], large[1]): "seq"}
    blanks = [stem.network.zero_inputs(*size) for size in (small, large)]
    inputs = [{name: blank[name] for name in stem.reads} for blank in blanks]
    outputs = [stem.named(*values.values()) for values in inputs]
    return describe_tensors(inputs[0], inputs[1], axes), describe_tensors(outputs[0], outputs[1], axes)


@dataclass(frozen=True)
class ExportableClassifier:
    """A classifier's checkpoint with everything that its bundle needs; see segments.Exportable."""

    checkpoint: Checkpoint

    weights_only: ClassVar[bool] = False
    tolerances: ClassVar[Mapping[str, float]] = {"fp32": TOLERANCE}

    @property
    def same_answers(self) -> SameAnswers | None:
        """Compare what an exit gives in two precisions; see segments.Exportable."""
        decisions = self.network.task.decisions
        if decisions is None:
            return None
        limits = threshold_logits(self.network.spec.thresholds)
        return lambda right, actual: decisions(right, limits) == decisions(actual, limits)

    @property
    def network(self) -> EarlyExitNetwork:
        """The network of the checkpoint."""
        return self.checkpoint.network

    @property
    def files(self) -> dict[str, Path]:
        """The tokenizer file, by its name in the bundle; empty for images."""
        tokenizer = self.checkpoint.tokenizer
        return {} if tokenizer is None else {TOKENIZER: tokenizer}

    def split(self, cuts: str | Sequence[int], variants: Sequence[str] | None = None) -> SplitNetwork:
        """Cut the network at these exits; see split_classifier."""
        exits = parse_cuts(self.network, cuts) if isinstance(cuts, str) else cuts
        return split_classifier(self.network, exits, variants)

    def facts(self, split: SplitNetwork, variants: Sequence[str]) -> ManifestFacts:
        """The facts that the manifest of the split holds in addition to its segments."""
        network, training = self.network, self.checkpoint.training
        multi = network.spec.task == MULTI_LABEL
        points = operating_points(self.checkpoint, split, variants)
        return ManifestFacts(
            task=_task_of(network),
            labels=network.spec.labels,
            thresholds=network.spec.thresholds or (0.5,) * multi * len(network.spec.labels),
            input=self._input(),
            rule=_default_rule(split, points),
            points=points,
            costs=self._costs(split, variants),
            training=training,
            provenance={
                "backbone": network.config.model_type,
                "network": {
                    "pooling": network.spec.pooling,
                    "head": network.spec.head,
                    "ensemble": network.spec.ensemble,
                    "policy": network.spec.policy,
                },
                "trained_with": _mapping(training.get("versions")),
            },
        )

    def samples(
        self, split: SplitNetwork, variants: Sequence[str], texts: Sequence[str] | None
    ) -> Iterator[Sample]:
        """Samples on which the split is verified, from texts or paths of images (None: built-in samples)."""
        names = [tensor.name for tensor in split.stem.inputs]
        for batch, kept in verification_batches(self.checkpoint, texts):
            inputs = {name: batch[name] for name in names}
            yield Sample(inputs, kept, _expected(self.network, split, variants, inputs))

    def _input(self) -> TextInput | ImageInput:
        facts = self.checkpoint.input
        if isinstance(facts, ImageInput):
            return facts
        return TextInput(TOKENIZER, facts.prefix, facts.pad_id, facts.longest)

    def _costs(self, split: SplitNetwork, variants: Sequence[str]) -> dict[str, StepCosts]:
        """Bit operations of every step, for a network with error forecasts; empty for others."""
        if not self.network.spec.forecast:
            return {}
        tokens = int(self.checkpoint.training.get("dev", {}).get("tokens", TOKENS))
        steps = {
            name: tuple(bit_operations(segment.macs, name, tokens) for segment in split.segments)
            for name in variants
        }
        return {"bops": StepCosts(tokens, steps)}


def _task_of(network: EarlyExitNetwork) -> str:
    """The name of the network's task in a manifest, where texts and images are classified under two names."""
    if network.spec.task != CLASSIFICATION:
        return network.spec.task
    return "text-classification" if network.family.vision is None else "image-classification"


def operating_points(
    checkpoint: Checkpoint, split: SplitNetwork, variants: Sequence[str]
) -> tuple[OperatingPoint, ...]:
    """The checkpoint's operating points in the written variants; none if exits were dropped.

    They were measured with every exit: an exit number or a threshold has another meaning when exits are left
    out. Points of a rule that chose between more variants than are written are left out, too.
    """
    spec = checkpoint.network.spec
    if len(split.segments) != len(spec.exits) or set(spec.forecast) - set(variants):
        return ()
    data = _mapping(checkpoint.training.get("data")).get("name", "")
    return tuple(
        OperatingPoint(
            point["name"],
            RuleSpec(
                point["rule"]["name"], {key: float(v) for key, v in point["rule"]["parameters"].items()}
            ),
            point["variant"],
            point["data"] or data,
            point["split"],
            {key: float(value) for key, value in point["measured"].items()},
        )
        for point in checkpoint.training.get("operating_points", [])
        if point["variant"] in variants
    )


def _default_rule(split: SplitNetwork, points: Sequence[OperatingPoint]) -> RuleSpec:
    """The default rule of a bundle: that of point "default", the trained gate, or that of the first point."""
    for point in points:
        if point.name == "default":
            return point.rule
    if len(split.segments) == 1:
        return RuleSpec("never", {})
    if any(tensor.name == "gate" for tensor in split.segments[0].outputs):
        return RuleSpec("gate", {"threshold": 0.5})
    if points:
        return points[0].rule
    if any(tensor.name == "logits" for tensor in split.segments[0].outputs):
        return RuleSpec("max_probability", {"threshold": 0.9})
    return RuleSpec("never", {})  # how far values still settle is not known before a calibration


def _expected(
    network: EarlyExitNetwork, split: SplitNetwork, variants: Sequence[str], inputs: Values
) -> Iterator[Values]:
    """Expected outputs of the stem and of every segment, computed by the network's own methods."""
    hidden, context = network.stem(inputs)
    evidence, logits = network.no_evidence(hidden), None
    flows = {} if evidence is None else {"evidence": evidence}
    if network.spec.ensemble:
        flows["ensemble"] = no_logits(network, hidden)
    yield {"hidden": hidden, **context, **flows}
    kept = {segment.blocks[-1] for segment in split.segments}
    for segment in split.segments:
        for block in segment.blocks:
            hidden = network.run_block(block - 1, hidden, context)
            if block == segment.blocks[-1] or (network.spec.ensemble and block in network.spec.exits):
                exit_index = network.spec.exits.index(block)
                pooled = network.pooled(exit_index, hidden, context)
                logits = network.classify(exit_index, pooled, logits)
        assert logits is not None
        outputs = {NEXT + "hidden": hidden, "answer": logits}
        for_rules = network.rule_logits(logits, context.get("words"))
        if for_rules is not None:
            outputs["logits"] = for_rules
        if network.spec.ensemble:
            outputs[NEXT + "ensemble"] = logits
        if exit_index < len(network.policies):
            gate_logit, evidence = network.gate_logit(exit_index, pooled, outputs["logits"], evidence)
            outputs["gate"] = gate_logit.sigmoid()
            if evidence is not None:
                outputs[NEXT + "evidence"] = evidence
        if exit_index < len(network.forecasts):
            later = network.spec.exits[exit_index + 1 :]
            exits_ahead = [number for number, block in enumerate(later) if block in kept]
            known = network.spec.forecast
            numbers = [known.index(variant) for variant in variants]
            columns = path_columns(numbers, len(known), exits_ahead, len(later))
            forecast = network.forecasts[exit_index](outputs["logits"], pooled)
            outputs["forecast"] = forecast.sigmoid()[:, columns]
        yield outputs


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
