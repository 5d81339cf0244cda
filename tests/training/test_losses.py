"""Losses of every task: against labels, and against another exit's answers."""

from __future__ import annotations

import math

import pytest
import tiny_tasks
import torch
from torch.nn import functional

from offramp.models.tasks import EMBEDDING, MULTI_LABEL, REGRESSION, TOKENS
from offramp.training.losses import losses_of


def test_the_loss_of_several_labels_is_the_sum_of_their_binary_losses() -> None:
    losses = losses_of(tiny_tasks.network(MULTI_LABEL))
    logits, labels = torch.randn(4, 2, 3), torch.randint(0, 2, (4, 3)).float()
    expected = functional.binary_cross_entropy_with_logits(logits[:, 1], labels, reduction="none").sum(1)
    torch.testing.assert_close(losses.by_label(logits, labels)[:, 1], expected)


def test_the_divergence_of_several_labels_is_the_sum_of_two_outcomes_of_each() -> None:
    losses = losses_of(tiny_tasks.network(MULTI_LABEL))
    given, wanted = torch.tensor([[[0.0]]]), torch.tensor([[[2.0]]])
    p = 1 / (1 + math.exp(-2))
    expected = p * math.log(p / 0.5) + (1 - p) * math.log((1 - p) / 0.5)
    assert float(losses.divergence(given, wanted, 1.0)) == pytest.approx(expected, abs=1e-6)
    assert float(losses.divergence(wanted, wanted, 2.0)) == pytest.approx(0, abs=1e-6)


def test_the_loss_of_a_value_is_in_units_of_the_spread() -> None:
    network = tiny_tasks.network(REGRESSION)
    assert network.value_spread is not None
    network.value_spread.fill_(10.0)
    losses = losses_of(network)
    given = torch.tensor([[[5.0], [25.0]]])
    torch.testing.assert_close(losses.by_label(given, torch.tensor([5.0])), torch.tensor([[0.0, 4.0]]))
    torch.testing.assert_close(losses.divergence(given, given[:, 1:], 2.0), torch.tensor([[4.0, 0.0]]))


def test_an_embedding_is_compared_by_its_angle() -> None:
    losses = losses_of(tiny_tasks.network(EMBEDDING))
    given = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    divergence = losses.divergence(given, torch.tensor([[[3.0, 0.0]]]), 1.0)
    torch.testing.assert_close(divergence, torch.tensor([[0.0, 1.0]]))


def test_rows_without_a_label_are_known_as_such() -> None:
    for task, labels, known in (
        (MULTI_LABEL, torch.tensor([[1.0, 0.0, 0.0], [-1.0, -1.0, -1.0]]), [True, False]),
        (TOKENS, torch.tensor([0, -1, 2]), [True, False, True]),
        (REGRESSION, torch.tensor([1.5, float("nan")]), [True, False]),
        (EMBEDDING, torch.tensor([-1, -1]), [False, False]),
    ):
        assert losses_of(tiny_tasks.network(task)).known(labels).tolist() == known
