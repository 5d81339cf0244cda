"""--segments auto: the choice of exits against every subset, the choice of seams against scripted times."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import tiny
from click.testing import CliRunner

from offramp.export.auto import (
    ExitTimes,
    SeamTimes,
    _token_seconds,
    choose_segment_count,
    even_cuts,
    exits_table,
    fastest_exits,
    segment_counts,
    segment_counts_table,
)
from offramp.export.cli import main as split
from offramp.export.decoder import ExportableDecoder
from offramp.models.decoder import DecoderNetwork


@pytest.mark.parametrize("seed", range(6))
def test_no_subset_is_better(seed: int) -> None:
    rng = np.random.default_rng(seed)
    leaves = rng.dirichlet(np.full(6, 0.5))
    times = ExitTimes(leaves, rng.uniform(0.2, 2.0, 6), float(rng.uniform(0.0, 1.0)), 0.0)
    kept = fastest_exits(times)
    assert kept[-1] == 5
    subsets = (subset for size in range(6) for subset in combinations(range(5), size))
    least = min(times.expected_ms((*subset, 5)) for subset in subsets)
    assert times.expected_ms(kept) == pytest.approx(least)


def test_unused_exits_go_and_free_exits_that_are_used_stay() -> None:
    assert fastest_exits(ExitTimes(np.array([0.0, 0.0, 0.0, 1.0]), np.ones(4), 0.1, 0.0)) == (3,)
    assert fastest_exits(ExitTimes(np.full(4, 0.25), np.ones(4), 0.0, 0.0)) == (0, 1, 2, 3)


def test_the_table_shows_the_worth_of_each_exit() -> None:
    times = ExitTimes(np.array([0.5, 0.0, 0.5]), np.array([1.0, 1.0, 1.0]), 0.2, 0.1)
    kept = fastest_exits(times)
    assert kept == (0, 2)
    # Stem 0.1; all rows run block 1 and its exit; half of them the other two blocks and one exit.
    assert times.expected_ms(kept) == pytest.approx(0.1 + 1.2 + 0.5 * 2.2)
    lines = exits_table((1, 2, 3), times, kept).splitlines()
    assert [line.split()[-1] for line in lines[1:4]] == ["yes", "no", "yes"]
    assert lines[-1].endswith("with 2 of 3")


def test_groupings_are_even() -> None:
    assert segment_counts(30) == [30, 15, 10, 8, 6, 5, 4, 3, 2, 1] and segment_counts(1) == [1]
    assert even_cuts(30, 4) == (8, 15, 22, 30) and even_cuts(3, 3) == (1, 2, 3)


def test_the_table_shows_the_speed_of_each_grouping() -> None:
    times = {"fp32": SeamTimes(20e-3, 100e-6), "int8": SeamTimes(10e-3, 90e-6)}
    assert times["fp32"].token_seconds(1) == 20e-3 and times["fp32"].token_seconds(12) == pytest.approx(
        21.1e-3
    )
    table = segment_counts_table(12, times, even_cuts(12, 3)).splitlines()
    assert [line.endswith("yes") for line in table[1:-1]].count(True) == 1
    assert table[1].split() == ["12", "1", "21.100", "0.938", "10.990", "0.894", "no"]
    assert table[-1] == "a seam takes 100 us; speed: divided by that of one graph"


def test_a_decoder_is_cut_as_finely_as_seams_allow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ExportableDecoder(DecoderNetwork(tiny.decoder("llama")), tmp_path)
    seconds: dict[str, float] = {}

    def token_seconds(bundles: list[Path], variant: str) -> list[float]:
        """The bundle that is opened first is slower, which must cancel out."""
        return [
            (1.0 if bundle.name == "one" else seconds[variant]) * (1.1 if bundle == bundles[0] else 1.0)
            for bundle in bundles
        ]

    monkeypatch.setattr("offramp.export.auto._write_to_time", lambda *arguments: None)
    monkeypatch.setattr("offramp.export.auto._token_seconds", token_seconds)
    for seconds["fp32"], cuts in ((1.001, (1, 2, 3)), (1.008, (2, 3)), (2.0, (3,))):
        assert choose_segment_count(source).cuts == cuts
    seconds |= {"fp32": 1.001, "int4": 1.008}  # a bundle has one cut, for both
    assert choose_segment_count(source, ("fp32", "int4")).cuts == (2, 3)


def test_the_longest_seam_of_the_variants_counts_in_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ExportableDecoder(DecoderNetwork(tiny.decoder("llama")), tmp_path)
    seconds = {"fp32": {"one": 1.0, "few": 1.006}, "int8": {"one": 0.5, "few": 0.5}}  # no seam seen in int8
    monkeypatch.setattr("offramp.export.auto._write_to_time", lambda *arguments: None)
    monkeypatch.setattr(
        "offramp.export.auto._token_seconds", lambda bundles, name: [seconds[name][b.name] for b in bundles]
    )
    assert choose_segment_count(source, ("fp32",)).cuts == (1, 2, 3)
    choice = choose_segment_count(source, ("fp32", "int8"))
    assert choice.cuts == (3,) and choice.times["int8"] == pytest.approx((0.5, 0.003))


@pytest.mark.slow
def test_timing_that_fails_names_the_cure(tmp_path: Path) -> None:
    with pytest.raises(ChildProcessError, match=r"seams in int8 ended with code 1; .* --segments 'every N'"):
        _token_seconds([tmp_path / "none"], "int8")


@pytest.mark.slow
def test_ee_split_uses_auto_where_the_training_had_no_exits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offramp.export.auto.PAIRS", 1)  # each is two processes a variant
    tiny.decoder("llama", blocks=2).save_pretrained(tmp_path / "model")  # each takes seconds to export
    tiny.tokenizer().save(str(tmp_path / "model" / "tokenizer.json"))
    words = [str(tmp_path / "model"), "--out", str(tmp_path / "bundle"), "--variants", "fp32,int8"]
    done = CliRunner().invoke(split, [*words, "--monolith", str(tmp_path / "one.onnx")])
    assert done.exit_code == 0, done.output
    assert " us; speed" in done.output and "yes" in done.output and (tmp_path / "one.onnx").is_file()
