"""Recipe consistentee_lm: rewards, the policy gradient, trained parts, and a folder that loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch.nn import functional

from offramp.models.decoder import DecoderNetwork
from offramp.runtime.errors import BadSetting
from offramp.training.checkpoint import EXITS
from offramp.training.decoder import load_decoder
from offramp.training.lm_data import IGNORED, TokenRows, load_token_rows
from offramp.training.loop import Run
from offramp.training.options import TrainConfig
from offramp.training.recipes import consistentee_lm
from offramp.training.recipes.consistentee import exit_distribution, reinforce_loss
from offramp.training.recipes.consistentee_lm import (
    ConsistentEELMSettings,
    exit_rewards,
    prepare,
    sample_trajectories,
    train,
)
from offramp.training.token_exits import collect_tokens, compare_rules
from offramp.training.train import train as run_training

pytestmark = pytest.mark.slow

EXITS_AT = (1, 2, 3)
# Actions and loss whose gradient is that of the expected reward.
UNBIASED: dict[str, Any] = {"exploration": "bernoulli", "expert": False, "per_layer": False}


def answer_rows(network: DecoderNetwork, count: int, length: int = 4) -> TokenRows:
    """Random prompts and greedy tokens of the full network: its last block is always right."""
    random = np.random.default_rng(0)
    rows = [random.integers(3, 60, 3 + number % 4).tolist() for number in range(count)]
    answers = tiny.greedy(network, rows, length)
    return TokenRows(
        [row + answer for row, answer in zip(rows, answers, strict=True)], [len(row) for row in rows]
    )


def trained(
    folder: Path, network: DecoderNetwork, rows: TokenRows, exits: tuple[int, ...] = EXITS_AT, **settings: Any
) -> dict[str, Any]:
    """The recipe's figures on the rows that it was trained on."""
    recipe_settings = ConsistentEELMSettings(batch_size=4, **settings)
    prepare(network, exits, recipe_settings)
    run = Run(network, folder, seed=0)
    results = train(run, {"train": rows, "dev": rows}, exits, recipe_settings)
    return dict(results["dev"])


def logged(folder: Path, phase: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("phase") == phase]


def without_late_blocks(network: DecoderNetwork, first: int) -> DecoderNetwork:
    """Blocks from `first` on (0-based) add nothing: exits after them agree with the last block."""
    with torch.no_grad():
        for block in list(network.blocks)[first:]:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    return network


def test_reward_of_every_exit() -> None:
    losses = torch.tensor([[1.0, 0.5, 0.25], [2.0, 3.0, 4.0]])
    right = torch.tensor([[False, True, True], [True, True, False]])
    reward = exit_rewards(losses, right, (2, 4, 8), ConsistentEELMSettings(alpha=0.1))
    # The first needs 4 of 8 blocks and pays half of 0.1 a block; the second is never right at the end: free.
    torch.testing.assert_close(reward, torch.tensor([[-1.1, -0.7, -0.65], [-2.0, -3.0, -4.0]]))
    plain = exit_rewards(losses, right, (2, 4, 8), ConsistentEELMSettings(alpha=0.1, hardness=False))
    torch.testing.assert_close(plain, torch.tensor([[-1.2, -0.9, -1.05], [-2.2, -3.4, -4.8]]))


@pytest.mark.parametrize("count", [2, 4])
def test_unbiased_settings_give_the_gradient_of_the_expected_reward(count: int) -> None:
    torch.manual_seed(0)
    gate_logits = torch.tensor([[0.3, -0.7], [1.2, 0.1]], requires_grad=True)
    reward = torch.tensor([[-3.0, -0.6, -1.8], [1.2, -4.5, 2.7]])
    (exact,) = torch.autograd.grad(-(exit_distribution(gate_logits) * reward).sum(1).mean(), gate_logits)
    repeated = gate_logits.repeat(100_000, 1)
    sampled = sample_trajectories(repeated, 0, ConsistentEELMSettings(trajectories=count, **UNBIASED))
    loss = reinforce_loss(repeated, reward.repeat(100_000, 1), sampled)
    (estimate,) = torch.autograd.grad(loss, gate_logits)
    # A trajectory is part of its own baseline, which shrinks the gradient by (K - 1) / K.
    torch.testing.assert_close(estimate * count / (count - 1), exact, atol=0.01, rtol=0)
    assert float(exact.abs().min()) > 0.05  # twice as much, or the wrong sign, would be seen


def test_actions_are_those_of_the_public_code() -> None:
    """One trajectory never exits; a coin decides one action of ten at first, and ever fewer."""
    torch.manual_seed(0)
    gate_logits = torch.tensor([[-0.1, 0.1]]).expand(4000, 2)
    for step, epsilon in ((0, 0.1), (10_000, 0.1 / np.e)):
        sampled = sample_trajectories(gate_logits, step, ConsistentEELMSettings())
        assert sampled.shape == (4000, 4) and sampled[:, 0].eq(2).all()
        shares = torch.bincount(sampled[:, 1:].flatten(), minlength=3) / 12_000
        coin = epsilon / 2
        expected = torch.tensor([coin, (1 - coin) * (1 - coin), (1 - coin) * coin])
        torch.testing.assert_close(shares, expected, atol=0.008, rtol=0)
    drawn = sample_trajectories(torch.full((50, 2), 9.0), 0, ConsistentEELMSettings(**UNBIASED))
    assert not drawn.bool().any()


@pytest.mark.parametrize("target", ["data", "model"])
def test_exits_learn_completions_weighted_by_block(tmp_path: Path, target: str) -> None:
    network = DecoderNetwork(tiny.decoder("llama"))
    rows = answer_rows(network, 4)
    for ids in rows.ids:
        ids[-1] = 3  # not the model's prediction
    ids, targets = rows.batch(range(4))
    with torch.no_grad():
        out = network.model(ids, output_hidden_states=True)
    learned = targets != IGNORED
    expected = []
    for hidden in out.hidden_states[1:3]:
        logits = network.model.lm_head(network.model.model.norm(hidden))[learned].detach()
        goal = targets[learned] if target == "data" else out.logits[learned].softmax(-1)
        expected.append(float(functional.cross_entropy(logits, goal)))
    none = {"policy_epochs": 0, "both_epochs": 0}
    dev = trained(tmp_path, network, rows, epochs=40, heads_lr=0.03, target=target, **none)
    first = logged(tmp_path, "heads")[0]
    assert [first["exit_1"], first["exit_2"]] == pytest.approx(expected, rel=1e-4)
    assert first["loss"] == pytest.approx((expected[0] + 2 * expected[1]) / 3, rel=1e-4)
    agreement = "right" if target == "data" else "agrees"
    assert min(dev[agreement][:2]) > 0.9  # twelve tokens can be memorized
    assert dev["policy"]["depth"] == 3


# Epsilon-greedy actions pass a closed gate once in twenty times, so some tokens are not learned.
@pytest.mark.parametrize(("settings", "share"), [({}, 0.8), (UNBIASED, 1.0)])
def test_a_policy_exits_where_later_exits_are_no_better(
    tmp_path: Path, settings: dict[str, Any], share: float
) -> None:
    network = without_late_blocks(DecoderNetwork(tiny.decoder("llama")), 1)
    only = {"epochs": 0, "both_epochs": 0, "policy_epochs": 100, "policies_lr": 0.3, **settings}
    dev = trained(tmp_path, network, answer_rows(network, 60), alpha=0.05, **only)
    assert dev["right"] == [1.0, 1.0, 1.0]
    assert dev["policy"]["shares"][0] >= share
    assert dev["calm"]["confidence"]["depth"] == pytest.approx(dev["policy"]["depth"], abs=0.05)


@pytest.mark.parametrize(("settings", "depth"), [({}, 2.7), (UNBIASED, 2.9)])
def test_a_policy_continues_where_exits_are_wrong(
    tmp_path: Path, settings: dict[str, Any], depth: float
) -> None:
    network = DecoderNetwork(tiny.decoder("llama"))
    only = {"epochs": 0, "both_epochs": 0, "policy_epochs": 60, "policies_lr": 0.1, **settings}
    dev = trained(tmp_path, network, answer_rows(network, 60), alpha=0.001, **only)
    assert dev["right"][0] < 0.2 and dev["right"][2] == 1.0
    assert dev["policy"]["depth"] > depth
    assert dev["policy"]["loss"] < min(dev["loss"][:2]) - 0.3


def test_a_policy_distinguishes_tokens(tmp_path: Path) -> None:
    """At a price at which always and never exiting are both worse than exiting where the loss is small."""
    network = DecoderNetwork(tiny.decoder("llama"))
    rows = answer_rows(network, 80)
    only = {"epochs": 0, "both_epochs": 0, "policy_epochs": 150, "policies_lr": 0.05, **UNBIASED}
    dev = trained(tmp_path, network, rows, (1, 3), alpha=0.5, hardness=False, **only)
    assert 0.1 < dev["policy"]["shares"][0] < 0.9
    assert dev["policy"]["loss"] + 0.5 * dev["policy"]["depth"] < min(
        dev["loss"][0] + 0.5 * 1, dev["loss"][1] + 0.5 * 3
    )


@pytest.mark.parametrize("both_policies", [False, True])
def test_in_the_last_phase_exits_are_trained_only_on_tokens_that_exit_there(
    tmp_path: Path, both_policies: bool
) -> None:
    for bias, learns in ((-50.0, False), (0.0, True)):
        network = DecoderNetwork(tiny.decoder("llama"))
        prepare(network, EXITS_AT, ConsistentEELMSettings())
        with torch.no_grad():
            for policy in network.policies.values():
                policy.bias.fill_(bias)
        only = {"epochs": 0, "policy_epochs": 0, "both_epochs": 2, "both_heads_lr": 0.01, **UNBIASED}
        rows, folder = answer_rows(network, 8), tmp_path / str(bias)
        trained(folder, network, rows, **only, both_policies=both_policies)
        moved = [bool(exit.weight.any()) for exit in network.exits.values()]
        assert moved == [learns, learns]
        policies_moved = any(bool(policy.weight.any()) for policy in network.policies.values())
        assert policies_moved == (learns and both_policies)
        first_line = logged(folder, "both" if both_policies else "taken exits")[0]
        assert first_line["depth"] == pytest.approx(1.75 if learns else 3.0)


def test_prepare_adds_missing_modules_once_and_refuses_contradictions() -> None:
    network = DecoderNetwork(tiny.decoder("llama"))
    network.add_exits((1, 2))  # a folder with translators alone
    with torch.no_grad():
        network.exits["1"].weight.fill_(0.5)
    for _ in range(2):
        prepare(network, EXITS_AT, ConsistentEELMSettings())
    assert bool((network.exits["1"].weight == 0.5).all()) and sorted(network.policies) == ["1", "2"]
    with pytest.raises(BadSetting, match=r"exits after blocks \[1, 2\]"):
        prepare(network, (2, 3), ConsistentEELMSettings())
    with pytest.raises(BadSetting, match="one before the last"):
        prepare(network, (3,), ConsistentEELMSettings())
    for wrong in (
        {"trajectories": 1},
        {"alpha": -1.0},
        {"target": "other"},
        {"heads_lr": 0.0},
        {"epochs": -1},
        {"exploration": "other"},
        {"epsilon_decay": -1.0},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong)).replace("heads_lr", "learning rates")):
            ConsistentEELMSettings(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tokens_per_batch"):
        ConsistentEELMSettings(tokens_per_batch=0)


def test_a_killed_run_ends_with_the_weights_of_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final_weights = []
    settings = ConsistentEELMSettings(batch_size=4, policy_epochs=3, tokens_per_batch=7)
    rows = answer_rows(DecoderNetwork(tiny.decoder("llama")), 24)
    for kills in ((), (2, 5)):  # calls of sample_trajectories: in phase 2, in phase 3
        folder = tmp_path / str(len(kills))
        for kill in (*kills, 0):
            network = DecoderNetwork(tiny.decoder("llama"))
            prepare(network, EXITS_AT, settings)
            run = Run(network, folder, seed=0, save_every=-1.0)
            calls_left = [kill]

            def interrupted(*arguments: Any, calls_left: list[int] = calls_left) -> torch.Tensor:
                calls_left[0] -= 1
                if calls_left[0] == 0:
                    raise KeyboardInterrupt
                return sample_trajectories(*arguments)

            monkeypatch.setattr(consistentee_lm, "sample_trajectories", interrupted)
            if kill:
                with pytest.raises(KeyboardInterrupt):
                    train(run, {"train": rows}, EXITS_AT, settings)
            else:
                train(run, {"train": rows}, EXITS_AT, settings)
        final_weights.append({name: value.clone() for name, value in network.state_dict().items()})
    for name, value in final_weights[0].items():
        assert torch.equal(value, final_weights[1][name]), name
        assert name.startswith("model.") or bool(value.any())


def test_from_options_to_a_folder_that_loads(tmp_path: Path) -> None:
    tiny.decoder("llama").save_pretrained(tmp_path / "model")
    tiny.hub_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for split, seed in (("train", 0), ("dev", 1)):
        lines = [
            json.dumps(
                {"prompt": row["text"], "completion": "the film is good" if row["label"] else "not at all"}
            )
            for row in tiny.rows(24, seed)
        ]
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    config = TrainConfig(
        model=str(tmp_path / "model"),
        init=None,
        data=str(tmp_path / "data"),
        recipe="consistentee_lm",
        out=tmp_path / "out",
        exits="1,2",
        pooling=None,
        prefix="",
        max_length=32,
        seed=0,
        precision="fp32",
        settings=("epochs=6", "heads_lr=0.02", "policies_lr=0.05", "policy_epochs=10", "alpha=0.05"),
        save_every=1e9,
        text_column="text",
        text_b_column="text_b",
        label_column="label",
    )
    training = run_training(config)
    assert (tmp_path / "out" / EXITS).is_file()
    network, tokenizer = load_decoder(str(tmp_path / "out"))
    assert sorted(network.exits) == sorted(network.policies) == ["1", "2"]
    rows = load_token_rows(config.data, tokenizer, 32)["dev"]
    outputs = collect_tokens(network, rows, list(range(24)), EXITS_AT, 8, 64)
    again = compare_rules(network, outputs, EXITS_AT)
    assert again["loss"] == pytest.approx(training["dev"]["loss"], abs=1e-3)
    for name, value in training["dev"]["policy"].items():
        assert again["policy"][name] == pytest.approx(value, abs=0.02), name
    assert (
        training["dev"]["loss"][1] < training["dev"]["loss"][2]
    )  # the frozen last block was not trained on such text
    before, _ = load_decoder(str(tmp_path / "model"))
    for name, value in before.model.state_dict().items():
        assert torch.equal(value, network.model.state_dict()[name]), name
