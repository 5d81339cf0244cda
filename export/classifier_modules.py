"""The modules that become a classifier's graphs: stem, and segments of blocks with the exit after them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from offramp.models.exits import join_logits, pool_tokens
from offramp.models.families.family import Context
from offramp.models.network import EarlyExitNetwork
from offramp.models.tasks import CLASSIFICATION


def stem_inputs(network: EarlyExitNetwork) -> tuple[str, ...]:
    """Names of the tensors that a classifier's stem reads: integers [batch, seq], or pixel_values."""
    first, *others = network.family.inputs
    if network.family.vision is not None:
        return (first,)
    words = ("word_starts",) if network.task.per_token else ()
    return (first, "attention_mask", *others, *words)


class ClassifierStem(nn.Module):
    """The graph before the first segment: from token ids and attention mask, or pixels, to the hidden state.

    Outputs: hidden [batch, seq, hidden size], the mask and all other tensors that every segment reads.
    """

    def __init__(self, network: EarlyExitNetwork, *, walks: bool) -> None:
        super().__init__()
        self.network = network
        self.reads = stem_inputs(network)
        self.walks = walks  # whether several segments follow, which pass on evidence and ensemble

    def named(self, *tensors: torch.Tensor) -> Context:
        """Run the stem and return its outputs by name; tensors: its inputs, in the order of stem_inputs()."""
        hidden, context = self.network.stem(dict(zip(self.reads, tensors, strict=True)))
        outputs = {"hidden": hidden, **context}
        no_evidence = self.network.no_evidence(hidden) if self.walks else None
        if no_evidence is not None:
            outputs["evidence"] = no_evidence
        if self.walks and self.network.spec.ensemble:
            outputs["ensemble"] = no_logits(self.network, hidden)
        return outputs

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the stem; tensors: its inputs, in the order of stem_inputs()."""
        return tuple(self.named(*tensors).values())


def no_logits(network: EarlyExitNetwork, hidden: torch.Tensor) -> torch.Tensor:
    """The logits before the first exit of an ensemble: zeros for each row, or for each token."""
    axes = hidden.shape[:2] if network.task.per_token else hidden.shape[:1]
    return torch.zeros(*axes, network.outputs)


class SegmentExit(nn.Module):
    """One exit of a segment: pooling, head and, in an ensemble, the join with the exits before it."""

    def __init__(self, network: EarlyExitNetwork, exit_index: int) -> None:
        super().__init__()
        exit_head = network.exits[exit_index]
        self.norm, self.pooler = network.norm, network.pooler
        self.attention = exit_head.attention
        self.own_pool = exit_head.own_pool
        self.exit = exit_head.folded()  # type: ignore[operator]
        self.decay: torch.Tensor | None = None if exit_index == 0 else exit_head.decay  # type: ignore[assignment]
        self.per_token = network.task.per_token
        self.in_units = partial(network.in_units, exit_index)

    def forward(
        self, hidden: torch.Tensor, context: Context, before: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the pooled vector [batch, hidden] and what the exit gives, such as logits [batch, classes].

        hidden [batch, seq, hidden]; before [batch, classes]: logits of the exit before, or None.
        """
        parts = self.attention, self.pooler, self.own_pool
        pooled = pool_tokens(hidden, context, self.norm, *parts, per_token=self.per_token)  # type: ignore[arg-type]
        return pooled, self.in_units(join_logits(self.exit(pooled), self.decay, before))


class ClassifierSegment(nn.Module):
    """Consecutive blocks of a classifier, the exit after them, and its policy or error forecast.

    The last exit has no policy and no forecast. For tasks beside classification a segment also outputs the
    answer, all that the exit gives; rules read its logits, see EarlyExitNetwork.rule_logits.

    exits_ahead: later exits that are kept, counted from here (0: the next exit of the network). variants:
    numbers of the variants between which the forecast chooses. last: output the logits alone. In an ensemble
    a segment also computes the exits that were dropped from it, since later exits read them. done: the first
    blocks, which other graphs have run; they are left out, and if none is left, hidden is no output.
    """

    def __init__(
        self,
        network: EarlyExitNetwork,
        blocks: range,
        exit_index: int,
        reads: Sequence[str],
        exits_ahead: Sequence[int] = (),
        variants: Sequence[int] = (),
        *,
        last: bool,
        done: int = 0,
    ) -> None:
        super().__init__()
        self.family = network.family
        self.reads = tuple(reads)
        self.done = done
        self.last = last
        self.rule_logits = network.rule_logits
        self.has_answer = network.spec.task != CLASSIFICATION
        self.has_ensemble = network.spec.ensemble
        fold = network.family.folded
        self.blocks = nn.ModuleList(
            fold(network.blocks[block]) if number >= done else nn.Identity()
            for number, block in enumerate(blocks)
        )
        first = 0 if blocks.start == 0 else network.spec.exits.index(blocks.start) + 1
        numbers = range(first, exit_index + 1) if network.spec.ensemble else (exit_index,)
        self.heads = nn.ModuleDict(
            {str(network.spec.exits[n] - blocks.start): SegmentExit(network, n) for n in numbers}
        )
        self.policy: nn.Module | None = None
        if not last and len(network.policies):
            classes = len(network.spec.labels)
            self.policy = network.policies[exit_index].folded(classes)  # type: ignore[operator]
        self.forecast: nn.Module | None = None
        if not last and len(network.forecasts) and exits_ahead:
            self.forecast = network.forecasts[exit_index].folded(variants, exits_ahead)  # type: ignore[operator]

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the segment; tensors: its inputs, in the order of `reads`."""
        context = dict(zip(self.reads, tensors, strict=True))
        hidden, evidence = context.pop("hidden"), context.pop("evidence", None)
        logits, words = context.pop("ensemble", None), context.pop("words", None)
        for number, block in enumerate(self.blocks, 1):
            if number > self.done:
                hidden = self.family.run_block(block, hidden, context)  # [batch, seq, hidden]
            if str(number) in self.heads:
                pooled, logits = self.heads[str(number)](hidden, context, logits)  # [batch, classes]
        assert logits is not None  # the last block has an exit
        answer = (logits,) if self.has_answer else ()
        for_rules = self.rule_logits(logits, words)
        signals = () if for_rules is None else (for_rules,)
        if self.last:
            return *signals, *answer
        forecast = () if self.forecast is None else (self.forecast(logits, pooled),)
        flows: tuple[torch.Tensor, ...] = (hidden,) if self.done < len(self.blocks) else ()
        gate: tuple[torch.Tensor, ...] = ()
        if self.policy is not None:
            gate_logit, next_evidence = self.policy(pooled, logits, evidence)
            gate = (gate_logit.sigmoid(),)  # [batch]
            flows = flows if evidence is None else (*flows, next_evidence)
        if self.has_ensemble:
            flows = (*flows, logits)
        return *flows, *signals, *gate, *forecast, *answer
