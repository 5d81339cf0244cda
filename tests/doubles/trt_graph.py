"""ONNX graphs for the double of TensorRT: what is in them, by the wire format, and runs on ONNX Runtime."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import onnxruntime

from offramp.runtime.engines import threads

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
NUMPY = {
    **{"FLOAT": np.float32, "HALF": np.float16, "INT8": np.int8, "UINT8": np.uint8},
    **{"INT32": np.int32, "INT64": np.int64, "BOOL": np.bool_},
}
_ORT_TYPES = {
    **{"float": "FLOAT", "float16": "HALF", "int8": "INT8", "uint8": "UINT8"},
    **{"int32": "INT32", "int64": "INT64", "bool": "BOOL"},
}
_ONNX_TYPES = {1: "FLOAT", 2: "UINT8", 3: "INT8", 6: "INT32", 7: "INT64", 9: "BOOL", 10: "HALF"}
# Operators of quantised graphs that ONNX's own domain has and TensorRT's parser has not.
_UNKNOWN = {"DynamicQuantizeLinear", "MatMulInteger", "QLinearMatMul", "QLinearConv", "ConvInteger"}
_GIVES = {
    **dict.fromkeys(("Shape", "Size", "NonZero", "ArgMax", "ArgMin"), "INT64"),
    **dict.fromkeys(
        ("Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual", "And", "Or", "Not"), "BOOL"
    ),
}
_MAGIC = b"double of a plan\n"


@dataclass(frozen=True)
class Io:
    """An input or output; kind: the name of its DataType. A dimension is a number, a name, or unknown."""

    name: str
    kind: str
    dims: tuple[int | str | None, ...]

    @property
    def free(self) -> bool:
        return any(not isinstance(dim, int) for dim in self.dims)

    @property
    def shape(self) -> Shape:
        return tuple(dim if isinstance(dim, int) else -1 for dim in self.dims)


@dataclass
class Node:
    """As much of a node as a layer shows; kinds: DataTypes of its outputs."""

    name: str = ""
    op: str = ""
    domain: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)


class Graph:
    """One ONNX model; ValueError where ONNX Runtime does not open it or TensorRT's parser would refuse it.

    wide: whether there is INT64 (TensorRT before 10 has INT32 in its place).
    """

    def __init__(self, data: bytes, folder: str = "", *, wide: bool = True) -> None:
        self.data, self.folder, self.wide = data, folder, wide
        try:
            self.sha256 = hashlib.sha256(data).hexdigest()
            session = _session(self.sha256, folder, data)
            self._fed = {node.name: NUMPY[_ORT_TYPES[node.type[7:-1]]] for node in session.get_inputs()}
            self.inputs = [self._io(node) for node in session.get_inputs()]
            self.outputs = [self._io(node) for node in session.get_outputs()]
        except Exception as problem:  # ORT's error types share no base; KeyError: a type of no interest here
            raise ValueError(f"failed to parse the model: {problem!r}") from problem
        self.nodes: list[Node] = []
        self.half = False
        kinds = {io.name: io.kind for io in self.inputs}
        for number, value in _fields(data):
            if number == 7:
                self._read(value, kinds)
        self.half |= any(io.kind == "HALF" for io in (*self.inputs, *self.outputs))

    def problem(self, shapes: Shapes) -> str:
        """What is wrong with these shapes of inputs: fixed dimensions, and free ones that share a name."""
        named: dict[str, int] = {}
        for io in self.inputs:
            if (shape := shapes.get(io.name)) is None:
                continue
            if len(shape) != len(io.dims):
                return f"{io.name} has {len(io.dims)} dimensions, {shape} has {len(shape)}"
            for dim, size in zip(io.dims, shape, strict=True):
                if isinstance(dim, int) and dim != size:
                    return f"{io.name} is {io.shape}, not {shape}"
                if isinstance(dim, str) and named.setdefault(dim, size) != size:
                    return f"{io.name} {shape}: dimension {dim} is {named[dim]} in another input"
        return ""

    def shapes_of_outputs(self, shapes: Shapes) -> dict[str, Shape]:
        """By the names of dimensions, and where those do not say, by a run on zeros."""
        named = {dim: size for io in self.inputs for dim, size in zip(io.dims, shapes[io.name], strict=True)}
        found = {
            io.name: tuple(named.get(d, d) if isinstance(d, str) else d for d in io.dims)
            for io in self.outputs
        }
        if all(isinstance(size, int) for shape in found.values() for size in shape):
            return found  # type: ignore[return-value]
        zeros = {io.name: np.zeros(shapes[io.name], NUMPY[io.kind]) for io in self.inputs}
        return {name: array.shape for name, array in self.run(zeros).items()}

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs in the types that TensorRT gives them."""
        session = _session(self.sha256, self.folder, self.data)
        cast = {name: np.ascontiguousarray(array, self._fed[name]) for name, array in feeds.items()}
        made = session.run([io.name for io in self.outputs], cast)
        return {io.name: np.asarray(m, NUMPY[io.kind]) for io, m in zip(self.outputs, made, strict=True)}

    def scratch(self, shapes: Shapes) -> int:
        """Bytes of scratch memory for these shapes of inputs; like the real, it grows with them."""
        made = {**shapes, **self.shapes_of_outputs(shapes)}
        return 256 * (2 + len(self.nodes) + sum(math.prod(shape) for shape in made.values()) // 64)

    def _io(self, node: Any) -> Io:
        kind = _ORT_TYPES[node.type[7:-1]]
        return Io(node.name, "INT32" if kind == "INT64" and not self.wide else kind, tuple(node.shape))

    def _kind(self, number: int) -> str:
        kind = _ONNX_TYPES.get(number, "FLOAT")
        self.half |= kind == "HALF"
        return "INT32" if kind == "INT64" and not self.wide else kind

    def _read(self, graph: bytes, kinds: dict[str, str]) -> None:
        nodes = []
        for number, value in _fields(graph):
            if number == 5:
                parts = dict(_fields(value))
                kinds[parts[8].decode()] = self._kind(parts.get(2, 1))
            elif number == 1:
                nodes.append(value)
        for value in nodes:
            self._read_node(value, kinds)

    def _read_node(self, data: bytes, kinds: dict[str, str]) -> None:
        node, said = Node(), ""
        for number, value in _fields(data):
            if number in (1, 2):
                (node.inputs if number == 1 else node.outputs).append(value.decode())
            elif number in (3, 4, 7):
                setattr(node, {3: "name", 4: "op", 7: "domain"}[number], value.decode())
            elif number == 5:
                parts = dict(_fields(value))
                if parts[1] in (b"to", b"dtype"):
                    said = self._kind(parts[3])
                elif parts[1] == b"value" and 5 in parts:
                    said = self._kind(dict(_fields(parts[5])).get(2, 1))
                elif 6 in parts:
                    self._read(parts[6], kinds)  # a branch or a body
        if node.domain not in ("", "ai.onnx") or node.op in _UNKNOWN:
            raise ValueError(
                f"In node {node.name}: UNSUPPORTED_NODE: no importer registered for op {node.op} of domain "
                f"{node.domain or 'ai.onnx'}"
            )
        shown = node.inputs[1:] if node.op == "Where" else node.inputs
        kind = said or _GIVES.get(node.op) or next((kinds[name] for name in shown if name in kinds), "FLOAT")
        node.kinds = ["INT32" if kind == "INT64" and not self.wide else kind] * len(node.outputs)
        kinds.update(zip(node.outputs, node.kinds, strict=True))
        self.nodes.append(node)


def profile_problem(inputs: Sequence[Io], graph: Graph, profile: Mapping[str, Sequence[Shape]]) -> str:
    """Why a graph cannot be built under a profile; "" where it can."""
    for io in inputs:
        if io.free and io.name not in profile:
            return f"Dynamic input tensor {io.name} is missing dimensions in profile"
    for which in range(3):
        problem = graph.problem({name: shapes[which] for name, shapes in profile.items()})
        if problem:
            return f"{('kMIN', 'kOPT', 'kMAX')[which]} of the profile: {problem}"
    return ""


def pack(facts: Mapping[str, Any], graph: Graph) -> bytes:
    """A plan: what is said of it, then the graph."""
    head = json.dumps({**facts, "sha256": graph.sha256, "folder": graph.folder}).encode()
    return _MAGIC + len(head).to_bytes(4, "little") + head + graph.data


def unpack(plan: bytes) -> tuple[dict[str, Any], bytes]:
    """Facts and graph; ValueError where the bytes are no plan or not all of it."""
    start = len(_MAGIC) + 4
    if not plan.startswith(_MAGIC):
        raise ValueError("Serialization assertion plan->header.magicTag == rt::kPLAN_MAGIC_TAG failed")
    end = start + int.from_bytes(plan[start - 4 : start], "little")
    facts: dict[str, Any] = json.loads(plan[start:end])  # its error is a ValueError
    if hashlib.sha256(plan[end:]).hexdigest() != facts["sha256"]:
        raise ValueError("Serialization assertion plan->header.size == blobSize failed")
    return facts, plan[end:]


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of one message of protobuf: bytes, or an int where that is what is there."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        tag = varint()
        wire = tag & 7
        if wire == 0:
            yield tag >> 3, varint()
        else:
            size = varint() if wire == 2 else {1: 8, 5: 4}[wire]
            yield tag >> 3, data[at : at + size]
            at += size


@lru_cache(maxsize=64)
def _cached(sha256: str, folder: str) -> list[Any]:
    return []


def _session(sha256: str, folder: str, data: bytes) -> Any:
    """One session a graph, for all doubles of the process."""
    held = _cached(sha256, folder)
    if not held:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        threads.fit(options)
        if getattr(options, "use_per_session_threads", True):
            options.intra_op_num_threads = options.inter_op_num_threads = 1
        if folder:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        held.append(onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"]))
    return held[0]
