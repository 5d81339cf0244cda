"""Controllers: their input, their gradients, and the folding of a fixed input."""

from __future__ import annotations

import pytest
import torch

from offramp.models.controllers import (
    Controllers,
    controllers_after,
    controllers_of,
    load_controllers,
    run_probabilities,
)


def small_controllers(input: str = "hidden", start: float = 0.0) -> Controllers:
    torch.manual_seed(0)
    controllers = Controllers(5, 16, input=input, start=start)
    for parameter in controllers.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return controllers


def test_the_first_and_the_last_block_always_run() -> None:
    assert sorted(small_controllers()) == ["2", "3", "4"]
    with pytest.raises(ValueError, match="none is left"):
        Controllers(2, 16)
    with pytest.raises(ValueError, match="hidden, fixed"):
        Controllers(5, 16, input="word")


def test_they_read_directions_and_send_no_gradient_to_hidden() -> None:
    controllers, hidden = small_controllers(), torch.randn(2, 7, 16, requires_grad=True)
    torch.testing.assert_close(controllers.margin(2, hidden), controllers.margin(2, 900 * hidden))
    assert controllers.margin(2, hidden).std() > 0.1
    controllers.sample(3, hidden, 1.0).sum().backward()
    assert hidden.grad is None
    assert controllers["3"].weight.grad.abs().sum() > 0  # type: ignore[union-attr, operator]


@torch.no_grad()
def test_samples_are_hard_and_as_frequent_as_the_logit() -> None:
    controllers = Controllers(5, 16, start=2.0)
    sampled = controllers.sample(2, torch.randn(40, 100, 16), 1.0)
    assert (torch.isclose(sampled, torch.tensor(0.0)) | torch.isclose(sampled, torch.tensor(1.0))).all()
    assert float(sampled.mean()) == pytest.approx(float(torch.tensor(2.0).sigmoid()), abs=0.02)


def test_a_fixed_input_ignores_the_token_and_folds_into_biases() -> None:
    controllers, hidden = small_controllers("fixed"), torch.randn(2, 7, 16)
    before = controllers.margin(4, hidden).detach()
    assert before.std() < 1e-6
    controllers.fold_fixed_input()
    controllers.fold_fixed_input()  # a resumed run folds again
    loaded = load_controllers({f"controllers.{k}": v for k, v in controllers.state_dict().items()}, 5, 16)
    torch.testing.assert_close(loaded.margin(4, hidden), before)
    torch.testing.assert_close(loaded.margin(4, -hidden), before)


def test_tensors_of_another_network_are_refused() -> None:
    state = {f"controllers.{k}": v for k, v in small_controllers().state_dict().items()} | {
        "exits.2.bias": torch.ones(1)
    }
    load_controllers(state, 5, 16)
    with pytest.raises(ValueError, match="of 6 blocks"):
        load_controllers(state, 6, 16)


def test_a_network_without_controllers() -> None:
    network = torch.nn.Linear(2, 2)
    assert controllers_of(network) is None
    network.controllers = small_controllers()
    assert controllers_of(network) is not None


@pytest.mark.parametrize("input", ["hidden", "fixed"])
def test_probabilities_of_the_blocks_ahead_are_those_of_each_controller(input: str) -> None:
    network = torch.nn.Module()
    network.controllers = small_controllers(input)
    hidden = 30 * torch.randn(2, 7, 16)
    for block, ahead in ((1, 3), (2, 2), (3, 1)):
        after = controllers_after(network, block)
        assert after is not None
        probabilities = after(hidden)
        assert probabilities.shape == (2, 7, ahead)
        torch.testing.assert_close(probabilities, run_probabilities(network, block, hidden))
        margin = network.controllers.margin(block + 1, hidden)
        torch.testing.assert_close(probabilities[..., 0], margin.sigmoid())
    assert controllers_after(network, 4) is None and controllers_after(torch.nn.Module(), 1) is None
