"""The Python model of a Triton server that walks a bundle: requests in, labels, scores, exits and depths out.

ee-export-triton writes a model.py that calls TritonModel, and a configuration with the inputs and outputs
below. Rows of all requests that the server hands over together share one walk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import import_module
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from offramp.runtime.bundle.files import Bundle, open_bundle
from offramp.runtime.bundle.manifest import (
    CLASSIFICATION,
    EMBEDDING,
    MULTI_LABEL,
    REGRESSION,
    TOKENS,
    ImageInput,
    Manifest,
    Tensor,
)
from offramp.runtime.engines.base import Engine, State
from offramp.runtime.engines.triton import (
    WRITE_AGAIN,
    TritonEngine,
    TritonProblem,
    TritonRequest,
    TritonResponse,
    TritonState,
    TritonUtils,
)
from offramp.runtime.errors import (
    BadBundle,
    BadInput,
    BadSetting,
    EngineUnavailable,
    ItemError,
    OfframpError,
)
from offramp.runtime.inputs.text import AnyRow, Item, open_reader
from offramp.runtime.loading import ROW_SESSIONS
from offramp.runtime.row_session import RowAnswer, RowSession
from offramp.runtime.rules.base import Plan
from offramp.runtime.rules.resolve import bind_for_bundle, resolve_rule, segments_within
from offramp.runtime.walker import Trace, Walk

BUNDLE = "bundle"  # the folder with manifest and tokenizer, beside model.py
TEXT = "object"  # numpy's dtype of a tensor of texts, or of the bytes of files
MOVES_BETWEEN_VARIANTS = "quee"  # the rule that goes on in any precision of the bundle


@dataclass(frozen=True)
class TritonSettings:
    """How the model walks: parameters of its configuration, under the names of these fields.

    models: how the names of the models begin that are graphs. variants: the precisions that the server has,
    comma-separated. variant: that in which rows start. point: an operating point, "" for the bundle's own
    rule. long_texts: see load(). rows: most rows of a step.
    """

    models: str
    variants: str
    variant: str
    point: str
    long_texts: str
    rows: str

    @classmethod
    def read(cls, text: str) -> TritonSettings:
        """Read the settings from a configuration as JSON; raises BadSetting for those that are missing."""
        given = json.loads(text).get("parameters", {})
        names = [entry.name for entry in fields(cls)]
        if missing := [name for name in names if name not in given]:
            raise BadSetting(f"config.pbtxt: it has no parameter {missing[0]}; {WRITE_AGAIN}")
        settings = cls(**{name: given[name].get("string_value", "") for name in names})
        if not settings.rows.isdecimal() or not int(settings.rows):
            raise BadSetting(f"config.pbtxt: parameter rows is {settings.rows!r}, expected 1 or more")
        return settings

    def parameters(self) -> dict[str, str]:
        """The parameters of the configuration, by name."""
        return asdict(self)


def model_inputs(manifest: Manifest) -> tuple[tuple[Tensor, bool], ...]:
    """The inputs of the model, without the axis of rows, and whether a request may leave them out."""
    if isinstance(manifest.input, ImageInput):
        return ((Tensor("image", TEXT, (1,)), False),)
    text = (Tensor("text", TEXT, (1,)), False)
    is_single = manifest.kind in (TOKENS, EMBEDDING)
    return (text,) if is_single else (text, (Tensor("text_b", TEXT, (1,)), True))


def model_outputs(manifest: Manifest) -> tuple[Tensor, ...]:
    """The outputs of the model, without the axis of rows.

    answer: the JSON object of the answer, as ee-run writes it without times.
    """
    of_task = {
        CLASSIFICATION: (Tensor("label", TEXT, (1,)), Tensor("score", "float32", (1,))),
        MULTI_LABEL: (Tensor("scores", "float32", (len(manifest.labels),)),),
        REGRESSION: (Tensor("value", "float32", (1,)),),
        EMBEDDING: (Tensor("embedding", "float32", (manifest.answer_size,)),),
    }
    of_all = (Tensor("exit", "int32", (1,)), Tensor("depth", "int32", (1,)), Tensor("answer", TEXT, (1,)))
    return (*of_task.get(manifest.kind, ()), *of_all)


def fixed_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of an input or output of the model, of which each size is a number."""
    return tuple(size for size in tensor.shape if isinstance(size, int))


def check_variants(manifest: Manifest, rule: str, variant: str, offered: Sequence[str]) -> None:
    """Raise BadSetting unless the precisions that a server has are enough for a rule that starts in one."""
    needed = manifest.variants if rule == MOVES_BETWEEN_VARIANTS else (variant,)
    if missing := [name for name in needed if name not in offered]:
        raise BadSetting(
            f"rule {rule} walks {', '.join(needed)}, and the model repository has {', '.join(offered)}: "
            f"{WRITE_AGAIN} --variant {missing[0]}"
        )


@dataclass(eq=False)
class _Job:
    """A request under way. rows: of its items. rule, variant, segments: how they are walked.

    slots: its rows of the trace, windows included. problem: why it cannot be answered.
    """

    rows: list[AnyRow] = field(default_factory=list)
    rule: int = 0
    variant: int = 0
    segments: int | None = None
    slots: range = range(0)
    problem: Exception | None = None


class TritonModel:
    """What model.py of a Triton server calls: opens the bundle, and answers requests.

    utils: the module triton_python_backend_utils. arguments: those that the server gives to initialize().
    Raises the errors of load(), and BadSetting for a configuration that ee-export-triton did not write.
    """

    def __init__(self, utils: TritonUtils, arguments: Mapping[str, str]) -> None:
        self._utils = utils
        settings = TritonSettings.read(arguments["model_config"])
        bundle = open_bundle(Path(arguments["model_repository"]) / arguments["model_version"] / BUNDLE)
        self._variants, self._point = settings.variants.split(","), settings.point or None
        self._rows = int(settings.rows)
        self._session = _open_session(utils, bundle, settings, self._variants)
        self._inputs, self._outputs = model_inputs(bundle.manifest), model_outputs(bundle.manifest)

    def execute(self, requests: Sequence[TritonRequest]) -> list[TritonResponse]:
        """Answer requests, each with a response or an error of its own, in their order."""
        jobs = [self._read(request) for request in requests]
        good = [job for job in jobs if job.problem is None]
        answers: dict[_Job, list[RowAnswer]] = {}
        try:
            answers = self._walk(good)
        except Exception as problem:  # a mistake in a rule, say: the server must get its responses
            for job in good:
                job.problem = job.problem or problem
        return [self._respond(job, answers.get(job, [])) for job in jobs]

    def close(self) -> None:
        """Close the session."""
        self._session.close()

    def _read(self, request: TritonRequest) -> _Job:
        """A request's rows and how they are walked, or why it cannot be answered."""
        job = _Job()
        try:
            self._choose(job, request.parameters())
            for index, row in enumerate(self._session.read(self._items(request))):
                if isinstance(row, ItemError):
                    raise BadInput(f"item {index}: {row.message}")
                job.rows.append(row)
        except Exception as problem:
            job.problem = problem
        return job

    def _items(self, request: TritonRequest) -> list[Item]:
        """The texts, pairs of texts or images of a request."""
        given = {tensor.name(): tensor.as_numpy().reshape(-1).tolist() for tensor in request.inputs()}
        (first, *others) = [tensor.name for tensor, _ in self._inputs]
        if not given.get(first):
            raise BadInput(f"{first}: expected one or more of them")
        if first == "image":  # bytes alone: a text would be the path of a file
            return [value for value in given[first] if isinstance(value, bytes)]
        texts = _texts(first, given[first])
        if not others or others[0] not in given:
            return list(texts)
        seconds = _texts(others[0], given[others[0]])
        if len(seconds) != len(texts):
            raise BadInput(f"{others[0]}: {len(seconds)} texts, and {first} has {len(texts)}")
        return list(zip(texts, seconds, strict=True))

    def _choose(self, job: _Job, text: str) -> None:
        """Set how the rows of a request are walked; text: its parameters, of which others are ignored."""
        given = json.loads(text) if text else {}
        point, depth = given.get("point"), given.get("max_depth")
        manifest = self._session.manifest
        if point is None:
            rule = self._session.rule.name
            job.rule, job.variant = self._session.draw()
        else:
            if not isinstance(point, str):
                raise BadSetting(f"point: expected the name of an operating point, found {point!r:.60}")
            spec, variant = resolve_rule(manifest, point=point)
            check_variants(manifest, spec.name, variant, self._variants)
            rule = spec.name
            job.rule, job.variant = self._session.add_point(point)
        if depth is not None:
            if isinstance(depth, bool) or not isinstance(depth, int):
                raise BadSetting(f"max_depth: expected a whole number of blocks, found {depth!r:.60}")
            job.segments = segments_within(manifest, rule, depth)

    def _walk(self, jobs: Sequence[_Job]) -> dict[_Job, list[RowAnswer]]:
        """Walk the rows of all jobs, and return the answers of each that has no problem."""
        rows: list[AnyRow] = []
        for job in jobs:
            first = len(rows)
            rows += [part for row in job.rows for part in (row, *row.rest)]
            job.slots = range(first, len(rows))
        if not rows:
            return {}
        walk, trace = self._session.open_walk(len(rows), self._rows)
        with self._session.walking():
            self._run(walk, jobs, rows)
        return {job: self._finish(trace, job) for job in jobs if job.problem is None}

    def _run(self, walk: Walk[State], jobs: Sequence[_Job], rows: Sequence[AnyRow]) -> None:
        """Begin all rows, and run queues until none waits; an error is that of the jobs whose rows it has."""
        plans = np.concatenate([_plan(walk, job) for job in jobs])
        rules = np.repeat([job.rule for job in jobs], [len(job.slots) for job in jobs])
        for ids, inputs in self._session.batches(rows, self._rows):
            try:
                walk.begin(ids, inputs, plans=plans[ids], rules=rules[ids])
            except Exception as problem:
                _fail(walk, jobs, set(ids.tolist()), problem)
        # The earliest segment first, so that all rows that can join its queue have joined it.
        while (key := walk.first_queue()) is not None:
            before = set(walk.waiting().tolist())
            try:
                walk.run(key)
            except Exception as problem:
                if not (lost := before.difference(walk.waiting().tolist())):
                    raise
                _fail(walk, jobs, lost, problem)

    def _finish(self, trace: Trace, job: _Job) -> list[RowAnswer]:
        """The answers to the rows of a job, or none, and its problem set, if one of them has no answer."""
        answers, first = [], job.slots.start
        try:
            for row in job.rows:
                answers.append(self._session.finish(trace, first, row, job.rule))
                first += 1 + len(row.rest)
        except Exception as problem:  # BadInput: the network gives no number
            job.problem = problem
        return answers

    def _respond(self, job: _Job, answers: Sequence[RowAnswer]) -> TritonResponse:
        utils = self._utils
        if job.problem is not None:
            return utils.InferenceResponse(error=self._error(job.problem))
        tensors = []
        for tensor in self._outputs:
            values: NDArray[np.generic] = np.empty((len(answers), *fixed_shape(tensor)), tensor.dtype)
            for number, answer in enumerate(answers):
                values[number] = _value(answer, tensor.name)  # type: ignore[assignment]
            tensors.append(utils.Tensor(tensor.name, values))
        return utils.InferenceResponse(tensors)

    def _error(self, problem: Exception) -> TritonProblem:
        """The server's error for an exception."""
        codes = self._utils.TritonError
        if isinstance(problem, (BadInput, BadSetting)):
            return codes(str(problem), codes.INVALID_ARG)
        if isinstance(problem, EngineUnavailable):
            return codes(str(problem), codes.UNAVAILABLE)
        if isinstance(problem, OfframpError):
            return codes(str(problem), codes.INTERNAL)
        name = type(problem).__name__
        return codes(f"the rows could not be walked: {name}: {problem}", codes.INTERNAL)


def _open_session(
    utils: TritonUtils, bundle: Bundle, settings: TritonSettings, variants: Sequence[str]
) -> RowSession[RowAnswer]:
    """The session of the bundle's task on engine triton."""
    manifest = bundle.manifest
    if manifest.kind not in ROW_SESSIONS:
        raise BadBundle(f"{bundle.folder}: its task is {manifest.task}; this model answers row by row")
    spec, variant = resolve_rule(manifest, point=settings.point or None, variant=settings.variant)
    check_variants(manifest, spec.name, variant, variants)
    rule = bind_for_bundle(bundle, spec)
    engine: Engine[TritonState] = TritonEngine(utils, bundle, variant, variants, settings.models)
    kind = ROW_SESSIONS[manifest.kind]
    make = getattr(import_module(f"offramp.runtime.{kind.module}"), kind.name)
    reader = open_reader(bundle, settings.long_texts)
    session: RowSession[RowAnswer] = make(bundle, engine, reader, rule, variant, int(settings.rows))
    return session


def _texts(name: str, values: Sequence[object]) -> list[str]:
    """Texts from the bytes of a tensor; raises BadInput for what is not UTF-8."""
    texts = []
    for index, value in enumerate(values):
        try:
            texts.append(value.decode("utf-8") if isinstance(value, bytes) else str(value))
        except UnicodeDecodeError as problem:
            raise BadInput(f"item {index}: {name} is not UTF-8: {problem}") from None
    return texts


def _plan(walk: Walk[State], job: _Job) -> Plan:
    """The plans with which the rows of a job start [rows, segments]."""
    plan = walk.first_plan(job.rule, job.variant)
    if job.segments is not None:
        plan = plan.copy()
        plan[:, job.segments :] = -1
    return np.repeat(plan, len(job.slots), axis=0)


def _fail(walk: Walk[State], jobs: Sequence[_Job], lost: set[int], problem: Exception) -> None:
    """Give an error to the jobs of which rows were lost, and forget their other rows."""
    for job in jobs:
        if not lost.isdisjoint(job.slots):
            job.problem = job.problem or problem
            walk.drop(np.array(job.slots))


def _value(answer: RowAnswer, name: str) -> object:
    """The value of one output of the model for an answer."""
    if name == "answer":
        return json.dumps(_object(answer), ensure_ascii=False).encode("utf-8")
    if name == "scores":
        return list(getattr(answer, name).values())
    value: object = getattr(answer, name)
    return value.encode("utf-8") if isinstance(value, str) else value


def _object(answer: RowAnswer) -> dict[str, object]:
    """The JSON object of an answer."""
    value = answer.as_json() | {"exit": answer.exit, "depth": answer.depth}
    calibrated, labels = getattr(answer, "calibrated", None), getattr(answer, "label_set", None)
    if calibrated is not None and labels is not None:
        value |= {"calibrated": round(calibrated, 6), "set": list(labels)}
    if answer.windows > 1:
        value["windows"] = answer.windows
    return value | {"truncated": True} if answer.truncated else value
