"""Outputs of exits by token: which tokens, their values, and the results of rules."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from torch.nn import functional

from offramp.models.decoder import DecoderNetwork
from offramp.training.lm_data import TokenRows
from offramp.training.token_exits import (
    TokenOutputs,
    collect_tokens,
    figures_at_depth,
    figures_at_exits,
    first_exit_above,
    may_exit_early,
    sample_tokens,
)

EXITS_AT = (1, 2, 3)


def test_tokens_that_may_exit_early() -> None:
    _, targets = TokenRows([[5, 6, 7, 8, 9], [5, 6, 7]], [3, 1]).batch([0, 1])
    where = may_exit_early(targets)
    assert where.tolist() == [[False, False, False, True, False], [False, True, False, False, False]]
    assert torch.equal(sample_tokens(where, 2), where)
    sampled = sample_tokens(where, 1)
    assert int(sampled.sum()) == 1 and bool((where | ~sampled).all())


def test_outputs_are_of_completions_without_their_first_token() -> None:
    network = DecoderNetwork(tiny.decoder("llama"))
    network.add_exits(EXITS_AT[:2], policies=True)
    random = np.random.default_rng(0)
    ids_of = [random.integers(3, 60, 7 + number % 4).tolist() for number in range(5)]
    rows = TokenRows(ids_of, [3, 1, 5, 6, 2])
    outputs = collect_tokens(network, rows, [0, 1, 2, 3, 4], EXITS_AT, 3, 2)
    states, targets, losses = [], [], []
    for ids, start in zip(rows.ids, rows.starts, strict=True):
        reference = network.model(torch.tensor([ids]), output_hidden_states=True)
        hidden = torch.stack(reference.hidden_states[1:3], 2)[0, start:-1]
        logits = network.model.lm_head(network.model.model.norm(hidden[:, 0]))
        states.append(hidden)
        targets.append(torch.tensor(ids[start + 1 :]))
        losses.append(functional.cross_entropy(logits, targets[-1], reduction="none"))
    torch.testing.assert_close(outputs.states, torch.cat(states), atol=1e-4, rtol=1e-4)
    assert torch.equal(outputs.targets, torch.cat(targets))
    torch.testing.assert_close(outputs.losses[:, 0], torch.cat(losses), atol=1e-4, rtol=1e-4)
    cosines = functional.cosine_similarity(outputs.states[:, 0], outputs.states[:, 1], dim=-1)
    torch.testing.assert_close(outputs.cosines, torch.stack([-torch.ones_like(cosines), cosines], 1))


def test_results_of_exiting_by_a_score() -> None:
    predictions = torch.tensor([[4, 5, 5], [6, 6, 7], [8, 9, 8], [1, 2, 3]])
    outputs = TokenOutputs(
        states=torch.zeros(4, 2, 1),
        targets=torch.tensor([5, 6, 8, 3]),
        losses=torch.tensor([[3.0, 2.0, 1.0], [0.5, 1.0, 2.0], [1.0, 4.0, 1.5], [9.0, 9.0, 0.5]]),
        predictions=predictions,
        margins=torch.tensor([[0.1, 0.8], [0.9, 0.1], [0.9, 0.9], [0.2, 0.3]]),
        cosines=torch.zeros(4, 2),
    )
    exit_numbers = first_exit_above(outputs.margins, 0.5)
    assert exit_numbers.tolist() == [1, 0, 0, 2]
    expected = {"depth": 5.0, "shares": [0.5, 0.25, 0.25], "loss": 1.0, "right": 1.0, "agrees": 0.75}
    assert figures_at_exits(outputs, exit_numbers, (3, 4, 10)) == expected
    assert figures_at_depth(outputs, outputs.margins, 5.4, (3, 4, 10)) == {
        "threshold": pytest.approx(0.3),
        **expected,
    }
    assert figures_at_depth(outputs, outputs.margins, 0.0, (3, 4, 10))["depth"] == 3.0
    assert figures_at_depth(outputs, outputs.margins, 99.0, (3, 4, 10))["depth"] == 10.0
