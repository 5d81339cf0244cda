"""Baselines of a walk: single graphs, exits drawn at random, and the start of a new process.

A folder of single graphs is checked as strictly as a bundle: baselines.json field by field, every graph's
size and sha256. The same bytes that were checked are opened, on the thread pool and arena of the walk.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import numpy as np

from offramp.runtime import rules
from offramp.runtime.bundle.graph_checks import check_graph
from offramp.runtime.bundle.manifest import (
    CLASSIFICATION,
    EMBEDDING,
    MULTI_LABEL,
    REGRESSION,
    TOKENS,
    Manifest,
    RuleSpec,
)
from offramp.runtime.bundle.strict_json import build_value, parse_json
from offramp.runtime.engines import threads as pools
from offramp.runtime.errors import BadBundle, BundleNotFound, EngineUnavailable
from offramp.runtime.tuning.figures import round_figure
from offramp.runtime.tuning.right_answers import AnswerReader
from offramp.runtime.tuning.timing import AnswersAndExits, Batches, Candidate, take_turns

FORMAT = 1
FILE_NAME = "baselines.json"
MONOLITH, NESTED, TRUNCATED = KINDS = ("monolith", "nested", "truncated")
CURE = "write the folder again with ee-split --baselines DIR"


@dataclass(frozen=True)
class GraphFact:
    """The entry of one graph in baselines.json; exit: number of the exit (1-based) whose answers it gives."""

    name: str
    kind: str
    variant: str
    file: str
    exit: int
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Baselines:
    """The content of baselines.json, format 1.

    labels: in the order of the logits; empty for tasks without. graphs: in the order of the table.
    """

    format: int
    labels: tuple[str, ...]
    graphs: tuple[GraphFact, ...]


def read_baselines(folder: Path, manifest: Manifest) -> Baselines:
    """Read baselines.json and check that it fits the bundle with which its graphs are compared.

    Raises BundleNotFound if the folder or the file is missing, BadBundle naming the field.
    """
    path = folder / FILE_NAME
    try:
        text = path.read_bytes().decode("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise BundleNotFound(f"{path}: no such file; {CURE}") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise BadBundle(f"{path}: cannot be read: {problem}; {CURE}") from problem
    try:
        value = parse_json(text)
        if isinstance(value, dict) and value.get("format", FORMAT) != FORMAT:
            raise ValueError(f"format: {value['format']!r} is not known; this version reads format {FORMAT}")
        baselines: Baselines = build_value(Baselines, value, "baselines")
        _check_fields(baselines, manifest)
    except ValueError as problem:
        raise BadBundle(f"{path}: {problem}; {CURE}") from problem
    return baselines


def open_baseline(
    folder: Path, fact: GraphFact, manifest: Manifest, *, threads: int | None, threshold: float | None
) -> Candidate:
    """Open one single graph as a candidate, on the thread pool and arena of the walks.

    The walks must be open with the same number of threads. threshold: the value with which a nested graph
    compares its gates. Raises BadBundle if the file is not as baselines.json describes it, BundleNotFound if
    it is missing.
    """
    path, ort = folder / fact.file, import_module("onnxruntime")
    options = ort.SessionOptions()
    pools.apply_pool(pools.claim_pool(ort, threads, True), options)
    if hasattr(ort, "create_and_register_allocator"):
        options.add_session_config_entry("session.use_env_allocators", "1")
    options.log_severity_level = 3
    data = _read_verified(path, fact)
    check_graph(data, str(path), branches=fact.kind == NESTED)
    try:
        session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as problem:  # ORT's error types have no common base of their own
        raise BadBundle(f"{path}: ONNX Runtime cannot open it: {problem}; {CURE}") from problem
    nested = fact.kind == NESTED
    inputs = {entry.name for entry in session.get_inputs()}
    stem_inputs = [tensor.name for tensor in manifest.stem.first_graph.inputs]
    known = {*stem_inputs, *({"threshold"} if nested else ())}
    reader = AnswerReader(manifest)
    outputs = [reader.output, "exit"] if nested else [reader.output]
    if not inputs <= known or stem_inputs[0] not in inputs or (nested and "threshold" not in inputs):
        raise BadBundle(f"{path}: inputs {sorted(inputs)}, expected some of {sorted(known)}; {CURE}")
    shapes = {entry.name: entry.shape for entry in session.get_outputs()}
    if not set(outputs) <= set(shapes):
        raise BadBundle(f"{path}: outputs {sorted(shapes)}, expected {outputs}; {CURE}")
    sizes, expected = shapes[reader.output][-1:], manifest.answer_size or manifest.classes
    if isinstance(next(iter(sizes), None), int) and sizes != [expected]:
        raise BadBundle(f"{path}: {sizes[0]} numbers of {reader.output}, the bundle has {expected}; {CURE}")
    constant = {"threshold": np.array(threshold, np.float32)} if nested else {}
    row_inputs = inputs - {"threshold"}

    def run(batches: Batches, rows: int, limit: int) -> Callable[[], AnswersAndExits]:
        try:
            results = [
                (ids, session.run(outputs, {name: arrays[name] for name in row_inputs} | constant))
                for ids, arrays in batches
            ]
        except Exception as problem:  # as above
            raise BadBundle(f"{path}: ONNX Runtime cannot run it: {problem}; {CURE}") from problem

        def read() -> AnswersAndExits:
            row_outputs, exits = [np.zeros(0)] * rows, np.full(rows, fact.exit, np.int64)
            for ids, arrays in results:
                for row, output in zip(ids.tolist(), arrays[0], strict=True):
                    row_outputs[row] = output
                if nested:
                    exits[ids] = arrays[1]
            return reader.decide(row_outputs, reader.places(batches, rows)), exits

        return read

    return Candidate(fact.name, fact.kind, fact.variant, fact.bytes, run, bulk=not nested)


def nested_threshold(manifest: Manifest, rule: RuleSpec | None) -> float | None:
    """The threshold with which a nested graph makes the decisions of a rule, or None if there is none.

    A nested graph reads probabilities of the logits as they are, so that there is none for a rule that reads
    them at temperatures.
    """
    outputs = manifest.segments[0].first_graph.outputs
    signal = "gate" if any(tensor.name == "gate" for tensor in outputs) else "max_probability"
    if rule is None or rule.name != signal or (rule.temperatures and signal != "gate"):
        return None
    return rule.parameters["threshold"]


def random_exits(histogram: Sequence[float], seed: int = 0) -> rules.ExitRule:
    """Create a rule that exits at random; histogram: expected number of rows at each exit.

    The probability at an exit is the share, among the rows that reach it, of those that leave there.
    """
    reached = np.cumsum(np.asarray(histogram, float)[::-1])[::-1]
    hazards = (np.asarray(histogram, float) / np.maximum(reached, 1e-12)).tolist()
    draw = np.random.default_rng(seed).random

    def exits(
        signals: rules.Signals, memory: rules.Floats, segment: int
    ) -> tuple[rules.Bools | bool, rules.Floats]:
        if len(signals.logits) == 1:
            return draw() < hazards[segment], memory
        return draw(len(signals.logits)) < hazards[segment], memory

    return rules.ExitRule(RuleSpec("random", {}), exits, 0)


# On Linux a child's ru_maxrss includes the parent's resident memory; VmHWM is that of the child alone.
_PEAK = """
try:
    peak = 1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
except (OSError, IndexError):
    try:
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    except ImportError:
        peak = 0
print(peak)
"""
# Expressions of the answer that a script prints, by kind of task: of a session, and of a graph whose output
# for the text is `output`.
_WALK_ANSWERS = {
    CLASSIFICATION: "answer.label",
    MULTI_LABEL: "sorted(answer.labels)",
    TOKENS: "[token.label for token in answer.tokens]",
    REGRESSION: "round(answer.value, 3)",
    EMBEDDING: "len(answer.embedding)",
}
_GRAPH_ANSWERS = {
    CLASSIFICATION: "labels[int(output.argmax())]",
    MULTI_LABEL: "sorted(name for name, logit, threshold in zip(labels, output, thresholds) "
    "if 1 / (1 + numpy.exp(-logit)) >= threshold)",
    TOKENS: "[labels[number] for number, start in zip(output.argmax(-1), starts) if start]",
    REGRESSION: "round(float(output[0]), 3)",
    EMBEDDING: "len(output)",
}
_WALK_SCRIPT = """
import json, sys
bundle, rule, options, item = json.loads(sys.argv[1])
from offramp.runtime import RuleSpec, load
rule = RuleSpec(**{{key: tuple(value) if isinstance(value, list) else value for key, value in rule.items()}})
answer = load(bundle, rule=rule, **options)(*item)
print(ascii({answer}), flush=True)
"""
_GRAPH_SCRIPT = """
import json, sys
file, tokenizer, longest, prefix, labels, thresholds, threads, item = json.loads(sys.argv[1])
import numpy, onnxruntime
from tokenizers import Tokenizer
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = threads
graph = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
tokenizer = Tokenizer.from_file(tokenizer)
tokenizer.no_padding()
tokenizer.enable_truncation(longest)
encoding = tokenizer.encode(prefix + item[0], *item[1:])
words = [
    None if end <= len(prefix) else word
    for word, (_, end) in zip(encoding.word_ids, encoding.offsets)
]
starts = [int(word is not None and word != before) for before, word in zip([None, *words], words)]
ids = {{
    "input_ids": encoding.ids,
    "attention_mask": encoding.attention_mask,
    "token_type_ids": encoding.type_ids,
    "word_starts": starts,
}}
inputs = {{entry.name: numpy.array([ids[entry.name]], numpy.int64) for entry in graph.get_inputs()}}
output = graph.run(["{output}"], inputs)[0][0]
print(ascii({answer}), flush=True)
"""


def walk_script(kind: str) -> str:
    """The script of a walk that answers one item; arguments: those of walk_arguments."""
    return _WALK_SCRIPT.format(answer=_WALK_ANSWERS[kind])


def graph_script(manifest: Manifest) -> str:
    """The script of a single graph that answers one text.

    Arguments: the graph, tokenizer, longest and prefix of the bundle, labels, thresholds, threads, parts of
    the item.
    """
    return _GRAPH_SCRIPT.format(output=AnswerReader(manifest).output, answer=_GRAPH_ANSWERS[manifest.kind])


def time_cold_start(script: str, arguments: Sequence[Any]) -> tuple[str, float, int]:
    """Run a script that answers one text in a new process; gives answer, seconds to it, peak resident bytes.

    The peak is 0 if the system does not report it. Raises EngineUnavailable with the last line of the
    process's standard error if it gives no answer.
    """
    command = [sys.executable, "-c", script + _PEAK, json.dumps(arguments)]
    with tempfile.TemporaryFile() as errors:  # a file and no pipe, which would fill up: it is read at the end
        started = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as process:
            assert process.stdout is not None
            answer = process.stdout.readline()
            seconds = time.perf_counter() - started
            rest = process.stdout.read()
        if process.returncode or not answer:
            errors.seek(0)
            last = errors.read().decode(errors="replace").strip().rpartition("\n")[2]
            raise EngineUnavailable(f"a fresh process could not answer (exit {process.returncode}): {last}")
    return answer.decode("ascii").strip(), seconds, int(rest)


def walk_arguments(bundle: Path, walk: Candidate, threads: int | None, item: Sequence[str]) -> list[Any]:
    """The arguments of walk_script: bundle, the walk's whole rule, options of load(), parts of the item.

    With these options load() opens the same walk lazily, for a first answer in the least time.
    """
    assert walk.rule is not None
    options = {"variant": walk.variant, "threads": threads, "lazy": True, "global_pool": True}
    return [str(bundle), asdict(walk.rule), options, list(item)]


def time_cold_starts(scripts: Mapping[str, tuple[str, list[Any]]], starts: int) -> list[dict[str, Any]]:
    """Time the starts of new processes that take turns; gives for each script medians, and every start's
    time.

    scripts: (script, arguments) by name. starts: processes of each.
    """
    runs: dict[str, list[tuple[float, int]]] = {name: [] for name in scripts}
    calls = {name: partial(time_cold_start, *script) for name, script in scripts.items()}
    with click.progressbar(length=starts * len(scripts), label="cold start", file=sys.stderr) as bar:
        for name, _, (_, seconds, peak) in take_turns(calls, starts):
            runs[name].append((seconds, peak))
            bar.update(1)
    figures = []
    for name, measured in runs.items():
        each, peaks = [round_figure(seconds) for seconds, _ in measured], [peak for _, peak in measured]
        facts = {"name": name, "seconds": round_figure(float(np.median(each))), "each_seconds": each}
        figures.append(facts | {"peak_bytes": int(np.median(peaks))})
    return figures


def _check_fields(baselines: Baselines, manifest: Manifest) -> None:
    if baselines.labels != manifest.labels:
        raise ValueError(
            f"baselines.labels: {list(baselines.labels)}, the bundle has {list(manifest.labels)}"
        )
    if not baselines.graphs:
        raise ValueError("baselines.graphs: empty")
    names: set[str] = set()
    for number, graph in enumerate(baselines.graphs):
        where, last = f"baselines.graphs[{number}]", len(manifest.segments)
        if graph.kind not in KINDS:
            raise ValueError(f"{where}.kind: {graph.kind!r} is not one of {', '.join(KINDS)}")
        if not graph.name or graph.name in names:
            raise ValueError(f"{where}.name: {graph.name!r} is empty or there twice")
        if graph.file in ("", ".", "..") or set("/\\:\0") & set(graph.file):
            raise ValueError(f"{where}.file: {graph.file!r} is not a plain file name")
        if not 1 <= graph.exit <= last or (graph.kind != TRUNCATED and graph.exit != last):
            raise ValueError(f"{where}.exit: {graph.exit}, the bundle's exits are 1 to {last}")
        if len(graph.sha256) != 64 or set(graph.sha256) - set("0123456789abcdef"):
            raise ValueError(f"{where}.sha256: expected 64 lower-case hex digits, found {graph.sha256!r:.70}")
        if graph.bytes < 1:
            raise ValueError(f"{where}.bytes: {graph.bytes}, expected 1 or more")
        names.add(graph.name)


def _read_verified(path: Path, fact: GraphFact) -> bytes:
    """Read the bytes of a graph and compare their size and sha256 with baselines.json."""
    if not os.path.lexists(path):
        raise BundleNotFound(f"{path}: missing; {CURE}")
    if path.is_symlink() or not path.is_file():  # a link could lead out of the folder, a pipe could block
        raise BadBundle(f"{path}: not a regular file of the folder itself; {CURE}")
    try:
        with path.open("rb") as file:
            data = file.read(fact.bytes + 1)
    except OSError as problem:
        raise BadBundle(f"{path}: cannot be read: {problem}") from problem
    if len(data) != fact.bytes or hashlib.sha256(data).hexdigest() != fact.sha256:
        raise BadBundle(f"{path}: size or sha256 is not what {FILE_NAME} says; {CURE}")
    return data
