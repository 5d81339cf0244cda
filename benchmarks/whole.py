"""A decoder's one graph walked as segments are: the same cache, bound and extended in the same places."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from offramp.runtime.engines.buffers import Run, runner
from offramp.runtime.engines.graphs import CPU, give_back
from offramp.runtime.engines.threads import Pool, apply

PLACES = 64  # as in runtime.engines.decoder


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


class _Lane:
    """One sequence: its cache, and runs on so many tokens bound to it."""

    def __init__(self, graph: OneGraph) -> None:
        self.graph, self.places = graph, PLACES
        self.arrays = {name: self._empty(shape) for name, shape in graph.past.items()}
        self._bound: dict[int, tuple[Run, dict[str, np.ndarray]]] = {}

    def step(self, ids: Sequence[int], start: int) -> int:
        count = len(ids)
        if start + count > self.places:
            self._grow(start + count)
        if count not in self._bound:
            self._bound[count] = self._bind(count)
        run, known = self._bound[count]
        known["input_ids"][0], known["position_ids"][0] = ids, np.arange(start, start + count)
        known["past_valid"][0, :start], known["past_valid"][0, start:] = 1, 0
        run()
        for name, array in self.arrays.items():
            new = known[name.replace("past", "new", 1)]
            if name.startswith("past_k_"):
                array[..., start : start + count] = new
            else:
                array[:, :, start : start + count] = new
        return int(known["logits"][0, 0].argmax())

    def _empty(self, shape: Sequence[Any]) -> np.ndarray:
        sizes = {"batch": 1, "past": self.places}
        return np.zeros([sizes.get(size, size) for size in shape], np.float32)

    def _grow(self, tokens: int) -> None:
        held = self.places
        while self.places < tokens:
            self.places += min(self.places, 4 * PLACES)
        for name, old in self.arrays.items():
            new = self._empty(self.graph.past[name])
            new[(..., slice(held)) if name.startswith("past_k_") else (..., slice(held), slice(None))] = old
            self.arrays[name] = new
        self._bound.clear()

    def _bind(self, count: int) -> tuple[Run, dict[str, np.ndarray]]:
        graph = self.graph
        known: dict[str, np.ndarray] = {
            "input_ids": np.zeros((1, count), np.int64),
            "position_ids": np.zeros((1, count), np.int64),
            "past_valid": np.zeros((1, self.places), np.int64),
            "logits": np.zeros((1, 1, graph.vocabulary), np.float32),
        }
        sizes = {"batch": 1, "past": count}
        for name, shape in graph.past.items():
            new = name.replace("past", "new", 1)
            known[new] = np.zeros([sizes.get(size, size) for size in shape], np.float32)
        binding = onnxruntime.IOBinding(graph.session)
        for bind, nodes in (
            (binding.bind_input, graph.session.get_inputs()),
            (binding.bind_output, graph.session.get_outputs()),
        ):
            for node in nodes:
                array = self.arrays.get(node.name, known.get(node.name))
                assert array is not None
                bind(node.name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        return runner(onnxruntime, graph.session, binding), known
