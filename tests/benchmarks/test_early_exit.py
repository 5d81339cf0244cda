"""Tests of benchmarks.early_exit: the time of a truncated network of the same accuracy."""

from __future__ import annotations

from typing import Any

import pytest

from offramp.benchmarks.early_exit import rows_with_ratios, static_ms


def candidate(name: str, kind: str, accuracy: float, ms: float, variant: str = "fp32") -> dict[str, Any]:
    return {"name": name, "kind": kind, "variant": variant, "accuracy": accuracy, "mean_ms": ms}


STATIC = [
    candidate("first 2 blocks", "truncated", 70.0, 2.0),
    candidate("first 3 blocks", "truncated", 68.0, 3.0),  # slower and worse than another: not on the line
    candidate("first 4 blocks", "truncated", 80.0, 4.0),
    candidate("monolith", "monolith", 90.0, 12.0),
    candidate("monolith int8", "monolith", 89.0, 6.0, "int8"),  # another precision is not on the line
]


def test_static_time_is_on_the_line_through_undominated_graphs() -> None:
    assert static_ms(STATIC, 70.0) == 2.0
    assert static_ms(STATIC, 75.0) == pytest.approx(3.0)
    assert static_ms(STATIC, 85.0) == pytest.approx(8.0)


def test_there_is_no_static_network_above_the_best_or_below_the_worst() -> None:
    assert static_ms(STATIC, 90.1) is None
    assert static_ms(STATIC, 69.9) is None


def test_a_walk_is_compared_with_full_depth_and_both_monoliths() -> None:
    walks = [candidate("walk", "walk", 85.0, 4.0), candidate("walk full depth", "full", 90.0, 13.0)]
    row = rows_with_ratios({"candidates": [*walks, *STATIC]})[0]
    assert row["accuracy_lost"] == 5.0
    assert (row["times_fp32_monolith"], row["times_int8_monolith"], row["times_static"]) == (3.0, 1.5, 2.0)
