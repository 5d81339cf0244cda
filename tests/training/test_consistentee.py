"""ConsistentEE: hardness, reward and gradient by hand, which exits learn, ablations, and resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from offramp.models import EarlyExitNetwork, NetworkSpec
from offramp.training.batches import EncodedText
from offramp.training.collect import Collected
from offramp.training.loop import Run
from offramp.training.recipes import consistentee
from offramp.training.recipes.consistentee import (
    ConsistentEESettings,
    easiness,
    epsilon_after,
    exit_distribution,
    exit_rewards,
    log_exit_distribution,
    memorized_exit,
    parts_of,
    reinforce_loss,
    sample_exits,
    take_actions,
    taken_exit_loss,
)

FAST: dict[str, Any] = {
    "epochs": 4,
    "batch_size": 8,
    "lr": 0.002,
    "heads_lr": 0.01,
    "policy_epochs": 6,
    "policy_lr": 0.02,
    "both_lr": 0.001,
    "both_heads_lr": 0.005,
}


def encoded(count: int, seed: int = 0, label: int | None = None) -> EncodedText:
    """Rows of tiny.rows as token ids; all with one label, if it is said."""
    rows = tiny.rows(count, seed)
    ids = [tiny.tokenizer().encode(str(row["text"])).ids for row in rows]
    labels = [row["label"] if label is None else label for row in rows]
    return EncodedText(ids, [[0] * len(row) for row in ids], np.array(labels), 0)


def published_network(seed: int = 0) -> EarlyExitNetwork:
    parts = parts_of(ConsistentEESettings())
    return tiny.network(pooling=parts.pooling, policy=parts.policy, seed=seed)


def network_of_constant_exits(*scales: float) -> EarlyExitNetwork:
    """Every exit has the logits -s and s for all rows: it is right on label 1 where s is positive."""
    network = published_network()
    with torch.no_grad():
        for early_exit, scale in zip(network.exits, scales, strict=True):
            early_exit.classify.weight.zero_()
            early_exit.classify.bias.copy_(torch.tensor([-scale, scale]))
    return network


def trained(
    folder: Path, network: EarlyExitNetwork | None = None, warm: bool = True, **settings: Any
) -> dict[str, Any]:
    """The recipe's entries of training.json on 64 rows of train and 32 of dev."""
    run = Run(network or published_network(), folder, seed=0)
    recipe_settings = ConsistentEESettings(**(FAST | settings))
    return consistentee.train(run, encoded(64), encoded(32, 1), recipe_settings, skip_warm_start=not warm)


def phases(folder: Path) -> list[str]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return list(dict.fromkeys(line["phase"] for line in lines))


def point(results: dict[str, Any], name: str) -> dict[str, float]:
    return next(dict(p["measured"]) for p in results["operating_points"] if p["name"] == name)


def test_memorized_exit_is_the_first_from_which_on_all_are_right() -> None:
    right = torch.tensor(
        [[1, 1, 1, 1], [0, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 1], [1, 1, 1, 0], [0, 0, 0, 0]]
    ).bool()
    assert memorized_exit(right).tolist() == [0, 1, 2, 3, 3, 3]


def test_easiness_is_zero_for_the_hardest() -> None:
    assert easiness(torch.tensor([0, 1, 3]), 4).tolist() == [0.75, 0.5, 0.0]


def test_reward_charges_depth_to_easy_instances_alone() -> None:
    losses = torch.tensor([[1.0, 0.5, 0.25]] * 2)
    reward = exit_rewards(-losses, 0.3, easiness(torch.tensor([0, 2]), 3))
    # m = 1 of 3 pays two thirds of 0.3 for each exit, m = 3 nothing.
    torch.testing.assert_close(reward, torch.tensor([[-1.2, -0.9, -0.85], [-1.0, -0.5, -0.25]]))


def test_exit_distribution_is_the_chain_of_gates() -> None:
    gates = torch.tensor([[0.2, 0.5], [0.9, 0.1]])
    distribution = exit_distribution(gates.logit())
    torch.testing.assert_close(distribution, torch.tensor([[0.2, 0.4, 0.4], [0.9, 0.01, 0.09]]))


def test_log_probabilities_stay_finite_where_probabilities_vanish() -> None:
    log_probability = log_exit_distribution(torch.tensor([[300.0, 300.0]]))
    torch.testing.assert_close(log_probability, torch.tensor([[0.0, -300.0, -600.0]]))


@pytest.mark.parametrize("count", [2, 8])
def test_the_reinforce_gradient_is_that_of_the_expected_reward(count: int) -> None:
    gate_logits = torch.tensor([[0.3, -0.4]], requires_grad=True)
    reward = torch.tensor([[0.1, 0.9, 0.4]])
    expected_loss = -(exit_distribution(gate_logits) * reward).sum()
    (exact,) = torch.autograd.grad(expected_loss, gate_logits)
    torch.manual_seed(0)
    draws = 20_000
    repeated = gate_logits.detach().expand(draws, 2).clone().requires_grad_()
    sampled = sample_exits(repeated, count)
    (each,) = torch.autograd.grad(reinforce_loss(repeated, reward.expand(draws, 3), sampled), repeated)
    # A trajectory is part of its own baseline, which shrinks the gradient by (K - 1) / K.
    each = each * draws * count / (count - 1)  # [draws, 2]
    standard_error = each.std(0) / draws**0.5
    assert ((each.mean(0) - exact[0]).abs() < 4 * standard_error).all()
    assert (exact[0].abs() > 20 * standard_error).all()  # the wrong sign, or twice as much, would be seen


def test_per_layer_divides_a_trajectory_by_its_exits() -> None:
    gate_logits = torch.tensor([[0.5, -0.5]])
    reward, sampled = torch.tensor([[1.0, 0.0, 3.0]]), torch.tensor([[0, 2]])
    log_probability = log_exit_distribution(gate_logits)[0]
    plain = -(-1.0 * log_probability[0] + 1.0 * log_probability[2]) / 2
    divided = -(-1.0 * log_probability[0] / 1 + 1.0 * log_probability[2] / 3) / 2
    torch.testing.assert_close(reinforce_loss(gate_logits, reward, sampled), plain)
    torch.testing.assert_close(reinforce_loss(gate_logits, reward, sampled, per_layer=True), divided)


def test_greedy_actions_exit_at_one_half_and_a_coin_decides_an_epsilon_of_them() -> None:
    gate_logits = torch.tensor([[-0.1, 0.1]]).expand(4000, 2)
    assert sample_exits(gate_logits, 2, 0.0).eq(1).all()
    torch.manual_seed(0)
    shares = torch.bincount(sample_exits(gate_logits, 2, 0.4).flatten(), minlength=3) / 8000
    torch.testing.assert_close(shares, torch.tensor([0.2, 0.64, 0.16]), atol=0.02, rtol=0)
    assert epsilon_after(0, 0.06, 0.01, 1000.0) == pytest.approx(0.06)
    assert epsilon_after(1000, 0.06, 0.01, 1000.0) == pytest.approx(0.01 + 0.05 / np.e)


def test_the_task_loss_touches_only_the_exits_taken() -> None:
    losses = torch.tensor([[3.0, 2.0, 1.0], [6.0, 5.0, 4.0]], requires_grad=True)
    loss = taken_exit_loss(losses, torch.tensor([[0, 0], [1, 2]]))
    assert loss.item() == pytest.approx((3 + 3 + 5 + 4) / 4)
    (gradient,) = torch.autograd.grad(loss, losses)
    assert gradient.tolist() == [[0.5, 0.0, 0.0], [0.0, 0.25, 0.25]]


def test_oracle_actions_exit_at_the_memorized_layer_and_policies_imitate_it() -> None:
    settings = ConsistentEESettings(actions="oracle")
    gate_logits = torch.tensor([[0.3, -0.4], [1.0, 2.0]])
    exits_taken, loss = take_actions(gate_logits, torch.zeros(2, 3), torch.tensor([1, 2]), settings, 0)
    assert exits_taken.tolist() == [[1], [2]]
    log_probability = log_exit_distribution(gate_logits)
    torch.testing.assert_close(loss, -(log_probability[0, 1] + log_probability[1, 2]) / 2)


def test_defaults_are_the_published_schedule() -> None:
    s = ConsistentEESettings()
    warm_start = (s.epochs, s.batch_size, s.lr, s.heads_lr, s.weights, s.plain_epochs)
    assert warm_start == (2, 16, 2e-5, 2e-5, "linear", 0)
    assert (s.warmup, s.weight_decay, s.trajectories, s.hardness) == (0.0, 0.0, 8, True)
    assert (s.policy_epochs, s.policy_batch, s.policy_lr) == (2, 32, 3e-4)
    assert (s.both_epochs, s.both_batch, s.both_lr, s.both_heads_lr) == (1, 32, 3e-5, 3e-5)
    assert (s.actions, s.exploration, s.stage3) == ("sampled", "bernoulli", True)


def test_the_published_policy_is_one_perceptron_an_exit() -> None:
    network = published_network().eval()
    sizes = [[tuple(p.shape) for p in policy.parameters()] for policy in network.policies]
    assert sizes == [[(32, 32), (32,), (1, 32), (1,)]] * 2 and network.pooler is not None
    pooled, logits = torch.randn(4, 3, 32), torch.randn(4, 3, 2)
    gates = network.gate_logits(pooled, logits)
    assert network.gate_logits(pooled, logits + 5).equal(gates)  # no logits, no evidence
    assert not any(
        part.p
        for policy in network.policies
        for part in policy.modules()
        if isinstance(part, torch.nn.Dropout)
    )


@pytest.mark.slow
def test_phase_four_trains_the_exits_that_rows_take_and_no_other(tmp_path: Path) -> None:
    for bias, moved in ((30.0, [True, False, False]), (-30.0, [False, False, True])):
        network = published_network()
        for policy in network.policies:
            policy.bias.fill_(bias)
        before = {name: value.clone() for name, value in network.state_dict().items()}
        trained(tmp_path / str(bias), network, warm=False, rounds=1, policy_epochs=1, policy_lr=1e-9)
        after = network.state_dict()
        weights = [f"exits.{number}.classify.weight" for number in range(3)]
        assert [not after[name].equal(before[name]) for name in weights] == moved
        shared = ("pooler.dense.weight", "backbone.embeddings.word_embeddings.weight")
        assert not any(after[name].equal(before[name]) for name in shared)  # everything trains


@pytest.mark.slow
def test_the_policies_loss_reaches_the_backbone_unless_detached(tmp_path: Path) -> None:
    weights = []
    for detached in (False, True):
        network, folder = published_network(), tmp_path / str(detached)
        trained(folder, network, warm=False, rounds=1, final_policy=False, detach_policies=detached)
        weights.append(network.state_dict()["pooler.dense.weight"].clone())
    assert not weights[0].equal(weights[1])


@pytest.mark.slow
def test_phases_alternate_and_a_last_one_fits_the_policies(tmp_path: Path) -> None:
    results = trained(tmp_path, epochs=10)
    assert phases(tmp_path) == ["joint", "policy 1", "both 1", "policy 2", "both 2", "policy last"]
    assert results["published_points"] == ["trained"] and point(results, "trained")["accuracy"] > 80
    assert sum(results["memorized_layers"]) == pytest.approx(1, abs=1e-3)
    bound = results["memorized_on_dev"]
    assert bound["mean_exit"] < 3 and bound["accuracy"] == pytest.approx(
        results["dev"]["full_depth"], abs=0.01
    )


@pytest.mark.slow
def test_without_stage_three_the_policies_alone_are_trained(tmp_path: Path) -> None:
    trained(tmp_path, stage3=False, final_policy=False, epochs=1)
    assert phases(tmp_path) == ["joint", "policy 1", "policy 2"]


@pytest.mark.slow
def test_a_policy_learns_where_the_reward_is_largest(tmp_path: Path) -> None:
    """Exit 1 is wrong; exit 3 is as right as exit 2 and one exit dearer."""
    network, rows = network_of_constant_exits(-9, 9, 9), encoded(64, label=1)
    settings = ConsistentEESettings(**(FAST | {"alpha": 1.0, "rounds": 0, "policy_epochs": 40}))
    results = consistentee.train(Run(network, tmp_path, seed=0), rows, rows, settings, skip_warm_start=True)
    assert results["memorized_layers"] == [0.0, 1.0, 0.0]
    assert point(results, "trained")["mean_exit"] == 2.0
    assert results["memorized_on_dev"]["mean_exit"] == 2.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"alpha": 0.3}, [1, 2, 3]),
        ({"alpha": 0.3, "hardness": False}, [1, 2, 3]),
        ({"actions": "oracle"}, [1, 2, 3]),
        ({"alpha": 0.0}, [3, 3, 3]),  # the last exit has the least loss
        ({"alpha": 30.0}, [1, 1, 3]),  # dearer than any error, but for the hardest rows
        ({"alpha": 30.0, "hardness": False}, [1, 1, 1]),
    ],
)
def test_policies_learn_the_exit_of_each_row_if_the_state_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], expected: list[int]
) -> None:
    """The first right exit differs from row to row; three numbers of the pooled state name it.

    They differ by 0.01 between rows, as states do behind a pooler that was not pretrained.
    """
    generator = torch.Generator().manual_seed(0)
    first_right = torch.randint(0, 3, (400,), generator=generator)
    exits = torch.arange(3)
    # Loss of a right exit: e^-4, e^-4.5, e^-5. Of a wrong one: about 4.
    margins = torch.where(exits >= first_right[:, None], 4 + exits / 2, -4.0)
    pooled = 0.1 * torch.randn(400, 3, 32, generator=generator)
    pooled[..., :3] += torch.nn.functional.one_hot(first_right, 3)[:, None]
    pooled = 0.3 + 0.01 * pooled
    labels, logits = torch.ones(400, dtype=torch.long), torch.stack([torch.zeros_like(margins), margins], -1)
    collected = Collected(logits, pooled, None, labels, np.full(400, 2))
    monkeypatch.setattr(consistentee, "collect", lambda *_, **__: collected)
    memorized = memorized_exit(logits.argmax(-1) == labels[:, None])
    assert memorized.equal(first_right)
    network, rows = published_network(), EncodedText([[2, 3]] * 400, [[0, 0]] * 400, labels.numpy(), 0)
    settings = ConsistentEESettings(**(FAST | {"policy_epochs": 16, "policy_lr": 0.02} | change))
    consistentee._fit_policies(Run(network, tmp_path, seed=0), rows, memorized, settings, "policy")
    is_open = (network.eval().gate_logits(pooled, logits) > 0).long()  # P(exit) above 0.5
    taken = torch.cat([is_open, torch.ones(400, 1, dtype=torch.long)], 1).argmax(1) + 1
    for number, depth in enumerate(expected):
        assert taken[first_right == number].float().mean() == pytest.approx(depth, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("hardness", "depth"), [(True, 3.0), (False, 1.0)])
def test_without_hardness_the_hardest_instances_pay_for_depth(
    tmp_path: Path, hardness: bool, depth: float
) -> None:
    """No exit is right, so m = L; the last has the least loss."""
    network, rows = network_of_constant_exits(-1.5, -1.5, -0.25), encoded(64, label=1)
    change = {"alpha": 2.0, "hardness": hardness, "rounds": 0, "policy_epochs": 40}
    settings = ConsistentEESettings(**(FAST | change))
    results = consistentee.train(Run(network, tmp_path, seed=0), rows, rows, settings, skip_warm_start=True)
    assert point(results, "trained")["mean_exit"] == depth


@pytest.mark.slow
def test_a_killed_run_ends_with_the_weights_of_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ConsistentEESettings(**(FAST | {"epochs": 1, "policy_epochs": 2}))
    rows, dev, actions = encoded(40), encoded(16, 1), consistentee.take_actions
    final_weights = []
    for kills in ((), (3, 2, 4)):  # calls of take_actions: in a policy phase, at once again, in phase 4
        for kill in (*kills, 0):
            network = published_network()
            run = Run(network, tmp_path / str(len(kills)), seed=0, save_every=-1.0)
            calls_left = [kill]

            def interrupted(*arguments: Any, calls_left: list[int] = calls_left) -> Any:
                calls_left[0] -= 1
                if calls_left[0] == 0:
                    raise KeyboardInterrupt
                return actions(*arguments)

            monkeypatch.setattr(consistentee, "take_actions", interrupted)
            if kill:
                with pytest.raises(KeyboardInterrupt):
                    consistentee.train(run, rows, dev, settings, skip_warm_start=False)
            else:
                consistentee.train(run, rows, dev, settings, skip_warm_start=False)
        final_weights.append({name: value.clone() for name, value in network.state_dict().items()})
    for name, value in final_weights[0].items():
        assert value.equal(final_weights[1][name]), name


def test_policies_of_older_checkpoints_load() -> None:
    """Their bias was a parameter; it is a constant now, under the same name."""
    old = {name: torch.full_like(value, 0.5) for name, value in published_network().state_dict().items()}
    assert "policies.0.bias" in old
    network = EarlyExitNetwork(tiny.backbone("bert"), NetworkSpec(("a", "b"), (1, 2, 3), "cls", "state"))
    network.load_state_dict(old)
    assert network.policies[0].bias == 0.5


@pytest.mark.parametrize(
    "wrong",
    [
        {"actions": "other"},
        {"exploration": "other"},
        {"alpha": -0.1},
        {"trajectories": 1},
        {"rounds": -1},
        {"rounds": 0, "final_policy": False},
        {"epsilon_start": 0.1, "epsilon_end": 0.2},
        {"epsilon_decay": 0.0},
        {"weights": "other"},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(wrong)))):
        ConsistentEESettings(**wrong)  # type: ignore[arg-type]
