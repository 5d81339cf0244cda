"""What a network computes that is no number is an error of that row, in every task, and never an answer."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from tiny_bundles import CLASSIFIER, EMBEDDING, GENERATOR, MULTI_LABEL, REGRESSION, TOKENS

from offramp.runtime import BadBundle, BadInput, ItemError, cli, load_generator, load_row_session
from offramp.runtime.engines.ort import OrtEngine
from offramp.runtime.engines.ort_decoder import KVCache, _BoundSteps
from offramp.runtime.tuning import bench, calibrate

ROWS = (CLASSIFIER, MULTI_LABEL, TOKENS, REGRESSION, EMBEDDING)
LONG = "the film was not at all good"  # the row that overflows


@pytest.fixture(params=[np.nan, np.inf], ids=["nan", "inf"])
def overflow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rows of nine tokens or more get this number from the last segment."""
    step = OrtEngine.step

    def broken(self: Any, segment: int, variant: int, state: Any) -> Any:
        signals = step(self, segment, variant, state)
        if segment == len(self._bundle.manifest.segments) - 1 and state.length >= 9:
            for array in (signals.logits, signals.answer):
                if array is not None and array.size:
                    array[...] = request.param
        return signals

    monkeypatch.setattr(OrtEngine, "step", broken)
    with warnings.catch_warnings():  # numpy's, about infinity minus infinity
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


@pytest.mark.parametrize("bundle", ROWS, ids=lambda path: path.name)
def test_row_is_an_error_and_the_others_are_answers(bundle: Path, overflow: None) -> None:
    with load_row_session(bundle, rule="never") as session:
        with pytest.raises(BadInput, match="the network's output at exit 3 is not finite"):
            session(LONG)
        for size in (1, 2):
            first, second, third = session.answers(["good", LONG, "bad"], size)
            assert isinstance(second, ItemError) and second.index == 1 and "not finite" in second.message
            assert not isinstance(first, ItemError) and not isinstance(third, ItemError)


def test_command_writes_no_score_that_is_not_a_number(overflow: None) -> None:
    command = ["--bundle", str(CLASSIFIER), "--rule", "never"]
    warnings.simplefilter("error")  # nothing of numpy's on standard error
    done = CliRunner().invoke(cli.main, command, input=f"good\n{LONG}\nbad\n")
    assert done.exit_code == cli.SOME_FAILED and "NaN" not in done.stdout.replace("(NaN or", "")
    values = [json.loads(line) for line in done.stdout.splitlines()]
    assert ["label" in value for value in values] == [True, False, True] and values[1]["line"] == 2


@pytest.mark.parametrize("rule", ["never", "gate", "speculative"])
def test_head_that_gives_no_number_ends_the_text(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        KVCache, "logits", lambda self, hidden, draft=False: np.full((len(hidden), 9), np.nan)
    )
    with (
        load_generator(GENERATOR, rule=rule) as session,
        pytest.raises(BadInput, match="logits are not finite"),
    ):
        list(session.generate("the film", 4))


def test_command_gives_a_prompt_without_numbers_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        KVCache, "logits", lambda self, hidden, draft=False: np.full((len(hidden), 9), np.nan)
    )
    done = CliRunner().invoke(cli.main, ["--bundle", str(GENERATOR)], input="the film\n")
    assert done.exit_code == cli.SOME_FAILED and json.loads(done.stdout)["line"] == 1


def test_graph_of_a_decoder_that_fails_names_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    with load_generator(GENERATOR, rule="never") as session:
        with pytest.raises(BadBundle, match=r"stem\.onnx: ONNX Runtime cannot run it \(stem\)"):
            list(session.tokens([10**6], 2))
        assert len(list(session.tokens([3], 2))) == 2, "the session goes on"

        bind = _BoundSteps._bind

        def broken_run() -> None:
            raise RuntimeError("out of bounds")

        def break_some(self: Any, segment: Any, arrays: Any) -> Any:
            return broken_run if segment.name == broken else bind(self, segment, arrays)

        monkeypatch.setattr(_BoundSteps, "_bind", break_some)
        for segment in (session.manifest.segments[1], session.engine.decoder.head):  # type: ignore[attr-defined]
            broken = segment.name
            message = rf"{segment.first_graph.file}: ONNX Runtime cannot run it \({broken}\): out of bounds"
            with pytest.raises(BadBundle, match=message):
                list(session.tokens([3, 4], 2))


@pytest.mark.slow
@pytest.mark.parametrize("bundle", ROWS, ids=lambda path: path.name)
def test_no_point_counts_a_row_without_an_answer(bundle: Path, overflow: None, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    before = (folder / "manifest.json").read_bytes()
    (tmp_path / "rows.txt").write_text(f"good\n{LONG}\nbad\n" + "a film\n" * 40, encoding="utf-8")
    words = [str(tmp_path / "rows.txt"), "--bundle", str(folder)]
    guarantee = [] if bundle == REGRESSION else [("--risk", "0.9")]  # numbers have none
    for options in ((), *guarantee):
        done = CliRunner().invoke(calibrate.main, [*words, *options])
        assert done.exit_code == 2 and "output for row 2 is not finite" in done.stderr, done.output
        assert (folder / "manifest.json").read_bytes() == before


@pytest.mark.slow
def test_no_figure_of_a_benchmark_counts_a_row_without_an_answer(overflow: None, tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text(f"good\n{LONG}\n", encoding="utf-8")
    words = ["--bundle", str(CLASSIFIER), "--data", str(tmp_path / "rows.txt"), "--turns", "1"]
    done = CliRunner().invoke(bench.main, words)
    assert done.exit_code == 2 and done.stdout == "" and "the network's output is not finite" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--risk", "0.9")], ids=["measured", "guaranteed"])
def test_a_policy_that_is_no_number_is_named(
    options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = OrtEngine.step

    def broken(self: Any, segment: int, variant: int, state: Any) -> Any:
        signals = step(self, segment, variant, state)
        if signals.gate is not None:
            signals.gate[...] = np.nan
        return signals

    monkeypatch.setattr(OrtEngine, "step", broken)
    folder = Path(shutil.copytree(CLASSIFIER, tmp_path / "bundle"))
    (tmp_path / "rows.txt").write_text("good\nbad\na film\n" * 20, encoding="utf-8")
    words = [str(tmp_path / "rows.txt"), "--bundle", str(folder), *options]
    done = CliRunner().invoke(calibrate.main, words)
    assert done.exit_code == 2 and "rule gate: P(exit) of a policy is not finite" in done.stderr, done.output
