"""Session, the base of all sessions: an open bundle on an engine, with a lock."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Generic
from weakref import WeakSet

from offramp.runtime.bundle.files import Bundle
from offramp.runtime.bundle.manifest import Manifest, RuleSpec
from offramp.runtime.engines.base import Engine, S
from offramp.runtime.errors import SessionClosed, SessionForked, WrongTask
from offramp.runtime.forks import after_fork
from offramp.runtime.rules.base import Rule

if TYPE_CHECKING:
    from typing_extensions import Self


class Session(ABC, Generic[S]):
    """An open bundle that answers requests: a RowSession or a TextGenerator; load() returns it.

    Any thread may call it: a lock lets walks run one at a time.

    engine: the engine that really runs (name, device, facts). rule: the spec of its rule. variant: the
    precision in which rows start. folder: the bundle's folder.
    """

    usage: ClassVar[str]  # names the methods that answer, for error messages

    def __init__(self, bundle: Bundle, engine: Engine[S], rule: Rule, variant: str) -> None:
        self.manifest: Manifest = bundle.manifest
        self.folder: Path = bundle.folder
        self.engine = engine
        self.rule: RuleSpec = rule.spec
        self.variant = variant
        self._bound_rule = rule
        self._variant_number = self.manifest.variants.index(variant)
        self._lock = threading.Lock()
        self._closed = False
        self._forks = 0  # of this process and its parents, since the session was opened
        self._forked_problem = ""
        with _sessions_lock:
            _sessions.add(self)

    @abstractmethod
    def warm_up(self, lengths: Sequence[int] = (16,), batch: int = 1) -> None:
        """Run every segment once at these lengths (tokens), so that no later call pays for the first run."""

    def close(self) -> None:
        """Close the session and free its engine; a second call does nothing."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self.engine.close()

    def after_fork(self) -> None:
        """Make the session usable in a process that was forked, or refuse later calls; called there.

        The threads of the engine do not exist in it, so graphs are read and opened again when a row reaches
        them. Without such threads (threads=1) the graphs stay, in memory that both processes share.
        """
        self._lock = threading.Lock()
        self._forks += 1
        if self._closed:
            return
        try:
            self.engine.after_fork()
        except SessionForked as problem:
            self._closed, self._forked_problem = True, str(problem)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    if not TYPE_CHECKING:  # type checkers report such names themselves

        def __getattr__(self, name: str) -> None:
            """Raise WrongTask for a public name that this kind of session does not have."""
            if name.startswith("_"):
                raise AttributeError(name)
            raise WrongTask(f"{name}: {self.usage}")

    def _check_open(self) -> None:
        if self._closed:
            if self._forked_problem:
                raise SessionForked(self._forked_problem)
            raise SessionClosed("the session is closed; load() another")


FORK_WAIT = 5.0  # seconds that a fork waits for the walk of a session in another thread
_sessions: WeakSet[Session[Any]] = WeakSet()
_sessions_lock = threading.Lock()
_resting: list[Session[Any]] = []  # whose locks are held while this process forks


def _before_fork() -> None:
    """Wait until no session walks, so that neither a session nor ONNX Runtime is copied in the middle."""
    _sessions_lock.acquire()
    _resting[:] = [session for session in _sessions if session._lock.acquire(timeout=FORK_WAIT)]


def _in_parent() -> None:
    for session in _resting:
        session._lock.release()
    _resting.clear()
    _sessions_lock.release()


def _in_child() -> None:
    global _sessions_lock
    _sessions_lock = threading.Lock()
    _resting.clear()
    for session in list(_sessions):
        session.after_fork()


after_fork(_in_child, before=_before_fork, in_parent=_in_parent)
