"""Tests of the decoder benchmarks: they run on a tiny bundle, and their figures are consistent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from click.testing import CliRunner
from transformers import PreTrainedTokenizerFast

from offramp.benchmarks import decoders
from offramp.benchmarks.decoder_baselines import TimedAnswer
from offramp.benchmarks.decoder_candidates import Round, open_in_process, time_tokens
from offramp.benchmarks.workers import resident_mb

DATA = Path(__file__).parents[1] / "data"
GENERATOR = DATA / "tiny_generator"
SENTENCE = "the film was good and the plot was very dull at all"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": f"{SENTENCE} {w}"}) + "\n" for w in tiny.GOOD), "utf-8")
    return file


def run(command: Any, *words: str) -> Any:
    out = Path(words[words.index("--out") + 1])
    done = CliRunner().invoke(command, words)
    assert done.exit_code == 0, done.output
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_the_lossless_rule_is_compared_with_full_depth(texts: Path, tmp_path: Path) -> None:
    words = ["--bundle", str(GENERATOR), "--texts", str(texts)]
    sizes = ["--count", "3", "--prompt", "4", "--tokens", "12", "--fixed", "1,2 2,1"]
    result = run(decoders.lossless, *words, *sizes, "--out", str(tmp_path / "o"))
    figures = result["bundles"][GENERATOR.name]
    assert figures["cuts"] == [1, 2, 3] and list(figures["rules"]) == ["full", "speculative", "1,2", "2,1"]
    sources = {"full": set[str](), "1,2": {"1"}, "2,1": {"2"}}
    for name, row in figures["rules"].items():
        assert row["same"] == 3 and row["tokens_per_s"] > 0
        assert set(row.get("accepted", {})) <= sources.get(name, {"1", "2", "lookup"})
        assert name == "full" or sum(row["rounds"].values()) > 0
    assert figures["rules"]["full"]["speed"] == 1.0
    done = CliRunner().invoke(decoders.lossless, words)
    assert done.exit_code == 1 and "0 texts of 24 tokens, expected 100" in done.output


def test_an_unknown_precision_is_refused(tmp_path: Path) -> None:
    words = ["--model", str(tmp_path), "--scratch", str(tmp_path), "--texts", str(tmp_path)]
    done = CliRunner().invoke(decoders.baselines, [*words, "--variants", "fp32,int3"])
    assert done.exit_code == 2
    assert "--variants int3: choose of fp32, int8, int4" in done.output


def test_answers_are_compared_by_pairs_of_rounds() -> None:
    fast, slow = TimedAnswer([1, 2, 3], 0.5, [0.5] * 2), TimedAnswer([1, 2, 4], 0.5, [1.0] * 2)
    rounds: list[Round] = [{"a": [slow], "b": [fast]}, {"a": [slow], "b": [slow]}]
    rows = decoders.compare_rounds(rounds, "a", [[1, 2, 3], [1, 2, 4]])
    assert rows["a"]["ratio"] == 1.0 and rows["b"]["same"] == 2 and rows["b"]["error"] is None
    assert rows["b"]["ratio"] == rows["b"]["ratio_median"] == pytest.approx(2**0.5, abs=1e-4)
    assert rows["a"]["tokens_per_s"] == 1.0 and rows["a"]["same"] == 1 and rows["b"]["first_ms"] == 500.0
    rows = decoders.compare_rounds([*rounds, *[{"a": [slow], "b": [fast]}] * 2], "a", [])
    assert rows["b"]["ratio"] == pytest.approx(2**0.75, abs=1e-4)
    assert rows["b"]["ratio_median"] == 2.0 and rows["b"]["error"] > 0


def test_the_second_round_of_a_pair_opens_in_reverse_order(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = []

    def run_fresh_round(request: dict[str, Any], facts: dict[str, Any]) -> Round:
        requests.append(request)
        return {name: [] for name in request["names"]}

    monkeypatch.setattr(decoders, "run_fresh_round", run_fresh_round)
    rounds = decoders.run_rounds({}, ["a", "b", "c"], [[1], [2], [3], [4], [5]], 3)
    assert [list(answers) for answers in rounds] == [["a", "b", "c"]] * 3
    shares = [(request["prompts"], request["seed"]) for request in requests]
    assert shares == [([[1], [2]], 0), ([[3], [4]], 1), ([[5]], 2)]
    assert requests[0]["names"] == requests[1]["names"][::-1]
    assert sorted(requests[2]["names"]) == ["a", "b", "c"]


def test_an_answer_is_timed() -> None:
    with open_in_process(GENERATOR.parent, "fp32", [GENERATOR.name]) as candidates:
        answer = time_tokens(candidates[GENERATOR.name]([5, 6, 7], 5))
    assert len(answer.ids) == 5 and answer.first_s > 0 and len(answer.step_s) == 4
    assert all(megabytes > 10 for megabytes in resident_mb())


@pytest.mark.slow
def test_segments_against_the_monolith(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.decoder("llama")
    model.save_pretrained(tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=tiny.tokenizer()).save_pretrained(tmp_path / "model")

    def two_prompts(session: Any, *_: Any) -> list[list[int]]:
        return [session.encode_prompt("the film was good")] * 2

    monkeypatch.setattr(decoders, "read_prompts", two_prompts)
    monkeypatch.setattr("offramp.export.auto.PAIRS", 1)  # each is two processes
    words = ["--scratch", str(tmp_path / "scratch"), "--texts", str(texts)]
    out = ["--tokens", "6", "--rounds", "2", "--out", str(tmp_path / "o")]  # a round is a process
    result = run(decoders.full, "--model", str(tmp_path / "model"), *words, *out)
    assert list(result["candidates"]) == ["fp32", "int8", "int4"]
    for rows in result["candidates"].values():
        assert list(rows) == ["monolith", "auto", "segments_3", "segments_1"]
        assert all(row["same"] == 2 for row in rows.values()) and rows["monolith"]["ratio"] == 1.0
    result = run(decoders.memory, *words, "--context", "40", "--rounds", "1", "--out", str(tmp_path / "m"))
    assert result["candidates"]["monolith, int4"]["ratio"] == 1.0
