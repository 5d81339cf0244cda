"""The losses of a task: an exit's answers against labels, and against the answers of another exit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from offramp.models.network import EarlyExitNetwork
from offramp.models.tasks import CLASSIFICATION, EMBEDDING, MULTI_LABEL, REGRESSION, TOKENS
from offramp.training.data import NO_LABEL


@dataclass(frozen=True)
class TaskLosses:
    """The losses of one task, for every row (or word) and exit.

    known: labels [rows, …] -> which rows have a label [rows]. by_label: (what the exits give [rows, exits,
    outputs], labels of these rows) -> [rows, exits]. divergence: (the same, what they should give [rows, 1 or
    exits, outputs], temperature) -> [rows, exits].
    """

    known: Callable[[Tensor], Tensor]
    by_label: Callable[[Tensor, Tensor], Tensor]
    divergence: Callable[[Tensor, Tensor, float], Tensor]


def losses_of(network: EarlyExitNetwork) -> TaskLosses:
    """The losses of a network's task; those of values count in units of the network's spread."""
    if network.spec.task != REGRESSION:
        return _LOSSES[network.spec.task]
    spread = network.value_spread
    assert spread is not None

    def squared(given: Tensor, wanted: Tensor) -> Tensor:
        return ((given.float() - wanted) / spread).square().squeeze(-1)

    return TaskLosses(
        lambda labels: ~labels.isnan(),
        lambda given, labels: squared(given, labels[:, None, None]),
        lambda given, wanted, temperature: squared(given, wanted),
    )


def exit_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of every exit [batch, exits]; logits [batch, exits, classes], labels [batch]."""
    rows, exits, _ = logits.shape
    repeated = labels[:, None].expand(rows, exits)
    return functional.cross_entropy(logits.float().flatten(0, 1), repeated.flatten(), reduction="none").view(
        rows, exits
    )


def label_divergence(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """KL of every exit's probabilities from those of `target`, times the square of the temperature.

    logits [batch, exits, classes], target [batch, 1 or exits, classes]; gives [batch, exits] (Hinton et al.,
    arXiv 1503.02531).
    """
    soft = (logits.float() / temperature).log_softmax(-1)
    wanted = (target.float() / temperature).log_softmax(-1).expand_as(soft)
    return temperature**2 * functional.kl_div(soft, wanted, reduction="none", log_target=True).sum(-1)


def _binary_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum over labels of each label's binary cross-entropy; labels [batch, labels] of 0 and 1.

    transformers takes the mean; the sum has the scale of the cross-entropy of one label.
    """
    wanted = labels[:, None].expand_as(logits).float()
    return functional.binary_cross_entropy_with_logits(logits.float(), wanted, reduction="none").sum(-1)


def _binary_divergence(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """As label_divergence, the sum over labels that are each given or not."""
    soft = logits.float() / temperature
    wanted = (target.float() / temperature).expand_as(soft)
    cross = functional.binary_cross_entropy_with_logits(soft, wanted.sigmoid(), reduction="none")
    least = functional.binary_cross_entropy_with_logits(wanted, wanted.sigmoid(), reduction="none")
    return temperature**2 * (cross - least).sum(-1)


def _no_label(labels: Tensor) -> Tensor:
    return torch.zeros(len(labels), dtype=torch.bool, device=labels.device)


def _never_by_label(given: Tensor, labels: Tensor) -> Tensor:
    return given.new_zeros(given.shape[:2])


def _angle(given: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """One less the cosine of two embeddings."""
    return 1 - functional.cosine_similarity(given.float(), wanted.float().expand_as(given), dim=-1)


_CLASSES = TaskLosses(lambda labels: labels != NO_LABEL, exit_losses, label_divergence)
_LOSSES = {
    CLASSIFICATION: _CLASSES,
    TOKENS: _CLASSES,
    MULTI_LABEL: TaskLosses(lambda labels: (labels >= 0).all(-1), _binary_losses, _binary_divergence),
    EMBEDDING: TaskLosses(_no_label, _never_by_label, _angle),
}
