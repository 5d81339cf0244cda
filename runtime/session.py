"""Session, the base of all sessions: an open bundle on an engine, with a lock."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar, Generic

from offramp.runtime.bundle.files import Bundle
from offramp.runtime.bundle.manifest import Manifest, RuleSpec
from offramp.runtime.engines.base import Engine, S
from offramp.runtime.errors import SessionClosed, WrongTask
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

    @abstractmethod
    def warm_up(self, lengths: Sequence[int] = (16,), batch: int = 1) -> None:
        """Run every segment once at these lengths (tokens), so that no later call pays for the first run."""

    def close(self) -> None:
        """Close the session and free its engine; a second call does nothing."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self.engine.close()

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
            raise SessionClosed("the session is closed; load() another")
