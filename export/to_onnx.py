"""Export a segment to an ONNX file: opset 18, named axes, weights inside, ONNX's own operators.

Segments of decoders may hold attention of ONNX Runtime, see Segment.vendor_operators.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import torch
from torch import nn

from offramp.export.rewrite import apply_rewrites
from offramp.export.segments import Segment
from offramp.runtime.bundle.external import SUFFIX
from offramp.runtime.bundle.manifest import Tensor

# Bytes of weights that a graph holds itself; protobuf cannot write 2 GiB, of which the nodes need a part.
LARGEST_GRAPH = 2**31 - 2**26
SMALL = 1024  # bytes of a tensor that stays in the graph in any case
OPSET = 18  # what TensorRT's parser and older ONNX Runtimes read; torch needs no conversion for it
# The sizes differ from each other, and from one, which an exporter may treat as a constant.
TRACED = {"batch": 2, "seq": 11, "past": 7, "places": 19}
VENDOR = "com.microsoft"  # domain of ONNX Runtime's own operators


def to_onnx(segment: Segment, path: Path, *, largest: int = LARGEST_GRAPH) -> None:
    """Export a segment to an ONNX file with the segment's names, types and shapes of inputs and outputs.

    Nodes are named by their modules ("blocks.0.attention.self.query/MatMul_9"). largest: if the weights have
    more bytes, they are written into a file beside the graph (external data), whose name is the graph's with
    SUFFIX behind it. Raises RuntimeError if the exported graph has other inputs or outputs, or operators of
    a vendor.
    """
    weights = path.with_name(path.name + SUFFIX)
    axes = {name: torch.export.Dim(name, min=1, max=segment.longest) for name in ("seq", "past")}
    axes["places"] = torch.export.Dim("places", min=1, max=max(segment.longest + 1, TRACED["places"]))
    axes["batch"] = torch.export.Dim("batch", min=1)
    shapes = tuple(
        {axis: axes[size] for axis, size in enumerate(tensor.shape) if isinstance(size, str)}
        for tensor in segment.inputs
    )
    with _quiet(), eager_attention(segment.module), torch.no_grad():
        program: Any = torch.onnx.export(
            segment.module.eval(),
            tuple(_example(tensor, segment.longest) for tensor in segment.inputs),
            dynamo=True,
            opset_version=OPSET,
            external_data=False,
            verbose=False,
            dynamic_shapes=(shapes,),
            input_names=[tensor.name for tensor in segment.inputs],
            output_names=[tensor.name for tensor in segment.outputs],
        )
        program.model = apply_rewrites(program.model)
        is_large = sum(value.const_value.nbytes for value in _initializers(program.model)) > largest
        if is_large:
            onnx_ir.save(program.model, path, external_data=weights.name, size_threshold_bytes=SMALL)
            model: onnx.ModelProto = onnx.load(path, load_external_data=False)
        else:
            model = program.model_proto
    _name_nodes(model)
    _strip(model)
    _check(model, segment)
    path.write_bytes(model.SerializeToString())
    onnx.checker.check_model(path if is_large else model)


@contextlib.contextmanager
def eager_attention(module: nn.Module) -> Iterator[None]:
    """Context manager in which a module computes attention by plain products.

    They become fewer operators than scaled_dot_product_attention.
    """
    configs: dict[int, Any] = {}
    for submodule in module.modules():
        config = getattr(submodule, "config", None)
        if hasattr(config, "_attn_implementation"):
            configs[id(config)] = config
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config in configs.values():
            config._attn_implementation = "eager"
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's output; its exceptions are raised as usual.

    It prints, logs and warns on every export about things that cannot be changed here (axes that share a
    name, torchvision that is not installed).
    """
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _example(tensor: Tensor, longest: int) -> torch.Tensor:
    sizes = {**TRACED, "seq": min(TRACED["seq"], longest)}
    shape = [sizes[size] if isinstance(size, str) else size for size in tensor.shape]
    if tensor.dtype in ("int64", "int32"):
        dtype = torch.int64 if tensor.dtype == "int64" else torch.int32
        return torch.ones(shape, dtype=dtype) * (tensor.name != "token_type_ids")
    return torch.full(shape, 0.1)


def _initializers(model: Any) -> list[Any]:
    return [value for value in model.graph.initializers.values() if value.const_value is not None]


def _name_nodes(model: onnx.ModelProto) -> None:
    """Name every node by its module, which the exporter stores only in the metadata."""
    for number, node in enumerate(model.graph.node):
        metadata = {entry.key: entry.value for entry in node.metadata_props}
        # "['', 'blocks.0', 'blocks.0.attention', 'linear']": modules from the outside in, the operator's own
        # name last
        scopes = [
            scope.strip(" '\"")
            for scope in metadata.get("pkg.torch.onnx.name_scopes", "").strip("[]").split(",")
        ]
        module = (
            scopes[-2] if len(scopes) > 1 and not scopes[-2].startswith("_") else ""
        )  # "_...": of no module
        node.name = f"{module}/{node.op_type}_{number}".lstrip("/")


def _strip(model: onnx.ModelProto) -> None:
    """Remove the exporter's metadata, which is half of a small graph and holds paths of this machine."""
    graph = model.graph
    for entry in (
        model,
        graph,
        *graph.node,
        *graph.input,
        *graph.output,
        *graph.initializer,
        *graph.value_info,
    ):
        del entry.metadata_props[:]
        entry.doc_string = ""


def _check(model: onnx.ModelProto, segment: Segment) -> None:
    """Check that the graph has the operators that the segment may have, and its inputs and outputs."""
    known = {"ai.onnx", VENDOR} if segment.vendor_operators else {"ai.onnx"}
    foreign = {node.domain or "ai.onnx" for node in model.graph.node} - known
    if foreign or model.functions or [o.version for o in model.opset_import if o.domain == ""] != [OPSET]:
        raise RuntimeError(
            f"{segment.name}: exported with operators beyond ONNX opset {OPSET}: {sorted(foreign)}"
        )
    for expected, values in ((segment.inputs, model.graph.input), (segment.outputs, model.graph.output)):
        tensors = tuple(_tensor(value) for value in values)
        if tensors != expected:
            raise RuntimeError(
                f"{segment.name}: exported as {tensors}, expected {expected}; is this torch release "
                "supported?"
            )


def _tensor(value: onnx.ValueInfoProto) -> Tensor:
    kind = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name
    return Tensor(value.name, dtype, tuple(dim.dim_param or dim.dim_value for dim in kind.shape.dim))
