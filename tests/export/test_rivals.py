"""Which truncated graphs are written when nobody says; the folder itself is checked in test_cli."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from offramp.export.rivals import mean_exits
from offramp.runtime.bundle import open_bundle
from offramp.runtime.manifest import OperatingPoint, RuleSpec

MANIFEST = open_bundle(Path(__file__).parent.parent / "data" / "tiny_bundle").manifest  # exits after 1, 3, 4


@pytest.mark.parametrize(
    ("means", "blocks"),
    [
        ([], [3]),  # no points: the middle exit
        ([1.7], [1, 3]),
        ([3.0], [3]),
        ([1.7, 3.5], [1, 3]),  # the last exit is the monolith
        ([4.0], [3]),
    ],
)
def test_both_sides_of_the_mean_exits(means: list[float], blocks: list[int]) -> None:
    points = tuple(
        OperatingPoint(str(mean), RuleSpec("never", {}), "fp32", "", "dev", {"mean_exit": mean})
        for mean in means
    )
    assert mean_exits(dataclasses.replace(MANIFEST, points=points)) == blocks
