"""The benchmarks of decoders run, on a tiny bundle, and their figures fit together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from click.testing import CliRunner
from transformers import PreTrainedTokenizerFast

from offramp.benchmarks import decoders, draft_costs
from offramp.benchmarks.decoder_cache import main as caches
from offramp.benchmarks.decoder_contest import writing
from offramp.benchmarks.decoder_turns import Answer, Round, clocked, compared, rounds
from offramp.benchmarks.lossless import main as lossless
from offramp.benchmarks.worker_memory import resident
from offramp.runtime import load
from offramp.runtime.generator import Writer

WRITER = Path(__file__).parents[1] / "data" / "tiny_writer"
SENTENCE = "the film was good and the plot was very dull at all"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": f"{SENTENCE} {w}"}) + "\n" for w in tiny.GOOD), "utf-8")
    return file


def told(command: Any, *words: str) -> Any:
    out = Path(words[words.index("--out") + 1])
    done = CliRunner().invoke(command, words)
    assert done.exit_code == 0, done.output
    return json.loads(out.read_text(encoding="utf-8"))


def test_the_lossless_mode_is_held_to_the_full_depth(texts: Path, tmp_path: Path) -> None:
    given = ["--bundle", str(WRITER), "--texts", str(texts)]
    sizes = ["--count", "3", "--prompt", "4", "--tokens", "12", "--fixed", "1,2 2,1"]
    one = told(lossless, *given, *sizes, "--out", str(tmp_path / "o"))["bundles"]["tiny_writer"]
    assert one["cuts"] == [1, 2, 3] and list(one["ways"]) == ["full", "speculative", "1,2", "2,1"]
    asked = {"full": set[str](), "1,2": {"1"}, "2,1": {"2"}}
    for name, row in one["ways"].items():
        assert row["same"] == 3 and row["tokens_per_s"] > 0
        assert set(row.get("accepted", {})) <= asked.get(name, {"1", "2"})
        assert name == "full" or sum(row["rounds"].values()) > 0
    assert one["ways"]["full"]["speed"] == 1.0
    done = CliRunner().invoke(lossless, given)
    assert done.exit_code == 1 and "0 texts of 24 tokens, 100 are asked for" in done.output


def test_what_drafts_must_be_right_at_follows_from_what_runs_take(tmp_path: Path) -> None:
    words = ["--bundle", str(WRITER), "--turns", "3", "--out", str(tmp_path / "o")]
    one = told(draft_costs.main, *words)["bundles"]["tiny_writer"]
    pairs = [(exit, drafts) for exit in (1, 2) for drafts in range(1, 5)]
    assert [(need["exit"], need["drafts"]) for need in one["needs"]] == pairs
    assert all(taken > 0 for taken in one["ms"].values())
    # Two tokens to the exit, a drafting head and 8 behind are 11; alone a token takes 9.
    took = {("0", 1): 1.0, ("1", 1): 6.0, ("head", 1): 2.0, ("draft", 1): 1.0}
    took |= {(name, n): took[name, 1] for name in ("0", "1", "head") for n in range(2, 6)}
    first = draft_costs.needs(took, 2)[0]
    assert first["speed_at_most"] == pytest.approx(2 * 9 / 11, abs=1e-3)
    assert first["accepted"] == pytest.approx(1.2 * 11 / 9 - 1, abs=1e-3)
    slow = draft_costs.needs(took | {("draft", 1): 9.0}, 2)[0]
    assert slow["accepted"] is None and slow["speed_at_most"] < 1.2


@pytest.mark.slow
def test_caches_are_held_to_transformers(
    texts: Path, tmp_path: Path, decoder_bundle: Callable[[str], Any]
) -> None:
    _, bundle = decoder_bundle("llama")
    words = ["--bundle", str(bundle), "--model", str(bundle.parent / "model"), "--texts", str(texts)]
    sizes = ["--count", "2", "--prompt", "3", "--tokens", "12", "--rule", "max_probability"]
    found = told(caches, *words, *sizes, "--thresholds", "0.03,1.0", "--out", str(tmp_path / "o"))["ways"]
    names = [f"{cache}, {threshold}" for threshold in ("0.03", "1") for cache in ("deferred", "propagate")]
    assert list(found) == ["full", *names]
    assert found["full"]["deep"] == 16 and found["full"]["deep_diff"] < 1e-3
    assert len({found[name]["perplexity"] for name in ("full", "deferred, 1", "propagate, 1")}) == 1
    assert found["deferred, 0.03"]["depth"] < 3
    if found["deferred, 0.03"]["deep"]:
        assert found["deferred, 0.03"]["deep_diff"] < 1e-3


def test_answers_are_compared_by_pairs_of_rounds() -> None:
    fast, slow = Answer([1, 2, 3], 0.5, [0.5] * 2), Answer([1, 2, 4], 0.5, [1.0] * 2)
    said: list[Round] = [{"a": [slow], "b": [fast]}, {"a": [slow], "b": [slow]}]
    rows = compared(said, "a", [[1, 2, 3], [1, 2, 4]])
    assert rows["a"]["ratio"] == 1.0 and rows["b"]["same"] == 2 and rows["b"]["error"] is None
    assert rows["b"]["ratio"] == rows["b"]["ratio_median"] == pytest.approx(2**0.5, abs=1e-4)
    assert rows["a"]["tokens_per_s"] == 1.0 and rows["a"]["same"] == 1 and rows["b"]["first_ms"] == 500.0
    rows = compared([*said, {"a": [slow], "b": [fast]}, {"a": [slow], "b": [fast]}], "a", [])
    assert rows["b"]["ratio"] == pytest.approx(2**0.75, abs=1e-4)
    assert rows["b"]["ratio_median"] == 2.0 and rows["b"]["error"] > 0


def test_rounds_come_in_pairs_the_second_back_to_front() -> None:
    asked = []

    def ask(order: list[str], prompts: list[list[int]], seed: int) -> Round:
        asked.append((order, prompts, seed))
        return {name: [] for name in order}

    found = rounds(ask, ["a", "b", "c"], [[1], [2], [3], [4], [5]], 3)
    assert [list(one) for one in found] == [["a", "b", "c"]] * 3
    assert [(prompts, seed) for _, prompts, seed in asked] == [([[1], [2]], 0), ([[3], [4]], 1), ([[5]], 2)]
    assert asked[0][0] == asked[1][0][::-1] and sorted(asked[2][0]) == ["a", "b", "c"]


def test_an_answer_is_clocked() -> None:
    with load(WRITER, rule="never") as session:
        assert isinstance(session, Writer)
        answer = clocked(writing(session)(session.ids_of(SENTENCE), 5))
    assert len(answer.ids) == 5 and answer.first > 0 and len(answer.steps) == 4
    assert all(number > 10 for number in resident())


@pytest.mark.slow
def test_segments_against_one_graph(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.decoder("llama")
    model.save_pretrained(tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=tiny.tokenizer()).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(decoders, "prompts_of", lambda writer, *_: [writer.ids_of("the film was good")] * 2)
    words = ["--scratch", str(tmp_path / "scratch"), "--texts", str(texts)]
    out = ["--tokens", "6", "--out", str(tmp_path / "o")]
    found = told(decoders.full, "--model", str(tmp_path / "model"), *words, *out)
    assert list(found["contenders"]) == ["fp32", "int8", "int4"]
    for rows in found["contenders"].values():
        assert list(rows) == ["one graph", "auto", "segments_3", "segments_1"]
        assert all(row["same"] == 2 for row in rows.values()) and rows["one graph"]["ratio"] == 1.0
    found = told(decoders.memory, *words, "--context", "40", "--turns", "1", "--out", str(tmp_path / "m"))
    assert found["contenders"]["one graph, int4"]["ratio"] == 1.0
