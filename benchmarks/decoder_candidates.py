"""Candidates of the decoder benchmarks, each a function from a prompt to timed tokens, and the rounds in
which they take turns.

The order in which a process opens candidates changes their speed by up to a tenth for as long as they are
open: the first one gets worse memory than later ones, and one that is opened after others were closed gets
their scattered pages. So every round is a new process, and rounds come in pairs, of which the second opens
the candidates in reverse order.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime

from offramp.benchmarks.decoder_baselines import (
    BaselineProcess,
    GenaiProcess,
    LlamaProcess,
    TimedAnswer,
    build_genai_model,
    build_llama_model,
)
from offramp.runtime import load_generator
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import LAST_POSITIONS, TOTAL_LENGTH, RotationFacts
from offramp.runtime.engines.buffers import Run, make_run
from offramp.runtime.engines.graphs import CPU, free_unused_memory
from offramp.runtime.engines.ort_decoder import PLACES
from offramp.runtime.engines.rotation import rotation_tables
from offramp.runtime.engines.threads import apply_pool, claim_pool
from offramp.runtime.generator import TextGenerator
from offramp.runtime.sequence import KEPT_TOKENS
from offramp.runtime.tuning.timing import take_turns

OFFRAMP, MONOLITH, GENAI, LLAMA = "offramp", "monolith", "onnxruntime-genai", "llama.cpp"
WITH_BASELINES = (OFFRAMP, MONOLITH, GENAI, LLAMA)
GGUF = {"fp32": "F32", "int8": "Q8_0", "int4": "Q4_0"}  # llama.cpp's kind of as many bits
THREADS = 2
BURST = 9  # tokens
PAUSE_S = 0.15  # before each turn: threads that still spin after a run would slow down the next candidate

Generate = Callable[[list[int], int], Iterator[int]]  # prompt, number of tokens -> ids, as they are generated
Answer = Callable[[list[int], int], TimedAnswer]
Round = dict[str, list[TimedAnswer]]  # by candidate, one answer for each prompt


def time_tokens(ids: Iterator[int]) -> TimedAnswer:
    """Read all token ids of an iterator and time each of them."""
    tokens, stamps = list[int](), [time.perf_counter()]
    for token in ids:
        tokens.append(token)
        stamps.append(time.perf_counter())
    first, *steps = np.diff(stamps).tolist()
    return TimedAnswer(tokens, first, steps)


def monolith_file(scratch: Path, variant: str) -> Path:
    """The path of the ONNX file that holds the decoder as one graph in this variant."""
    return scratch / ("monolith.onnx" if variant == "fp32" else f"monolith_{variant}.onnx")


@contextmanager
def open_in_process(scratch: Path, variant: str, names: Sequence[str]) -> Iterator[dict[str, Generate]]:
    """Open candidates in this process, in the order of `names`; gives their generate functions by name.

    A name is "monolith" or that of a bundle in the scratch folder, which runs at full depth.
    """
    candidates: dict[str, Generate] = {}
    with ExitStack() as stack:
        for name in names:
            if name == MONOLITH:
                candidates[name] = open_monolith(scratch, variant).generate
                continue
            session = load_generator(
                scratch / name, rule="never", variant=variant, share=False, global_pool=True
            )
            stack.enter_context(session)
            candidates[name] = partial(_ids, session)
        yield candidates


def _ids(session: TextGenerator, prompt: list[int], tokens: int) -> Iterator[int]:
    return (token.id for token in session.tokens(prompt, tokens, ()))


@contextmanager
def open_with_baselines(
    model: Path, scratch: Path, variant: str, facts: dict[str, Any], names: Sequence[str]
) -> Iterator[dict[str, Answer]]:
    """Open candidates, among them baseline processes, in the order of `names`; gives answer functions by
    name.

    names: some of WITH_BASELINES. The versions of the baselines are added to `facts`.
    """
    candidates: dict[str, Answer] = {}
    with ExitStack() as stack:
        for name in names:
            if name in (OFFRAMP, MONOLITH):
                candidate = "auto" if name == OFFRAMP else MONOLITH
                generate = stack.enter_context(open_in_process(scratch, variant, [candidate]))[candidate]
                candidates[name] = partial(_timed_answer, generate)
                continue
            baseline = stack.enter_context(open_baseline(name, model, scratch, variant))
            facts[name], candidates[name] = baseline.facts, baseline.answer
        yield candidates


def open_baseline(name: str, model: Path, scratch: Path, variant: str) -> BaselineProcess:
    """Start the process of a baseline, GENAI or LLAMA, at a precision."""
    if name == GENAI:
        return GenaiProcess(build_genai_model(model, variant, scratch / "genai"), THREADS)
    return LlamaProcess(build_llama_model(model, GGUF[variant], scratch / "llama"), THREADS)


def _timed_answer(generate: Generate, prompt: list[int], tokens: int) -> TimedAnswer:
    return time_tokens(generate(prompt, tokens))


def time_whole_answers(
    candidates: Mapping[str, Answer], prompts: Sequence[list[int]], tokens: int, seed: int
) -> Round:
    """Time the candidates' answers prompt by prompt, in an order that is drawn for each prompt.

    The order varies because a candidate slows down the next one: it fills the processor's caches, and its
    threads may still run.
    """
    answers: Round = {name: [] for name in candidates}
    order = np.random.default_rng(seed)
    for answer in candidates.values():
        answer(prompts[0], 8)
    for prompt in prompts:
        calls = {name: partial(answer, prompt, tokens) for name, answer in candidates.items()}
        for name, _, result in take_turns(calls, 1, seed=order, before=partial(time.sleep, PAUSE_S)):
            answers[name].append(result)
    return answers


def time_bursts(
    candidates: Mapping[str, Generate], prompts: Sequence[list[int]], tokens: int, seed: int
) -> Round:
    """Time the candidates' answers in turns of BURST tokens, in an order that is drawn for each turn.

    Turns are short because the machine's speed changes from one second to the next by more than candidates of
    one process differ. The first step of each burst is left out, because the candidate's memory is not in the
    caches then.
    """
    answers: Round = {name: [] for name in candidates}
    order = np.random.default_rng(seed)
    for prompt in prompts:
        streams = {name: generate(prompt, tokens) for name, generate in candidates.items()}
        for name, stream in streams.items():
            answers[name].append(time_tokens(islice(stream, 1)))
        for _ in range(1, tokens, BURST):
            calls = {name: partial(_burst, stream) for name, stream in streams.items()}
            for name, _, (ids, _, steps) in take_turns(calls, 1, seed=order):
                answers[name][-1].ids.extend(ids)
                answers[name][-1].step_s.extend(steps)
    return answers


def _burst(stream: Iterator[int]) -> TimedAnswer:
    return time_tokens(islice(stream, BURST))


def run_round(request: Mapping[str, Any]) -> dict[str, Any]:
    """Run one round in this process; gives "answers" by candidate, and the versions of baselines as "facts".

    request: scratch, variant, prompts (ids), tokens, seed, names (in the order in which they are opened), and
    model for a round with baselines.
    """
    scratch, variant, names = Path(request["scratch"]), request["variant"], request["names"]
    facts: dict[str, Any] = {}
    rest = (request["prompts"], request["tokens"], request["seed"])
    if "model" in request:
        with open_with_baselines(Path(request["model"]), scratch, variant, facts, names) as processes:
            answers = time_whole_answers(processes, *rest)
    else:
        with open_in_process(scratch, variant, names) as candidates:
            answers = time_bursts(candidates, *rest)
    return {"answers": answers, "facts": facts}


def run_fresh_round(request: Mapping[str, Any], facts: dict[str, Any]) -> Round:
    """Run one round in a new process; gives answers by candidate, adds versions of baselines to `facts`.

    request: see run_round.
    """
    worker = [sys.executable, "-m", "offramp.benchmarks.workers", "round"]
    done = subprocess.run(worker, input=json.dumps(request), check=True, stdout=subprocess.PIPE, text=True)
    result = json.loads(done.stdout.splitlines()[-1])
    facts.update(result["facts"])
    return {name: [TimedAnswer(*answer) for answer in answers] for name, answers in result["answers"].items()}


def open_monolith(scratch: Path, variant: str) -> DecoderMonolith:
    """Open the decoder as one graph; its rotations are those of the bundle "auto" beside it."""
    decoder = open_bundle(scratch / "auto").manifest.decoder
    assert decoder is not None
    return DecoderMonolith(monolith_file(scratch, variant), decoder.rotations)


class DecoderMonolith:
    """A decoder as one graph, which ee-split --monolith writes; it generates greedily.

    Its cache is handled as in a walk: it is bound to the session and extended in place. rotations: of the
    bundle's manifest, for a graph that extends the cache itself.
    """

    def __init__(self, file: Path, rotations: Mapping[str, RotationFacts] | None = None) -> None:
        options = onnxruntime.SessionOptions()
        apply_pool(claim_pool(onnxruntime, None, True), options)
        options.log_severity_level = 3
        options.enable_mem_pattern = False
        self.session = onnxruntime.InferenceSession(str(file), options, providers=[CPU])
        free_unused_memory()  # as an engine does after it has opened everything
        self.past = {node.name: node.shape for node in self.session.get_inputs() if node.name[:5] == "past_"}
        self.past.pop("past_valid", None)
        self.rotations = rotations or {}
        self.in_place = any(node.name == LAST_POSITIONS.name for node in self.session.get_inputs())
        self.vocabulary = int(self.session.get_outputs()[0].shape[2])

    def generate(self, prompt: Sequence[int], tokens: int) -> Iterator[int]:
        """Generate this number of tokens greedily; yields their ids."""
        sequence = _InPlaceSequence(self) if self.in_place else _Sequence(self)
        ids, start = list(prompt), 0
        for _ in range(tokens):
            token = sequence.next_token(ids, start)
            yield token
            ids, start = [token], start + len(ids)

    def bind(self, arrays: Mapping[str, np.ndarray]) -> Run:
        """Bind the graph to arrays by name, which the caller keeps alive."""
        binding = onnxruntime.IOBinding(self.session)
        for bind, nodes in (
            (binding.bind_input, self.session.get_inputs()),
            (binding.bind_output, self.session.get_outputs()),
        ):
            for node in nodes:
                array = arrays[node.name]
                bind(node.name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        return make_run(onnxruntime, self.session, binding)


class _Binding(NamedTuple):
    """A bound run of a fixed number of tokens.

    arrays: bound inputs and outputs by name. added: pairs (cache, new keys or values), tokens first.
    """

    run: Run
    arrays: dict[str, np.ndarray]
    added: list[tuple[np.ndarray, np.ndarray]]


class _Sequence:
    """One sequence that is being generated: its cache, and bindings to it by number of tokens."""

    def __init__(self, monolith: DecoderMonolith) -> None:
        self.monolith, self.places = monolith, PLACES
        self.keys = [name for name in monolith.past if name.startswith("past_k_")]
        self.values = [name for name in monolith.past if not name.startswith("past_k_")]
        # Keys of all blocks are one array, and so are values, as in the cache of a walk.
        self.caches = [self._zeros(names, PLACES) for names in (self.keys, self.values)]
        self._bindings: dict[tuple[int, int], _Binding] = {}

    def next_token(self, ids: Sequence[int], start: int) -> int:
        """Run these ids, the first at position `start`, and give the most probable next token."""
        count = len(ids)
        if start + count > self.places:
            self._grow(start + count)
        places = 1 if start == 0 and count > KEPT_TOKENS else self.places
        if (count, places) not in self._bindings:
            self._bindings[count, places] = self._bind(count, places)
        run, arrays, added = self._bindings[count, places]
        arrays["input_ids"][0], arrays["position_ids"][0] = ids, np.arange(start, start + count)
        arrays["past_valid"][0, :start], arrays["past_valid"][0, start:] = 1, 0
        run()
        for cached, new in added:
            cached[start : start + count] = new
        return int(arrays["logits"][0, 0].argmax())

    def _zeros(self, names: Sequence[str], places: int) -> np.ndarray:
        sizes = {"batch": 1, "past": places}
        shape = [sizes.get(size, size) for size in self.monolith.past[names[0]]]
        return np.zeros((len(names), *shape), np.float32)

    def _grow(self, tokens: int) -> None:
        filled = self.places
        while self.places < tokens:
            self.places += min(self.places, 4 * PLACES)
        self._bindings.clear()
        for at, names in enumerate((self.keys, self.values)):
            larger = self._zeros(names, self.places)
            _tokens_first(names, larger)[:filled] = _tokens_first(names, self.caches[at])
            self.caches[at] = larger
        free_unused_memory()

    def _bind(self, count: int, places: int) -> _Binding:
        monolith = self.monolith
        arrays: dict[str, np.ndarray] = {
            "input_ids": np.zeros((1, count), np.int64),
            "position_ids": np.zeros((1, count), np.int64),
            "past_valid": np.zeros((1, places), np.int64),
            "logits": np.zeros((1, 1, monolith.vocabulary), np.float32),
        }
        added = []
        for names, cached in zip((self.keys, self.values), self.caches, strict=True):
            new = self._zeros(names, count)
            past = cached if places == self.places else self._zeros(names, places)
            for number, name in enumerate(names):
                arrays[name.replace("past", "new", 1)], arrays[name] = new[number], past[number]
            added.append((_tokens_first(names, cached), _tokens_first(names, new)))
        return _Binding(monolith.bind(arrays), arrays, added)


class _InPlaceSequence:
    """One sequence of a graph that extends the cache itself; see _Sequence."""

    def __init__(self, monolith: DecoderMonolith) -> None:
        self.monolith, self.places = monolith, 0
        self._caches: dict[str, np.ndarray] = {}
        self._tables: Mapping[str, np.ndarray] = {}
        self._bindings: dict[int, _Binding] = {}
        self._grow(PLACES)

    def next_token(self, ids: Sequence[int], start: int) -> int:
        """Run these ids, the first at position `start`, and give the most probable next token."""
        count, end = len(ids), start + len(ids)
        if end > self.places:
            self._grow(end)
        if count not in self._bindings:
            self._bindings[count] = self._bind(count)
        run, arrays, _ = self._bindings[count]
        arrays["input_ids"][0], arrays["position_ids"][0] = ids, np.arange(start, end)
        arrays[LAST_POSITIONS.name][0], arrays[TOTAL_LENGTH.name][...] = end - 1, end
        run()
        return int(arrays["logits"][0, 0].argmax())

    def _grow(self, tokens: int) -> None:
        filled, self.places = self.places, max(self.places, PLACES)
        while self.places < tokens:
            self.places += min(self.places, 4 * PLACES)
        self._bindings.clear()
        for name, (_, heads, _, size) in self.monolith.past.items():
            larger = np.zeros((1, heads, self.places, size), np.float32)
            if filled:
                larger[:, :, :filled] = self._caches[name]
            self._caches[name] = larger
        self._tables = rotation_tables(self.monolith.rotations, self.places)
        free_unused_memory()

    def _bind(self, count: int) -> _Binding:
        arrays: dict[str, np.ndarray] = {
            **self._tables,
            **self._caches,
            **{name.replace("past", "new", 1): cache for name, cache in self._caches.items()},
            "input_ids": np.zeros((1, count), np.int64),
            "position_ids": np.zeros((1, count), np.int64),
            LAST_POSITIONS.name: np.zeros(1, np.int32),
            TOTAL_LENGTH.name: np.zeros((), np.int32),
            "logits": np.zeros((1, 1, self.monolith.vocabulary), np.float32),
        }
        return _Binding(self.monolith.bind(arrays), arrays, [])


def _tokens_first(names: Sequence[str], array: np.ndarray) -> np.ndarray:
    """A view of keys or values with the axis of tokens first.

    array: keys [blocks, 1, heads, size, tokens] or values [blocks, 1, heads, tokens, size].
    """
    return np.moveaxis(array, 4 if names[0].startswith("past_k_") else 3, 0)
