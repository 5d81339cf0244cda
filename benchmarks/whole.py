"""A decoder's one graph walked as segments are: the same cache, bound and extended in the same places."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime

from offramp.runtime.engines.buffers import Run, runner
from offramp.runtime.engines.graphs import CPU, give_back
from offramp.runtime.engines.ort_decoder import KEPT, PLACES
from offramp.runtime.engines.threads import Pool, apply


class OneGraph:
    """What ee-split --monolith wrote of a language model, opened; generates greedily.

    profile: how the name of ONNX Runtime's profile begins, where there is to be one.
    """

    def __init__(self, file: Path, pool: Pool, profile: Path | None = None) -> None:
        options = onnxruntime.SessionOptions()
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        apply(pool, options)
        options.log_severity_level = 3
        options.enable_mem_pattern = False
        self.session = onnxruntime.InferenceSession(str(file), options, providers=[CPU])
        give_back()  # as an engine does when all is open
        self.past = {node.name: node.shape for node in self.session.get_inputs() if "past_" in node.name[:5]}
        self.past.pop("past_valid")
        self.vocabulary = int(self.session.get_outputs()[0].shape[2])

    def generate(self, prompt: Sequence[int], most: int) -> Iterator[int]:
        """Likeliest ids, `most` of them."""
        lane = _Lane(self)
        given, start = list(prompt), 0
        for _ in range(most):
            token = lane.step(given, start)
            yield token
            given, start = [token], start + len(given)


class _Bound(NamedTuple):
    """Runs on so many tokens: their memory, and what takes in what they add, tokens first."""

    run: Run
    known: dict[str, np.ndarray]
    added: list[tuple[np.ndarray, np.ndarray]]


class _Lane:
    """One sequence: its cache, and runs on so many tokens bound to it."""

    def __init__(self, graph: OneGraph) -> None:
        self.graph, self.places = graph, PLACES
        self.keys = [name for name in graph.past if name.startswith("past_k_")]
        self.values = [name for name in graph.past if not name.startswith("past_k_")]
        # Keys, and values, of all blocks in one array each, as a cache has them.
        self.stacks = [self._stack(names, PLACES) for names in (self.keys, self.values)]
        self._bound: dict[tuple[int, int], _Bound] = {}

    def step(self, ids: Sequence[int], start: int) -> int:
        count = len(ids)
        if start + count > self.places:
            self._grow(start + count)
        places = 1 if start == 0 and count > KEPT else self.places
        if (count, places) not in self._bound:
            self._bound[count, places] = self._bind(count, places)
        run, known, added = self._bound[count, places]
        known["input_ids"][0], known["position_ids"][0] = ids, np.arange(start, start + count)
        known["past_valid"][0, :start], known["past_valid"][0, start:] = 1, 0
        run()
        for kept, new in added:
            kept[start : start + count] = new
        return int(known["logits"][0, 0].argmax())

    def _stack(self, names: Sequence[str], places: int) -> np.ndarray:
        sizes = {"batch": 1, "past": places}
        shape = [sizes.get(size, size) for size in self.graph.past[names[0]]]
        return np.zeros((len(names), *shape), np.float32)

    def _grow(self, tokens: int) -> None:
        held = self.places
        while self.places < tokens:
            self.places += min(self.places, 4 * PLACES)
        self._bound.clear()
        for at, names in enumerate((self.keys, self.values)):
            new = self._stack(names, self.places)
            _tokens_first(names, new)[:held] = _tokens_first(names, self.stacks[at])
            self.stacks[at] = new
        give_back()

    def _bind(self, count: int, places: int) -> _Bound:
        graph = self.graph
        known: dict[str, np.ndarray] = {
            "input_ids": np.zeros((1, count), np.int64),
            "position_ids": np.zeros((1, count), np.int64),
            "past_valid": np.zeros((1, places), np.int64),
            "logits": np.zeros((1, 1, graph.vocabulary), np.float32),
        }
        added = []
        for names, kept in zip((self.keys, self.values), self.stacks, strict=True):
            new = self._stack(names, count)
            read = kept if places == self.places else self._stack(names, places)
            for name, mine, past in zip(names, new, read, strict=True):
                known[name.replace("past", "new", 1)], known[name] = mine, past
            added.append((_tokens_first(names, kept), _tokens_first(names, new)))
        binding = onnxruntime.IOBinding(graph.session)
        for bind, nodes in (
            (binding.bind_input, graph.session.get_inputs()),
            (binding.bind_output, graph.session.get_outputs()),
        ):
            for node in nodes:
                array = known[node.name]
                bind(node.name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        return _Bound(runner(onnxruntime, graph.session, binding), known, added)


def _tokens_first(names: Sequence[str], stack: np.ndarray) -> np.ndarray:
    """A view of keys [blocks, 1, heads, size, tokens] or values [blocks, 1, heads, tokens, size]."""
    return np.moveaxis(stack, 4 if names[0].startswith("past_k_") else 3, 0)
