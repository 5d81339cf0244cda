"""ConsistentEE's reward, estimators and policies against small cases worked out by hand."""

from __future__ import annotations

import pytest
import torch

from offramp.training.recipes.consistentee import (
    ConsistentEE,
    draw_alpha,
    leave_probabilities,
    policy_loss,
    qualities,
    rewards,
)

LOGITS = torch.tensor([[[2.0, 0.0], [0.0, 2.0], [0.0, 4.0]]])
LABELS = torch.tensor([1])


def test_leave_probabilities_are_the_chain_of_gates() -> None:
    gates = torch.tensor([[0.2, 0.5], [0.9, 0.1]])
    leave = leave_probabilities(gates.logit())
    torch.testing.assert_close(leave, torch.tensor([[0.2, 0.4, 0.4], [0.9, 0.01, 0.09]]))


def test_reward_charges_depth_to_easy_instances_alone() -> None:
    quality = qualities(LOGITS, LABELS, "ce")
    easy = rewards(quality, torch.tensor([0.1]), torch.tensor([0.5]))
    hard = rewards(quality, torch.tensor([0.1]), torch.tensor([0.0]))
    torch.testing.assert_close(hard - easy, torch.tensor([[0.05, 0.10, 0.15]]))
    torch.testing.assert_close(hard[0, 2], torch.log_softmax(LOGITS[0, 2], -1)[1])


def test_quality_of_being_right_and_of_agreeing() -> None:
    assert qualities(LOGITS, LABELS, "correct").tolist() == [[0.0, 1.0, 1.0]]
    assert qualities(LOGITS, torch.tensor([0]), "agree").tolist() == [[0.0, 1.0, 1.0]]


def test_prices_are_drawn_around_alpha_and_shift_the_gates_with_them() -> None:
    torch.manual_seed(0)
    alpha, shift = draw_alpha(4000, ConsistentEE(alpha=0.02, spread=4.0), torch.device("cpu"))
    assert 0.005 <= alpha.min() < 0.0055 and 0.075 < alpha.max() <= 0.08
    torch.testing.assert_close(shift, 3.0 * (alpha / 0.02).log(), atol=1e-4, rtol=0)
    same, still = draw_alpha(3, ConsistentEE(alpha=0.02, spread=1.0), torch.device("cpu"))
    assert same.tolist() == pytest.approx([0.02] * 3) and still.tolist() == [0.0] * 3


def test_sampled_gradient_is_the_expected_gradient_on_average() -> None:
    gates = torch.tensor([[0.3, -0.4]], requires_grad=True)
    reward = torch.tensor([[0.1, 0.9, 0.4]])
    exact = torch.autograd.grad(policy_loss(gates, reward, ConsistentEE()), gates)[0]
    torch.manual_seed(0)
    many = gates.detach().expand(20000, 2).clone().requires_grad_()
    settings = ConsistentEE(estimator="sampled", trajectories=8)
    found = torch.autograd.grad(policy_loss(many, reward.expand(20000, 3), settings), many)[0].sum(0)
    # The mean of the K samples contains the sample itself, which shrinks the gradient by (K - 1) / K.
    torch.testing.assert_close(found * 8 / 7, exact[0], atol=0.004, rtol=0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"quality": "luck"},
        {"estimator": "guess"},
        {"holdout": 1.0},
        {"alpha": 0.0},
        {"spread": 0.5},
        {"estimator": "sampled", "trajectories": 1},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        ConsistentEE(**wrong)  # type: ignore[arg-type]
