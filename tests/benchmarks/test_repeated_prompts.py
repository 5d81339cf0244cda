"""Prompts whose answers repeat them: which rows are taken, what is asked, and drafts for them."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from offramp.benchmarks import decoders
from offramp.benchmarks.repeated_prompts import (
    EDITED_LETTERS,
    edit_prompts,
    read_repeated_prompts,
    summary_prompts,
)
from offramp.runtime import load_generator

GENERATOR = Path(__file__).parents[1] / "data" / "tiny_generator"
FILM = "the film was good and the plot was dull"


def write_rows(file: Path, rows: list[dict[str, str]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_summaries_are_those_of_articles_and_dialogues(tmp_path: Path) -> None:
    tasks = ("samsum_Summarize_", "gigaword_write_a_title", "cnn_dailymail_3_0_0_news_stock", "xsum")
    rows = [{"prompt": f"prompt {number}", "task": task} for number, task in enumerate(tasks)]
    assert list(summary_prompts(write_rows(tmp_path / "rows", rows))) == ["prompt 0", "prompt 2"]


def test_edits_replace_the_most_frequent_long_word(tmp_path: Path) -> None:
    text = "A house stands here. The house is old, and it was built in a valley. " * 9
    (prompt,) = edit_prompts(write_rows(tmp_path / "rows", [{"text": text}, {"text": "no long one"}]))
    request, _, repeated = prompt.partition("\n\n")
    assert request == 'Repeat the text with the word "house" replaced by "garden":'
    assert text.startswith(repeated.strip()) and repeated.strip().endswith(".")
    assert 0.5 * EDITED_LETTERS < len(repeated.strip()) <= EDITED_LETTERS


@pytest.mark.slow
def test_prompts_leave_room_for_the_answer(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows", [{"prompt": FILM * times, "task": "samsum"} for times in (9, 1, 1)])
    with load_generator(GENERATOR, rule="never") as session:
        prompts = read_repeated_prompts(session, "summaries", file, 2, 20)
        assert len(prompts) == 2 and all(len(ids) + 20 <= session.longest for ids in prompts)
        with pytest.raises(click.ClickException, match="2 prompts of kind summaries, expected 3"):
            read_repeated_prompts(session, "summaries", file, 3, 20)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["summaries", "edits"])
def test_the_lossless_rule_is_compared_on_them(tmp_path: Path, kind: str) -> None:
    rows = [{"prompt": f"{FILM} {word}", "task": "samsum"} for word in ("again", "there")]
    file, out = write_rows(tmp_path / "rows", rows), tmp_path / "out.json"
    words = ["--bundle", str(GENERATOR), "--texts", str(file), "--prompts", kind, "--count", "1"]
    done = CliRunner().invoke(decoders.lossless, [*words, "--tokens", "9", "--out", str(out)])
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["prompts"] == kind and result["prompt"] is None
    figures = result["bundles"][GENERATOR.name]["rules"]
    assert figures["speculative"]["same"] == 1 and figures["full"]["speed"] == 1.0
