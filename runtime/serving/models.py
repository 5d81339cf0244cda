"""The bundles that a server answers with: session, scheduler, and what a request may ask of each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import Any

from offramp.runtime.bundle.manifest import FILE_NAME, Manifest, OperatingPoint
from offramp.runtime.errors import BadSetting
from offramp.runtime.generator import TextGenerator
from offramp.runtime.hub.reference import PREFIX
from offramp.runtime.hub.resolve import resolve_bundle
from offramp.runtime.loading import load
from offramp.runtime.row_session import RowAnswer, RowSession
from offramp.runtime.rules.registry import RULES
from offramp.runtime.serving.generation import ServedGenerator
from offramp.runtime.serving.scheduler import QUEUE, RowOptions, Scheduler

Observer = Callable[[str, RowAnswer, float], None]  # name of the model, answer, seconds since it was asked


class UnknownModel(BadSetting):
    """A request names a model that the server does not have."""


@dataclass(frozen=True)
class Wanted:
    """What a request asks of the walk of its rows; None: the server's own setting.

    point: an operating point. max_risk: the cheapest point whose guarantee is at most this. max_depth: most
    blocks that are run.
    """

    point: str | None = None
    max_risk: float | None = None
    max_depth: int | None = None


@dataclass
class ServedModel:
    """A bundle that is open: its name in requests, session and scheduler."""

    name: str
    folder: Path
    session: RowSession[Any]
    scheduler: Scheduler[Any]
    tag: str  # what changes when the bundle does: the hash of its manifest

    def __post_init__(self) -> None:
        self._lock = threading.Lock()  # requests of several threads may ask for the same new point

    @property
    def manifest(self) -> Manifest:
        """The manifest of the bundle."""
        return self.session.manifest

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

    def options(self, wanted: Wanted) -> RowOptions:
        """How rows are walked of which this is asked.

        Raises BadSetting for points and limits that the bundle does not have.
        """
        if wanted.point is not None and wanted.max_risk is not None:
            raise BadSetting("point and max_risk: give one of them")
        point = wanted.point
        if wanted.max_risk is not None:
            point = cheapest_point(self.manifest, wanted.max_risk).name
        rule, variant = self.numbers(point)
        return RowOptions(rule, variant, self._segments(wanted.max_depth, point))

    def numbers(self, point: str | None, full_depth: str | None = None) -> tuple[int, int]:
        """The numbers of rule and variant of a point, or of every segment in a variant; see RowSession.

        Without both they are those of the server's own setting. Raises BadSetting for unknown names.
        """
        with self._lock:
            if full_depth is not None:
                return self.session.full_depth(full_depth)
            return self.session.draw() if point is None else self.session.add_point(point)

    def _segments(self, max_depth: int | None, point: str | None) -> int | None:
        """The number of segments whose blocks are at most max_depth."""
        if max_depth is None:
            return None
        rules = {entry.name: entry.rule.name for entry in self.manifest.points}
        rule = self.session.rule.name if point is None else rules[point]
        if RULES[rule].exits is None:
            raise BadSetting(
                f"max_depth: rule {rule} plans how deep a row goes by itself; name another point"
            )
        depths = list(accumulate(len(segment.blocks) for segment in self.manifest.segments))
        if max_depth < depths[0]:
            raise BadSetting(
                f"max_depth {max_depth}: the first exit of this bundle is after {depths[0]} blocks"
            )
        return sum(depth <= max_depth for depth in depths)

    def close(self, *, finish: bool = True) -> None:
        """Close the scheduler, which answers what it accepted if `finish`, and then the session."""
        self.scheduler.close(finish=finish)
        self.session.close()


def cheapest_point(manifest: Manifest, max_risk: float) -> OperatingPoint:
    """The point of least depth that guarantees a risk of at most this; raises BadSetting if there is none."""
    promised = [p for p in manifest.points if p.guarantee is not None and p.guarantee.limit <= max_risk]
    if not promised:
        limits = sorted({p.guarantee.limit for p in manifest.points if p.guarantee is not None})
        known = ", ".join(f"{limit:g}" for limit in limits) or "none"
        raise BadSetting(
            f"max_risk {max_risk:g}: the risks that points of this bundle guarantee: {known}; "
            "ee-calibrate --risk makes such points"
        )
    return min(promised, key=lambda point: point.measured.get("mean_exit", float(manifest.blocks)))


@dataclass
class Models:
    """All bundles of a server, by name; the first is the one of requests that name none.

    options: options of load() for every bundle. scheduling: keyword arguments of Scheduler. observe: told of
    every answer.
    """

    folders: Mapping[str, Path]
    options: Mapping[str, Any] = field(default_factory=dict)
    scheduling: Mapping[str, int] = field(default_factory=dict)
    observe: Observer | None = None

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
        raise BadSetting(f"model {model.name}: its task is {model.manifest.task}; ask /v1/classify")

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
                return ServedGenerator(name, folder, session, self.scheduling.get("queue", QUEUE), tag)
            observe = None if self.observe is None else partial(self.observe, name)
            return ServedModel(
                name, folder, session, Scheduler(session, observe=observe, **self.scheduling), tag
            )
        except BaseException:
            session.close()
            raise


def manifest_tag(folder: Path) -> str:
    """The hash of a bundle's manifest, which names the hashes of all its files; "" if there is none."""
    file = folder / FILE_NAME
    return sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


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
