"""What both kinds of session share: a bundle opened on an engine, a lock, and its end."""

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
    """A bundle that is ready to answer: a Classifier or a TextGenerator, made by load().

    Any thread may call it: walks run one at a time behind one lock.

    engine: what really runs (name, device, facts). rule: the spec of the rule that decides. variant: the
    precision in which rows start. folder: the bundle's.
    """

    usage: ClassVar[str]  # which methods answer, for the errors of others

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
        """Free the engine; a second call does nothing."""
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

    if not TYPE_CHECKING:  # a type checker reports such a name itself

        def __getattr__(self, name: str) -> None:
            """Raise WrongTask for a public name that this kind of session does not have."""
            if name.startswith("_"):
                raise AttributeError(name)
            raise WrongTask(f"{name}: {self.usage}")

    def _check_open(self) -> None:
        if self._closed:
            raise SessionClosed("the session is closed; load() another")
