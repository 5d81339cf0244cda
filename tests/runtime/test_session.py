"""What both kinds of session share: facts, the end, and the lock."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from tiny_bundles import CLASSIFIER, GENERATOR

from offramp.runtime import BadSetting, Classifier, Session, SessionClosed, TextGenerator, WrongTask, load
from offramp.runtime.bundle.files import open_bundle

BUNDLES = pytest.mark.parametrize("path", [CLASSIFIER, GENERATOR], ids=["classifier", "generator"])


@BUNDLES
def test_session_has_facts_of_its_bundle_and_engine(path: Any) -> None:
    with load(path, variant="int8", rule="never") as session:
        assert isinstance(session, Session)
        assert session.manifest == open_bundle(path).manifest and session.folder == path
        assert (session.rule.name, session.variant) == ("never", "int8")
        assert (session.engine.name, session.engine.device) == ("ort", "cpu")
        assert set(session.engine.facts) == {"onnxruntime", "threads", "pool"}


USES: dict[str, Callable[[Any], object]] = {
    "call": lambda session: session("good"),
    "map": lambda session: list(session.map(["good"])),
    "answers": lambda session: list(session.answers(["good"])),
    "full depth": lambda session: session.at_full_depth(["good"]),
    "classifier warm-up": lambda session: session.warm_up(),
    "generate": lambda session: list(session.generate("good")),
    "tokens": lambda session: list(session.tokens([1], 3)),
    "generator warm-up": lambda session: session.warm_up(),
}


@pytest.mark.parametrize("use", USES)
def test_closed_session_is_refused(use: str) -> None:
    generates = use in ("generate", "tokens", "generator warm-up")
    session: Any = load(GENERATOR if generates else CLASSIFIER)
    assert isinstance(session, TextGenerator if generates else Classifier)
    session.close()
    session.close()  # a second call does nothing
    with pytest.raises(SessionClosed, match=r"load\(\) another"):
        USES[use](session)


@BUNDLES
def test_context_manager_closes_the_engine_once(path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    session, closed = load(path), []
    close = session.engine.close
    monkeypatch.setattr(session.engine, "close", lambda: (closed.append(1), close()))
    with session as entered:
        assert entered is session and not closed
    session.close()
    assert closed == [1]


def test_close_waits_for_a_walk() -> None:
    session = load(CLASSIFIER)
    with session._lock:  # as during a walk
        thread = threading.Thread(target=session.close)
        thread.start()
        thread.join(0.05)
        assert thread.is_alive() and not session._closed
    thread.join(5)
    assert session._closed


def test_session_itself_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Session()  # type: ignore[abstract,call-arg]


def test_a_method_of_the_other_kind_of_session_is_refused_by_name() -> None:
    with load(CLASSIFIER) as classifier, load(GENERATOR) as generator:
        with pytest.raises(WrongTask, match=r"generate: this bundle classifies: call the session"):
            classifier.generate("a film")
        with pytest.raises(BadSetting, match=r"map: this bundle generates text: call generate"):
            generator.map(["a film"])
        with pytest.raises(BadSetting, match=r"this bundle generates text: call generate"):
            generator("a film")
        assert not hasattr(classifier, "generate")
