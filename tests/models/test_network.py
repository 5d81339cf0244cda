"""Exits, policies and their evidence."""

from __future__ import annotations

import pytest
import tiny
import torch

from offramp.models import EarlyExitNetwork, NetworkSpec
from offramp.models.exits import Exit
from offramp.models.network import parse_exits
from offramp.models.policies.consistentee import Policy, evidence_size, no_evidence, weigh_evidence


def test_cls_pooling_starts_from_the_pretrained_pooler() -> None:
    base = tiny.backbone("bert")
    weight = base.pooler.dense.weight.clone()
    network = EarlyExitNetwork(base, NetworkSpec(("a", "b"), (1, 2, 3), "cls"))
    assert network.pooler is not None
    torch.testing.assert_close(network.pooler.dense.weight, weight)


def test_gates_from_cached_features_equal_gates_of_the_forward() -> None:
    network = tiny.network(policy="both")
    with torch.no_grad():
        out = network(tiny.inputs())
        torch.testing.assert_close(network.gates(out.pooled, out.logits), out.gates)


def test_policies_that_see_values_send_no_gradient_to_the_exits() -> None:
    network = tiny.network(policy="both")
    network(tiny.inputs(), policies_see="values").gates.sum().backward()
    assert network.exits[0].classify.weight.grad is None
    assert network.policies[0].slope.grad != 0


def test_an_untrained_policy_opens_with_the_top_probability() -> None:
    policy = Policy(32, "statistics")
    sure, unsure = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.2, 0.0]])
    pooled = torch.zeros(1, 32)
    opened = [policy(pooled, logits, None)[0] for logits in (sure, unsure)]
    assert opened[0] > 0 > opened[1]


def test_statistics_tell_agreement_from_disagreement() -> None:
    first, same, other = torch.tensor([[4.0, 0.0]]), torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    _, evidence = weigh_evidence(first, no_evidence(first, 2))
    agreeing, _ = weigh_evidence(same, evidence)
    opposing, _ = weigh_evidence(other, evidence)
    assert evidence.shape == (1, evidence_size(2))
    assert agreeing[0, 1] > 0.9 > 0.1 > opposing[0, 1]
    assert agreeing[0, 0] == opposing[0, 0]  # as certain, of another label


@pytest.mark.parametrize("kind", ["statistics", "both", "state"])
def test_a_folded_policy_is_the_same_policy(kind: str) -> None:
    torch.manual_seed(0)
    policy = Policy(8, kind).eval()
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter)
    logits = torch.randn(6, 3) * 4
    pooled, evidence = torch.randn(6, 8), torch.rand(6, 3)
    opened, seen = policy(pooled, logits, evidence)
    folded, folded_seen = policy.folded(3)(pooled, logits, evidence)
    torch.testing.assert_close(folded, opened)
    if kind != "state":
        torch.testing.assert_close(folded_seen, seen)


def test_statistics_stay_finite_at_certainty() -> None:
    certain = torch.tensor([[80.0, -80.0]])
    statistics, evidence = weigh_evidence(certain, no_evidence(certain, 2))
    assert torch.isfinite(statistics).all() and torch.isfinite(evidence).all()


def test_exits_must_end_at_the_last_block() -> None:
    with pytest.raises(ValueError, match="last block 3"):
        EarlyExitNetwork(tiny.backbone("bert"), NetworkSpec(("a", "b"), (1, 2)))


@pytest.mark.parametrize(
    ("wish", "exits"),
    [("each", (1, 2, 3, 4)), ("every 2", (2, 4)), ("every 3", (3, 4)), ("1,3", (1, 3, 4)), ("2", (2, 4))],
)
def test_parse_exits(wish: str, exits: tuple[int, ...]) -> None:
    assert parse_exits(wish, 4) == exits


@pytest.mark.parametrize("wish", ["0", "5", "every", "two", "every 1,2", ""])
def test_parse_exits_refuses(wish: str) -> None:
    with pytest.raises(ValueError):
        parse_exits(wish, 4)


def test_a_folded_exit_is_the_same_classifier() -> None:
    torch.manual_seed(0)
    leaving = Exit(8, 3, 0.1)
    for _ in range(50):
        leaving(torch.randn(16, 8) * 3 + 5)
    leaving.eval()
    pooled = torch.randn(4, 8) * 3 + 5
    torch.testing.assert_close(leaving.folded()(pooled), leaving(pooled), atol=1e-5, rtol=0)
    assert leaving.standardize(torch.randn(5000, 8) * 3 + 5).std() == pytest.approx(1.0, abs=0.15)
