"""ConsistentEE's hardness, reward, estimators and policies against small cases computed by hand."""

from __future__ import annotations

import pytest
import torch

from offramp.training.recipes.consistentee import (
    ConsistentEESettings,
    draw_alpha,
    easiness,
    exit_distribution,
    exit_qualities,
    exit_rewards,
    memorized_exit,
    policy_loss,
)

LOGITS = torch.tensor([[[2.0, 0.0], [0.0, 2.0], [0.0, 4.0]]])
LABELS = torch.tensor([1])


def test_exit_distribution_is_the_chain_of_gates() -> None:
    gates = torch.tensor([[0.2, 0.5], [0.9, 0.1]])
    distribution = exit_distribution(gates.logit())
    torch.testing.assert_close(distribution, torch.tensor([[0.2, 0.4, 0.4], [0.9, 0.01, 0.09]]))


def test_reward_charges_depth_to_easy_instances_alone() -> None:
    quality = exit_qualities(LOGITS, LABELS, "ce")
    easy = exit_rewards(quality, torch.tensor([0.1]), torch.tensor([0.5]))
    hard = exit_rewards(quality, torch.tensor([0.1]), torch.tensor([0.0]))
    torch.testing.assert_close(hard - easy, torch.tensor([[0.05, 0.10, 0.15]]))
    torch.testing.assert_close(hard[0, 2], torch.log_softmax(LOGITS[0, 2], -1)[1])


def test_qualities_correct_and_agree() -> None:
    assert exit_qualities(LOGITS, LABELS, "correct").tolist() == [[0.0, 1.0, 1.0]]
    assert exit_qualities(LOGITS, torch.tensor([0]), "agree").tolist() == [[0.0, 1.0, 1.0]]


def test_prices_are_drawn_around_alpha_and_shift_the_gates() -> None:
    torch.manual_seed(0)
    alpha, shift = draw_alpha(4000, ConsistentEESettings(alpha=0.02, spread=4.0), torch.device("cpu"))
    assert 0.005 <= alpha.min() < 0.0055 and 0.075 < alpha.max() <= 0.08
    torch.testing.assert_close(shift, 3.0 * (alpha / 0.02).log(), atol=1e-4, rtol=0)
    same, no_shift = draw_alpha(3, ConsistentEESettings(alpha=0.02, spread=1.0), torch.device("cpu"))
    assert same.tolist() == pytest.approx([0.02] * 3) and no_shift.tolist() == [0.0] * 3


def test_sampled_gradient_is_the_expected_gradient_on_average() -> None:
    gate_logits = torch.tensor([[0.3, -0.4]], requires_grad=True)
    reward = torch.tensor([[0.1, 0.9, 0.4]])
    exact = torch.autograd.grad(policy_loss(gate_logits, reward, ConsistentEESettings()), gate_logits)[0]
    torch.manual_seed(0)
    repeated = gate_logits.detach().expand(20000, 2).clone().requires_grad_()
    settings = ConsistentEESettings(estimator="sampled", trajectories=8)
    loss = policy_loss(repeated, reward.expand(20000, 3), settings)
    sampled = torch.autograd.grad(loss, repeated)[0].sum(0)
    # The mean of the K samples contains the sample itself, which shrinks the gradient by (K - 1) / K.
    torch.testing.assert_close(sampled * 8 / 7, exact[0], atol=0.004, rtol=0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"quality": "other"},
        {"estimator": "other"},
        {"holdout": 1.0},
        {"alpha": 0.0},
        {"spread": 0.5},
        {"estimator": "sampled", "trajectories": 1},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        ConsistentEESettings(**wrong)  # type: ignore[arg-type]


def test_memorized_exit_is_the_first_from_which_on_all_are_right() -> None:
    right = torch.tensor(
        [[1, 1, 1, 1], [0, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 1], [1, 1, 1, 0], [0, 0, 0, 0]]
    ).bool()
    assert memorized_exit(right).tolist() == [0, 1, 2, 3, 3, 3]


def test_easiness_is_zero_for_the_hardest() -> None:
    predictions = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])
    logits = torch.nn.functional.one_hot(predictions, 2).float()
    assert easiness(logits, torch.ones(2, dtype=torch.long)).tolist() == [0.75, 0.0]
