"""Recipe layer_selection: who may go past blocks, what it costs to run them, what is trained and kept."""

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
from offramp.training.loop import Run
from offramp.training.recipes.layer_selection import LayerSelection, draws, measure, prepare, train
from offramp.training.texts import IGNORED, Texts
from offramp.training.token_hardness import may_leave


def texts(count: int) -> Texts:
    """Three tokens that the full network itself says of random prompts: its blocks are worth running."""
    random = np.random.default_rng(0)
    rows = [random.integers(3, 60, 5 + number % 4).tolist() for number in range(count)]
    told = tiny.greedy(DecoderNetwork(tiny.decoder("llama")), rows, 3)
    return Texts([row + said for row, said in zip(rows, told, strict=True)], [len(row) for row in rows])


def trained(folder: Path, **settings: Any) -> tuple[DecoderNetwork, dict[str, Any], dict[str, Any]]:
    """The network, what the recipe says of dev, and the weights before."""
    network = DecoderNetwork(tiny.decoder("llama"))
    before = {name: value.clone() for name, value in network.model.state_dict().items()}
    s = LayerSelection(batch_size=8, lr=0.05, **settings)
    prepare(network, (), s)
    run = Run(network, folder, seed=0)
    rows = texts(80)
    found = train(run, {"train": rows, "dev": rows}, (), s)["dev"]
    return network, found, before


def test_the_token_that_predicts_may_go_past_and_no_token_of_the_prompt() -> None:
    _, following = Texts([[5, 6, 7, 8, 9], [5, 6, 7]], [3, 1]).batch([0, 1])
    assert may_leave(following).tolist() == [
        [False, False, False, True, False],
        [False, True, False, False, False],
    ]
    assert following[1].tolist() == [6, 7, IGNORED, IGNORED, IGNORED]


def test_shares_are_of_answer_tokens_and_prompts_run_everything() -> None:
    network = DecoderNetwork(tiny.decoder("llama"))
    prepare(network, (), LayerSelection(start=-50.0))
    may = torch.tensor([[False, False, True, True], [False, True, False, False]])
    ran: list[torch.Tensor] = []
    controllers = controllers_of(network)
    assert controllers is not None
    decide = draws(controllers, may, 1.0, ran)
    hidden = torch.randn(2, 4, 32)
    assert decide(0, hidden) is None and decide(2, hidden) is None and not ran
    share = decide(1, hidden)
    assert share is not None and torch.equal(share, (~may).float())
    assert [float(one.detach()) for one in ran] == [0.0]


@pytest.mark.parametrize("input", ["hidden", "fixed"])
def test_depth_is_bought_where_it_is_cheap(tmp_path: Path, input: str) -> None:
    _, dear, _ = trained(tmp_path / "dear", alpha=100.0, input=input, epochs=2)
    network, cheap, before = trained(tmp_path / "cheap", alpha=0.0, start=0.0, input=input, epochs=2)
    assert dear["depth"] < 2.2 and cheap["depth"] > 2.8
    assert dear["loss_full"] == cheap["loss_full"]  # the backbone is frozen
    for name, value in network.model.state_dict().items():
        assert torch.equal(value, before[name])
    save_exits(network, tmp_path)
    controllers = load_controllers(load_file(tmp_path / EXITS), 3, 32)
    kept = controllers_of(network)
    assert kept is not None
    hidden = torch.randn(1, 6, 32)
    torch.testing.assert_close(controllers.margin(2, hidden), kept.margin(2, hidden))
    assert (float(kept.margin(2, hidden).detach().std()) < 1e-5) == (input == "fixed")


def test_the_backbone_learns_where_it_is_told_to(tmp_path: Path) -> None:
    network, _, before = trained(tmp_path, backbone="trained")
    moved = [
        name for name, value in network.model.state_dict().items() if not torch.equal(value, before[name])
    ]
    assert any("layers.1" in name for name in moved)


def test_full_depth_measures_as_no_controllers_do(tmp_path: Path) -> None:
    network = DecoderNetwork(tiny.decoder("llama"))
    prepare(network, (), LayerSelection(start=50.0))
    found = measure(Run(network, tmp_path, seed=0), texts(12))
    assert found["depth"] == 3 and found["ran"] == [1.0]
    assert found["loss"] == found["loss_full"]
    assert found["tokens"] == 12 * 2  # three are learned, the first is predicted by the prompt


def test_contradictions_are_refused(tmp_path: Path) -> None:
    for wrong in ({"tau": 0.0}, {"alpha": -1.0}, {"input": "word"}, {"backbone": "half"}, {"epochs": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LayerSelection(**wrong)  # type: ignore[arg-type]
    run = Run(DecoderNetwork(tiny.decoder("llama")), tmp_path, seed=0)
    with pytest.raises(ValueError, match="call prepare"):
        train(run, {"train": texts(8)}, (), LayerSelection())
