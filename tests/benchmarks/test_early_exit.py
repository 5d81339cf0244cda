"""Tests of benchmarks.early_exit: the time of a truncated network of the same accuracy."""

from __future__ import annotations

from typing import Any

import pytest

from offramp.benchmarks.early_exit import judged, static_ms


def one(name: str, kind: str, accuracy: float, ms: float, variant: str = "fp32") -> dict[str, Any]:
    return {"name": name, "kind": kind, "variant": variant, "accuracy": accuracy, "mean_ms": ms}


STATIC = [
    one("first 2 blocks", "truncated", 70.0, 2.0),
    one("first 3 blocks", "truncated", 68.0, 3.0),  # slower and worse: nobody deploys it
    one("first 4 blocks", "truncated", 80.0, 4.0),
    one("monolith", "monolith", 90.0, 12.0),
    one("monolith int8", "monolith", 89.0, 6.0, "int8"),  # another precision is not on the line
]


def test_static_time_is_read_off_the_line_through_graphs_that_nothing_beats() -> None:
    assert static_ms(STATIC, 70.0) == 2.0
    assert static_ms(STATIC, 75.0) == pytest.approx(3.0)
    assert static_ms(STATIC, 85.0) == pytest.approx(8.0)


def test_there_is_no_static_network_above_the_best_or_below_the_worst() -> None:
    assert static_ms(STATIC, 90.1) is None
    assert static_ms(STATIC, 69.9) is None


def test_a_walk_is_judged_against_full_depth_and_both_monoliths() -> None:
    walks = [one("walk", "walk", 85.0, 4.0), one("walk full depth", "full", 90.0, 13.0)]
    row = judged({"contenders": [*walks, *STATIC]})[0]
    assert row["accuracy_lost"] == 5.0
    assert (row["times_fp32_monolith"], row["times_int8_monolith"], row["times_static"]) == (3.0, 1.5, 2.0)
