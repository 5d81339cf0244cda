"""Exits, policies and their evidence."""

from __future__ import annotations

import pytest
import tiny
import torch

from offramp.models import EarlyExitNetwork, NetworkSpec
from offramp.models.exits import Exit
from offramp.models.network import parse_exits
from offramp.models.policies.consistentee import ConsistentEEPolicy, evidence_size, weigh_evidence


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
        torch.testing.assert_close(network.gate_logits(out.pooled, out.logits), out.gate_logits)


def test_detached_policies_send_no_gradient_to_the_exits() -> None:
    network = tiny.network(policy="both")
    network(tiny.inputs(), detach_policies=True).gate_logits.sum().backward()
    assert network.exits[0].classify.weight.grad is None
    assert network.policies[0].slope.grad != 0


def test_the_gate_of_an_untrained_policy_grows_with_the_top_probability() -> None:
    policy = ConsistentEEPolicy(32, "statistics")
    sure, unsure = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.2, 0.0]])
    pooled = torch.zeros(1, 32)
    gate_logits = [policy(pooled, logits, None)[0] for logits in (sure, unsure)]
    assert gate_logits[0] > 0 > gate_logits[1]


def test_statistics_separate_agreement_from_disagreement() -> None:
    first, same, other = torch.tensor([[4.0, 0.0]]), torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    _, evidence = weigh_evidence(first, torch.zeros(1, 2))
    agreeing, _ = weigh_evidence(same, evidence)
    opposing, _ = weigh_evidence(other, evidence)
    assert evidence.shape == (1, evidence_size(2))
    assert agreeing[0, 1] > 0.9 > 0.1 > opposing[0, 1]
    assert agreeing[0, 0] == opposing[0, 0]  # as certain, of another label


@pytest.mark.parametrize("kind", ["statistics", "both", "state"])
def test_a_folded_policy_is_the_same_policy(kind: str) -> None:
    torch.manual_seed(0)
    policy = ConsistentEEPolicy(8, kind).eval()
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter)
    if policy.state is not None:
        policy.train()(torch.randn(20, 8) * 3 + 1, torch.randn(20, 3), None)  # statistics other than 0 and 1
        policy.eval()
    logits = torch.randn(6, 3) * 4
    pooled, evidence = torch.randn(6, 8), torch.rand(6, 3)
    gate_logit, next_evidence = policy(pooled, logits, evidence)
    folded_logit, folded_evidence = policy.folded(3)(pooled, logits, evidence)
    torch.testing.assert_close(folded_logit, gate_logit)
    if kind != "state":
        torch.testing.assert_close(folded_evidence, next_evidence)


def test_statistics_stay_finite_at_certainty() -> None:
    certain = torch.tensor([[80.0, -80.0]])
    statistics, evidence = weigh_evidence(certain, torch.zeros(1, 2))
    assert torch.isfinite(statistics).all() and torch.isfinite(evidence).all()


def test_exits_must_end_at_the_last_block() -> None:
    with pytest.raises(ValueError, match="last block 3"):
        EarlyExitNetwork(tiny.backbone("bert"), NetworkSpec(("a", "b"), (1, 2)))


@pytest.mark.parametrize(
    ("option", "exits"),
    [("each", (1, 2, 3, 4)), ("every 2", (2, 4)), ("every 3", (3, 4)), ("1,3", (1, 3, 4)), ("2", (2, 4))],
)
def test_parse_exits(option: str, exits: tuple[int, ...]) -> None:
    assert parse_exits(option, 4) == exits


@pytest.mark.parametrize("option", ["0", "5", "every", "two", "every 1,2", ""])
def test_parse_exits_refuses(option: str) -> None:
    with pytest.raises(ValueError):
        parse_exits(option, 4)


def test_a_folded_exit_is_the_same_classifier() -> None:
    torch.manual_seed(0)
    early_exit = Exit(8, 3, 0.1)
    for _ in range(50):
        early_exit(torch.randn(16, 8) * 3 + 5)
    early_exit.eval()
    pooled = torch.randn(4, 8) * 3 + 5
    torch.testing.assert_close(early_exit.folded()(pooled), early_exit(pooled), atol=1e-5, rtol=0)
    assert early_exit.standardize(torch.randn(5000, 8) * 3 + 5).std() == pytest.approx(1.0, abs=0.15)
