"""Policies of every kind: one signature, the same answer folded, and JEI's chain against a naive loop."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from torch import Tensor

from offramp.models.policies import KINDS
from offramp.models.policies.jei import MIN_REMAINDER, JeiGate, exit_probabilities, uncertainties


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_folds_to_the_same_policy(kind: str) -> None:
    torch.manual_seed(0)
    policies = KINDS[kind].make(8, 2).eval()
    for parameter in policies.parameters():
        torch.nn.init.normal_(parameter)
    logits, pooled = torch.randn(50, 3) * 4, torch.randn(50, 8)
    size = KINDS[kind].evidence(3)
    evidence = torch.rand(50, size) if size else None
    for policy in policies:
        gate_logit, next_evidence = policy(pooled, logits, evidence)
        folded_logit, folded_evidence = policy.folded(3)(pooled, logits, evidence)
        assert gate_logit.shape == (50,)
        torch.testing.assert_close(folded_logit.sigmoid(), gate_logit.sigmoid(), atol=1e-5, rtol=0)
        assert (next_evidence is None) == (folded_evidence is None) == (size == 0)
        if next_evidence is not None:
            torch.testing.assert_close(folded_evidence, next_evidence, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_gates_of_a_network_are_its_policies_one_after_the_other(kind: str) -> None:
    network = tiny.network(policy=kind)
    with torch.no_grad():
        out = network(tiny.inputs())
        torch.testing.assert_close(network.gate_logits(out.pooled, out.logits), out.gate_logits)
        evidence = network.no_evidence(out.logits)
        for at in range(2):
            gate_logit, evidence = network.gate_logit(at, out.pooled[:, at], out.logits[:, at], evidence)
            torch.testing.assert_close(gate_logit, out.gate_logits[:, at])


def test_names_in_checkpoints_are_known() -> None:
    """Other names would make checkpoints of users unreadable."""
    names = {name.split(".", 2)[2] for name in tiny.network(policy="both").state_dict() if "policies" in name}
    layers = ("state.2", "state.4", "statistics.0", "statistics.2")
    statistics = {f"state.0.{what}" for what in ("mean", "variance", "seen")}
    weights = {f"{layer}.{what}" for layer in layers for what in ("weight", "bias")}
    assert names == {"slope", "bias", *statistics, *weights}


def naive(gates: list[float]) -> list[float]:
    """Section 2.1 of the paper as written: P_l, then c_l by the product of the earlier factors."""
    conditionals: list[float] = []
    for at, gate in enumerate(gates):
        exit_here = max(0.0, min(gate, 1.0 - sum(gates[:at])))
        remaining = math.prod(1.0 - c for c in conditionals)
        # With nothing remaining the quotient is 0 / 0, and any decision is right.
        conditionals.append(1.0 if remaining <= 1e-9 else min(1.0, max(0.0, exit_here / remaining)))
    return conditionals


class FixedGate(JeiGate):
    """A gate whose logit of g is its input."""

    def gate_logit(self, logits: Tensor) -> Tensor:
        return logits[:, 0]


def chain(gates: Tensor) -> Tensor:
    """Outputs of the modules in turn [rows, exits - 1], as probabilities; gates [rows, exits - 1] are g."""
    evidence, outputs = None, []
    for column in gates.unbind(1):
        logit, evidence = FixedGate()(column, column.logit()[:, None], evidence)
        outputs.append(logit.sigmoid())
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("largest", [0.15, 0.5, 1.0])
def test_the_chain_is_that_of_a_naive_loop(largest: float) -> None:
    torch.manual_seed(1)
    gates = torch.rand(400, 6, dtype=torch.float64) * largest
    outputs = chain(gates)
    expected = torch.tensor([naive(row) for row in gates.tolist()], dtype=torch.float64)
    conditionals = (outputs / (1 - outputs) / 2).clamp(max=1)
    remainder = 1 - (gates.cumsum(1) - gates)
    compared = remainder >= MIN_REMAINDER  # below that we define c_l differently from the paper
    assert compared.float().mean() > 0.3
    torch.testing.assert_close(conditionals[compared], expected[compared], atol=1e-9, rtol=0)
    first = [[c >= 0.5 for c in row] for row in expected.tolist()]
    agree = [
        (row.index(True) if True in row else 6) == (mine.index(True) if True in mine else 6)
        for row, mine in zip(first, (outputs >= 0.5).tolist(), strict=True)
    ]
    assert sum(agree) >= 398


def test_exit_probabilities_sum_to_one_at_most() -> None:
    probabilities = exit_probabilities(
        torch.tensor([[0.3, 0.5, 0.4, 0.9], [0.1, 0.1, 0.1, 0.1], [1.0, 0.2, 0.0, 0.0]])
    )
    expected = [[0.3, 0.5, 0.2, 0.0], [0.1, 0.1, 0.1, 0.1], [1.0, 0.0, 0.0, 0.0]]
    torch.testing.assert_close(probabilities, torch.tensor(expected))


def test_the_logit_is_finite_and_grows_where_the_conditional_is_one() -> None:
    # g / remainder: 0.5, 0.4 / 0.5, 0.4 / 0.1; then 0.5, 1 and, with nothing remaining, 0.5 / MIN_REMAINDER
    outputs = chain(torch.tensor([[0.5, 0.4, 0.4], [0.5, 0.5, 0.5]]))
    expected = torch.tensor([[0.5, 0.8, 4.0], [0.5, 1.0, 0.5 / MIN_REMAINDER]])
    torch.testing.assert_close(outputs, 2 * expected / (2 * expected + 1))
    with torch.no_grad():
        gate = KINDS["jei"].make(4, 1)[0]
        gate.line.weight.copy_(torch.tensor([[-90.0, 90.0, -90.0, 90.0]]))  # high where the exit is uncertain
        for module in (gate.eval(), gate.folded(2)):
            for logits in (torch.tensor([[90.0, -90.0]]), torch.zeros(1, 2)):
                logit, gate_sum = module(torch.zeros(1, 4), logits, torch.full((1, 1), 1.3))
                assert torch.isfinite(logit).all()
                assert logit.sigmoid().item() == pytest.approx(float(logits[0, 0] == 0), abs=0.03)
                torch.testing.assert_close(gate_sum, torch.full((1, 1), 1.3 + float(logits[0, 0] == 0)))


def test_the_four_uncertainties_by_hand() -> None:
    values = uncertainties(torch.log(torch.tensor([0.7, 0.2, 0.1])))
    squares = [0.49 / 0.54, 0.04 / 0.54, 0.01 / 0.54]
    expected = [0.7, *(-sum(p * math.log(p) for p in ps) for ps in ([0.7, 0.2, 0.1], squares))]
    torch.testing.assert_close(values, torch.tensor([expected[0], expected[1], 0.5, expected[2]]))
    assert torch.isfinite(uncertainties(torch.tensor([200.0, -200.0, 0.0]))).all()


def test_learning_to_exit_is_one_layer_for_all_exits() -> None:
    network = tiny.network(policy="lte")
    assert network.policies[0].wrong is network.policies[1].wrong
    assert sum(name.startswith("policies") for name, _ in network.named_parameters()) == 2
