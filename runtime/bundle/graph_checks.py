"""Checks of a graph's bytes before an engine sees them, by a reader that knows only what bundles hold.

An ONNX file is a protobuf message. The reader goes through its fields once, skips weights by their length,
and refuses every field, operator and tensor that graphs of bundles do not have: what an engine would do with
them is then no question. It is strict where parsers of protobuf differ, so that an engine cannot read another
graph from the same bytes: a field that may be there once is refused if it is there twice, and so is a known
field with another wire type. Field numbers: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod

from offramp.runtime.bundle import external
from offramp.runtime.bundle.external import OutsideTensor
from offramp.runtime.errors import BadBundle

MAX_BYTES = 2**31 - 1  # of a graph; a longer protobuf message cannot be parsed
MAX_NODES = (
    20_000  # ONNX Runtime needs minutes for 100,000; 48 blocks of DeBERTa in one graph have some 10,000
)
MAX_ELEMENTS = 2**28  # of a tensor whose size the graph states: 1 GiB of float32
MAX_DEPTH = 32  # branches in branches; protobuf itself stops at about that depth
MAX_FIELDS = 500_000  # of all messages, half a second of reading; DeBERTa has 130,000
_ORT_FORMAT = b"ORTM"  # at byte 4: ONNX Runtime would read another format, which this reader does not know
_MAX_RANK = 32
_SHORT = 64  # bytes of an attribute that is kept
_KEPT_VALUES = 64  # constants of up to this many whole numbers are kept, for they may be shapes

# The operators that a bundle may use, by domain. Those are left out that run a graph of their own (Loop,
# Scan, SequenceMap, and If outside of nested baselines), that read files (EPContext), and those that no
# network here needs: strings, sequences, images, random numbers.
_ONNX = """
    Abs Add And ArgMax ArgMin Attention AveragePool BatchNormalization Cast CastLike Ceil Clip Concat Constant
    ConstantOfShape Conv Cos CumSum DepthToSpace DequantizeLinear Div DynamicQuantizeLinear Einsum Elu Equal
    Erf Exp Expand Flatten Floor Gather GatherElements GatherND Gelu Gemm GlobalAveragePool Greater
    GreaterOrEqual HardSigmoid HardSwish Identity InstanceNormalization IsInf IsNaN LayerNormalization
    LeakyRelu Less LessOrEqual Log LogSoftmax MatMul MatMulInteger Max MaxPool Mean Min Mod Mul Neg Not Or
    PRelu Pad Pow QLinearMatMul QuantizeLinear RMSNormalization Range Reciprocal ReduceL1 ReduceL2
    ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape
    RotaryEmbedding Round ScatterElements ScatterND Selu Shape Sigmoid Sign Sin Size Slice Softmax Softplus
    SpaceToDepth Split Sqrt Squeeze Sub Sum Swish Tan Tanh Tile TopK Transpose Trilu Unsqueeze Where Xor
"""
_MICROSOFT = """
    DynamicQuantizeMatMul FusedMatMul GatherBlockQuantized GroupQueryAttention MatMulIntegerToFloat
    MatMulNBits
"""
OPERATORS: Mapping[str, frozenset[str]] = {
    "": frozenset(_ONNX.split()),
    "com.microsoft": frozenset(_MICROSOFT.split()),
}
_DOMAINS = {"": "", "ai.onnx": "", "com.microsoft": "com.microsoft"}  # as in a file -> as in OPERATORS
# (domain, operator) as in a file -> as in GraphFacts.operators
_ALLOWED = {
    (name.encode(), operator.encode()): f"{domain}:{operator}" if domain else operator
    for name, domain in _DOMAINS.items()
    for operator in OPERATORS[domain]
}
# Bits of an element, by TensorProto.DataType; texts, complex numbers and 8-bit floats are left out.
_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16} | {
    21: 4,
    22: 4,
}
_INT64 = 7
_CURE = "write it again with ee-split, or do not use it if it is not yours"

_Attribute = tuple[bytes, "tuple[int, ...] | None"]  # its name; its values if they are a few whole numbers
Schema = Mapping[
    int, tuple[str, bool]
]  # a field's tag -> its name, and whether it may be there more than once


def _schema(once: str, repeated: str = "") -> Schema:
    """Fields as "name:number:wire type": 0 a whole number, 2 bytes, text or a message, 5 four bytes."""
    fields = [(entry.split(":"), False) for entry in once.split()]
    fields += [(entry.split(":"), True) for entry in repeated.split()]
    return {int(number) << 3 | int(wire): (name, many) for (name, number, wire), many in fields}


_MODEL = _schema(
    "ir_version:1:0 producer_name:2:2 producer_version:3:2 domain:4:2 model_version:5:0 doc:6:2 graph:7:2",
    "opset_import:8:2 metadata:14:2",
)
_OPSET = _schema("domain:1:2 version:2:0")
_GRAPH = _schema(
    "name:2:2 doc:10:2", "node:1:2 initializer:5:2 input:11:2 output:12:2 value_info:13:2 metadata:16:2"
)
_NODE = _schema("name:3:2 op_type:4:2 doc:6:2 domain:7:2", "input:1:2 output:2:2 attribute:5:2 metadata:9:2")
_ATTRIBUTE = _schema("name:1:2 f:2:5 i:3:0 s:4:2 t:5:2 g:6:2 doc:13:2 type:20:0", "floats:7:5 ints:8:0")
_TENSOR = _schema(
    "data_type:2:0 float_data:4:2 int32_data:5:2 int64_data:7:2 name:8:2 raw_data:9:2 double_data:10:2 "
    "uint64_data:11:2 doc:12:2 data_location:14:0",
    "dims:1:0 external_data:13:2 metadata:16:2",
)
# Fewest bits of an element in these fields; numbers of the others have one byte or more each.
_FIXED_BITS = {"float_data": 32, "double_data": 64}
_DATA = ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data")
# The field that holds the numbers of a data type if they are not raw; int32_data for the others.
_FIELD_OF = {1: "float_data", 7: "int64_data", 11: "double_data", 12: "uint64_data", 13: "uint64_data"}
_VALUE = _schema("name:1:2 type:2:2 doc:3:2", "metadata:4:2")
_ENTRY = _schema("key:1:2 value:2:2")


@dataclass
class GraphFacts:
    """What a graph holds, without its weights.

    operators: number of nodes by operator, "domain:name" for those that are not ONNX's own. weights: bytes of
    its initializers, with those in its file of weights. producer: the software that wrote it.
    outside: the initializers in its file of weights, by name.
    """

    operators: Counter[str] = field(default_factory=Counter)
    weights: int = 0
    opset: int = 0
    producer: str = ""
    outside: dict[str, OutsideTensor] = field(default_factory=dict)

    @property
    def nodes(self) -> int:
        """Number of nodes, with those of branches."""
        return sum(self.operators.values())


def check_graph(
    data: bytes, source: str, *, branches: bool = False, weights: tuple[str, int] | None = None
) -> GraphFacts:
    """Read the bytes of an ONNX file and check that an engine may open them.

    source: the file that errors name. branches: whether the operator If is allowed, as in nested baselines.
    weights: name and bytes of the file in which initializers may be (external data), None for a graph that
    has all of them itself. Raises BadBundle, which names the node or tensor.
    """
    reader = _Reader(data, branches, weights)
    try:
        reader.read_model()
    except IndexError:
        raise BadBundle(f"{source}: not an ONNX graph: it ends in the middle of a field; {_CURE}") from None
    except ValueError as problem:
        raise BadBundle(f"{source}: {problem}; {_CURE}") from None
    return reader.facts


class _Reader:
    """Goes through one file; every method raises ValueError for what is refused."""

    def __init__(self, data: bytes, branches: bool, weights: tuple[str, int] | None) -> None:
        self._data, self._branches, self._weights = data, branches, weights
        self._fields_left, self._nodes_left = MAX_FIELDS, MAX_NODES
        self._defined: set[bytes] = set()  # names of tensors, of all graphs of the file
        self._constants: dict[bytes, tuple[int, ...]] = {}  # small constants, by the name of the tensor
        self._attributes: dict[bytes, _Attribute] = {}  # short ones, which many nodes have alike
        self.facts = GraphFacts()

    def read_model(self) -> None:
        data = self._data
        if len(data) > MAX_BYTES:
            raise ValueError(f"{len(data)} bytes: a graph has at most {MAX_BYTES}")
        if data[4:8] == _ORT_FORMAT:
            raise ValueError("ONNX Runtime's own format; only ONNX graphs are read")
        graph = None
        for name, start, end in self._fields(0, len(data), _MODEL, "the model"):
            if name == "graph":
                graph = start, end
            elif name == "opset_import":
                self._read_opset(start, end)
            elif name == "producer_name":
                self.facts.producer = data[start:end].decode("utf-8", "replace")
        if graph is None:
            raise ValueError("not an ONNX graph: it has no graph")
        self._read_graph(*graph, 0)

    def _read_opset(self, start: int, end: int) -> None:
        domain, version = "", 0
        for name, a, b in self._fields(start, end, _OPSET, "opset_import"):
            if name == "domain":
                domain = self._data[a:b].decode("utf-8", "replace")
            else:
                version = a
        if domain not in _DOMAINS:
            raise ValueError(
                f"operators of domain {domain!r:.80}; bundles use those of ONNX and com.microsoft alone"
            )
        if not _DOMAINS[domain]:
            self.facts.opset = version

    def _read_graph(self, start: int, end: int, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise ValueError(f"branches in branches, more than {MAX_DEPTH} deep")
        nodes, tensors = [], []
        for name, a, b in self._fields(start, end, _GRAPH, "the graph"):
            if name == "node":
                nodes.append((a, b))
            elif name == "initializer":
                tensors.append((a, b))
            elif name == "input":
                self._define(self._name_of(a, b), "input")
        self._nodes_left -= len(nodes)
        if self._nodes_left < 0:
            raise ValueError(f"more than {MAX_NODES} nodes")
        for a, b in tensors:  # they follow the nodes in a file, and nodes are checked with their values
            tensor, values, size = self._read_tensor(a, b, may_be_outside=depth == 0)
            self.facts.weights += size
            self._define(tensor, "initializer")
            if values is not None:
                self._constants[tensor] = values
        for a, b in nodes:
            self._read_node(a, b, depth)

    def _read_node(self, start: int, end: int, depth: int) -> None:
        data, node, operator, domain = self._data, b"", b"", b""
        inputs, outputs, attributes = [], [], []
        for name, a, b in self._fields(start, end, _NODE, "a node"):
            if name == "input":
                inputs.append(data[a:b])
            elif name == "output":
                outputs.append(data[a:b])
            elif name == "op_type":
                operator = data[a:b]
            elif name == "attribute":
                attributes.append((a, b))
            elif name == "domain":
                domain = data[a:b]
            elif name == "name":
                node = data[a : min(b, a + 80)]
        where = f"node {_shown(node or next(iter(outputs), b''))}"
        known = _ALLOWED.get((domain, operator))
        may_branch = self._branches and operator == b"If" and domain in (b"", b"ai.onnx")
        if known is None and not may_branch:
            full = domain + b":" * bool(domain) + operator
            raise ValueError(f"{where}: operator {_shown(full)} is not allowed")
        self.facts.operators[known or "If"] += 1
        seen: set[bytes] = set()
        for a, b in attributes:
            attribute, values = self._read_attribute(a, b, where, depth if may_branch else None)
            if attribute in seen:
                raise ValueError(f"{where}: attribute {_shown(attribute)} is there twice")
            seen.add(attribute)
            if operator == b"Constant" and values is not None and outputs:
                self._constants[outputs[0]] = values
        for output in outputs:
            if output:  # an optional output that is left out has an empty name
                self._define(output, "output")
        count_of = _SIZES.get(operator)
        if (
            count_of is not None
            and (size := count_of([self._constants.get(name) for name in inputs])) > MAX_ELEMENTS
        ):
            raise ValueError(f"{where}: it makes {size:.3g} numbers; {MAX_ELEMENTS} are allowed")

    def _read_attribute(self, start: int, end: int, where: str, depth: int | None) -> _Attribute:
        """Read an attribute of a node; depth: of the node's graph, None if it may have no graph in it."""
        short = self._data[start:end] if end - start <= _SHORT else b""
        if short in self._attributes:
            return self._attributes[short]
        attribute, values, graph = b"", None, None
        ints: list[int] = []
        for name, a, b in self._fields(start, end, _ATTRIBUTE, where):
            if name == "name":
                attribute = self._data[a:b]
            elif name == "t":
                values = self._read_tensor(a, b)[1]
            elif name == "g":
                graph = a, b
            elif name == "ints" and len(ints) < _KEPT_VALUES:
                ints.append(_signed(a))
        if graph is not None:
            if depth is None:
                raise ValueError(f"{where}: attribute {_shown(attribute)} is a graph of its own")
            self._read_graph(*graph, depth + 1)
        result = attribute, tuple(ints) if ints and values is None else values
        if short and graph is None:
            self._attributes[short] = result
        return result

    def _read_tensor(
        self, start: int, end: int, *, may_be_outside: bool = False
    ) -> tuple[bytes, tuple[int, ...] | None, int]:
        """Name of a tensor, its values if they are a few whole numbers, and its bytes.

        Its weights are skipped, but their length must be what dims and data type claim. may_be_outside:
        whether they may be in the graph's file of weights.
        """
        tensor, kind, dims, is_outside = b"", 0, [], False
        held: list[tuple[str, int, int]] = []
        place: dict[bytes, bytes] = {}
        for name, a, b in self._fields(start, end, _TENSOR, "a tensor"):
            if name == "name":
                tensor = self._data[a:b]
            elif name == "dims":
                dims.append(_signed(a))
            elif name == "data_type":
                kind = a
            elif name in _DATA:
                held.append((name, a, b))
            elif name == "external_data":
                self._read_entry(a, b, place)
            elif name == "data_location":
                is_outside = a == 1
                if a > 1:
                    raise ValueError(f"tensor {_shown(tensor)}: data location {a} (external data)")
        where = f"tensor {_shown(tensor)}"
        if kind not in _BITS:
            raise ValueError(f"{where}: data type {kind} is not allowed")
        if len(held) > 1:
            raise ValueError(f"{where}: two fields hold its numbers")
        if min(dims, default=1) < 0 or len(dims) > _MAX_RANK:
            raise ValueError(f"{where}: sizes {dims[:_MAX_RANK]}")
        elements = prod(dims)
        if is_outside or place:
            if held or not (is_outside and may_be_outside) or elements < external.FEWEST:
                raise ValueError(f"{where}: its numbers belong into the graph alone (external data)")
            size = elements * _BITS[kind] // 8
            try:
                outside = external.outside_tensor(self._weights, place, kind, tuple(dims), size)
            except ValueError as problem:
                raise ValueError(f"{where}: {problem}") from None
            self.facts.outside[tensor.decode("utf-8")] = outside
            return tensor, None, size
        name, a, b = held[0] if held else ("raw_data", 0, 0)
        bits = elements * _BITS[kind]
        if name != "raw_data":
            if name != _FIELD_OF.get(kind, "int32_data"):
                raise ValueError(f"{where}: numbers of data type {kind} in field {name}")
            bits = elements * _FIXED_BITS.get(name, 4 if _BITS[kind] == 4 else 8)
        if 8 * (b - a) < bits or (name == "raw_data" and b - a != (bits + 7) // 8):
            raise ValueError(f"{where}: {b - a} bytes, its sizes {dims} need {(bits + 7) // 8}")
        return tensor, self._whole_numbers(name, a, b, kind, elements), b - a

    def _read_entry(self, start: int, end: int, place: dict[bytes, bytes]) -> None:
        """Read one of the entries that say where a tensor is, into `place`."""
        data, entry = self._data, dict[str, bytes]()
        for name, a, b in self._fields(start, end, _ENTRY, "external data"):
            entry[name] = data[a:b]
        key = entry.get("key", b"")
        if key not in external.KEYS or key in place:
            raise ValueError(f"external data: entry {_shown(key)} is not known, or there twice")
        place[key] = entry.get("value", b"")

    def _whole_numbers(
        self, name: str, start: int, end: int, kind: int, elements: int
    ) -> tuple[int, ...] | None:
        if kind != _INT64 or elements > _KEPT_VALUES:
            return None
        if name == "raw_data":
            return struct.unpack(f"<{elements}q", self._data[start:end])
        values: list[int] = []
        at = start
        while at < end and len(values) <= _KEPT_VALUES:
            value, at = _varint(self._data, at)
            values.append(_signed(value))
        return tuple(values)

    def _name_of(self, start: int, end: int) -> bytes:
        fields = self._fields(start, end, _VALUE, "an input")
        return next((self._data[a:b] for name, a, b in fields if name == "name"), b"")

    def _define(self, name: bytes, what: str) -> None:
        """Note the name of a tensor; raises ValueError if another tensor has it."""
        if name in self._defined:
            raise ValueError(f"{what} {_shown(name)}: the name is there twice")
        if not name.isascii():
            _check_utf8(name, what)
        self._defined.add(name)

    def _fields(self, at: int, end: int, schema: Schema, what: str) -> list[tuple[str, int, int]]:
        """The fields of a message: (name, start, end) of bytes, (name, number, 0) of whole numbers."""
        data, seen, left = self._data, 0, self._fields_left
        fields: list[tuple[str, int, int]] = []
        while at < end:
            tag = data[at]
            at += 1
            if tag > 127:
                tag = tag & 127 | data[at] << 7
                at += 1
            known = schema.get(tag)
            if known is None:
                raise ValueError(
                    f"not a graph as bundles hold them: {what} has field {tag >> 3} (type {tag & 7})"
                )
            name, repeated = known
            if not repeated:
                if seen >> tag & 1:
                    raise ValueError(f"{what}: field {name} is there twice")
                seen |= 1 << tag
            wire = tag & 7
            if wire == 2:
                size = data[at]
                at += 1
                if size > 127:
                    size, at = _varint(data, at - 1)
                start, at = at, at + size
                if at > end:
                    break
                fields.append((name, start, at))
            elif wire == 0:
                value, at = _varint(data, at)
                fields.append((name, value, 0))
            else:
                at += 4
                fields.append((name, at - 4, at))
            left -= 1
            if left < 0:
                raise ValueError(f"more than {MAX_FIELDS} fields")
        if at != end:
            raise ValueError(f"not an ONNX graph: {what} ends in the middle of a field")
        self._fields_left = left
        return fields


def _check_utf8(name: bytes, what: str) -> None:
    try:
        name.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{what} {_shown(name)}: the name is not UTF-8") from None


def _shown(name: bytes) -> str:
    """A name from a file as a message shows it: in one line, and not all of it if it is long."""
    return ascii(name[:80].decode("utf-8", "replace"))


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A whole number of up to 64 bits, seven bits a byte, and the place after it."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            break
        shift += 7
        if shift > 63:
            raise ValueError("not an ONNX graph: a number of more than 64 bits")
    if value >> 64:
        raise ValueError("not an ONNX graph: a number of more than 64 bits")
    return value, at


def _signed(value: int) -> int:
    return value - 2**64 if value >> 63 else value


_Values = list[tuple[int, ...] | None]  # of a node's inputs, None where they are not known before a run


def _product_of(number: int) -> Callable[[_Values], int]:
    def product(values: _Values) -> int:
        known = values[number] if number < len(values) else None
        return prod(max(value, 1) for value in known) if known else 0

    return product


def _pad(values: _Values) -> int:
    known = values[1] if len(values) > 1 else None
    return sum(max(value, 0) for value in known or ())


def _range(values: _Values) -> int:
    if len(values) != 3 or not all(values):
        return 0
    start, limit, step = (value[0] for value in values if value)
    return max(0, (limit - start) // step) if step else 0


# Operators that make a tensor of a stated size of a small one -> the numbers that they make, from the values
# of their inputs; 0 where those are not known.
_SIZES: Mapping[bytes, Callable[[_Values], int]] = {
    b"ConstantOfShape": _product_of(0),
    b"Expand": _product_of(1),
    b"Pad": _pad,
    b"Range": _range,
    b"Reshape": _product_of(1),
    b"Tile": _product_of(1),
}
