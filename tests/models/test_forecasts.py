"""Error forecasts: their statistics, and the columns that a graph carries."""

from __future__ import annotations

import math

import pytest
import tiny
import torch

from offramp.models import EarlyExitNetwork, NetworkSpec
from offramp.models.forecasts import Forecast, path_columns, softmax_statistics


def test_statistics_of_a_softmax_worked_out_by_hand() -> None:
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [1 / 3, 1 / 3, 1 / 3]])
    statistics = softmax_statistics(probabilities.log())
    entropy = -(0.7 * math.log(0.7) + 0.2 * math.log(0.2) + 0.1 * math.log(0.1)) / math.log(3)
    torch.testing.assert_close(statistics[0], torch.tensor([math.log(3.5), entropy, 0.5]))
    torch.testing.assert_close(statistics[1], torch.tensor([0.0, 1.0, 0.0]))


def test_a_certain_exit_has_finite_statistics() -> None:
    assert softmax_statistics(torch.tensor([[1000.0, -1000.0]])).isfinite().all()
    sure = torch.tensor([[9.0, -8.0, 1.0]])
    moved = softmax_statistics(sure + torch.tensor([[1e-6, 0.0, -1e-6]])) - softmax_statistics(sure)
    assert moved.abs().max() < 1e-5, "an engine's last digit must not be amplified"


def test_kept_columns_are_those_of_their_paths() -> None:
    names = [
        f"{current} {path}"
        for current in "abc"
        for path in ["exit", *(f"{b}{e}" for b in "abc" for e in range(4))]
    ]
    columns = [names[at] for at in path_columns([0, 2], 3, [1, 3], 4)]
    assert columns == [
        *("a exit", "a a1", "a a3", "a c1", "a c3"),
        *("c exit", "c a1", "c a3", "c c1", "c c3"),
    ]


def test_a_folded_forecast_gives_a_subset_of_the_columns() -> None:
    torch.manual_seed(0)
    forecast = Forecast(variants=3, ahead=2).eval()
    forecast.mean.normal_()
    forecast.spread.uniform_(0.5, 2.0)
    logits = torch.randn(7, 4)
    whole = forecast(logits).sigmoid().view(7, 3, 7)
    with torch.no_grad():
        kept = forecast.folded([0, 1], [1])(logits).view(7, 2, 3)
    torch.testing.assert_close(kept[:, 0], whole[:, 0][:, [0, 2, 4]])
    torch.testing.assert_close(kept[:, 1], whole[:, 1][:, [0, 2, 4]])


@pytest.mark.parametrize("inputs", ["features", "both"])
def test_a_forecast_reads_compact_features_of_the_pooled_vector(inputs: str) -> None:
    torch.manual_seed(0)
    forecast = Forecast(variants=2, ahead=2, inputs=inputs, hidden_size=12).eval()
    forecast.mean.normal_()
    forecast.spread.uniform_(0.5, 2.0)
    logits, pooled = torch.randn(7, 4), torch.randn(7, 12)
    with torch.no_grad():
        whole = forecast(logits, pooled).sigmoid().view(7, 2, 5)
        kept = forecast.folded([0, 1], [0, 1])(logits, pooled).view(7, 2, 5)
        others = forecast(torch.randn(7, 4), pooled).sigmoid().view(7, 2, 5)
        moved = forecast(logits, torch.randn(7, 12)).sigmoid().view(7, 2, 5)
    torch.testing.assert_close(kept, whole)
    assert not torch.allclose(moved, whole, atol=1e-3)
    assert torch.allclose(others, whole) == (inputs == "features")


def test_every_exit_but_the_last_has_a_forecast_of_its_width() -> None:
    spec = NetworkSpec(("a", "b"), (1, 2, 3), forecast=("fp32", "int8"))
    network = EarlyExitNetwork(tiny.backbone("bert"), spec)
    widths = [forecast(torch.zeros(1, 2)).shape[1] for forecast in network.forecasts]
    assert widths == [2 * (1 + 2 * 2), 2 * (1 + 2 * 1)]
