"""Tests of benchmarks.compare.pages: methods over data sets, variants against the default, the verdict, the
document.
"""

from __future__ import annotations

from typing import Any

from offramp.benchmarks.compare.pages import (
    DOCUMENT,
    REFERENCE,
    all_data_rows,
    comparison_document,
    other_setting_rows,
    read_results,
    verdict,
)


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


def test_data_sets_have_the_same_weight_and_are_averaged_before_the_interval() -> None:
    # Half of the resamples of each are below zero; of their mean all are above.
    first, second = result("x", 1.0, [-1.0, 3.0] * 50), result("y", 1.0, [3.0, -1.0] * 50)
    assert all_data_rows([first, second]) == [["a (gate)", "+1.00", "+1.00", "+1.00 [+1.00, +1.00]", "above"]]
    assert all_data_rows([first])[0][-1] == "not apart"


def test_a_method_that_a_data_set_lacks_is_left_out() -> None:
    lacking = result("y", 0.0, [0.0])
    del lacking["draws"]["a (gate)"]
    assert all_data_rows([result("x", 1.0, [1.0]), lacking]) == []


def test_a_variant_is_compared_with_the_default_by_resample() -> None:
    plain, other = result("x", 1.0, [0.0, 2.0] * 50), result("x", 0.5, [-0.5, 1.5] * 50, "price=2")
    (row,) = other_setting_rows([plain, other])
    assert row == ["x", "a (gate)", "price=2", "90.50", "91.00", "-0.50 [-0.50, -0.50]", "below"]
    assert other_setting_rows([other]) == [] and other_setting_rows([plain]) == []


def test_the_document_is_written_from_the_result_files() -> None:
    expected = comparison_document(read_results(), read_results("agreement"))
    assert DOCUMENT.read_text(encoding="utf-8") == expected, "python benchmarks/compare/pages.py"


def verdict_on(low: float = -1.0, high: float = 1.0, **more: float) -> str:
    figures = {"accuracy_at_half": 90.0, "random": 80.0, "static": 85.0} | more
    return verdict([figures], {"low": low, "high": high})


def test_the_verdict_names_the_controls_that_a_method_does_not_beat() -> None:
    assert verdict_on() == ""
    assert verdict_on(static=91.0) == "does not beat static"
    assert verdict_on(high=-0.1) == "below max-probability"
    assert verdict_on(random=95.0, low=0.1) == "does not beat random; above max-probability"
