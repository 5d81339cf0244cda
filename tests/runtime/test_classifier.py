"""Sessions over the tiny bundle: answers, order, laziness, wishes and their contradictions."""

import shutil
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from offramp.runtime import (
    Answer,
    BadBundle,
    BadInput,
    BadSetting,
    BundleNotFound,
    RuleSpec,
    Session,
    SessionClosed,
    load,
)
from offramp.runtime.classifier import WINDOW

TINY = Path(__file__).parents[1] / "data" / "tiny_bundle"
WORDS = ["the", "a", "film", "plot", "was", "very", "not", "at", "all", "good", "warm", "bad", "poor", "cold"]


def texts(count: int, seed: int = 0) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, random.integers(1, 30))) for _ in range(count)]


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with load(TINY, batch_size=4) as session:
        yield session


def same(one: Answer, other: Answer) -> bool:
    return (one.label, one.exit, one.steps) == (other.label, other.exit, other.steps) and bool(
        np.isclose(one.score, other.score, atol=1e-4)
    )


def test_an_answer_agrees_with_itself(session: Session) -> None:
    answer = session("the film was good")
    assert answer.label in session.manifest.labels
    assert 1 / len(session.manifest.labels) <= answer.score <= 1
    assert answer.exit == answer.steps[-1][0] == len(answer.steps)
    assert answer.depth == session.manifest.segments[answer.exit - 1].blocks[-1]
    assert len(answer.signals) == len(answer.steps) and answer.signals[-1][0] == answer.score
    assert answer.seconds > 0 and not answer.truncated


def test_the_gate_decides_by_default(session: Session) -> None:
    assert session.rule == session.manifest.rule == RuleSpec("gate", {"threshold": 0.5})
    answers = [session(text) for text in texts(40)]
    for answer in answers:
        gates = [gate for _, gate in answer.signals if gate is not None]
        assert all(gate <= 0.5 for gate in gates[:-1])
        assert answer.exit == len(session.manifest.segments) or gates[-1] > 0.5
    assert len({answer.exit for answer in answers}) > 1, "the tiny bundle should use more than one exit"


def test_map_gives_what_calls_give_in_order(session: Session) -> None:
    items = texts(100)
    assert all(same(one, session(item)) for one, item in zip(session.map(items), items, strict=True))


@pytest.mark.parametrize("size", [1, 3, 64])
def test_map_in_any_batch_size(session: Session, size: int) -> None:
    items = texts(50)
    found = list(session.map(items, batch_size=size))
    assert len(found) == 50
    assert all(same(one, other) for one, other in zip(found, session.map(items), strict=True))


def test_pairs(session: Session) -> None:
    assert same(session("good film", "bad plot"), next(session.map([("good film", "bad plot")])))
    assert session("good film", "bad plot").signals != session("good film bad plot").signals


def test_map_reads_no_further_than_two_windows(session: Session) -> None:
    read = 0

    def source() -> Iterator[str]:
        nonlocal read
        for text in texts(1000):
            read += 1
            yield text

    answers = session.map(source(), batch_size=2)
    assert read == 0
    list(islice(answers, 3))
    assert read == 2 * 2 * WINDOW
    list(islice(answers, 2 * WINDOW))
    assert read == 3 * 2 * WINDOW


def test_map_of_batch_size_one_answers_before_it_reads_on(session: Session) -> None:
    read = []

    def source() -> Iterator[str]:
        for text in texts(5):
            read.append(text)
            yield text

    for count, _ in enumerate(session.map(source(), batch_size=1), 1):
        assert len(read) == count


def test_map_of_nothing(session: Session) -> None:
    assert list(session.map([])) == []


def test_an_item_that_is_no_text_comes_after_the_answers_before_it(session: Session) -> None:
    items = [*texts(40), None, "good"]
    answers = []
    with pytest.raises(BadInput, match="item 40: "):
        for answer in session.map(items):  # type: ignore[arg-type]
            answers.append(answer)
    assert len(answers) == 40


def test_an_error_of_the_source_comes_after_the_answers_before_it(session: Session) -> None:
    def source() -> Iterator[str]:
        yield from texts(40)
        raise OSError("the source broke")

    for size in (1, 4):
        answers = []
        with pytest.raises(OSError, match="the source broke"):
            for answer in session.map(source(), batch_size=size):
                answers.append(answer)
        assert len(answers) == 40


def tokenizing() -> bool:
    return any(thread.name == "offramp ahead" for thread in threading.enumerate())


def test_windows_are_tokenized_beside_the_walk(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    where = []
    encode = session._encode

    class Spy:
        arrays = staticmethod(encode.arrays)

        def __call__(self, items: list[str]) -> list:
            where.append(threading.current_thread() is threading.main_thread())
            return encode(items)

    monkeypatch.setattr(session, "_encode", Spy())
    assert len(list(session.map(texts(4 * WINDOW * 3)))) == 4 * WINDOW * 3
    assert where == [True, False, False]
    where.clear()
    list(session.map(texts(5), batch_size=1))
    assert where == [True] * 5


def test_an_abandoned_map_leaves_no_thread(session: Session) -> None:
    answers = session.map(texts(500))
    next(answers)
    del answers
    assert not tokenizing()
    answers = session.map(texts(500))
    next(answers)
    answers.close()  # type: ignore[attr-defined]
    assert not tokenizing()


def test_a_session_closed_under_a_map_says_so() -> None:
    session = load(TINY, batch_size=2)
    answers = session.map(texts(100))
    next(answers)
    session.close()
    with pytest.raises(SessionClosed):
        list(answers)
    assert not tokenizing()


def test_encode_gives_what_a_call_runs_on(session: Session) -> None:
    state = session.engine.begin(session.encode("good film", "bad"))
    assert state.rows == 1 and session.engine.step(0, 0, state).logits.shape == (1, len(session.labels))
    session.engine.drop(state)


def test_truncated_text_says_so(session: Session) -> None:
    assert session("good " * 500).truncated


def test_many_threads_share_a_session(session: Session) -> None:
    items = texts(30)
    expected = [session(text) for text in items]
    found: dict[int, list[Answer]] = {}

    def work(number: int) -> None:
        found[number] = [session(text) for text in items] if number % 2 else list(session.map(items))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(same(a, b) for answers in found.values() for a, b in zip(answers, expected, strict=True))


def test_a_closed_session_says_so() -> None:
    session = load(TINY)
    session.close()
    session.close()
    with pytest.raises(SessionClosed):
        session("good")
    with pytest.raises(SessionClosed):
        list(session.map(["good"]))


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleNotFound, match="no such folder"):
        load(tmp_path / "bundle")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "bundle"))


def test_a_lazy_session_opens_what_is_reached(folder: Path) -> None:
    (folder / "segment_02.onnx").unlink()
    with pytest.raises(BundleNotFound, match="segment_02"):
        load(folder)
    with load(folder, lazy=True, rule="fixed", threshold=2) as session, load(TINY) as whole:
        answer = session("good film")
        assert answer.exit == 2
        assert np.isclose(answer.signals[0][0], whole("good film").signals[0][0], atol=1e-5)
        with pytest.raises(BundleNotFound, match="segment_02"):
            session.warm_up()
        assert session("good film") != answer and session("good film").exit == 2  # seconds differ


def test_a_lazy_session_checks_what_it_reads(folder: Path) -> None:
    with load(folder, lazy=True, rule="never") as session:
        path = folder / "segment_01.onnx"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        with pytest.raises(BadBundle, match=r"segment_01\.onnx: sha256"):
            session("good film")


def test_a_lazy_session_still_needs_its_stem(folder: Path) -> None:
    (folder / "stem.onnx").unlink()
    with pytest.raises(BundleNotFound, match="stem"):
        load(folder, lazy=True)


def test_after_a_warm_up_no_file_is_read(folder: Path) -> None:
    with load(folder, lazy=True, variant="int8") as session, load(TINY, variant="int8") as eager:
        session.warm_up((1, 7, 1000), batch=2)
        for path in folder.iterdir():
            path.unlink()
        assert all(same(a, b) for a, b in zip(session.map(texts(20)), eager.map(texts(20)), strict=True))


@pytest.mark.parametrize("wish", [{"lengths": (8, 0)}, {"batch": 0}])
def test_a_warm_up_of_nothing_is_refused(session: Session, wish: dict) -> None:
    with pytest.raises(BadSetting, match="expected 1 or more"):
        session.warm_up(**wish)


def test_a_closed_session_is_not_warmed() -> None:
    session = load(TINY)
    session.close()
    with pytest.raises(SessionClosed):
        session.warm_up()


def test_a_bad_tokenizer_is_said_whatever_the_engine_does(folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(b"{}")
    with pytest.raises(BadBundle, match=r"tokenizer\.json"):
        load(folder)
    assert not tokenizing()


def test_full_depth_and_fixed_exits() -> None:
    last = 3
    with load(TINY, rule="never") as session:
        full = session("good film")
        assert full.exit == last and full.depth == session.manifest.blocks
    with load(TINY, rule="fixed", threshold=2) as session:
        early = session("good film")
        assert early.exit == 2
        assert np.isclose(early.signals[0][0], full.signals[0][0], atol=1e-5) or early.label != full.label


def test_the_variant_that_is_wished_for_runs() -> None:
    with load(TINY, variant="int8", rule="never") as eight, load(TINY, rule="never") as full:
        assert {variant for _, variant in eight("good film").steps} == {"int8"}
        assert {variant for _, variant in full("good film").steps} == {"fp32"}
        assert eight("good film").signals != full("good film").signals


def test_an_operating_point_sets_rule_and_variant() -> None:
    with load(TINY, point="fast") as session:
        point = next(point for point in session.manifest.points if point.name == "fast")
        assert (session.rule, session.variant) == (point.rule, point.variant)


def test_a_threshold_alone_goes_to_the_bundles_rule() -> None:
    with load(TINY, threshold=2.0) as session:
        assert session.rule == RuleSpec("gate", {"threshold": 2.0})
        assert session("good film").exit == len(session.manifest.segments)


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"point": "fast", "rule": "never"}, "wish for either, not both"),
        ({"point": "fast", "threshold": 0.1}, "wish for either, not both"),
        ({"point": "fast", "variant": "fp32"}, "measured in variant int8"),
        ({"point": "slow"}, "it has: default, fast"),
        ({"rule": "luck"}, "choose one of: gate"),
        ({"rule": "margin"}, "needs threshold"),
        ({"rule": "never", "threshold": 0.5}, "has no threshold"),
        ({"rule": "fixed", "threshold": 9}, "exits 1 to 3"),
        ({"variant": "int4"}, "it offers: fp32, int8"),
        ({"engine": "tpu"}, "choose one of: ort, trt"),
        ({"device": "tpu"}, "choose one of: cpu, cuda"),
        ({"threads": 0}, "expected 1 or more"),
        ({"batch_size": 0}, "expected 1 or more"),
    ],
)
def test_wishes_that_cannot_be_met(wishes: dict, message: str) -> None:
    with pytest.raises(BadSetting, match=message):
        load(TINY, **wishes)
