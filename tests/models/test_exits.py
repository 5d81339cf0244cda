"""How exits read a hidden state: pooling, heads, and the gradients that they send back."""

from __future__ import annotations

import pytest
import tiny
import torch

from offramp.models.exits import AttentionPool, Exit
from offramp.models.network import NetworkSpec, share_gradient


def test_untrained_attention_is_the_mean_of_the_real_tokens() -> None:
    hidden = torch.randn(2, 4, 8)
    mask = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, -3e4, -3e4]])[:, None, :]
    pooled = AttentionPool(8)(hidden, mask)
    torch.testing.assert_close(pooled, torch.stack([hidden[0].mean(0), hidden[1, :2].mean(0)]))


def test_attention_reads_the_tokens_that_its_query_chooses() -> None:
    pool = AttentionPool(4)
    with torch.no_grad():
        pool.query.weight[0, 0] = 50.0  # the token with the largest first feature
    hidden = torch.tensor([[[1.0, 2.0, 3.0, 4.0], [9.0, 8.0, 7.0, 6.0]]])
    torch.testing.assert_close(pool(hidden, None), hidden[:, 1])


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_a_folded_exit_is_the_same_exit(head: str) -> None:
    exit_head = Exit(8, 3, 0.1, head)
    for _ in range(3):
        exit_head(torch.randn(16, 8) * 3 + 1)  # statistics to fold
    exit_head.eval()
    pooled = torch.randn(5, 8)
    torch.testing.assert_close(exit_head.folded()(pooled), exit_head(pooled), atol=1e-5, rtol=1e-5)


def test_equilibrium_divides_the_gradient_among_the_exits_ahead() -> None:
    hidden = torch.ones(3, requires_grad=True)
    for_exit, onward = share_gradient(hidden, 4, "equilibrium")
    (for_exit.sum() + 10 * onward.sum()).backward()
    torch.testing.assert_close(hidden.grad, torch.full((3,), 0.25 + 7.5))


def test_a_block_learns_from_its_next_exit_alone() -> None:
    network = tiny.network()
    logits = network(tiny.inputs(), gradient="next_exit").logits
    logits[:, -1].sum().backward()
    last, before = network.blocks[-1], network.blocks[-2]
    assert any(p.grad.abs().max() > 0 for p in last.parameters())
    assert all(p.grad.abs().max() == 0 for p in before.parameters())


def test_the_last_exit_of_an_equilibrium_gets_its_whole_gradient() -> None:
    hidden = torch.ones(2, requires_grad=True)
    share_gradient(hidden, 1, "equilibrium")[0].sum().backward()
    torch.testing.assert_close(hidden.grad, torch.ones(2))


def test_attention_reads_no_padding() -> None:
    network = tiny.network(pooling="attention", policy=None)
    inputs = tiny.inputs()
    padded = {name: torch.cat([t, torch.zeros_like(t[:, :2])], 1) for name, t in inputs.items()}
    with torch.no_grad():
        torch.testing.assert_close(network(padded).logits, network(inputs).logits, atol=1e-5, rtol=1e-5)


def test_an_unknown_head_is_refused() -> None:
    with pytest.raises(ValueError, match="head 'deep'; choose one of linear, mlp"):
        NetworkSpec(("a", "b"), (1,), head="deep")


def test_an_ensemble_adds_what_the_exits_before_said() -> None:
    network = tiny.network(policy=None, ensemble=True)
    plain = tiny.network(policy=None)
    with torch.no_grad():
        joined, alone = network(tiny.inputs()).logits, plain(tiny.inputs()).logits
    expected = alone[:, 0]
    torch.testing.assert_close(joined[:, 0], expected)
    for number in (1, 2):
        expected = alone[:, number] + 0.5 * expected
        torch.testing.assert_close(joined[:, number], expected)


def test_an_exit_of_an_ensemble_sends_no_gradient_to_the_exits_before() -> None:
    network = tiny.network(policy=None, ensemble=True)
    network(tiny.inputs()).logits[:, 2].sum().backward()
    assert network.exits[1].classify.weight.grad.abs().max() == 0
    assert network.exits[2].decay.grad != 0


def test_logits_from_cached_features_are_those_of_the_forward() -> None:
    network = tiny.network(policy=None, ensemble=True)
    with torch.no_grad():
        out = network(tiny.inputs())
        torch.testing.assert_close(network.classify_all(out.pooled), out.logits)
