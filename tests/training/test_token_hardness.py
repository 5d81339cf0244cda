"""What exits say of tokens: which tokens, how hard they are, and what leaving by a rule comes to."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from torch.nn import functional

from offramp.models.decoder import DecoderNetwork
from offramp.training.texts import Texts
from offramp.training.token_hardness import (
    Said,
    first_above,
    listen,
    may_leave,
    memorized_block,
    nearest,
    outcome,
    some,
)

EXITS_AT = (1, 2, 3)


def test_hardness_is_counted_in_blocks_and_asks_every_later_exit() -> None:
    right = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 0, 1], [0, 0, 1], [1, 1, 0], [0, 0, 0]]).bool()
    assert memorized_block(right, (2, 5, 9)).tolist() == [2, 5, 9, 9, 9, 9]


def test_tokens_that_may_leave() -> None:
    _, following = Texts([[5, 6, 7, 8, 9], [5, 6, 7]], [3, 1]).batch([0, 1])
    where = may_leave(following)
    assert where.tolist() == [[False, False, False, True, False], [False, True, False, False, False]]
    assert torch.equal(some(where, 2), where)
    fewer = some(where, 1)
    assert int(fewer.sum()) == 1 and bool((where | ~fewer).all())


def test_what_exits_say_is_of_completions_less_their_first_token() -> None:
    network = DecoderNetwork(tiny.decoder("llama"))
    network.add_exits(EXITS_AT[:2], policies=True)
    random = np.random.default_rng(0)
    ids_of = [random.integers(3, 60, 7 + number % 4).tolist() for number in range(5)]
    rows = Texts(ids_of, [3, 1, 5, 6, 2])
    said = listen(network, rows, [0, 1, 2, 3, 4], EXITS_AT, 3, 2)
    states, following, losses = [], [], []
    for ids, start in zip(rows.ids, rows.starts, strict=True):
        out = network.model(torch.tensor([ids]), output_hidden_states=True)
        hidden = torch.stack(out.hidden_states[1:3], 2)[0, start:-1]
        heard = network.model.lm_head(network.model.model.norm(hidden[:, 0]))
        states.append(hidden)
        following.append(torch.tensor(ids[start + 1 :]))
        losses.append(functional.cross_entropy(heard, following[-1], reduction="none"))
    torch.testing.assert_close(said.states, torch.cat(states), atol=1e-4, rtol=1e-4)
    assert torch.equal(said.following, torch.cat(following))
    torch.testing.assert_close(said.losses[:, 0], torch.cat(losses), atol=1e-4, rtol=1e-4)
    behind = functional.cosine_similarity(said.states[:, 0], said.states[:, 1], dim=-1)
    torch.testing.assert_close(said.cosines, torch.stack([-torch.ones_like(behind), behind], 1))


def test_what_leaving_comes_to() -> None:
    words = torch.tensor([[4, 5, 5], [6, 6, 7], [8, 9, 8], [1, 2, 3]])
    said = Said(
        states=torch.zeros(4, 2, 1),
        following=torch.tensor([5, 6, 8, 3]),
        losses=torch.tensor([[3.0, 2.0, 1.0], [0.5, 1.0, 2.0], [1.0, 4.0, 1.5], [9.0, 9.0, 0.5]]),
        words=words,
        leads=torch.tensor([[0.1, 0.8], [0.9, 0.1], [0.9, 0.9], [0.2, 0.3]]),
        cosines=torch.zeros(4, 2),
    )
    left = first_above(said.leads, 0.5)
    assert left.tolist() == [1, 0, 0, 2]
    expected = {"depth": 5.0, "shares": [0.5, 0.25, 0.25], "loss": 1.0, "right": 1.0, "agrees": 0.75}
    assert outcome(said, left, (3, 4, 10)) == expected
    assert nearest(said, said.leads, 5.4, (3, 4, 10)) == {"threshold": pytest.approx(0.3), **expected}
    assert nearest(said, said.leads, 0.0, (3, 4, 10))["depth"] == 3.0
    assert nearest(said, said.leads, 99.0, (3, 4, 10))["depth"] == 10.0
