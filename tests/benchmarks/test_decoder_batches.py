"""Many texts at once: that their answers are compared with those of texts alone, and what the table holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tiny_bundles import GENERATOR_NATIVE

from offramp.benchmarks import decoder_batches
from offramp.benchmarks.decoder_batches import answer_queue, batch_figures, count_equal, generate_together
from offramp.runtime import TextGenerator, load_generator

PROMPTS = [[5], [7, 9, 11, 13, 15, 17, 19, 21], [8, 6], [30, 31, 32], [4, 4, 4, 4, 4]]


@pytest.fixture
def session() -> Iterator[TextGenerator]:
    with load_generator(GENERATOR_NATIVE, rule="never") as opened:
        yield opened


def alone(session: TextGenerator, tokens: int) -> list[list[int]]:
    return [[token.id for token in session.tokens(prompt, tokens, ())] for prompt in PROMPTS]


def test_prompts_that_queue_are_answered_as_alone(session: TextGenerator) -> None:
    assert answer_queue(session, PROMPTS, 9, 2) == alone(session, 9)
    assert count_equal(session, PROMPTS, 9, 2) == "5 of 5"


def test_answers_that_differ_are_not_counted(session: TextGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(session: Any, prompts: list[list[int]], tokens: int, size: int) -> list[list[int]]:
        return [[0 if size > 1 and prompt == [8, 6] else 1] for prompt in prompts]

    monkeypatch.setattr(decoder_batches, "answer_queue", answers)
    assert count_equal(session, PROMPTS, 9, 2) == "4 of 5"


def test_figures_of_a_size_are_ratios_to_one_text_at_a_time(session: TextGenerator) -> None:
    run = {str(size): generate_together(session, PROMPTS, 6, size) for size in (1, 5)}
    assert run["1"]["ids"] == alone(session, 6)
    run["1"] |= {"whole_s": 2.0, "decoding_s": 1.0, "decoded": 25}
    run["5"] |= {"whole_s": 0.5, "decoding_s": 0.5, "decoded": 25}
    figures = batch_figures([run, run], [1, 5])
    assert figures["5"] | {"same": ""} == {
        "decoding_tokens_per_s": 50.0,
        "decoding_ratio": 2.0,
        "decoding_error": 0.0,
        "whole_tokens_per_s": 60.0,
        "whole_ratio": 4.0,
        "whole_error": 0.0,
        "same": "",
    }
    assert figures["5"]["same"] == "10 of 10"
