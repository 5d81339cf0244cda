"""Recipe consistentee_lm: the reward of tokens, the policy gradient, what learns from what, and the
road from ee-train's wish to a folder that loads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from offramp.models.decoder import DecoderNetwork
from offramp.training.checkpoint import EXITS
from offramp.training.decoders import load_decoder, train_decoder
from offramp.training.loop import Run
from offramp.training.recipes import consistentee_lm
from offramp.training.recipes.consistentee import leave_probabilities
from offramp.training.recipes.consistentee_lm import (
    ConsistentEELM,
    draw,
    policy_loss,
    prepare,
    rewards,
    train,
)
from offramp.training.session import TrainingWish
from offramp.training.settings import BadSetting
from offramp.training.texts import IGNORED, Texts, load_texts
from offramp.training.token_hardness import compared, listen

EXITS_AT = (1, 2, 3)


def texts(network: DecoderNetwork, count: int, said: int = 4) -> Texts:
    """Random prompts, and what the full network itself says next: its last block is always right."""
    random = np.random.default_rng(0)
    rows = [random.integers(3, 60, 3 + number % 4).tolist() for number in range(count)]
    told = tiny.greedy(network, rows, said)
    return Texts([row + more for row, more in zip(rows, told, strict=True)], [len(row) for row in rows])


def trained(
    folder: Path, network: DecoderNetwork, rows: Texts, exits: tuple[int, ...] = EXITS_AT, **wished: Any
) -> dict[str, Any]:
    """What the recipe says of the rows it was trained on."""
    settings = ConsistentEELM(batch_size=4, **wished)
    prepare(network, exits, settings)
    found = train(Run(network, folder, seed=0), {"train": rows, "dev": rows}, exits, settings)
    return dict(found["dev"])


def logged(folder: Path, stage: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("stage") == stage]


def idle(network: DecoderNetwork, first: int) -> DecoderNetwork:
    """Blocks from this one on (0-based) add nothing: exits behind them say what the last block says."""
    with torch.no_grad():
        for block in list(network.blocks)[first:]:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    return network


def test_reward_of_every_exit() -> None:
    losses = torch.tensor([[1.0, 0.5, 0.25], [2.0, 3.0, 4.0]])
    right = torch.tensor([[False, True, True], [True, True, False]])
    worth = rewards(losses, right, (2, 4, 8), ConsistentEELM(alpha=0.1))
    # The first needs 4 of 8 blocks and pays half of 0.1 a block; the second is never right at the end: free.
    torch.testing.assert_close(worth, torch.tensor([[-1.1, -0.7, -0.65], [-2.0, -3.0, -4.0]]))
    plain = rewards(losses, right, (2, 4, 8), ConsistentEELM(alpha=0.1, hardness=False))
    torch.testing.assert_close(plain, torch.tensor([[-1.2, -0.9, -1.05], [-2.2, -3.4, -4.8]]))


@pytest.mark.parametrize("count", [2, 4])
def test_the_policy_gradient_is_that_of_the_expected_reward(count: int) -> None:
    torch.manual_seed(0)
    gates = torch.tensor([[0.3, -0.7], [1.2, 0.1]], requires_grad=True)
    reward = torch.tensor([[-3.0, -0.6, -1.8], [1.2, -4.5, 2.7]])
    (exact,) = torch.autograd.grad(-(leave_probabilities(gates) * reward).sum(1).mean(), gates)
    many = gates.repeat(100_000, 1)
    chosen = draw(many, ConsistentEELM(trajectories=count))
    (found,) = torch.autograd.grad(policy_loss(many, reward.repeat(100_000, 1), chosen), gates)
    torch.testing.assert_close(found, exact, atol=0.01, rtol=0)
    assert float(exact.abs().min()) > 0.05  # twice as much, or the wrong sign, would be seen


def test_the_expert_never_exits() -> None:
    gates = torch.full((50, 2), 9.0)
    assert not draw(gates, ConsistentEELM()).bool().any()
    chosen = draw(gates, ConsistentEELM(expert=True))
    assert chosen[:, 0].eq(2).all() and not chosen[:, 1:].bool().any()


@pytest.mark.parametrize("target", ["data", "model"])
def test_exits_learn_completions_weighted_by_block(tmp_path: Path, target: str) -> None:
    network = DecoderNetwork(tiny.decoder("llama"))
    rows = texts(network, 4)
    for ids in rows.ids:
        ids[-1] = 3  # not what the model says
    ids, following = rows.batch(range(4))
    with torch.no_grad():
        out = network.model(ids, output_hidden_states=True)
    learned = following != IGNORED
    expected = []
    for hidden in out.hidden_states[1:3]:
        logits = network.model.lm_head(network.model.model.norm(hidden))[learned].detach()
        goal = following[learned] if target == "data" else out.logits[learned].softmax(-1)
        expected.append(float(functional.cross_entropy(logits, goal)))
    none = {"policy_epochs": 0, "both_epochs": 0}
    dev = trained(tmp_path, network, rows, epochs=40, heads_lr=0.03, target=target, **none)
    first = logged(tmp_path, "heads")[0]
    assert [first["exit_1"], first["exit_2"]] == pytest.approx(expected, rel=1e-4)
    assert first["loss"] == pytest.approx((expected[0] + 2 * expected[1]) / 3, rel=1e-4)
    wanted = "right" if target == "data" else "agrees"
    assert min(dev[wanted][:2]) > 0.9  # twelve tokens are learned by heart
    assert dev["policy"]["depth"] == 3


def test_a_policy_leaves_where_nothing_is_gained_by_staying(tmp_path: Path) -> None:
    network = idle(DecoderNetwork(tiny.decoder("llama")), 1)
    only = {"epochs": 0, "both_epochs": 0, "policy_epochs": 100, "policies_lr": 0.3}
    dev = trained(tmp_path, network, texts(network, 60), alpha=0.05, **only)
    assert dev["right"] == [1.0, 1.0, 1.0]
    assert dev["policy"]["shares"] == [1.0, 0.0, 0.0]
    assert dev["policy"]["depth"] == dev["calm"]["confidence"]["depth"] == 1.0


def test_a_policy_stays_where_exits_are_wrong(tmp_path: Path) -> None:
    network = DecoderNetwork(tiny.decoder("llama"))
    only = {"epochs": 0, "both_epochs": 0, "policy_epochs": 60, "policies_lr": 0.1}
    dev = trained(tmp_path, network, texts(network, 60), alpha=0.001, **only)
    assert dev["right"][0] < 0.2 and dev["right"][2] == 1.0
    assert dev["policy"]["depth"] > 2.9
    assert dev["policy"]["loss"] < min(dev["loss"][:2]) - 0.3


def test_a_policy_tells_tokens_apart(tmp_path: Path) -> None:
    """At a price at which leaving always and never are both worse than leaving where it costs little."""
    network = DecoderNetwork(tiny.decoder("llama"))
    rows = texts(network, 80)
    only = {"epochs": 0, "both_epochs": 0, "policy_epochs": 150, "policies_lr": 0.05}
    dev = trained(tmp_path, network, rows, (1, 3), alpha=0.5, hardness=False, **only)
    assert 0.1 < dev["policy"]["shares"][0] < 0.9
    assert dev["policy"]["loss"] + 0.5 * dev["policy"]["depth"] < min(
        dev["loss"][0] + 0.5 * 1, dev["loss"][1] + 0.5 * 3
    )


def test_in_the_last_stage_exits_learn_only_from_tokens_that_leave_there(tmp_path: Path) -> None:
    for bias, learns in ((-50.0, False), (0.0, True)):
        network = DecoderNetwork(tiny.decoder("llama"))
        prepare(network, EXITS_AT, ConsistentEELM())
        with torch.no_grad():
            for policy in network.policies.values():
                policy.bias.fill_(bias)
        only = {"epochs": 0, "policy_epochs": 0, "both_epochs": 2, "both_heads_lr": 0.01}
        trained(tmp_path / str(bias), network, texts(network, 8), **only)
        moved = [bool(exit.weight.any()) for exit in network.exits.values()]
        assert moved == [learns, learns]
        told = logged(tmp_path / str(bias), "both")[0]
        assert told["depth"] == pytest.approx(1.75 if learns else 3.0)


def test_what_the_network_needs_is_given_once_and_contradictions_are_refused() -> None:
    network = DecoderNetwork(tiny.decoder("llama"))
    network.add_exits((1, 2))  # a folder with translators alone
    with torch.no_grad():
        network.exits["1"].weight.fill_(0.5)
    for _ in range(2):
        prepare(network, EXITS_AT, ConsistentEELM())
    assert bool((network.exits["1"].weight == 0.5).all()) and sorted(network.policies) == ["1", "2"]
    with pytest.raises(BadSetting, match=r"exits behind blocks \[1, 2\]"):
        prepare(network, (2, 3), ConsistentEELM())
    with pytest.raises(BadSetting, match="one before the last"):
        prepare(network, (3,), ConsistentEELM())
    for wrong in (
        {"trajectories": 1},
        {"alpha": -1.0},
        {"target": "word"},
        {"heads_lr": 0.0},
        {"epochs": -1},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong)).replace("heads_lr", "learning rates")):
            ConsistentEELM(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tokens_per_batch"):
        ConsistentEELM(tokens_per_batch=0)


def test_a_run_that_was_killed_ends_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = []
    settings = ConsistentEELM(batch_size=4, policy_epochs=3, tokens_per_batch=7)
    rows = texts(DecoderNetwork(tiny.decoder("llama")), 24)
    for kills in ((), (2, 5)):  # calls of policy_loss: in stage 2, in stage 3
        folder = tmp_path / str(len(kills))
        for kill in (*kills, 0):
            network = DecoderNetwork(tiny.decoder("llama"))
            prepare(network, EXITS_AT, settings)
            run = Run(network, folder, seed=0, save_every=-1.0)
            left = [kill]

            def killed(*given: torch.Tensor, left: list[int] = left) -> torch.Tensor:
                left[0] -= 1
                if left[0] == 0:
                    raise KeyboardInterrupt
                return policy_loss(*given)

            monkeypatch.setattr(consistentee_lm, "policy_loss", killed)
            if kill:
                with pytest.raises(KeyboardInterrupt):
                    train(run, {"train": rows}, EXITS_AT, settings)
            else:
                train(run, {"train": rows}, EXITS_AT, settings)
        ends.append({name: value.clone() for name, value in network.state_dict().items()})
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name
        assert name.startswith("model.") or bool(value.any())


def test_from_a_wish_to_a_folder_that_loads(tmp_path: Path) -> None:
    tiny.decoder("llama").save_pretrained(tmp_path / "model")
    words = PreTrainedTokenizerFast(tokenizer_object=tiny.tokenizer(), eos_token="[SEP]", pad_token="[PAD]")
    words.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for split, seed in (("train", 0), ("dev", 1)):
        lines = [
            json.dumps(
                {"prompt": row["text"], "completion": "the film is good" if row["label"] else "not at all"}
            )
            for row in tiny.rows(24, seed)
        ]
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    wish = TrainingWish(
        model=str(tmp_path / "model"),
        init=None,
        data=str(tmp_path / "data"),
        recipe="consistentee_lm",
        out=tmp_path / "out",
        exits="1,2",
        pooling="mean",
        prefix="",
        max_length=32,
        seed=0,
        precision="fp32",
        wishes=("epochs=6", "heads_lr=0.02", "policies_lr=0.05", "policy_epochs=10", "alpha=0.05"),
        save_every=1e9,
        text_column="text",
        text_b_column="text_b",
        label_column="label",
    )
    training = train_decoder(wish)
    assert (tmp_path / "out" / EXITS).is_file()
    network, tokenizer = load_decoder(str(tmp_path / "out"))
    assert sorted(network.exits) == sorted(network.policies) == ["1", "2"]
    rows = load_texts(wish.data, tokenizer, 32)["dev"]
    said = listen(network, rows, list(range(24)), EXITS_AT, 8, 64)
    again = compared(network, said, EXITS_AT)
    assert again["loss"] == pytest.approx(training["dev"]["loss"], abs=1e-3)
    for name, value in training["dev"]["policy"].items():
        assert again["policy"][name] == pytest.approx(value, abs=0.02), name
    assert training["dev"]["loss"][1] < training["dev"]["loss"][2]  # the frozen last block knows no such text
    before, _ = load_decoder(str(tmp_path / "model"))
    for name, value in before.model.state_dict().items():
        assert torch.equal(value, network.model.state_dict()[name]), name
