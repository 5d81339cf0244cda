"""Answers of batches: those of transformers at full depth, those of models.depth where tokens differ."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from offramp.models.decoder import DecoderNetwork
from offramp.models.depth import hidden_states
from offramp.models.generation import Walk, Way, generate, read_prompts

PROMPTS = [[7, 9, 4, 31, 22, 8, 5], [11, 12], [40, 3, 17, 55, 6]]
FAMILIES = ("gpt2", "llama", "qwen3")


def answers_by_transformers(model: Any, most: int, stop: list[int]) -> list[list[int]]:
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        told = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=most,
            do_sample=False,
            eos_token_id=stop or None,
            pad_token_id=0,
        )
        found.append(told[0, len(prompt) :].tolist())
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_full_depth_says_what_transformers_says(family: str) -> None:
    model = tiny.decoder(family)
    network = DecoderNetwork(model)
    told = generate(network, PROMPTS, 9, set())
    assert told.tokens == answers_by_transformers(model, 9, [])
    assert told.depths == [[3] * 9] * 3
    stop = told.tokens[1][2]  # in the middle of an answer
    stopped = generate(network, PROMPTS, 9, {stop})
    assert stopped.tokens == answers_by_transformers(model, 9, [stop])
    assert len(stopped.depths[1]) == len(stopped.tokens[1]) < 9


def static(block: int) -> Way:
    def way(number: int, hidden: Tensor, walk: Walk) -> Tensor:
        if number == block:
            walk.leave(block, torch.ones_like(walk.staying))
        return walk.staying.to(hidden)

    return way


def by_sign(number: int, hidden: Tensor, walk: Walk) -> Tensor | None:
    """Tokens leave behind the first block, or go past the second, by what stands in their hidden states."""
    if number == 1:
        walk.leave(1, hidden[..., 0] > 0.7)
        return (walk.staying & (hidden[..., 1] > 0)).to(hidden)
    return walk.staying.to(hidden) if number else None


def recomputed(network: DecoderNetwork, prompt: list[int], most: int, way: Way) -> tuple[list[int], set[int]]:
    """Token by token, all of the text anew with models.depth; and the depths that were seen."""
    ids, seen = list(prompt), set()
    for _ in range(most):
        tokens = torch.tensor([ids])
        walk = Walk(torch.tensor([0]), torch.full_like(tokens, 3))
        free = torch.arange(len(ids)) >= len(prompt)

        def decide(number: int, hidden: Tensor, walk: Walk = walk, free: Tensor = free) -> Tensor | None:
            share = way(number, hidden, walk)
            walk.left[:, ~free] = 3
            return None if share is None else torch.where(free, share, 1.0)

        *_, last = hidden_states(network, tokens, decide)
        left = int(walk.left[0, -1])
        read = network.leaving(left, last[:, -1]) if left < 3 else last[:, -1]
        ids.append(int(network.head(read).argmax()))
        seen.add(left)
    return ids[len(prompt) :], seen


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["exit 1", "exit 2", "by sign"])
def test_ways_say_what_whole_texts_say(family: str, name: str) -> None:
    network = DecoderNetwork(tiny.decoder(family))
    network.add_exits([1, 2])
    for translator in network.exits.values():
        torch.nn.init.normal_(translator.weight, std=0.3)
    way = by_sign if name == "by sign" else static(int(name[-1]))
    told = generate(network, PROMPTS, 8, set(), way)
    expected = [recomputed(network, prompt, 8, way) for prompt in PROMPTS]
    assert told.tokens == [tokens for tokens, _ in expected]
    if name == "by sign":
        assert len({depth for depths in told.depths for depth in depths[1:]}) > 1
        assert set.union(*(seen for _, seen in expected)) == {1, 3}
    else:
        assert told.depths == [[3] + [int(name[-1])] * 7] * 3
        assert told.tokens != generate(network, PROMPTS, 8, set()).tokens


def test_prompts_are_read_once_for_many_ways() -> None:
    network = DecoderNetwork(tiny.decoder("llama"))
    cache = read_prompts(network, PROMPTS)
    assert cache.states.shape == (3, 3, 32)
    for way in (static(1), None, static(1)):
        again = generate(network, PROMPTS, 5, set(), way, cache=cache)
        assert again == generate(network, PROMPTS, 5, set(), way)


def test_ways_are_told_which_text_a_row_is() -> None:
    def way(number: int, hidden: Tensor, walk: Walk) -> Tensor | None:
        walk.extra += 0.5
        return (walk.rows == 6)[:, None].to(hidden) if number == 1 else None

    network = DecoderNetwork(tiny.decoder("qwen3"))
    told = generate(network, PROMPTS, 3, set(), way, rows=[4, 6, 5])
    assert told.depths == [[3, 2, 2], [3, 3, 3], [3, 2, 2]]
    assert told.extra == [[0, 1.5, 1.5]] * 3
