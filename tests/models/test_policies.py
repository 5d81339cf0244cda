"""Policies of every kind: one signature, the same answer folded, and JEI's chain against a naive loop."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from torch import Tensor

from offramp.models.policies import KINDS
from offramp.models.policies.jei import LEAST, Gate, exit_probabilities, uncertainties


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
        opened, seen = policy(pooled, logits, evidence)
        folded, folded_seen = policy.folded(3)(pooled, logits, evidence)
        assert opened.shape == (50,)
        torch.testing.assert_close(folded.sigmoid(), opened.sigmoid(), atol=1e-5, rtol=0)
        assert (seen is None) == (folded_seen is None) == (size == 0)
        if seen is not None:
            torch.testing.assert_close(folded_seen, seen, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_gates_of_a_network_are_its_policies_one_after_the_other(kind: str) -> None:
    network = tiny.network(policy=kind)
    with torch.no_grad():
        out = network(tiny.inputs())
        torch.testing.assert_close(network.gates(out.pooled, out.logits), out.gates)
        evidence = network.no_evidence(out.logits)
        for at in range(2):
            gate, evidence = network.gate(at, out.pooled[:, at], out.logits[:, at], evidence)
            torch.testing.assert_close(gate, out.gates[:, at])


def test_names_of_parameters_are_those_of_old_checkpoints() -> None:
    names = {name.split(".", 2)[2] for name in tiny.network(policy="both").state_dict() if "policies" in name}
    layers = ("state.1", "state.3", "statistics.0", "statistics.2")
    assert names == {"slope", "bias", *(f"{layer}.{what}" for layer in layers for what in ("weight", "bias"))}


def naive(gates: list[float]) -> list[float]:
    """Section 2.1 of the paper as it is written: P_l, then c_l by the product of what came before."""
    found: list[float] = []
    for at, gate in enumerate(gates):
        leave = max(0.0, min(gate, 1.0 - sum(gates[:at])))
        left = math.prod(1.0 - c for c in found)
        # Where nobody is left there is nothing to decide: 0 / 0.
        found.append(1.0 if left <= 1e-9 else min(1.0, max(0.0, leave / left)))
    return found


class Given(Gate):
    """A gate that opens as it is told."""

    def own(self, logits: Tensor) -> Tensor:
        return logits[:, 0]


def chain(gates: Tensor) -> Tensor:
    """What the modules put out [rows, exits - 1], one after the other, for gates as told; a probability."""
    evidence, found = None, []
    for column in gates.unbind(1):
        opened, evidence = Given()(column, column.logit()[:, None], evidence)
        found.append(opened.sigmoid())
    return torch.stack(found, 1)


@pytest.mark.parametrize("largest", [0.15, 0.5, 1.0])
def test_the_chain_is_that_of_a_naive_loop(largest: float) -> None:
    torch.manual_seed(1)
    gates = torch.rand(400, 6, dtype=torch.float64) * largest
    said, expected = chain(gates), torch.tensor([naive(row) for row in gates.tolist()], dtype=torch.float64)
    found = (said / (1 - said) / 2).clamp(max=1)  # the conditional that it stands for
    left = 1 - (gates.cumsum(1) - gates)
    # Where less than LEAST is left c_l is defined otherwise, and where nothing is, by nobody.
    told = left >= LEAST
    assert told.float().mean() > 0.3
    torch.testing.assert_close(found[told], expected[told], atol=1e-9, rtol=0)
    first = [[c >= 0.5 for c in row] for row in expected.tolist()]
    agree = [
        (row.index(True) if True in row else 6) == (mine.index(True) if True in mine else 6)
        for row, mine in zip(first, (said >= 0.5).tolist(), strict=True)
    ]
    assert sum(agree) >= 398


def test_exit_probabilities_share_one_unit() -> None:
    found = exit_probabilities(
        torch.tensor([[0.3, 0.5, 0.4, 0.9], [0.1, 0.1, 0.1, 0.1], [1.0, 0.2, 0.0, 0.0]])
    )
    expected = [[0.3, 0.5, 0.2, 0.0], [0.1, 0.1, 0.1, 0.1], [1.0, 0.0, 0.0, 0.0]]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_what_is_put_out_is_finite_and_grows_where_the_conditional_stands_at_one() -> None:
    # g / left: 0.5, 0.4 / 0.5, 0.4 / 0.1; then 0.5, 1 and, with nothing left, 0.5 / LEAST
    said = chain(torch.tensor([[0.5, 0.4, 0.4], [0.5, 0.5, 0.5]]))
    expected = torch.tensor([[0.5, 0.8, 4.0], [0.5, 1.0, 0.5 / LEAST]])
    torch.testing.assert_close(said, 2 * expected / (2 * expected + 1))
    with torch.no_grad():
        gate = KINDS["jei"].make(4, 1)[0]
        gate.line.weight.copy_(torch.tensor([[-90.0, 90.0, -90.0, 90.0]]))  # opens where the exit is unsure
        for module in (gate.eval(), gate.folded(2)):
            for logits in (torch.tensor([[90.0, -90.0]]), torch.zeros(1, 2)):
                opened, spent = module(torch.zeros(1, 4), logits, torch.full((1, 1), 1.3))
                assert torch.isfinite(opened).all()
                assert opened.sigmoid().item() == pytest.approx(float(logits[0, 0] == 0), abs=0.03)
                torch.testing.assert_close(spent, torch.full((1, 1), 1.3 + float(logits[0, 0] == 0)))


def test_the_four_uncertainties_by_hand() -> None:
    found = uncertainties(torch.log(torch.tensor([0.7, 0.2, 0.1])))
    squares = [0.49 / 0.54, 0.04 / 0.54, 0.01 / 0.54]
    expected = [0.7, *(-sum(p * math.log(p) for p in ps) for ps in ([0.7, 0.2, 0.1], squares))]
    torch.testing.assert_close(found, torch.tensor([expected[0], expected[1], 0.5, expected[2]]))
    assert torch.isfinite(uncertainties(torch.tensor([200.0, -200.0, 0.0]))).all()


def test_learning_to_exit_is_one_layer_for_all_exits() -> None:
    network = tiny.network(policy="lte")
    assert network.policies[0].wrong is network.policies[1].wrong
    assert sum(name.startswith("policies") for name, _ in network.named_parameters()) == 2
