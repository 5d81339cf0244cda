"""Many texts of one session at once, on the tiny bundles: generate_many, batches, and ee-run --batch-size."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from click.testing import CliRunner
from tiny_bundles import GENERATOR, GENERATOR_NATIVE, texts

from offramp.runtime import (
    BadInput,
    BadSetting,
    ItemError,
    Sampling,
    SessionClosed,
    SessionForked,
    TextChunk,
    TextGenerator,
    cli,
    load_generator,
)
from offramp.runtime.generate_cli import AHEAD, write_answers
from offramp.runtime.inputs.lines import PROMPTS, read_lines
from offramp.runtime.output import Output

BUNDLES = {"portable": GENERATOR, "native": GENERATOR_NATIVE}
RULES: list[tuple[str, float | None]] = [
    ("never", None),
    ("gate", None),
    ("fixed", 2),
    ("skip", 2),
    ("speculative", None),
]
PROMPTS_OF = texts(30)


@pytest.fixture(scope="module", params=BUNDLES)
def folder(request: pytest.FixtureRequest) -> Any:
    return BUNDLES[request.param]


@pytest.fixture(scope="module")
def session(folder: Any) -> Iterator[TextGenerator]:
    with load_generator(folder, rule="never") as session:
        yield session


def by_prompt(source: Iterator[tuple[int, TextChunk | ItemError]]) -> dict[int, list[Any]]:
    """Chunks, or errors, by the number of the prompt."""
    results: dict[int, list[Any]] = {}
    for number, result in source:
        results.setdefault(number, []).append(result)
    return results


def facts(chunks: list[TextChunk]) -> list[tuple[str, int, int, str | None]]:
    return [(chunk.text, chunk.token, chunk.depth, chunk.ended) for chunk in chunks]


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule[0])
def test_texts_are_those_of_generate(folder: Any, rule: tuple[str, float | None]) -> None:
    with load_generator(folder, rule=rule[0], threshold=rule[1]) as session:
        results = by_prompt(session.generate_many(PROMPTS_OF, 12, batch_size=5))
        assert sorted(results) == list(range(30))
        for number, prompt in enumerate(PROMPTS_OF):
            assert facts(results[number]) == facts(list(session.generate(prompt, 12)))


def test_texts_of_int8_are_generated(folder: Any) -> None:
    with load_generator(folder, rule="gate", variant="int8") as session:
        results = by_prompt(session.generate_many(PROMPTS_OF[:6], 8, batch_size=3))
        assert [results[number][-1].ended for number in range(6)] == ["length"] * 6


def test_a_batch_of_one_text(session: TextGenerator) -> None:
    results = by_prompt(session.generate_many(PROMPTS_OF[:3], 5, batch_size=1))
    for number in range(3):
        assert facts(results[number]) == facts(list(session.generate(PROMPTS_OF[number], 5)))
    assert by_prompt(session.generate_many([], 5)) == {}


def test_prompts_are_read_when_there_is_a_place(session: TextGenerator) -> None:
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        while True:
            read += 1
            yield PROMPTS_OF[read % 30]

    results, ended = session.generate_many(endless(), 4, batch_size=3), 0
    while ended < 9:
        _, chunk = next(results)
        assert isinstance(chunk, TextChunk)
        ended += chunk.ended is not None
        assert read <= ended + 3
    results.close()  # type: ignore[attr-defined]


def test_an_error_takes_the_place_of_its_text(session: TextGenerator) -> None:
    prompts = [PROMPTS_OF[0], "film " * 100, PROMPTS_OF[1], 3, PROMPTS_OF[2]]
    results = by_prompt(session.generate_many(prompts, 6, batch_size=2))  # type: ignore[arg-type]
    (too_long,), (no_text,) = results[1], results[3]
    assert isinstance(too_long, ItemError) and too_long.index == 1 and "reads 64" in too_long.message
    assert isinstance(no_text, ItemError) and no_text.index == 3
    for number, prompt in ((0, 0), (2, 1), (4, 2)):
        assert facts(results[number]) == facts(list(session.generate(PROMPTS_OF[prompt], 6)))


def test_texts_end_before_stop_strings(session: TextGenerator) -> None:
    word = "".join(chunk.text for chunk in session.generate(PROMPTS_OF[0], 20)).split()[-1]
    results = by_prompt(session.generate_many(PROMPTS_OF[:6], 20, [word], batch_size=3))
    for number in range(6):
        assert facts(results[number]) == facts(list(session.generate(PROMPTS_OF[number], 20, [word])))
    assert results[0][-1].ended == "stop"


def test_each_prompt_has_a_seed_of_its_own(session: TextGenerator) -> None:
    drawn = Sampling(temperature=1.5, seed=7)
    results = by_prompt(session.generate_many([PROMPTS_OF[0]] * 4, 10, batch_size=4, sampling=drawn))
    for number in range(4):
        own = Sampling(temperature=1.5, seed=7 + number)
        assert facts(results[number]) == facts(list(session.generate(PROMPTS_OF[0], 10, sampling=own)))
    assert len({tuple(chunk.token for chunk in chunks) for chunks in results.values()}) > 1


def test_log_probabilities_are_those_of_generate(session: TextGenerator) -> None:
    asked = Sampling(logprobs=2)
    results = by_prompt(session.generate_many(PROMPTS_OF[:4], 6, batch_size=4, sampling=asked))
    for number in range(4):
        for chunk, other in zip(
            results[number], session.generate(PROMPTS_OF[number], 6, sampling=asked), strict=True
        ):
            assert chunk.logprob == pytest.approx(other.logprob, abs=1e-4) and len(chunk.top_logprobs) == 2


def test_other_texts_can_be_generated_between(session: TextGenerator) -> None:
    expected = facts(list(session.generate(PROMPTS_OF[20], 10)))
    results: dict[int, list[Any]] = {}
    for count, (number, result) in enumerate(session.generate_many(PROMPTS_OF[:8], 10, batch_size=4)):
        results.setdefault(number, []).append(result)
        if count % 9 == 0:
            assert facts(list(session.generate(PROMPTS_OF[20], 10))) == expected
    for number in range(8):
        assert facts(results[number]) == facts(list(session.generate(PROMPTS_OF[number], 10)))


@pytest.mark.slow
def test_batches_of_several_threads(session: TextGenerator) -> None:
    results: dict[int, dict[int, list[Any]]] = {}

    def generate(part: int) -> None:
        results[part] = by_prompt(session.generate_many(PROMPTS_OF[part::3], 8, batch_size=4))

    threads = [threading.Thread(target=generate, args=(part,)) for part in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, prompt in enumerate(PROMPTS_OF):
        assert facts(results[number % 3][number // 3]) == facts(list(session.generate(prompt, 8)))


def test_a_shared_beginning_is_read_from_the_cache(session: TextGenerator) -> None:
    beginning = "the film was very good and warm at all " * 5
    prompts = [beginning + word for word in ("a plot", "poor", "not bad", "cold")]
    assert len(session.encode_prompt(beginning)) > 40
    expected = [facts(list(session.generate(prompt, 8))) for prompt in prompts]
    for prefix_cache in (True, False):
        for batch_size in (1, 2, 4):
            results = by_prompt(
                session.generate_many(prompts, 8, batch_size=batch_size, prefix_cache=prefix_cache)
            )
            assert [facts(results[number]) for number in range(4)] == expected


def test_prompts_can_join_a_batch_and_leave_it(session: TextGenerator) -> None:
    batch = session.open_batch(3)
    numbers = [batch.add(session.encode_prompt(prompt), 10) for prompt in PROMPTS_OF[:2]]
    results: dict[int, list[Any]] = {}
    for _ in range(8):
        for number, chunk in batch.advance():
            results.setdefault(number, []).append(chunk)
    numbers.append(batch.add(session.encode_prompt(PROMPTS_OF[2]), 10, ["unheard of"]))
    batch.drop(numbers[0])
    while batch.unfinished:
        for number, chunk in batch.advance():
            results.setdefault(number, []).append(chunk)
    batch.close()
    assert facts(results[numbers[1]]) == facts(list(session.generate(PROMPTS_OF[1], 10)))
    assert [chunk.token for chunk in results[numbers[2]]] == [
        chunk.token for chunk in session.generate(PROMPTS_OF[2], 10)
    ]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"batch_size": 0}, "batch_size 0"),
        ({"batch_size": True}, "batch_size True"),
        ({"batch_size": 5000}, "batch_size 5000"),
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"stop": [3]}, "stop"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_at_once(session: TextGenerator, options: Any, name: str) -> None:
    with pytest.raises(BadSetting, match=name):
        session.generate_many([], **options)


def test_a_closed_session_ends_its_batches(folder: Any) -> None:
    session = load_generator(folder, rule="never")
    results = session.generate_many(PROMPTS_OF, 10)
    next(results)
    session.close()
    with pytest.raises(SessionClosed):
        list(results)
    batch = session.open_batch(2)
    batch.add([3], 1)
    with pytest.raises(SessionClosed):
        batch.advance()
    batch.close()


def test_texts_from_before_a_fork_are_lost(folder: Any) -> None:
    with load_generator(folder, rule="never") as session:
        results = session.generate_many(PROMPTS_OF, 10)
        next(results)
        session.after_fork()
        with pytest.raises(SessionForked):
            list(results)
        with suppress(SessionForked):  # an engine on the pool of the whole process cannot go on
            assert len(by_prompt(session.generate_many(PROMPTS_OF[:2], 3))) == 2


# ee-run


def answers(
    session: TextGenerator, *values: Any, batch_size: int, max_new_tokens: int = 6
) -> tuple[list[dict[str, Any]], int, str]:
    """Objects that are written for JSON lines, the number of errors, and the report."""
    out = io.BytesIO()
    data = "".join(json.dumps(value) + "\n" for value in values).encode()
    failed, report = write_answers(
        session,
        read_lines(io.BytesIO(data), "json", PROMPTS),
        Output(out),
        max_new_tokens=max_new_tokens,
        as_it_comes=False,
        batch_size=batch_size,
    )
    return [json.loads(line) for line in out.getvalue().decode().splitlines()], failed, report


def timeless(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in o.items() if k not in ("ms", "first_ms", "tokens_per_s")} for o in objects]


@pytest.mark.slow
def test_answers_are_in_the_order_of_the_lines(session: TextGenerator) -> None:
    values: list[dict[str, Any]] = [
        {"prompt": prompt, "max_new_tokens": 1 + 7 * number % 20} for number, prompt in enumerate(PROMPTS_OF)
    ]
    values[4] = {"prompt": "film " * 100}
    values[7] = {"prompt": "a film", "max_new_tokens": 0}
    values[9] |= {"stop": "film"}
    values[11] |= {"temperature": 1.5, "seed": 3}
    expected = answers(session, *values, batch_size=1)
    for batch_size in (2, 8):
        objects, failed, report = answers(session, *values, batch_size=batch_size)
        assert timeless(objects) == timeless(expected[0])
        assert failed == expected[1] == 2 and "30, 2 with errors" not in report
    assert "error" in expected[0][4] and "error" in expected[0][7]


def test_bad_lines_alone_and_many_of_them(session: TextGenerator) -> None:
    values: list[dict[str, Any]] = [{"prompt": ""}] * (2 * AHEAD + 3) + [{"prompt": "a film"}]
    objects, failed, _ = answers(session, *values, batch_size=2)
    assert failed == 2 * AHEAD + 3 and len(objects) == failed + 1 and objects[-1]["tokens"] == 6


@pytest.mark.slow
def test_lines_are_not_read_far_ahead(session: TextGenerator) -> None:
    read = []

    def lines() -> Iterator[Any]:
        data = (
            b'{"prompt": "a film", "max_new_tokens": 50}\n' + b'{"prompt": "a", "max_new_tokens": 1}\n' * 120
        )
        for line in read_lines(io.BytesIO(data), "json", PROMPTS):
            read.append(line.number)
            yield line

    out = io.BytesIO()
    ahead = 0

    class Watched(Output):
        def write(self, value: Any, *, flush: bool = False) -> None:
            nonlocal ahead
            ahead = max(ahead, len(read) - out.getvalue().count(b"\n"))
            super().write(value, flush=flush)

    write_answers(session, lines(), Watched(out), max_new_tokens=4, as_it_comes=False, batch_size=2)
    assert out.getvalue().count(b"\n") == 121 and ahead <= 2 * AHEAD


def test_ee_run_takes_a_batch_size(folder: Any) -> None:
    data = "".join(prompt + "\n" for prompt in PROMPTS_OF[:9])
    results = [
        CliRunner().invoke(
            cli.main,
            ["--bundle", str(folder), "--rule", "never", "--max-new-tokens", "5", "--batch-size", size],
            input=data,
        )
        for size in ("1", "4")
    ]
    objects = [[json.loads(line) for line in result.stdout.splitlines()] for result in results]
    assert [result.exit_code for result in results] == [0, 0]
    assert timeless(objects[0]) == timeless(objects[1]) and len(objects[0]) == 9


def test_errors_of_one_text_are_bad_input(session: TextGenerator) -> None:
    batch = session.open_batch(2)
    number = batch.add([], 3)
    ((other, problem),) = batch.advance()
    assert other == number and isinstance(problem, BadInput) and not batch.unfinished
    batch.close()
