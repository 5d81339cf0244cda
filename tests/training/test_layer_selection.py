"""Recipe layer_selection: controlled tokens, the price of blocks, trained and saved parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

from offramp.models.controllers import controllers_of, load_controllers
from offramp.models.decoder import DecoderNetwork
from offramp.training.checkpoint import EXITS, save_exits
from offramp.training.lm_data import IGNORED, TokenRows
from offramp.training.loop import Run
from offramp.training.recipes.layer_selection import (
    LayerSelectionSettings,
    controlled_blocks,
    measure_controllers,
    prepare,
    train,
)
from offramp.training.token_exits import may_exit_early


def answer_rows(count: int) -> TokenRows:
    """Random prompts and three greedy tokens of the full network: skipping blocks changes them."""
    random = np.random.default_rng(0)
    rows = [random.integers(3, 60, 5 + number % 4).tolist() for number in range(count)]
    answers = tiny.greedy(DecoderNetwork(tiny.decoder("llama")), rows, 3)
    return TokenRows(
        [row + answer for row, answer in zip(rows, answers, strict=True)], [len(row) for row in rows]
    )


def trained(folder: Path, **settings: Any) -> tuple[DecoderNetwork, dict[str, Any], dict[str, Any]]:
    """The network, the dev figures, and the weights before training."""
    network = DecoderNetwork(tiny.decoder("llama"))
    before = {name: value.clone() for name, value in network.model.state_dict().items()}
    s = LayerSelectionSettings(batch_size=8, lr=0.05, **settings)
    prepare(network, (), s)
    run = Run(network, folder, seed=0)
    rows = answer_rows(80)
    figures = train(run, {"train": rows, "dev": rows}, (), s)["dev"]
    return network, figures, before


def test_predicting_tokens_may_skip_and_tokens_of_the_prompt_may_not() -> None:
    _, targets = TokenRows([[5, 6, 7, 8, 9], [5, 6, 7]], [3, 1]).batch([0, 1])
    assert may_exit_early(targets).tolist() == [
        [False, False, False, True, False],
        [False, True, False, False, False],
    ]
    assert targets[1].tolist() == [6, 7, IGNORED, IGNORED, IGNORED]


def test_shares_are_of_answer_tokens_and_prompts_run_everything() -> None:
    network = DecoderNetwork(tiny.decoder("llama"))
    prepare(network, (), LayerSelectionSettings(start=-50.0))
    may_skip = torch.tensor([[False, False, True, True], [False, True, False, False]])
    shares: list[torch.Tensor] = []
    controllers = controllers_of(network)
    assert controllers is not None
    block_mask = controlled_blocks(controllers, may_skip, 1.0, shares)
    hidden = torch.randn(2, 4, 32)
    assert block_mask(0, hidden) is None and block_mask(2, hidden) is None and not shares
    mask = block_mask(1, hidden)
    assert mask is not None and torch.equal(mask, (~may_skip).float())
    assert [float(value.detach()) for value in shares] == [0.0]


@pytest.mark.parametrize("input", ["hidden", "fixed"])
def test_a_high_price_lowers_the_depth(tmp_path: Path, input: str) -> None:
    _, expensive, _ = trained(tmp_path / "expensive", alpha=100.0, input=input, epochs=2)
    network, cheap, before = trained(tmp_path / "cheap", alpha=0.0, start=0.0, input=input, epochs=2)
    assert expensive["depth"] < 2.2 and cheap["depth"] > 2.8
    assert expensive["loss_full"] == cheap["loss_full"]  # the backbone is frozen
    for name, value in network.model.state_dict().items():
        assert torch.equal(value, before[name])
    save_exits(network, tmp_path)
    controllers = load_controllers(load_file(tmp_path / EXITS), 3, 32)
    trained_controllers = controllers_of(network)
    assert trained_controllers is not None
    hidden = torch.randn(1, 6, 32)
    torch.testing.assert_close(controllers.margin(2, hidden), trained_controllers.margin(2, hidden))
    assert (float(trained_controllers.margin(2, hidden).detach().std()) < 1e-5) == (input == "fixed")


def test_the_backbone_is_trained_with_backbone_trained(tmp_path: Path) -> None:
    network, _, before = trained(tmp_path, backbone="trained")
    moved = [
        name for name, value in network.model.state_dict().items() if not torch.equal(value, before[name])
    ]
    assert any("layers.1" in name for name in moved)


def test_at_full_depth_both_losses_are_equal(tmp_path: Path) -> None:
    network = DecoderNetwork(tiny.decoder("llama"))
    prepare(network, (), LayerSelectionSettings(start=50.0))
    figures = measure_controllers(Run(network, tmp_path, seed=0), answer_rows(12))
    assert figures["depth"] == 3 and figures["block_shares"] == [1.0]
    assert figures["loss"] == figures["loss_full"]
    assert figures["tokens"] == 12 * 2  # three are learned, the first is predicted by the prompt


def test_invalid_settings_are_refused(tmp_path: Path) -> None:
    for wrong in ({"tau": 0.0}, {"alpha": -1.0}, {"input": "word"}, {"backbone": "other"}, {"epochs": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LayerSelectionSettings(**wrong)  # type: ignore[arg-type]
    run = Run(DecoderNetwork(tiny.decoder("llama")), tmp_path, seed=0)
    with pytest.raises(ValueError, match="call prepare"):
        train(run, {"train": answer_rows(8)}, (), LayerSelectionSettings())
