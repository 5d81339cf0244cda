"""Classifiers on the tiny bundle: answers, their order, what is read when, and items without an answer."""

import threading
from collections.abc import Iterator
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
from tiny_bundles import CLASSIFIER, GENERATOR, texts

from offramp.runtime import (
    Answer,
    BadInput,
    BadSetting,
    Classifier,
    ItemError,
    RuleSpec,
    SessionClosed,
    load,
    load_classifier,
)
from offramp.runtime.inputs.text import MAX_WINDOWS
from offramp.runtime.row_session import WINDOW


@pytest.fixture(scope="module")
def session() -> Iterator[Classifier]:
    with load_classifier(CLASSIFIER, batch_size=4) as session:
        yield session


def is_same(left: Answer, right: Answer) -> bool:
    """Equal but for seconds and for rounding of the score."""
    equal = (left.label, left.exit, left.steps) == (right.label, right.exit, right.steps)
    return equal and bool(np.isclose(left.score, right.score, atol=1e-4))


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "offramp prefetch"]


def test_fields_of_an_answer_agree(session: Classifier) -> None:
    answer = session("the film was good")
    assert answer.label in session.labels == session.manifest.labels
    assert 1 / len(session.labels) <= answer.score <= 1
    assert answer.exit == answer.steps[-1][0] == len(answer.steps)
    assert answer.depth == session.manifest.segments[answer.exit - 1].blocks[-1]
    assert len(answer.signals) == len(answer.steps) and answer.signals[-1][0] == answer.score
    assert answer.seconds > 0 and not answer.truncated


def test_gate_decides_by_default(session: Classifier) -> None:
    assert session.rule == session.manifest.rule == RuleSpec("gate", {"threshold": 0.5})
    answers = [session(text) for text in texts(40)]
    for answer in answers:
        gates = [gate for _, gate in answer.signals if gate is not None]
        assert all(gate <= 0.5 for gate in gates[:-1])
        assert answer.exit == len(session.manifest.segments) or gates[-1] > 0.5
    assert len({answer.exit for answer in answers}) > 1, "the tiny bundle should use more than one exit"


def test_full_depth_and_fixed_exits_agree_up_to_the_exit() -> None:
    with (
        load_classifier(CLASSIFIER, rule="never") as full,
        load_classifier(CLASSIFIER, rule="fixed", threshold=2) as fixed,
    ):
        answer, early = full("good film"), fixed("good film")
        assert answer.exit == len(full.manifest.segments) and answer.depth == full.manifest.blocks
        assert early.exit == 2
        assert early.label != answer.label or np.isclose(early.signals[0][0], answer.signals[0][0], atol=1e-5)


def test_variant_of_the_session_is_run() -> None:
    with (
        load_classifier(CLASSIFIER, variant="int8", rule="never") as quantized,
        load_classifier(CLASSIFIER, rule="never") as exact,
    ):
        assert {variant for _, variant in quantized("good film").steps} == {"int8"}
        assert {variant for _, variant in exact("good film").steps} == {"fp32"}
        assert quantized("good film").signals != exact("good film").signals


def test_map_equals_calls_in_order(session: Classifier) -> None:
    items = texts(100)
    assert all(is_same(a, session(item)) for a, item in zip(session.map(items), items, strict=True))


@pytest.mark.parametrize("size", [1, 3, 64])
def test_map_is_the_same_for_every_batch_size(session: Classifier, size: int) -> None:
    items = texts(50)
    answers = list(session.map(items, batch_size=size))
    assert len(answers) == 50
    assert all(is_same(a, b) for a, b in zip(answers, session.map(items), strict=True))


def test_map_of_no_items(session: Classifier) -> None:
    assert list(session.map([])) == []


def test_pair_is_the_same_in_a_call_and_in_map(session: Classifier) -> None:
    assert is_same(session("good film", "bad plot"), next(session.map([("good film", "bad plot")])))
    assert session("good film", "bad plot").signals != session("good film bad plot").signals


def test_map_reads_two_windows_at_most(session: Classifier) -> None:
    items_read = 0

    def source() -> Iterator[str]:
        nonlocal items_read
        for text in texts(1000):
            items_read += 1
            yield text

    answers = session.map(source(), batch_size=2)
    assert items_read == 0
    list(islice(answers, 3))
    assert items_read == 2 * 2 * WINDOW
    list(islice(answers, 2 * WINDOW))
    assert items_read == 3 * 2 * WINDOW


def test_map_of_batch_size_one_answers_before_it_reads_on(session: Classifier) -> None:
    items_read = []

    def source() -> Iterator[str]:
        for text in texts(5):
            items_read.append(text)
            yield text

    for count, _ in enumerate(session.map(source(), batch_size=1), 1):
        assert len(items_read) == count


BAD_ITEMS = {0: None, 9: 7, 10: ("a", "b", "c"), 40: "half \ud83d", 41: None}


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 8])
def test_answers_give_an_item_error_in_the_place_of_a_bad_item(session: Classifier, size: int) -> None:
    good = texts(200)
    items: list[Any] = [BAD_ITEMS.get(number, text) for number, text in enumerate(good)]
    expected, count = session.map(good), 0
    for number, (answer, full) in enumerate(zip(session.answers(items, size), expected, strict=True)):
        count += 1
        if number in BAD_ITEMS:
            assert isinstance(answer, ItemError) and answer.index == number
            assert "expected a string" in answer.message or "surrogate" in answer.message
        else:
            assert isinstance(answer, Answer) and is_same(answer, full)
    assert count == 200


@pytest.mark.parametrize("size", [1, 8])
def test_answers_of_bad_items_alone(session: Classifier, size: int) -> None:
    answers = list(session.answers([None] * 70, size))
    assert [error.index for error in answers if isinstance(error, ItemError)] == list(range(70))


@pytest.mark.parametrize("size", [1, 4])
def test_map_raises_a_bad_item_after_the_answers_before_it(session: Classifier, size: int) -> None:
    items: list[Any] = [*texts(40), None, "good"]
    answers = []
    with pytest.raises(BadInput, match=r"^item 40: expected a string or a pair of strings"):
        for answer in session.map(items, size):
            answers.append(answer)
    assert len(answers) == 40 and not prefetch_threads()


def test_call_raises_a_bad_item(session: Classifier) -> None:
    with pytest.raises(BadInput, match=r"^item 0: expected a string"):
        session(None)


@pytest.mark.parametrize("size", [1, 4])
def test_map_raises_an_error_of_the_source_after_the_answers_before_it(
    session: Classifier, size: int
) -> None:
    def source() -> Iterator[str]:
        yield from texts(40)
        raise OSError("the source broke")

    answers = []
    with pytest.raises(OSError, match="the source broke"):
        for answer in session.map(source(), batch_size=size):
            answers.append(answer)
    assert len(answers) == 40


def test_map_tokenizes_the_next_window_in_a_thread(
    session: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_main_thread = []
    reader = session._reader

    class Spy:
        arrays = staticmethod(reader.arrays)

        def read(self, items: list[str]) -> list[Any]:
            in_main_thread.append(threading.current_thread() is threading.main_thread())
            return reader.read(items)

    monkeypatch.setattr(session, "_reader", Spy())
    assert len(list(session.map(texts(4 * WINDOW * 3)))) == 4 * WINDOW * 3
    assert in_main_thread == [True, False, False]
    in_main_thread.clear()
    list(session.map(texts(5), batch_size=1))
    assert in_main_thread == [True] * 5


def test_abandoned_map_leaves_no_thread(session: Classifier) -> None:
    answers = session.map(texts(500))
    next(answers)
    del answers
    assert not prefetch_threads()
    answers = session.map(texts(500))
    next(answers)
    answers.close()  # type: ignore[attr-defined]
    assert not prefetch_threads()


def test_map_of_a_session_that_is_closed_meanwhile() -> None:
    session = load_classifier(CLASSIFIER, batch_size=2)
    answers = session.map(texts(100))
    next(answers)
    session.close()
    with pytest.raises(SessionClosed):
        list(answers)
    assert not prefetch_threads()


def test_encode_gives_the_inputs_of_the_stem(session: Classifier) -> None:
    inputs = session.encode("good film", "bad")
    assert {name: array.shape[0] for name, array in inputs.items()} == dict.fromkeys(inputs, 1)
    state = session.engine.begin(inputs)
    assert state.rows == 1 and state.length == inputs["input_ids"].shape[1]
    session.engine.drop(state)


def test_truncated_text_is_marked(session: Classifier) -> None:
    assert session("good " * 500).truncated
    assert [answer.truncated for answer in session.map(["good", "good " * 500])] == [False, True]


def test_at_full_depth_has_every_exit_of_every_item(session: Classifier) -> None:
    items = texts(10)
    trace, lengths = session.at_full_depth(items)
    assert (trace.variants == 0).all() and trace.logits.shape == (10, 3, len(session.labels))
    assert lengths.tolist() == [session.encode(item)["input_ids"].shape[1] for item in items]
    quantized, _ = session.at_full_depth(items, "int8")
    assert (quantized.variants == 1).all() and not np.array_equal(trace.logits, quantized.logits)
    with pytest.raises(BadInput, match="item 1: "):
        session.at_full_depth(["good", None])


def test_batches_are_of_similar_length_with_the_shortest_first(session: Classifier) -> None:
    rows = session._reader.read(texts(10))
    batches = list(session.batches([row for row in rows if not isinstance(row, ItemError)], 4))
    assert [len(ids) for ids, _ in batches] == [4, 4, 2]
    lengths = [
        int(inputs["attention_mask"][number].sum()) for ids, inputs in batches for number in range(len(ids))
    ]
    assert lengths == sorted(lengths)
    assert sorted(number for ids, _ in batches for number in ids.tolist()) == list(range(10))


def test_threads_share_a_session(session: Classifier) -> None:
    items = texts(30)
    expected = [session(text) for text in items]
    by_thread: dict[int, list[Answer]] = {}

    def work(number: int) -> None:
        answers = [session(text) for text in items] if number % 2 else list(session.map(items))
        by_thread[number] = answers

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(by_thread) == 4
    assert all(
        is_same(a, b) for answers in by_thread.values() for a, b in zip(answers, expected, strict=True)
    )


@pytest.mark.parametrize("sizes", [{"lengths": (8, 0)}, {"batch": 0}])
def test_warm_up_of_sizes_under_one_is_refused(session: Classifier, sizes: dict[str, Any]) -> None:
    with pytest.raises(BadSetting, match="expected 1 or more"):
        session.warm_up(**sizes)


def test_batch_size_beyond_any_memory_is_refused(session: Classifier) -> None:
    for work in (
        lambda: session.map(["good"], 10**19),
        lambda: load_classifier(CLASSIFIER, batch_size=10**9999),
    ):
        with pytest.raises(BadSetting, match=r"expected 1048576 or fewer"):
            list(work())  # type: ignore[call-overload]


@pytest.mark.parametrize("size", [0, -1])
def test_batch_size_under_one_is_refused(session: Classifier, size: int) -> None:
    with pytest.raises(BadSetting, match=f"batch size {size}: expected 1 or more"):
        session.map(["good"], batch_size=size)
        next(session.map(["good"], batch_size=size))


@pytest.fixture(scope="module")
def windowed() -> Iterator[Classifier]:
    with load_classifier(CLASSIFIER, batch_size=4, long_texts="windows") as session:
        yield session


def test_a_long_text_is_answered_from_the_mean_logits_of_its_windows(windowed: Classifier) -> None:
    long_text = " ".join(texts(60))
    (row,) = windowed._reader.read([long_text])
    assert not isinstance(row, ItemError) and not row.truncated
    answer = windowed(long_text)
    assert answer.windows == 1 + len(row.rest) > 2
    trace = windowed._trace([row, *row.rest], 4, windowed._bound_rule, windowed._variant_number)
    last = [int(np.flatnonzero(variants >= 0)[-1]) for variants in trace.variants]
    logits = np.mean([trace.logits[number, segment] for number, segment in enumerate(last)], 0)
    probabilities = np.exp(logits) / np.exp(logits).sum()
    assert answer.label == windowed.labels[int(probabilities.argmax())]
    assert answer.score == pytest.approx(float(probabilities.max()), abs=1e-4)
    assert answer.exit == max(last) + 1


def test_windows_share_a_quarter_and_cover_the_text(windowed: Classifier) -> None:
    long_text = " ".join(texts(60))
    (row,) = windowed._reader.read([long_text])
    assert not isinstance(row, ItemError)
    longest = windowed.manifest.input.longest  # type: ignore[union-attr]
    bodies = [list(part.ids)[1:-1] for part in (row, *row.rest)]  # type: ignore[attr-defined]
    assert all(len(body) == longest - 2 for body in bodies[:-1])
    shared = longest // 4
    assert all(left[-shared:] == right[:shared] for left, right in pairwise(bodies[:-1]))


def test_windowed_answers_keep_their_places(windowed: Classifier, session: Classifier) -> None:
    items = ["good film", "good " * 300, "bad plot", 7, "good " * 40]
    answers = list(windowed.answers(items))
    assert [isinstance(answer, ItemError) for answer in answers] == [False, False, False, True, False]
    for item, answer in zip(items, answers, strict=True):
        if isinstance(answer, Answer) and answer.windows == 1:
            assert is_same(answer, session(item))
    assert isinstance(answers[1], Answer) and answers[1].windows > 1


def test_a_pair_has_no_windows(windowed: Classifier) -> None:
    assert windowed("good", "film").windows == 1
    with pytest.raises(BadInput, match="cannot be read in windows"):
        windowed("good " * 300, "film")


def test_more_windows_than_the_most_are_marked_as_truncated(windowed: Classifier) -> None:
    answer = windowed("good " * 9000)
    assert answer.windows == MAX_WINDOWS and answer.truncated


def test_windows_are_for_texts_alone() -> None:
    with pytest.raises(BadSetting, match=r"long_texts windows: .* generates text, so it has no windows"):
        load(GENERATOR, long_texts="windows")
    with pytest.raises(BadSetting, match="long_texts 'wide': choose one of cut, windows"):
        load(CLASSIFIER, long_texts="wide")
