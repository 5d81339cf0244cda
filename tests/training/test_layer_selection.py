"""Recipe layer_selection: fixed lists, random routes, controlled tokens; what is trained and resumed."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

from offramp.models.controllers import controllers_of, load_controllers
from offramp.models.decoder import DecoderNetwork
from offramp.runtime.errors import BadSetting
from offramp.training.checkpoint import EXITS, save_exits
from offramp.training.lm_data import IGNORED, TokenRows
from offramp.training.loop import Run
from offramp.training.recipes.layer_selection import (
    LayerSelectionSettings,
    controlled_blocks,
    draw_mask,
    even_skip,
    measure_selection,
    prepare,
    random_runs,
    routes_of,
    train,
)
from offramp.training.token_exits import may_exit_early


@cache
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
    s = LayerSelectionSettings(batch_size=8, **{"lr": 0.05} | settings)
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


@pytest.mark.slow
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
    prepare(network, (), settings := LayerSelectionSettings(start=50.0))
    figures = measure_selection(Run(network, tmp_path, seed=0), answer_rows(12), settings)
    assert figures["depth"] == 3 and figures["block_shares"] == [1.0]
    assert figures["loss"] == figures["loss_full"]
    assert figures["tokens"] == 12 * 2  # three are learned, the first is predicted by the prompt


def moved_blocks(network: DecoderNetwork, before: dict[str, Any]) -> set[int]:
    """Blocks (0-based) of which a weight differs from what it was before training."""
    after = network.model.state_dict().items()
    moved = [name.split(".") for name, value in after if not torch.equal(value, before[name])]
    return {int(name[2]) for name in moved if name[1] == "layers"}


@pytest.mark.parametrize(
    ("settings", "moved", "depth"),
    [
        ({"selection": "skip", "blocks_run": "2"}, {0, 2}, 2),
        ({"selection": "skip", "skipped": "1,3"}, {1}, 1),
        ({"selection": "exit", "blocks_run": "1"}, {0}, 1),
        ({"selection": "full"}, {0, 1, 2}, 3),
        ({"selection": "menu", "blocks_run": "2,3"}, {0, 1, 2}, None),
        ({"selection": "random", "blocks_run": "2"}, {0, 1, 2}, 2),
        ({"selection": "stochastic", "blocks_run": "2"}, {0, 1, 2}, 2),
    ],
)
def test_only_blocks_that_answers_run_are_trained(
    tmp_path: Path, settings: dict[str, Any], moved: set[int], depth: float | None
) -> None:
    network, figures, before = trained(tmp_path, lr=0.01, **settings)
    assert moved_blocks(network, before) == moved
    assert controllers_of(network) is None
    if depth is not None:  # of three blocks the middle one alone can be drawn: never, with two blocks run
        assert figures["depth"] == depth
    else:
        assert 2 < figures["depth"] < 3


@pytest.mark.slow
def test_training_lowers_the_loss_of_the_skipped_model_itself(tmp_path: Path) -> None:
    settings = LayerSelectionSettings(selection="skip", blocks_run="2")
    network = DecoderNetwork(tiny.decoder("llama"))
    prepare(network, (), settings)
    before = measure_selection(Run(network, tmp_path / "run", seed=0), answer_rows(80), settings)
    _, after, _ = trained(tmp_path / "trained", lr=0.01, epochs=3, selection="skip", blocks_run="2")
    assert after["loss"] < before["loss"] - 0.1


@pytest.mark.slow
def test_ordinary_fine_tuning_comes_first_if_asked_for(tmp_path: Path) -> None:
    _, figures, _ = trained(tmp_path, lr=0.01, full_epochs=2, selection="exit", blocks_run="1")
    log = (tmp_path / "log.jsonl").read_text()
    phases = [json.loads(line)["phase"] for line in log.splitlines()]
    assert list(dict.fromkeys(phases)) == ["full", "exit"]
    assert figures["depth"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("selection", tiny.with_slow(["menu", "stochastic"], "menu"))
def test_a_killed_training_ends_with_the_same_weights(tmp_path: Path, selection: str) -> None:
    settings = {"selection": selection, "blocks_run": "2", "lr": 0.01, "full_epochs": 1}
    if selection == "menu":
        settings["blocks_run"] = "2,3"
    whole, _, _ = trained(tmp_path / "whole", **settings)

    class Killed(Exception):
        pass

    network = DecoderNetwork(tiny.decoder("llama"))
    s = LayerSelectionSettings(batch_size=8, **settings)  # type: ignore[arg-type]
    prepare(network, (), s)
    run = Run(network, tmp_path / "killed", seed=0, save_every=0)
    log, rows = run.log, answer_rows(80)

    def log_and_stop(**figures: Any) -> None:
        log(**figures)
        if figures["phase"] == selection and figures["step"] == 10:
            raise Killed

    run.log = log_and_stop  # type: ignore[method-assign]
    with pytest.raises(Killed):
        train(run, {"train": rows}, (), s)
    resumed = DecoderNetwork(tiny.decoder("llama"))
    prepare(resumed, (), s)
    train(Run(resumed, tmp_path / "killed", seed=0), {"train": rows}, (), s)
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name


def test_lists_are_even_and_a_given_list_is_taken() -> None:
    assert even_skip(30, 29) == {15} and even_skip(12, 10) == {3, 8} and even_skip(30, 30) == frozenset()
    for run in range(2, 30):
        skipped = even_skip(30, run)
        assert len(skipped) == 30 - run and not skipped & {0, 29}
    published = LayerSelectionSettings(selection="skip", skipped="2,4,6")
    assert routes_of(published, 6) == [frozenset({1, 3, 5})]
    assert routes_of(LayerSelectionSettings(selection="exit", blocks_run="4"), 6) == [frozenset({4, 5})]
    wrong: dict[str, Any]
    for wrong in (
        {"selection": "skip", "blocks_run": "7"},
        {"selection": "exit", "blocks_run": "7"},
        {"selection": "random", "blocks_run": "1"},
        {"selection": "skip", "skipped": "7"},
    ):
        with pytest.raises(BadSetting, match="blocks"):
            routes_of(LayerSelectionSettings(**wrong), 6)


def test_random_routes_keep_their_number_and_differ_by_row() -> None:
    torch.manual_seed(0)
    runs = random_runs(500, 8, 4)
    assert (runs.sum(1) == 4).all() and runs[:, [0, 7]].all()
    assert runs[:, 1:7].float().mean(0).tolist() == pytest.approx([2 / 6] * 6, abs=0.08)


def test_every_answer_token_of_a_row_has_one_route_and_stochastic_tokens_have_their_own() -> None:
    torch.manual_seed(0)
    may_skip = torch.ones(64, 5, dtype=torch.bool)
    may_skip[:, 0] = False
    hidden = torch.zeros(64, 5, 4)

    def runs(selection: str, blocks_run: str) -> torch.Tensor:
        mask = draw_mask(LayerSelectionSettings(selection=selection, blocks_run=blocks_run), 8, may_skip)
        assert mask is not None
        values = [mask(block, hidden) for block in range(8)]
        return torch.stack([torch.ones(64, 5) if value is None else value for value in values], -1)

    for selection, blocks_run, depths in (("menu", "8,4", {8, 4}), ("random", "4", {4})):
        route = runs(selection, blocks_run)
        assert (route[:, 1:] == route[:, 1:2]).all() and (route[:, 0] == 1).all()
        assert set(route[:, 1].sum(-1).int().tolist()) == depths
    tokens = runs("stochastic", "4")[:, 1:]
    assert not (tokens == tokens[:, :1]).all()
    assert float(tokens.sum(-1).mean()) == pytest.approx(4, abs=0.3)


def test_invalid_settings_are_refused(tmp_path: Path) -> None:
    wrong: dict[str, Any]
    for wrong in (
        {"tau": 0.0},
        {"alpha": -1.0},
        {"input": "word"},
        {"backbone": "other"},
        {"epochs": 0},
        {"selection": "best"},
        {"selection": "skip"},
        {"selection": "exit", "blocks_run": "3,4"},
        {"blocks_run": "3", "selection": "full"},
        {"blocks_run": "three", "selection": "skip"},
        {"skipped": "2", "selection": "exit"},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LayerSelectionSettings(**wrong)
    run = Run(DecoderNetwork(tiny.decoder("llama")), tmp_path, seed=0)
    with pytest.raises(ValueError, match="call prepare"):
        train(run, {"train": answer_rows(8)}, (), LayerSelectionSettings())
