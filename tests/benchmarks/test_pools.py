"""benchmarks/pools.py: two processes take turns, and each row has a ratio with its interval."""

from __future__ import annotations

import pytest
from tiny_bundles import CLASSIFIER

from offramp.benchmarks import pools


@pytest.mark.slow
def test_rows_have_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "WORDS", (3, 9))
    rows = pools.measure(CLASSIFIER, 3, 2)
    assert [row["words"] for row in rows] == [3, 9]
    assert all(0 < row["low"] <= row["ratio"] <= row["high"] for row in rows)
