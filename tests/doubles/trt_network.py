"""Networks and their parser in the double of TensorRT; trt_double.make cuts each to a version's names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from doubles.trt_graph import Graph, Io, Node
from doubles.trt_things import Dims, Thing, plain


class ITensor(Thing):
    _plain = plain(location=None, allowed_formats=1, is_shape_tensor=False, is_execution_tensor=True)

    def __init__(self, trt: Any, io: Io, side: str) -> None:
        self._io, self._side = io, side

    @property
    def name(self) -> str:
        return self._io.name

    @property
    def dtype(self) -> Any:
        return getattr(self._trt.DataType, self._io.kind)

    @property
    def shape(self) -> Dims:
        return Dims(self._io.shape)

    @property
    def is_network_input(self) -> bool:
        return self._side == "input"

    @property
    def is_network_output(self) -> bool:
        return self._side == "output"

    def get_dimension_name(self, index: int) -> str:
        dim = self._io.dims[index]
        return dim if isinstance(dim, str) else ""


class ILayer(Thing):
    _plain = plain(metadata="")

    def __init__(self, network: Any, node: Node) -> None:
        self._network, self._node = network, node
        self._precision: Any = None
        self._types: dict[int, Any] = {}
        self._of_ints = any(kind not in ("FLOAT", "HALF") for kind in node.kinds)
        self.name = node.name

    name = ""

    @property
    def num_inputs(self) -> int:
        return len(self._node.inputs)

    @property
    def num_outputs(self) -> int:
        return len(self._node.outputs)

    def get_output(self, index: int) -> Any:
        if not 0 <= index < self.num_outputs:
            return None
        io = Io(self._node.outputs[index], self._node.kinds[index], ())
        return self._trt.ITensor(self._trt, io, "inside")

    def get_output_type(self, index: int) -> Any:
        return self._types.get(index, self.get_output(index).dtype)

    @property
    def precision(self) -> Any:
        return self._precision or self._trt.DataType.FLOAT

    @precision.setter
    def precision(self, dtype: Any) -> None:
        self._precision = dtype

    @property
    def precision_is_set(self) -> bool:
        return self._precision is not None

    def reset_precision(self) -> None:
        self._precision = None

    def set_output_type(self, index: int, dtype: Any) -> None:
        self._types[index] = dtype

    def output_type_is_set(self, index: int) -> bool:
        return index in self._types

    def reset_output_type(self, index: int) -> None:
        self._types.pop(index, None)


class INetworkDefinition(Thing):
    _plain = plain(name="Unnamed Network 0", error_recorder=None)

    def __init__(self, builder: Any, flags: int) -> None:
        self._start(builder._logger)
        self._builder, self._flags = builder, flags
        self._graph: Graph | None = None
        self._layers: list[Any] = []
        named = self._trt.NetworkDefinitionCreationFlag.__members__
        self._explicit = self._trt._major >= 10 or bool(flags >> int(named["EXPLICIT_BATCH"]) & 1)
        self._strong = self._trt._major >= 11 or (
            "STRONGLY_TYPED" in named and bool(flags >> int(named["STRONGLY_TYPED"]) & 1)
        )

    @property
    def builder(self) -> Any:
        return self._builder

    @property
    def flags(self) -> int:
        return self._flags

    def get_flag(self, flag: Any) -> bool:
        return bool(self._flags >> int(flag) & 1)

    @property
    def has_implicit_batch_dimension(self) -> bool:
        return not self._explicit

    @property
    def num_inputs(self) -> int:
        return len(self._graph.inputs) if self._graph else 0

    @property
    def num_outputs(self) -> int:
        return len(self._graph.outputs) if self._graph else 0

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def get_input(self, index: int) -> Any:
        return self._tensor(index, "input")

    def get_output(self, index: int) -> Any:
        return self._tensor(index, "output")

    def get_layer(self, index: int) -> Any:
        return self._layers[index] if 0 <= index < len(self._layers) else self._refuse(3, f"no layer {index}")

    def _tensor(self, index: int, side: str) -> Any:
        tensors = getattr(self._graph, f"{side}s", [])
        if not 0 <= index < len(tensors):
            return self._refuse(3, f"Invalid network {side} index: {index}")
        return self._trt.ITensor(self._trt, tensors[index], side)

    def _wishes(self) -> set[Any]:
        return {wish for layer in self._layers for wish in (layer._precision, *layer._types.values())}


class ParserError(Thing):
    def __init__(self, text: str) -> None:
        self._text = text

    def desc(self) -> str:
        return self._text

    def code(self) -> int:
        return 8

    def node(self) -> int:
        return -1

    def node_name(self) -> str:
        return ""

    def node_operator(self) -> str:
        return ""

    def file(self) -> str:
        return "ModelImporter.cpp"

    def func(self) -> str:
        return "parse"

    def line(self) -> int:
        return 1


class OnnxParser(Thing):
    def __init__(self, network: Any, logger: Any) -> None:
        self._start(logger)
        self._network = self._of(network, "INetworkDefinition")
        self._errors: list[str] = []

    def parse(self, model: Any, path: str | None = None) -> bool:
        return self._parse(bytes(memoryview(model)), str(Path(path).parent) if path else "")

    def parse_from_file(self, model: str) -> bool:
        if not Path(model).is_file():
            return self._fail(f"Failed to open file: {model}")
        return self._parse(Path(model).read_bytes(), str(Path(model).parent))

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> Any:
        if not 0 <= index < len(self._errors):
            return self._refuse(3, f"no error {index}")
        return self._trt.ParserError(self._errors[index])

    def clear_errors(self) -> None:
        self._errors.clear()

    def _parse(self, data: bytes, folder: str) -> bool:
        network = self._network
        if not network._explicit:
            return self._fail(
                "This version of the ONNX parser only supports TensorRT INetworkDefinitions with an explicit "
                "batch dimension. Please ensure the network was created using the EXPLICIT_BATCH flag"
            )
        if network._graph is not None:
            return self._fail("Parse was called with a non-empty network definition")
        try:
            network._graph = Graph(data, folder, wide=self._trt._major >= 10)
        except ValueError as problem:
            return self._fail(str(problem))
        network._layers.extend(self._trt.ILayer(network, node) for node in network._graph.nodes)
        return True

    def _fail(self, text: str) -> bool:
        self._errors.append(text)
        self._say("ERROR", text)
        return False
