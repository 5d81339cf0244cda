"""A session: a bundle opened on an engine, ready to answer."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from offramp.runtime import rules
from offramp.runtime.bundle import Bundle, open_bundle
from offramp.runtime.engines import Engine, open_engine
from offramp.runtime.errors import BadInput, BadSetting, SessionClosed
from offramp.runtime.inputs import Encoder, Item, Row
from offramp.runtime.manifest import Manifest, RuleSpec
from offramp.runtime.walker import Inputs, Trace, walk

WINDOW = 8  # batches that map reads ahead, to sort rows by length


@dataclass(frozen=True)
class Answer:
    """What a walk found.

    score: probability (0..1) of the label at the exit where the row left. exit: that exit, 1-based. depth:
    blocks run.
    steps: (1-based segment, variant) of each step. signals: for each step, the probability that its exit gave
    to the final label, and P(exit) of its policy or None. seconds: wall time from the start of the row's stem
    until it left, waiting for the rows beside it included, tokenizing not. truncated: the text was longer
    than the network can read.
    """

    label: str
    score: float
    exit: int
    depth: int
    steps: tuple[tuple[int, str], ...]
    signals: tuple[tuple[float, float | None], ...]
    seconds: float
    truncated: bool = False


class Session:
    """Answers texts; made by load(). Any thread may call it: walks take turns behind one lock.

    engine: what really runs (name, device, facts). rule: the spec that decides. variant: the precision in
    which rows start.
    """

    def __init__(
        self, bundle: Bundle, engine: Engine, encoder: Encoder, rule: RuleSpec, variant: str, batch_size: int
    ) -> None:
        self.manifest: Manifest = bundle.manifest
        self.engine = engine
        self.rule = rule
        self.variant = variant
        self.batch_size = batch_size
        self._encode = encoder
        self._lock = threading.Lock()
        self._closed = False
        self._rule = rules.bind(rule, len(self.manifest.segments))
        self._number = self.manifest.variants.index(variant)
        self._depths = np.array([len(segment.blocks) for segment in self.manifest.segments])

    def __call__(self, text: str, text_b: str | None = None) -> Answer:
        """Answer one text (or pair); raises BadInput for what is not text, SessionClosed after close()."""
        rows = self._encode([text if text_b is None else (text, text_b)])
        return self._walk(rows, 1)[0]

    def map(self, items: Iterable[Item], batch_size: int | None = None) -> Iterator[Answer]:
        """Answers in the order of `items` (texts or pairs of texts), read and answered as they are asked for.

        Reads 8 batches ahead and holds no more, so that a million items need the memory of a few hundred;
        batch_size 1 reads one item, answers it, and only then reads the next. An item that is no text raises
        BadInput after the answers before it.
        """
        size = self.batch_size if batch_size is None else _batch_size(batch_size)
        source = iter(items)
        window = size * WINDOW if size > 1 else 1
        return self._map(source, size, window)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels, in the order of the logits."""
        return self.manifest.labels

    def encode(self, text: str, text_b: str | None = None) -> Inputs:
        """The stem's inputs for one text (or pair), int64 [1, seq]: what a call would run on."""
        return self._encode.arrays(self._encode([text if text_b is None else (text, text_b)]))

    def close(self) -> None:
        """Free the engine; calling twice is fine."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self.engine.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _map(self, source: Iterator[Item], size: int, window: int) -> Iterator[Answer]:
        done = 0
        while chunk := list(islice(source, window)):
            try:
                rows, problem = self._encode(chunk), None
            except BadInput:
                # One item is no text: find it, answer those before it, and name it by its place in the whole.
                rows, problem = self._good(chunk, done)
            yield from self._walk(rows, size)
            if problem is not None:
                raise problem
            done += len(chunk)

    def _good(self, chunk: Sequence[Item], done: int) -> tuple[list[Row], BadInput | None]:
        rows: list[Row] = []
        for at, item in enumerate(chunk):
            try:
                rows += self._encode([item])
            except BadInput as problem:
                return rows, BadInput(str(problem).replace("item 0", f"item {done + at}", 1))
        return rows, None

    def _walk(self, rows: Sequence[Row], size: int) -> list[Answer]:
        if not rows:
            return []
        with self._lock:
            if self._closed:
                raise SessionClosed("the session is closed; load() another")
            trace = walk(
                self.engine,
                self._rule,
                self._batches(rows, size),
                rows=len(rows),
                segments=len(self.manifest.segments),
                classes=len(self.manifest.labels),
                variant=self._number,
                limit=size,
            )
        return [self._answer(trace, at, row.truncated) for at, row in enumerate(rows)]

    def _batches(self, rows: Sequence[Row], size: int) -> Iterator[tuple[NDArray[np.int64], Inputs]]:
        """Rows of like length together, the shortest first."""
        order = np.argsort([len(row.ids) for row in rows], kind="stable")
        for start in range(0, len(rows), size):
            ids = order[start : start + size]
            yield ids, self._encode.arrays([rows[at] for at in ids])

    def _answer(self, trace: Trace, at: int, truncated: bool) -> Answer:
        ran = np.flatnonzero(trace.variants[at] >= 0)
        probabilities = rules.softmax(trace.logits[at, ran])  # [steps, classes]
        label = int(probabilities[-1].argmax())
        column = probabilities[:, label].tolist()
        gates = trace.gates[at, ran].tolist()
        segments = ran.tolist()
        names = self.manifest.variants
        return Answer(
            label=self.manifest.labels[label],
            score=column[-1],
            exit=segments[-1] + 1,
            depth=int(self._depths[ran].sum()),
            steps=tuple(
                (s + 1, names[v]) for s, v in zip(segments, trace.variants[at, ran].tolist(), strict=True)
            ),
            signals=tuple((p, None if math.isnan(g) else g) for p, g in zip(column, gates, strict=True)),
            seconds=float(trace.seconds[at]),
            truncated=truncated,
        )


def load(
    path: str | PathLike[str] = "bundle/",
    *,
    engine: str = "ort",
    device: str = "cpu",
    variant: str | None = None,
    threads: int | None = None,
    global_pool: bool = True,
    rule: str | RuleSpec | None = None,
    threshold: float | None = None,
    point: str | None = None,
    batch_size: int = 32,
) -> Session:
    """Open a bundle folder as a session; what is not wished for is as the bundle's manifest says.

    rule: a rule's name or a RuleSpec. threshold: the rule's one number (rule fixed: the exit; patience: the
    streak). point: an operating point of the manifest, which sets rule and variant. threads: None is one a
    core.
    global_pool: run all segments on one pool of the whole process, the fastest; from then on ONNX Runtime
    opens no session of the application that does not set use_per_session_threads = False. With False (or
    threads=1) the process is left alone, for a few per cent.
    Raises BundleNotFound, BadBundle, EngineUnavailable, and BadSetting for wishes unknown or
    contradicting each other.
    """
    size = _batch_size(batch_size)
    bundle = open_bundle(path)
    spec, variant = choose(bundle.manifest, rule=rule, threshold=threshold, point=point, variant=variant)
    # A bad wish is named before seconds go into opening graphs.
    rules.bind(spec, len(bundle.manifest.segments))
    encoder = Encoder(bundle)
    opened = open_engine(
        engine, bundle, device=device, variant=variant, threads=threads, global_pool=global_pool
    )
    return Session(bundle, opened, encoder, spec, variant, size)


def choose(
    manifest: Manifest,
    *,
    rule: str | RuleSpec | None,
    threshold: float | None,
    point: str | None,
    variant: str | None,
) -> tuple[RuleSpec, str]:
    """The rule and variant that wishes and manifest come to; BadSetting names a contradiction."""
    if variant is not None and variant not in manifest.variants:
        raise BadSetting(
            f"variant {variant!r} is not in this bundle; it offers: {', '.join(manifest.variants)}"
        )
    if point is not None:
        if rule is not None or threshold is not None:
            raise BadSetting(f"point {point!r} sets the rule and its threshold: wish for either, not both")
        found = next((known for known in manifest.points if known.name == point), None)
        if found is None:
            known = ", ".join(p.name for p in manifest.points) or "none at all"
            raise BadSetting(f"operating point {point!r} is not in this bundle; it has: {known}")
        if variant not in (None, found.variant):
            raise BadSetting(
                f"point {point!r} was measured in variant {found.variant}, not {variant}: wish for either"
            )
        return _with_policies(manifest, found.rule), found.variant
    if isinstance(rule, RuleSpec):
        spec = rule
    elif rule is None or rule == manifest.rule.name:
        spec = manifest.rule
    else:
        # A gate is a probability, so one half is its natural threshold; of the others, none is.
        spec = RuleSpec(rule, {"threshold": 0.5} if rule == "gate" else {})
    if threshold is not None:
        parameter = rules.main_parameter(spec.name)
        if parameter is None:
            raise BadSetting(f"rule {spec.name} has no threshold")
        spec = RuleSpec(spec.name, {**spec.parameters, parameter: float(threshold)})
    return _with_policies(manifest, spec), variant or manifest.variants[0]


def _with_policies(manifest: Manifest, spec: RuleSpec) -> RuleSpec:
    """The spec, unless it asks for a gate that the bundle does not have."""
    for segment in manifest.segments[:-1]:
        outputs = [tensor.name for tensor in next(iter(segment.variants.values())).outputs]
        if spec.name == "gate" and "gate" not in outputs:
            others = ", ".join(name for name in rules.KNOWN if name != "gate")
            raise BadSetting(
                f"rule gate: {segment.name} has no policy in this bundle; choose one of: {others}"
            )
    return spec


def _batch_size(size: int) -> int:
    if size < 1:
        raise BadSetting(f"batch size {size}: expected 1 or more")
    return size
