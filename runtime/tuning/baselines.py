"""What a walk is measured against: single graphs, exits drawn by chance, and the start of a fresh process.

A folder of single graphs is read as strictly as a bundle: rivals.json field by field, every graph held to its
size and sha256, and the very bytes that were checked are opened, on the walk's own thread pool and arena.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import numpy as np

from offramp.runtime import rules
from offramp.runtime.bundle.manifest import Manifest, RuleSpec
from offramp.runtime.bundle.strict_json import build, parse
from offramp.runtime.engines import threads as pools
from offramp.runtime.errors import BadBundle, BundleNotFound, EngineUnavailable
from offramp.runtime.rules import Floats, Signals
from offramp.runtime.tuning.timing import Batches, Contender, Found, Ids, short

FORMAT = 1
FILE_NAME = "rivals.json"
MONOLITH, NESTED, TRUNCATED = KINDS = ("monolith", "nested", "truncated")
CURE = "write the folder again with ee-split --rivals DIR"


@dataclass(frozen=True)
class GraphFact:
    """One graph of rivals.json. exit: 1-based number of the exit whose logits come out."""

    name: str
    kind: str
    variant: str
    file: str
    exit: int
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Rivals:
    """rivals.json (format 1): labels in the order of the logits, graphs in the order of the table."""

    format: int
    labels: tuple[str, ...]
    graphs: tuple[GraphFact, ...]


def read_rivals(folder: Path, manifest: Manifest) -> Rivals:
    """Read and check rivals.json against the bundle that the graphs are to be rivals of.

    Raises BundleNotFound where the folder or the file is missing, BadBundle naming the field.
    """
    path = folder / FILE_NAME
    try:
        text = path.read_bytes().decode("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise BundleNotFound(f"{path}: no such file; {CURE}") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise BadBundle(f"{path}: cannot be read: {problem}; {CURE}") from problem
    try:
        value = parse(text)
        if isinstance(value, dict) and value.get("format", FORMAT) != FORMAT:
            raise ValueError(f"format: {value['format']!r} is not known; this version reads format {FORMAT}")
        rivals: Rivals = build(Rivals, value, "rivals")
        _check(rivals, manifest)
    except ValueError as problem:
        raise BadBundle(f"{path}: {problem}; {CURE}") from problem
    return rivals


def open_rival(
    folder: Path, fact: GraphFact, manifest: Manifest, *, threads: int | None, threshold: float | None
) -> Contender:
    """Open one graph on the pool and arena of the walks: they must have been opened first, with the same
    threads. threshold: what a nested graph compares its gates with.

    Raises BadBundle where the file is not what rivals.json says, BundleNotFound where it is missing.
    """
    path, ort = folder / fact.file, import_module("onnxruntime")
    options = ort.SessionOptions()
    pools.apply(pools.claim(ort, threads, True), options)
    if hasattr(ort, "create_and_register_allocator"):
        options.add_session_config_entry("session.use_env_allocators", "1")
    options.log_severity_level = 3
    data = _verified(path, fact)
    try:
        session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as problem:  # ORT's error types share no base of their own
        raise BadBundle(f"{path}: ONNX Runtime cannot open it: {problem}; {CURE}") from problem
    nested = fact.kind == NESTED
    names = {entry.name for entry in session.get_inputs()}
    stem = [tensor.name for tensor in next(iter(manifest.stem.variants.values())).inputs]
    known = {*stem, *({"threshold"} if nested else ())}
    wanted = ["logits", "exit"] if nested else ["logits"]
    if not names <= known or stem[0] not in names or (nested and "threshold" not in names):
        raise BadBundle(f"{path}: inputs {sorted(names)}, expected some of {sorted(known)}; {CURE}")
    outputs = {entry.name: entry.shape for entry in session.get_outputs()}
    if not set(wanted) <= set(outputs):
        raise BadBundle(f"{path}: outputs {sorted(outputs)}, expected {wanted}; {CURE}")
    classes = outputs["logits"][-1:]
    if isinstance(next(iter(classes), None), int) and classes != [len(manifest.labels)]:
        raise BadBundle(f"{path}: {classes[0]} logits for {len(manifest.labels)} labels; {CURE}")
    constant = {"threshold": np.array(threshold, np.float32)} if nested else {}
    fed = names - {"threshold"}

    def run(batches: Batches, rows: int, limit: int) -> list[tuple[Ids, list[Any]]]:
        try:
            return [
                (ids, session.run(wanted, {name: inputs[name] for name in fed} | constant))
                for ids, inputs in batches
            ]
        except Exception as problem:  # as above
            raise BadBundle(f"{path}: ONNX Runtime cannot run it: {problem}; {CURE}") from problem

    def read(raw: list[tuple[Ids, list[Any]]]) -> Found:
        rows = sum(len(ids) for ids, _ in raw)
        labels, exits = np.zeros(rows, np.int64), np.full(rows, fact.exit, np.int64)
        for ids, said in raw:
            labels[ids] = said[0].argmax(axis=-1)
            if nested:
                exits[ids] = said[1]
        return labels, exits

    return Contender(fact.name, fact.kind, fact.variant, fact.bytes, run, read, bulk=not nested)


def nested_threshold(manifest: Manifest, rule: RuleSpec | None) -> float | None:
    """What a nested graph compares with to decide as the rule does; None where it cannot."""
    outputs = next(iter(manifest.segments[0].variants.values())).outputs
    wanted = "gate" if any(tensor.name == "gate" for tensor in outputs) else "max_probability"
    return rule.parameters["threshold"] if rule is not None and rule.name == wanted else None


def by_chance(histogram: Sequence[float], seed: int = 0) -> rules.ExitRule:
    """A rule that leaves at exits drawn at random; histogram: rows wished for at each exit.

    Each exit lets go the share of those who reach it that makes the whole come out as the histogram.
    """
    reached = np.cumsum(np.asarray(histogram, float)[::-1])[::-1]
    hazards = (np.asarray(histogram, float) / np.maximum(reached, 1e-12)).tolist()
    draw = np.random.default_rng(seed).random

    def leave(signals: Signals, memory: Floats, segment: int) -> tuple[rules.Bools | bool, Floats]:
        if len(signals.logits) == 1:
            return draw() < hazards[segment], memory
        return draw(len(signals.logits)) < hazards[segment], memory

    return rules.ExitRule(RuleSpec("random", {}), leave, 0)


# Linux carries the parent's resident memory over into a child's ru_maxrss; VmHWM is the child's own.
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
WALK_SCRIPT = """
import json, sys
bundle, wishes, item = json.loads(sys.argv[1])
from offramp.runtime import load
session = load(bundle, **wishes)
print(ascii(session(*item).label), flush=True)
"""
GRAPH_SCRIPT = """
import json, sys
file, tokenizer, longest, prefix, labels, threads, item = json.loads(sys.argv[1])
import numpy, onnxruntime
from tokenizers import Tokenizer
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = threads
graph = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
tokenizer = Tokenizer.from_file(tokenizer)
tokenizer.no_padding()
tokenizer.enable_truncation(longest)
found = tokenizer.encode(prefix + item[0], *item[1:])
made = {"input_ids": found.ids, "attention_mask": found.attention_mask, "token_type_ids": found.type_ids}
feed = {entry.name: numpy.array([made[entry.name]], numpy.int64) for entry in graph.get_inputs()}
print(ascii(labels[int(graph.run(["logits"], feed)[0][0].argmax())]), flush=True)
"""


def cold_start(script: str, arguments: Sequence[Any]) -> tuple[str, float, int]:
    """Answer one text in a fresh process: the answer, seconds from its start to the answer, peak bytes
    resident (0 where the system does not say).

    EngineUnavailable with the process's last words where it gives no answer.
    """
    command = [sys.executable, "-c", script + _PEAK, json.dumps(arguments)]
    with tempfile.TemporaryFile() as words:  # a file and no pipe: nobody reads it while the process runs
        started = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=words) as process:
            assert process.stdout is not None
            answer = process.stdout.readline()
            seconds = time.perf_counter() - started
            rest = process.stdout.read()
        if process.returncode or not answer:
            words.seek(0)
            last = words.read().decode(errors="replace").strip().rpartition("\n")[2]
            raise EngineUnavailable(f"a fresh process could not answer (exit {process.returncode}): {last}")
    return answer.decode("ascii").strip(), seconds, int(rest)


def wishes_of(walk: Contender, threads: int | None) -> dict[str, Any]:
    """Keyword arguments with which load() opens the same walk, for one answer as soon as may be."""
    assert walk.rule is not None
    value = walk.rule.parameters.get(rules.main_parameter(walk.rule.name) or "")
    wishes = {"rule": walk.rule.name, "variant": walk.variant, "threads": threads, "lazy": True}
    return wishes | ({} if value is None else {"threshold": value})


def cold_starts(scripts: Mapping[str, tuple[str, list[Any]]], starts: int) -> list[dict[str, Any]]:
    """Fresh processes in turn: seconds from start to answer and peak bytes resident, medians and each."""
    seen: dict[str, list[tuple[float, int]]] = {name: [] for name in scripts}
    with click.progressbar(length=starts * len(scripts), label="cold start", file=sys.stderr) as bar:
        for _ in range(starts):
            for name, (script, arguments) in scripts.items():
                seen[name].append(cold_start(script, arguments)[1:])
                bar.update(1)
    found = []
    for name, runs in seen.items():
        seconds, peaks = [short(one) for one, _ in runs], [peak for _, peak in runs]
        facts = {"name": name, "seconds": short(float(np.median(seconds))), "each_seconds": seconds}
        found.append(facts | {"peak_bytes": int(np.median(peaks))})
    return found


def _check(rivals: Rivals, manifest: Manifest) -> None:
    if rivals.labels != manifest.labels:
        raise ValueError(f"rivals.labels: {list(rivals.labels)}, the bundle has {list(manifest.labels)}")
    if not rivals.graphs:
        raise ValueError("rivals.graphs: empty")
    names: set[str] = set()
    for number, graph in enumerate(rivals.graphs):
        where, last = f"rivals.graphs[{number}]", len(manifest.segments)
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


def _verified(path: Path, fact: GraphFact) -> bytes:
    """The bytes of a graph that are what rivals.json says."""
    if not os.path.lexists(path):
        raise BundleNotFound(f"{path}: missing; {CURE}")
    if path.is_symlink() or not path.is_file():  # neither followed out of the folder nor waited for
        raise BadBundle(f"{path}: not a regular file of the folder itself; {CURE}")
    try:
        with path.open("rb") as file:
            data = file.read(fact.bytes + 1)
    except OSError as problem:
        raise BadBundle(f"{path}: cannot be read: {problem}") from problem
    if len(data) != fact.bytes or hashlib.sha256(data).hexdigest() != fact.sha256:
        raise BadBundle(f"{path}: size or sha256 is not what {FILE_NAME} says; {CURE}")
    return data
