"""The bundles that a server answers with: session, scheduler, and what a request may ask of each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from offramp.runtime.batching import TEXTS
from offramp.runtime.bundle.manifest import FILE_NAME, ImageInput, Manifest
from offramp.runtime.errors import BadSetting, ItemError
from offramp.runtime.generator import TextGenerator
from offramp.runtime.hub.reference import PREFIX
from offramp.runtime.hub.resolve import resolve_bundle
from offramp.runtime.inputs.text import AnyRow
from offramp.runtime.loading import load
from offramp.runtime.row_session import RowAnswer, RowSession
from offramp.runtime.rules.resolve import segments_within
from offramp.runtime.serving.generation import EndedText, ServedGenerator
from offramp.runtime.serving.savings import Savings
from offramp.runtime.serving.scheduler import QUEUE, RowOptions, Scheduler
from offramp.runtime.serving.settings import Settings, Wanted, WatchOptions

# Told of the name of a model, an answer of it or a text that ended, and the seconds since it was asked for.
Observer = Callable[[str, RowAnswer | EndedText, float], None]


class UnknownModel(BadSetting):
    """A request names a model that the server does not have."""


@dataclass
class ServedModel:
    """A bundle that is open: its name in requests, session and scheduler, and what was saved with it."""

    name: str
    folder: Path
    session: RowSession[Any]
    scheduler: Scheduler[Any]
    tag: str  # what changes when the bundle does: the hash of its manifest
    settings: Settings
    savings: Savings

    @property
    def manifest(self) -> Manifest:
        """The manifest of the bundle."""
        return self.session.manifest

    @property
    def reads_images(self) -> bool:
        """Whether its rows are images; otherwise they are texts."""
        return isinstance(self.manifest.input, ImageInput)

    @property
    def is_alive(self) -> bool:
        """Whether rows are still walked."""
        return self.scheduler.is_alive

    @property
    def accepted(self) -> int:
        """Rows that are accepted and not answered."""
        return self.scheduler.accepted

    @property
    def under_way(self) -> int:
        """Rows whose walk has begun."""
        return self.scheduler.under_way

    def read(self, items: Sequence[Any]) -> list[AnyRow | ItemError]:
        """Convert items of a request to rows, as RowSession.read does; every route reads its items here.

        A session for images opens a text as the path of a file. So this takes an image as bytes alone, and
        raises BadSetting for any other item before one is read.
        """
        if self.reads_images and not all(isinstance(item, bytes) for item in items):
            raise BadSetting(
                f'input: model {self.name} reads images: ask /v1/classify with {{"image": "…"}} in base64'
            )
        return self.session.read(items)

    def options(self, wanted: Wanted) -> RowOptions:
        """How a row is walked of which this is asked; the scheduler must get it.

        Raises BadSetting for points, limits and budgets that the bundle does not have, and TooManyBudgets.
        """
        setting = self.settings.find(wanted)
        if wanted.max_depth is None:
            return setting.options(None)
        return setting.options(segments_within(self.manifest, setting.spec.name, wanted.max_depth))

    def numbers(self, point: str | None, full_depth: str | None = None) -> tuple[int, int]:
        """The numbers of rule and variant of a point, or of every segment in a variant; see RowSession.

        Without both they are those of the server's own setting. Raises BadSetting for unknown names.
        """
        if full_depth is not None:
            return self.settings.full_depth(full_depth)
        return self.settings.find(Wanted(point)).draw()

    def close(self, *, finish: bool = True) -> None:
        """Close the scheduler, which answers what it accepted if `finish`, and then the session."""
        self.scheduler.close(finish=finish)
        self.session.close()


@dataclass
class Models:
    """All bundles of a server, by name; the first is the one of requests that name none.

    options: options of load() for every bundle. scheduling: keyword arguments of Scheduler, and "texts", see
    ServedGenerator. observe: told of every answer and text. watch: budgets and audits of every bundle.
    """

    folders: Mapping[str, Path]
    options: Mapping[str, Any] = field(default_factory=dict)
    scheduling: Mapping[str, int] = field(default_factory=dict)
    observe: Observer | None = None
    watch: WatchOptions = field(default_factory=WatchOptions)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()  # of reload
        self._models: dict[str, ServedModel | ServedGenerator] = {}

    def open(self) -> None:
        """Open every bundle and run its segments once; raises the errors of load()."""
        try:
            for name in self.folders:
                self._models[name] = self._open(name)
        except BaseException:
            self.close(finish=False)
            raise

    def get(self, name: str | None) -> ServedModel | ServedGenerator:
        """The model of this name, None for the first; raises UnknownModel."""
        if name is None:
            name = next(iter(self.folders))
        try:
            return self._models[name]
        except KeyError:
            raise UnknownModel(f"model {name!r}: this server has {', '.join(self.folders)}") from None

    def rows(self, name: str | None) -> ServedModel:
        """The model of this name, which must give one answer for each row; raises BadSetting if not."""
        model = self.get(name)
        if isinstance(model, ServedModel):
            return model
        raise BadSetting(f"model {model.name} generates text: ask /v1/completions or /v1/chat/completions")

    def text(self, name: str | None) -> ServedGenerator:
        """The model of this name, which must generate text; raises BadSetting if not."""
        model = self.get(name)
        if isinstance(model, ServedGenerator):
            return model
        texts = ", ".join(other.name for other in self.all() if isinstance(other, ServedGenerator))
        cure = f", or name a model that generates text: {texts}" if texts else ""
        raise BadSetting(f"model {model.name}: its task is {model.manifest.task}; ask /v1/classify{cure}")

    def all(self) -> Sequence[ServedModel | ServedGenerator]:
        """Every model that is open."""
        return list(self._models.values())

    def reload(self) -> list[str]:
        """Open bundles anew whose manifest has changed; gives their names.

        Rows that were accepted before are answered by the bundle of before. If a bundle cannot be opened, the
        one of before stays, and the error is raised when the others are done.
        """
        changed, problem = list[str](), None
        with self._lock:
            for name, before in list(self._models.items()):
                try:
                    if manifest_tag(before.folder) == before.tag:
                        continue
                    self._models[name] = self._open(name)
                except Exception as raised:
                    problem = raised
                    continue
                changed.append(name)
                before.close()
        if problem is not None:
            raise problem
        return changed

    def close(self, *, finish: bool = True) -> None:
        """Close every model; finish: after the rows that were accepted are answered."""
        for model in self._models.values():
            model.close(finish=finish)
        self._models.clear()

    def _open(self, name: str) -> ServedModel | ServedGenerator:
        folder = self.folders[name]
        tag = manifest_tag(folder)
        session = load(folder, **self.options)
        try:
            session.warm_up()
            if isinstance(session, TextGenerator):
                if self.watch.has_budget or self.watch.audit is not None:
                    what = "a budget" if self.watch.has_budget else "an audit"
                    raise BadSetting(
                        f"model {name} generates text: {what} is for bundles that give one answer for each "
                        "row; serve it by another ee-serve"
                    )
                queue, texts = self.scheduling.get("queue", QUEUE), self.scheduling.get("texts", TEXTS)
                observe = None if self.observe is None else partial(self.observe, name)
                return ServedGenerator(name, folder, session, queue, tag, texts, observe)
            return self._serve(name, folder, session, tag)
        except BaseException:
            session.close()
            raise

    def _serve(self, name: str, folder: Path, session: RowSession[Any], tag: str) -> ServedModel:
        """Let the rows of a session be walked; raises BadSetting if budget or audit do not suit it."""
        savings = Savings(session.manifest)

        def observe(answer: RowAnswer, seconds: float) -> None:
            savings.add(answer)
            if self.observe is not None:
                self.observe(name, answer, seconds)

        sizes = {key: size for key, size in self.scheduling.items() if key != "texts"}
        scheduler = Scheduler(session, observe=observe, **sizes)
        try:
            settings = Settings(name, session, scheduler, self.watch, self.options.get("point"))
        except BaseException as problem:
            scheduler.close(finish=False)
            if isinstance(problem, BadSetting):
                raise BadSetting(f"model {name}: {problem}") from None
            raise
        return ServedModel(name, folder, session, scheduler, tag, settings, savings)


def manifest_tag(folder: Path) -> str:
    """The hash of a bundle's manifest, which names the hashes of all its files; "" if there is none."""
    file = folder / FILE_NAME
    return sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def manifest_time(folder: Path) -> int:
    """When a bundle was written, in seconds since 1970; 0 if there is no manifest."""
    try:
        return int((folder / FILE_NAME).stat().st_mtime)
    except OSError:
        return 0


def names_of(places: Sequence[str]) -> dict[str, Path]:
    """Names and folders of bundles, each NAME=BUNDLE or a bundle: a folder, or one on a model hub.

    A bundle without a name has that of its folder, or of its repository. Raises BadSetting if two names are
    equal, and what resolve_bundle raises.
    """
    folders: dict[str, Path] = {}
    for place in places:
        name, _, reference = place.rpartition("=")
        folder = Path(resolve_bundle(reference, command=True))
        if not name:
            is_pulled = folder != Path(reference)
            last = reference.removeprefix(PREFIX).partition("@")[0].rpartition("/")[2]
            name = last if is_pulled else folder.resolve().name
        if name in folders:
            raise BadSetting(
                f"{place}: the name {name!r} is taken by {folders[name]}; write NAME={reference}"
            )
        folders[name] = folder
    return folders
