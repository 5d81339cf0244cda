"""The draft head: drafts of whole texts at once are those of one draft after another with a cache."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

from offramp.models.decoder import DecoderNetwork, run_block
from offramp.models.draft_head import (
    PREFIX,
    DraftHead,
    add_draft_head,
    draft_head_of,
    load_draft_head,
    normed_before,
    normed_hidden,
    predict_hidden,
)

# Rotations, learned positions, windows with caps of scores, parts of heads that are rotated.
FAMILIES = ["llama", "gpt2", "gemma2", "gpt_neox"]


def lively(network: DecoderNetwork) -> DraftHead:
    """A draft head with random weights, none of which is that of the model's last block."""
    draft_head = add_draft_head(network)
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in draft_head.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return draft_head


def drafted_one_by_one(
    network: DecoderNetwork,
    draft_head: DraftHead,
    ids: torch.Tensor,
    normed: torch.Tensor,
    end: int,
    count: int,
) -> list[torch.Tensor]:
    """Predictions [hidden] at places end - 1 to end + count - 2 of one text: as a runtime makes them.

    The cache gets the keys and values of the first `end` tokens, from the model's states; then, one token
    after another, those of tokens that read the prediction before them.
    """
    form, context_of = network.attention(draft_head.block), network.stem
    before, predictions = normed_before(network, normed), list[torch.Tensor]()
    cache: tuple[torch.Tensor, torch.Tensor] | None = None
    for start, stop in ((0, end), *((place, place + 1) for place in range(end, end + count - 1))):
        positions = torch.arange(start, stop)[None]
        embedded, context = context_of(ids[:, start:stop], positions, torch.ones(1, start, dtype=torch.int64))
        if predictions:
            before = normed_hidden(network, predictions[-1])[None, None]
        joined = draft_head(embedded, before[:, : stop - start])
        if cache is None:
            empty = torch.zeros(1, form.kv_heads, form.size, 0)
            cache = (empty, empty.transpose(2, 3))
        hidden, new = run_block(network.family, form, draft_head.block, joined, context, cache)
        cache = (torch.cat([cache[0], new[0]], 3), torch.cat([cache[1], new[1]], 2))
        predictions.append(hidden[0, -1])
    return predictions


@torch.no_grad()
@pytest.mark.parametrize("family", tiny.with_slow(sorted(tiny.DECODERS), *FAMILIES))
def test_steps_at_once_are_drafts_in_a_row(family: str) -> None:
    network = DecoderNetwork(tiny.decoder(family))
    draft_head = lively(network)
    ids = torch.randint(3, 60, (1, 14), generator=torch.Generator().manual_seed(1))
    normed = normed_hidden(network, network(ids)[-1])
    at_once = list(predict_hidden(network, draft_head, ids, normed, steps=4))
    for end in (1, 2, 7, 11):
        expected = drafted_one_by_one(network, draft_head, ids, normed, end, 4)
        for step, prediction in enumerate(expected):
            actual = at_once[step][0, end - 1 + step]
            torch.testing.assert_close(actual, prediction, atol=2e-4, rtol=1e-3)


@torch.no_grad()
def test_padding_at_the_end_changes_nothing() -> None:
    network = DecoderNetwork(tiny.decoder("llama"))
    draft_head = lively(network)
    ids = torch.randint(3, 60, (2, 9))
    normed = normed_hidden(network, network(ids)[-1])
    alone = list(predict_hidden(network, draft_head, ids[:1, :6], normed[:1, :6], steps=3))
    for padded, expected in zip(
        predict_hidden(network, draft_head, ids, normed, steps=3), alone, strict=True
    ):
        torch.testing.assert_close(padded[:1, :6], expected, atol=1e-5, rtol=1e-4)


def test_noise_is_of_the_first_step_and_random() -> None:
    network = DecoderNetwork(tiny.decoder("llama"))
    draft_head = lively(network)
    ids = torch.randint(3, 60, (1, 6))
    normed = torch.randn(1, 6, 32)

    def first(noise: float) -> torch.Tensor:
        return next(predict_hidden(network, draft_head, ids, normed, 1, noise)).detach()

    assert torch.equal(first(0.0), first(0.0))
    assert not torch.equal(first(0.1), first(0.1))
    torch.testing.assert_close(first(1e-6), first(0.0), atol=1e-3, rtol=1e-3)


def test_gradients_reach_the_draft_head_alone_and_not_through_predictions() -> None:
    network = DecoderNetwork(tiny.decoder("llama"))
    draft_head = lively(network)
    for parameter in network.model.parameters():
        parameter.requires_grad_(False)
    ids, normed = torch.randint(3, 60, (1, 6)), torch.randn(1, 6, 32)
    steps = list(predict_hidden(network, draft_head, ids, normed, steps=2))
    first = torch.autograd.grad(steps[1][0, 1].sum(), steps[0], allow_unused=True, retain_graph=True)[0]
    assert first is None  # the second step reads the first prediction as a number
    steps[1].sum().backward()
    assert all(parameter.grad is not None for parameter in draft_head.parameters())


def test_its_weights_are_loaded_or_refused() -> None:
    network = DecoderNetwork(tiny.decoder("llama"))
    assert draft_head_of(network) is None
    trained = lively(network)
    state: dict[str, Any] = {PREFIX + name: value for name, value in trained.state_dict().items()}
    loaded = load_draft_head(other := DecoderNetwork(tiny.decoder("llama", seed=1)), state)
    assert draft_head_of(other) is loaded
    for name, value in trained.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    with pytest.raises(ValueError, match=r"join\.bias"):
        load_draft_head(other, {name: value for name, value in state.items() if "join.bias" not in name})
    with pytest.raises(ValueError, match=r"exits\.1\.weight is no weight of a draft head"):
        load_draft_head(other, state | {"exits.1.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="no draft head of this model"):
        load_draft_head(DecoderNetwork(tiny.decoder("gpt2")), state)


def test_the_model_stays_as_it_was() -> None:
    network = DecoderNetwork(tiny.decoder("llama"))
    last = {name: value.clone() for name, value in network.blocks[-1].state_dict().items()}
    draft_head = add_draft_head(network)
    assert not draft_head.join.weight.any()
    with torch.no_grad():
        for parameter in draft_head.parameters():
            parameter += 1.0
    for name, value in network.blocks[-1].state_dict().items():
        assert torch.equal(value, last[name])
