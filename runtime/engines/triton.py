"""Engine triton: every graph is a model of a Triton server, called by a Python model of the same server.

The Python model walks (triton_model) and has the module triton_python_backend_utils, which exists only inside
of the server. This engine receives it as an argument. States are arrays of this process; a step sends the
tensors that its graph reads to the server and gets back what the graph gives, both through shared memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Protocol

import numpy as np

from offramp.runtime.bundle.files import Bundle
from offramp.runtime.bundle.manifest import NEXT, SIGNALS, Variant
from offramp.runtime.engines.base import Array, Rows
from offramp.runtime.engines.tensors import row_signals, stem_graph, walk_tensors
from offramp.runtime.errors import BadBundle, BadSetting, EngineUnavailable
from offramp.runtime.rules.base import RowSignals

WRITE_AGAIN = "write the model repository again with ee-export-triton"


class TritonTensor(Protocol):
    """A tensor of a request or a response."""

    def name(self) -> str:
        """Its name in the model's configuration."""
        ...

    def as_numpy(self) -> Array:
        """Its values, in memory that the tensor owns."""
        ...


class TritonProblem(Protocol):
    """The error of a response."""

    def message(self) -> str:
        """What went wrong."""
        ...


class TritonResponse(Protocol):
    """What a model answers."""

    def has_error(self) -> bool:
        """Whether it is an error."""
        ...

    def error(self) -> TritonProblem:
        """The error of a response that is one."""
        ...

    def output_tensors(self) -> Sequence[TritonTensor]:
        """The outputs of a response that is no error."""
        ...


class TritonRequest(Protocol):
    """What a model is asked."""

    def inputs(self) -> Sequence[TritonTensor]:
        """The inputs that were given."""
        ...

    def parameters(self) -> str:
        """The parameters as the text of a JSON object."""
        ...

    def exec(self) -> TritonResponse:
        """Ask the model, and wait for its response."""
        ...


class TritonErrors(Protocol):
    """The class of errors, and its codes."""

    INVALID_ARG: object
    UNAVAILABLE: object
    INTERNAL: object

    def __call__(self, message: str, code: object) -> TritonProblem:
        """Make an error."""
        ...


class TritonUtils(Protocol):
    """What is used of the module triton_python_backend_utils."""

    TRITONSERVER_MEMORY_CPU: object
    TritonError: TritonErrors

    def Tensor(self, name: str, values: Array, /) -> TritonTensor:
        """Make a tensor."""
        ...

    def PreferredMemory(self, kind: object, device: int, /) -> object:
        """Say where the outputs of a request are wanted."""
        ...

    def InferenceRequest(
        self,
        *,
        model_name: str,
        requested_output_names: Sequence[str],
        inputs: Sequence[TritonTensor],
        preferred_memory: object,
    ) -> TritonRequest:
        """Make a request for another model of the server."""
        ...

    def InferenceResponse(
        self, output_tensors: Sequence[TritonTensor] = (), error: TritonProblem | None = None
    ) -> TritonResponse:
        """Make the response to a request."""
        ...


def graph_model(models: str, file: str) -> str:
    """The name of the server's model that is a graph; models: how the names of all of them begin."""
    return f"{models}_{PurePath(file).stem}"


class TritonState:
    """The state of rows between two segments: the newest tensors by name, and rows and length."""

    __slots__ = ("arrays", "length", "rows")

    def __init__(self, arrays: dict[str, Array], rows: int, length: int) -> None:
        self.arrays, self.rows, self.length = arrays, rows, length


class TritonEngine:
    """Runs a classifier's segments as models of a Triton server; see engines.base.Engine.

    variant: the precision in which rows start, and that of the stem. variants: the precisions that the server
    has. models: see graph_model. Not thread-safe: the session that uses it holds a lock.
    """

    name = "triton"
    device = "server"  # the configuration of each model says where it runs
    max_rows = 1 << 20  # no limit but memory

    def __init__(
        self, utils: TritonUtils, bundle: Bundle, variant: str, variants: Sequence[str], models: str
    ) -> None:
        self._utils, self._variants, self._models = utils, tuple(variants), models
        self._manifest = bundle.manifest
        self._stem = stem_graph(bundle.manifest, variant)
        self._tensors = walk_tensors(bundle.manifest)

    @property
    def facts(self) -> dict[str, str]:
        """How the names of the server's models begin, and the precisions that it has."""
        return {"models": self._models, "variants": ", ".join(self._variants)}

    def prepare(self, variant: int, segments: Sequence[int]) -> None:
        """Check that the server has a variant; it opens the graphs itself. See Engine.prepare."""
        self._check_variant(variant)

    def begin(self, inputs: Mapping[str, Array]) -> TritonState:
        """Run the stem on new rows and return their state; see Engine.begin."""
        first = inputs[self._stem.inputs[0].name]
        state = TritonState({}, len(first), 0)
        outputs = self._run(self._stem, inputs)
        # Rows of images have as many tokens as the stem's output, rows of text as many as its input.
        if (hidden := outputs.get("hidden")) is not None and hidden.ndim > 1:
            state.length = hidden.shape[1]
        self._check_outputs(self._stem, outputs, state)
        state.arrays = outputs
        return state

    def step(self, segment: int, variant: int, state: TritonState) -> RowSignals:
        """Run one segment on a state and return its signals; see Engine.step."""
        self._check_variant(variant)
        facts = self._manifest.segments[segment].variants[self._manifest.variants[variant]]
        arrays, signals = dict(state.arrays), dict[str, np.ndarray]()
        for graph in facts.graphs:
            outputs = self._run(graph, arrays)
            self._check_outputs(graph, outputs, state)
            for name, values in outputs.items():
                if name in SIGNALS:
                    signals[name] = values
                else:
                    arrays[name.removeprefix(NEXT)] = values
        state.arrays = arrays
        return row_signals(signals, state.rows)

    def skip(self, segment: int, state: TritonState) -> None:
        """Move past a segment: the next step reads the same hidden state; see Engine.skip."""

    def take(self, state: TritonState, rows: Rows) -> TritonState:
        """Copy some rows of a state into a new state; see Engine.take."""
        arrays = {
            name: values[rows] if self._tensors[name].per_row else values
            for name, values in state.arrays.items()
        }
        return TritonState(arrays, len(rows), state.length)

    def join(self, states: Sequence[TritonState]) -> TritonState:
        """Copy the rows of several states into one new state; see Engine.join."""
        arrays = {
            name: np.concatenate([state.arrays[name] for state in states])
            if self._tensors[name].per_row
            else values
            for name, values in states[0].arrays.items()
        }
        return TritonState(arrays, sum(state.rows for state in states), states[0].length)

    def drop(self, state: TritonState) -> None:
        """Free a state's arrays; see Engine.drop."""
        state.arrays = {}

    def close(self) -> None:
        """Do nothing: the server closes its models itself."""

    def after_fork(self) -> None:
        """Do nothing: there is nothing that a fork would lose; see Engine.after_fork."""

    def _run(self, graph: Variant, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Ask the server to run a graph, and return its outputs by name, in memory of this process."""
        utils, model = self._utils, graph_model(self._models, graph.file)
        request = utils.InferenceRequest(
            model_name=model,
            requested_output_names=[tensor.name for tensor in graph.outputs],
            inputs=[
                utils.Tensor(tensor.name, np.ascontiguousarray(arrays[tensor.name]))
                for tensor in graph.inputs
            ],
            # Without it the outputs of a model on a GPU stay there, where numpy cannot read them.
            preferred_memory=utils.PreferredMemory(utils.TRITONSERVER_MEMORY_CPU, 0),
        )
        try:
            response = request.exec()
        except Exception as problem:  # the server's own error type exists only inside of it
            raise _cannot_run(model, str(problem)) from problem
        if response.has_error():
            raise _cannot_run(model, response.error().message())
        # Copied: the shared memory of a response is small, and rows may wait long for their next segment.
        return {tensor.name(): np.array(tensor.as_numpy()) for tensor in response.output_tensors()}

    def _check_outputs(self, graph: Variant, outputs: Mapping[str, Array], state: TritonState) -> None:
        """Raise BadBundle unless a graph gave what the manifest says of it."""
        model, sizes = graph_model(self._models, graph.file), {"batch": state.rows, "seq": state.length}
        for tensor in graph.outputs:
            values = outputs.get(tensor.name)
            if values is None:
                raise BadBundle(f"model {model}: it gave no output {tensor.name}; {WRITE_AGAIN}")
            shape = tuple(sizes[size] if isinstance(size, str) else size for size in tensor.shape)
            if values.dtype != np.dtype(tensor.dtype) or values.shape != shape:
                raise BadBundle(
                    f"model {model}: its output {tensor.name} is {values.dtype} {list(values.shape)}, the "
                    f"manifest has {tensor.dtype} {list(shape)}; {WRITE_AGAIN}"
                )

    def _check_variant(self, variant: int) -> None:
        if (name := self._manifest.variants[variant]) not in self._variants:
            raise BadSetting(
                f"variant {name}: this server has {', '.join(self._variants)}; {WRITE_AGAIN} --variant {name}"
            )


def _cannot_run(model: str, problem: str) -> EngineUnavailable:
    return EngineUnavailable(
        f"engine triton: model {model} gave no answer: {problem}; the server's log says why, and "
        "/v2/repository/index which models are loaded"
    )
