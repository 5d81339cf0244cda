"""Tests of benchmarks.risk: draws, what is chosen on them, and tables and pictures from results."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from tiny_bundles import CLASSIFIER, texts

from offramp.benchmarks import risk
from offramp.benchmarks.compare import pages
from offramp.benchmarks.risk import FULL_DEPTH, Promise, Settings, choose, draw, measure_promise, settings_of
from offramp.runtime.rules.sweep import ExitMacs, ExitTable

ROWS, EXITS = 600, 4


def simulated() -> tuple[ExitTable, ExitMacs]:
    """Exits that are surer and more often right the deeper they are, with the same hard rows at each."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, ROWS)
    margin = generator.normal(2.0, 1.5, ROWS)[:, None] + generator.normal(0, 0.8, (ROWS, EXITS))
    margin *= np.linspace(0.6, 1.5, EXITS)
    sign = np.where(labels == 1, 1, -1)[:, None]
    logits = np.stack([-margin * sign, margin * sign], -1).astype(np.float32)
    macs = np.broadcast_to(np.arange(1.0, EXITS + 1), (ROWS, EXITS))
    return ExitTable(logits, None, labels), ExitMacs(macs, macs[:, -1], np.arange(1, EXITS + 1))


@pytest.fixture(scope="module")
def settings() -> Settings:
    return settings_of("max_probability", *simulated())


def test_settings_go_from_the_safest_to_the_cheapest(settings: Settings) -> None:
    depth = settings.depth.mean(1)
    assert (np.diff(depth) <= 0).all() and depth[0] > 3.5 and depth[-1] == 1


def test_losses_are_those_of_the_answers(settings: Settings) -> None:
    full = settings.exits == EXITS - 1
    assert not settings.losses["disagreement"][full].any() and settings.losses["disagreement"].any()
    assert set(np.unique(settings.losses["error_increase"])) == {-1, 0, 1}
    # A row of two classes that disagrees with full depth is lost or gained.
    assert np.array_equal(settings.losses["disagreement"], settings.losses["error_increase"] != 0)


def test_naive_choice_is_cheaper_and_guaranteed_one_has_a_margin(settings: Settings) -> None:
    rows = np.arange(ROWS)
    naive, guaranteed = (
        choose(settings, Promise("disagreement", 0.05), rows, naive=n) for n in (True, False)
    )
    depth, lost = settings.depth.mean(1), settings.losses["disagreement"].mean(1)
    assert depth[naive] < depth[guaranteed] < EXITS
    assert lost[guaranteed] + 0.005 < lost[naive] <= 0.05


def test_full_depth_is_chosen_where_rows_are_too_few(settings: Settings) -> None:
    assert choose(settings, Promise("disagreement", 0.01), np.arange(229), naive=False) == FULL_DEPTH


def test_halves_are_disjoint_and_exact_draws_repeat_rows() -> None:
    chosen_on, checked_on = draw("halves", 11, np.random.default_rng(0))
    assert sorted([*chosen_on, *checked_on]) == list(range(11))
    chosen_on, checked_on = draw("exact", 100, np.random.default_rng(0))
    assert len(set(chosen_on)) < len(chosen_on) == 50 and list(checked_on) == list(range(100))


def test_excess_is_that_of_the_worst_group() -> None:
    losses, groups = np.repeat([False, True, False], [90, 1, 9]), np.repeat([0, 1], [90, 10])
    assert Promise("disagreement", 0.05).excess(losses, None) == pytest.approx(0.2)
    assert Promise("disagreement", 0.05, "class", group_count=2).excess(losses, groups) == pytest.approx(2)


def test_guaranteed_settings_break_their_word_less_often_than_naive_ones(settings: Settings) -> None:
    promise = Promise("disagreement", 0.05)
    lines = [measure_promise(settings, promise, "exact", 40, naive=naive) for naive in (False, True)]
    assert lines[0]["broken"] <= 0.2 < lines[1]["broken"]
    assert 0 < lines[0]["layers_saved"] < lines[1]["layers_saved"]


def test_demo_checks_a_point_for_each_seed(tmp_path: Path) -> None:
    rows = [json.dumps({"text": text, "label": 0}) + "\n" for text in texts(90)]
    calibration, test, out = (tmp_path / name for name in ("calib.jsonl", "test.jsonl", "demo_risk.json"))
    calibration.write_text("".join(rows[:60]), encoding="utf-8")
    test.write_text("".join(rows[60:]), encoding="utf-8")
    words = ["demo", *map(str, (CLASSIFIER, calibration, test)), "--risk", "0.2", "--json", str(out)]
    ended = CliRunner().invoke(risk.main, [*words, "--confidence", "0.9", "--seeds", "3"])
    result = json.loads(out.read_text(encoding="utf-8"))
    kept = sum(line["test"] <= 0.2 for line in result["lines"])
    assert (result["about"]["kept"], ended.exit_code) == (kept, int(kept < 3))
    assert [line["seed"] for line in result["lines"]] == [0, 1, 2]
    assert all(line["observed"] <= line["bound"] <= 0.2 for line in result["lines"])


@pytest.mark.slow
def test_tables_and_pictures_are_those_of_the_results(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    assert risk.risk_tables() == []
    lines = [
        {"rule": "max_probability", **measure_promise(settings, promise, design, 2, naive=naive)}
        for promise in risk.promises("max_probability", simulated()[0])
        for design in risk.DESIGNS
        for naive in (False, True)
    ]
    about = {"data": "toy", "model": "none", "rows": ROWS, "calibration_rows": 300, "splits": 2}
    result = {"command": "a command", "about": about | {"confidence": 0.9}, "lines": lines}
    (tmp_path / "risk_toy.json").write_text(json.dumps(result), encoding="utf-8")
    text = "\n".join(risk.risk_tables())
    assert "| toy | 300 | disagreement | 0.05 |" in text and "    python a command" in text
    for name in ("KEPT_PICTURE", "SAVED_PICTURE"):
        monkeypatch.setattr(risk, name, tmp_path / f"{name}.svg")
    assert CliRunner().invoke(risk.main, ["pictures"]).exit_code == 0
    assert "toy, guaranteed" in (tmp_path / "KEPT_PICTURE.svg").read_text(encoding="utf-8")
    assert "toy, naive" in (tmp_path / "SAVED_PICTURE.svg").read_text(encoding="utf-8")
