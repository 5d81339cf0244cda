"""Tests of benchmarks.compare_all: methods over data sets, variants against the default, the page of docs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from offramp.benchmarks.compare import REFERENCE
from offramp.benchmarks.compare_all import PAGE, over_all, read, text, variants
from offramp.benchmarks.contest import _top
from offramp.models.forecasts import softmax_statistics


def result(data: str, difference: float, draws: list[float], *settings: str) -> dict[str, Any]:
    against = {name: {"difference": d} for name, d in ((REFERENCE, 0.0), ("a (gate)", difference))}
    methods = {name: [{"accuracy_at_half": 90.0 + d["difference"]}] for name, d in against.items()}
    drawn = {REFERENCE: [0.0] * len(draws), "a (gate)": draws}
    return {
        "data": data,
        "settings": list(settings),
        "seeds": [0],
        "against_max_probability": against,
        "draws": drawn,
        "methods": methods,
    }


def test_data_sets_count_alike_and_draws_are_averaged_before_the_interval() -> None:
    # Each by itself leaves zero on one side in half of its draws; together every draw is above.
    one, other = result("x", 1.0, [-1.0, 3.0] * 50), result("y", 1.0, [3.0, -1.0] * 50)
    assert over_all([one, other]) == [["a (gate)", "+1.00", "+1.00", "+1.00 [+1.00, +1.00]", "above"]]
    assert over_all([one])[0][-1] == "not apart"


def test_a_method_that_a_data_set_lacks_is_left_out() -> None:
    lacking = result("y", 0.0, [0.0])
    del lacking["draws"]["a (gate)"]
    assert over_all([result("x", 1.0, [1.0]), lacking]) == []


def test_a_variant_is_held_against_the_default_draw_by_draw() -> None:
    plain, other = result("x", 1.0, [0.0, 2.0] * 50), result("x", 0.5, [-0.5, 1.5] * 50, "price=2")
    (row,) = variants([plain, other])
    assert row == ["x", "a (gate)", "price=2", "90.50", "91.00", "-0.50 [-0.50, -0.50]", "below"]
    assert variants([other]) == [] and variants([plain]) == []


def test_the_page_is_what_the_result_files_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == text(read(), read("agreement")), (
        "python benchmarks/compare_all.py"
    )


def test_the_top_probability_is_had_back_from_the_statistics() -> None:
    logits = torch.randn(200, 5, generator=torch.Generator().manual_seed(0)) * 3
    top = logits.softmax(-1).max(-1).values.numpy()
    assert np.allclose(_top(softmax_statistics(logits).numpy()), top, atol=2e-5)
