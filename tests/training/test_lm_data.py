"""Data of language models: pairs and concatenated texts as rows of token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny

from offramp.training.data import BadData
from offramp.training.lm_data import IGNORED, load_token_rows


def test_completions_of_pairs_are_learned(tmp_path: Path) -> None:
    first, second = {"prompt": "the film was", "completion": "good"}, {"prompt": "", "completion": "a plot"}
    source = tiny.write_rows(tmp_path, first, second)
    rows = load_token_rows(source, tiny.hub_tokenizer(), 9)["train"]
    ids = {word: tiny.hub_tokenizer().convert_tokens_to_ids(word) for word in (*tiny.WORDS,)}
    assert rows.ids == [
        [ids[word] for word in ("the", "film", "was", "good", "[SEP]")],
        [ids[word] for word in ("a", "plot", "[SEP]")],
    ]
    ids_batch, targets = rows.batch([0, 1])
    assert targets[0].tolist() == [IGNORED, IGNORED, ids["good"], ids["[SEP]"], IGNORED]
    assert targets[1].tolist() == [ids["plot"], ids["[SEP]"], IGNORED, IGNORED, IGNORED]
    assert ids_batch[1].tolist()[3:] == [0, 0] and rows.lengths.tolist() == [5, 3]
    short = load_token_rows(source, tiny.hub_tokenizer(), 4)["train"]
    assert short.ids[0] == [
        ids[word] for word in ("film", "was", "good", "[SEP]")
    ]  # the end of the prompt is kept


def test_texts_are_concatenated(tmp_path: Path) -> None:
    source = tiny.write_rows(tmp_path, {"text": "the film\u2028was good"}, {"text": "a plot"})
    rows = load_token_rows(source, tiny.hub_tokenizer(), 4)["train"]
    assert [len(row) for row in rows.ids] == [4, 4] and rows.starts == [1, 1]
    end = tiny.hub_tokenizer().eos_token_id
    assert sum(row.count(end) for row in rows.ids) == 2 and rows.ids[1][0] == end


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": "the film was good"}, "row 1: the completion has 5 tokens, rows 4"),
        ({"prompt": 3, "completion": "the"}, "row 1: column 'prompt' must be a text, found 3"),
        ({"words": "the"}, "neither 'text' nor prompt and completion, but words"),
        ({"text": ""}, "no text in it"),
    ],
)
def test_unusable_texts_are_refused(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(BadData, match=message):
        load_token_rows(tiny.write_rows(tmp_path, row), tiny.hub_tokenizer(), 4)
