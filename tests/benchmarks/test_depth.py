"""Quality against depth: what a way costs, how it is fitted, and the whole table of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner
from torch import Tensor

from offramp.benchmarks import depth_rows
from offramp.benchmarks.depth import main
from offramp.benchmarks.depth_fit import Dev, dialled, search, skips
from offramp.benchmarks.depth_methods import controlled, costs_of, drawn, exiting, static, uniform
from offramp.benchmarks.depth_rows import Rows, evaluate, losses
from offramp.models.controllers import Controllers
from offramp.models.decoder import DecoderNetwork
from offramp.models.depth import goes_past, hidden_states
from offramp.models.generation import Walk, read_prompts

RANDOM = np.random.default_rng(0)
ROWS = Rows(
    [RANDOM.integers(3, 60, 4 + n % 3).tolist() for n in range(6)],
    [RANDOM.integers(3, 60, 5 + n % 2).tolist() for n in range(6)],
)


def made(family: str = "llama", policies: bool = False) -> DecoderNetwork:
    network = DecoderNetwork(tiny.decoder(family)).eval()
    if policies:
        network.add_exits([1, 2], policies=True)
    return network


def test_costs_by_hand() -> None:
    costs = costs_of(made())  # 4 heads of 8, 2 of keys and values
    assert costs.block == 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64
    assert (costs.pair, costs.kept, costs.head) == (64, 2 * 32 * 16, 32 * 60)
    assert costs.of(2, 5, 10) == 2 * (costs.block + 640) + costs.kept + costs.head + 5
    assert costs.share(3, 0, 10) == 1
    gpt2 = costs_of(made("gpt2"))
    assert gpt2.block == 12 * 32 * 32 and gpt2.kept == 2 * 32 * 32


@torch.no_grad()
def test_losses_are_those_of_whole_texts() -> None:
    network = made()
    for way, skipped in ((None, frozenset[int]()), (skips([1]), frozenset({1}))):
        found = losses(network, ROWS, [0, 4], read_prompts(network, [ROWS.prompts[0], ROWS.prompts[4]]), way)
        for i, score in zip((0, 4), found, strict=True):
            prompt, after = ROWS.prompts[i], ROWS.after[i]
            *_, last = hidden_states(network, torch.tensor([prompt + after]), goes_past(skipped, len(prompt)))
            logits = network.head(last)[0, len(prompt) : -1]
            one = -torch.nn.functional.cross_entropy(logits, torch.tensor(after[1:]), reduction="none")
            assert score["score"] == pytest.approx(float(one.mean()), rel=1e-4)
            halves = [float(one[::2].mean()), float(one[1::2].mean())]
            assert score["halves"] == pytest.approx(halves, rel=1e-4)
            assert score["depth"] == 3 - len(skipped) and score["tokens"] == len(after) - 1


def walked(network: DecoderNetwork, way: Any) -> Walk:
    cache = read_prompts(network, ROWS.prompts[:2])
    return depth_rows.follow(network, ROWS, [0, 1], cache, way)[1]


def test_what_asking_costs() -> None:
    network, costs = made(policies=True), costs_of(made())
    head, square = costs.head, costs.square

    def charged(way: Any) -> set[tuple[int, float]]:
        walk = walked(network, way)
        return set(zip(walk.depth.flatten().tolist(), walk.extra.flatten().tolist(), strict=True))

    assert charged(static(network, 2, costs)) == {(2, square)}
    # Everything leaves at the first exit, whose confidence is its own head; or nothing leaves.
    assert charged(exiting(network, "confidence", [1, 2], -1.0, costs)) == {(1, square)}
    assert charged(exiting(network, "confidence", [1, 2], 2.0, costs)) == {(3, 2 * (head + square))}
    assert charged(exiting(network, "gate", [1, 2], -99.0, costs)) == {(1, 32 + square)}
    assert charged(exiting(network, "gate", [1, 2], 99.0, costs)) == {(3, 64)}
    assert charged(exiting(network, "cosine", [1, 2], 2.0, costs)) == {(3, 192)}
    controllers = Controllers(3, 32)
    assert charged(controlled(controllers, 0.0, costs)) == {(3, 64)}
    assert charged(controlled(controllers, -3.0, costs, free=True)) == {(2, 0)}


def test_a_bar_between_sends_tokens_to_different_depths() -> None:
    network = made(policies=True)
    for rule in ("confidence", "cosine", "gate"):
        dev = Dev(network, ROWS, 3)

        def make(bar: float, rule: str = rule) -> Any:
            return exiting(network, rule, [1, 2], bar, costs_of(network))

        low, high = (0.0, 1.0) if rule != "gate" else (-20.0, 20.0)
        bar = dialled(dev, make, low, high, 2.0)
        assert abs(dev.depth(make(bar)) - 2.0) < 0.35, rule
        assert len(walked(network, make(bar)).depth.unique()) > 1, rule


def test_routes_are_fixed_by_text_and_uniform_lists_are_even() -> None:
    assert uniform(30, 29) == [15] and uniform(12, 10) == [3, 8] and uniform(30, 2) == list(range(1, 29))
    for budget in range(2, 30):
        found = uniform(30, budget)
        assert len(set(found)) == 30 - budget and 0 not in found and 29 not in found
    network = made()
    for budget in (2, 3):
        assert (walked(network, drawn(3, budget, 6, 0)).depth == budget).all()
    way, hidden = drawn(6, 4, 50, 1), torch.zeros(50, 2, 8)
    walk = Walk(torch.arange(50), torch.full((50, 2), 6))
    told = [way(block, hidden, walk) for block in range(6)]
    shares = torch.stack([one for one in told if one is not None])
    assert (shares[[0, 5]] == 1).all() and (shares.sum(0) == 4).all()
    assert (shares[..., 0] == shares[..., 1]).all() and len(shares[:, :, 0].unique(dim=1)[0]) == 6


def test_the_search_takes_the_block_missed_least() -> None:
    network = DecoderNetwork(tiny.decoder("llama"))
    dev = Dev(network, ROWS, 3)
    steps: list[list[int]] = []
    assert search(dev, 1, [], steps.append) == [1] and steps == [[1]]
    assert search(dev, 1, [1], steps.append) == [1] and len(steps) == 1

    class Told(Dev):
        def states(self, way: Any) -> list[list[Tensor]]:
            return []

        def loss(self, way: Any, block: int, before: list[list[Tensor]]) -> float:
            hidden = torch.zeros(1, 1, 4)
            walk = Walk(torch.zeros(1, dtype=torch.long), torch.full((1, 1), 6))
            past = [block for block in range(6) if isinstance(way(block, hidden, walk), Tensor)]
            return sum([0, 5, 1, 3, 2, 0][block] for block in past) + 10 * (past == [2, 4])

    told = object.__new__(Told)
    told.network = type("Six", (), {"block_count": 6})()
    assert search(told, 3, [], steps.append) == [2, 3, 4]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_search_goes_on_from_what_it_knows(family: str) -> None:
    network, found = made(family), []
    dev = Dev(network, ROWS, 4)
    for known, block in (([], 1), ([], 2), ([1], 2)):
        way = skips([*known, block])
        whole = [score for i, cache in dev.caches for score in losses(network, ROWS, i, cache, way)]
        found.append(dev.loss(way, block, dev.states(skips(known))))
        assert found[-1] == pytest.approx(-float(np.mean([score["score"] for score in whole])), rel=1e-5)
    assert len({round(loss, 4) for loss in found}) == 3


def test_rows_are_not_computed_twice_and_half_lines_are_mended(tmp_path: Path) -> None:
    network, calls = made(), list[tuple[int, ...]]()

    def judge(network: Any, rows: Rows, index: Any, cache: Any, way: Any) -> Any:
        calls.append(tuple(index))
        return losses(network, rows, index, cache, way)

    ways: Any = {"full": None, "skip, 2": skips([1])}
    sizes = {"batch": 2, "reads": 1}
    first, features = evaluate(network, ROWS, ways, judge, tmp_path, **sizes)
    assert len(calls) == 6 and features.shape == (6, 32)
    file = tmp_path / "skip_2.jsonl"
    file.write_bytes(file.read_bytes()[:-9])  # killed while it wrote
    again, _ = evaluate(network, ROWS, ways, judge, tmp_path, **sizes)
    assert len(calls) == 7 and again == first
    assert evaluate(network, ROWS, ways, judge, tmp_path, **sizes)[0] == first and len(calls) == 7


def test_dialogues_come_in_two_wordings_where_there_are_two() -> None:
    rows = [{"prompt": str(n), "completion": str(n % 7)} for n in range(28)]
    drawn, twins = depth_rows._twice(rows, 5)  # the first four were seen
    assert [row["prompt"] for row in drawn] == ["4", "11", "5", "12"] and twins == [1, 0, 3, 2]
    drawn, twins = depth_rows._twice(rows[:13], 3)  # one of them has no second
    assert [row["prompt"] for row in drawn] == ["4", "11", "5"] and twins is None


def folders(tmp_path: Path) -> list[str]:
    """Arguments of a tiny model with translators and policies, and of its data."""
    from offramp.training.checkpoint import save_exits

    network = made(policies=True)
    network.model.save_pretrained(tmp_path / "model")
    save_exits(network, tmp_path / "model")
    tiny.tokenizer().save(str(tmp_path / "model" / "tokenizer.json"))
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "eos_token": "[SEP]"}
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64, **names}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(facts))

    def lines(name: str, rows: list[dict[str, str]]) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    texts = [" ".join(RANDOM.choice(tiny.WORDS[4:], 12)) for _ in range(20)]
    pairs = [
        {"prompt": text, "completion": text[-30:], "task": f"samsum_{n}"} for n, text in enumerate(texts)
    ]
    for split in ("train", "dev", "test"):
        lines(f"wiki/{split}.jsonl", [{"text": text} for text in texts])
        lines(f"pairs/{split}.jsonl", [*pairs, *({**row, "prompt": row["prompt"][3:]} for row in pairs)])
    told = ["--model", str(tmp_path / "model"), "--wikitext", str(tmp_path / "wiki")]
    told += ["--summaries", str(tmp_path / "pairs"), "--out", str(tmp_path / "out.json")]
    return [*told, "--scratch", str(tmp_path / "scratch"), "--shares", "0.7", "--window", "16"]


def test_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rouge_score")
    few = ["--tokens", "64", "--prompts", "4", "--answer", "4", "--dev-rows", "3", "--fit-rows", "5"]
    arguments = [*folders(tmp_path), *few, "--seeds", "2"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out.json").read_text())
    for task in ("wikitext", "samsum"):
        lines = found["tasks"][task]
        assert lines["full"]["depth"] == 3 and lines["full"]["cost"] == 1 and lines["full"]["se"] == 0
        assert lines["static exit, 2"]["depth"] == lines["searched skip, 2"]["depth"] == 2
        assert lines["uniform skip, 2"]["score"] == lines["searched skip, 2"]["score"]  # there is one to skip
        assert lines["random route, 2"]["depth"] == 2 and 0 < lines["random route, 2"]["cost"] < 1
        assert {"calm confidence, 2", "calm cosine, 2", "consistentee, 2", "router, 2"} <= set(lines)
        reached = max(lines[name]["score"] for name in ("static exit, 2", "uniform skip, 2"))
        assert lines["oracle, 2"]["score"] >= reached - 1e-4
        assert lines["oracle, as good as full"]["depth"] <= 3
        assert lines["oracle, 2"]["score"] >= lines["oracle held out, 2"]["score"] - 1e-4
        assert lines["oracle held out, as good as full"]["score"] >= lines["full"]["score"] - 1e-4
    assert found["tasks"]["wikitext"]["uniform skip, 2"]["se"] > 0
    assert lines["oracle shuffled, 2"]["score"] >= 0
    assert "perplexity" in result.output and "ROUGE-L" in result.output
    monkeypatch.setattr("offramp.benchmarks.depth_rows.read_prompts", None)  # nothing is computed again
    again = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert again.exit_code == 0 and json.loads((tmp_path / "out.json").read_text()) == found
    other = CliRunner().invoke(main, [*arguments, "--reads", "2"])
    assert other.exit_code == 1 and "begun with other settings" in str(other.exception)
