"""The ways to write an int8 graph that int8.py compares: functions from a segment's fp32 graph to a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)

from offramp.export.int8 import keep_layer_norms
from offramp.export.precision import (
    needs_reduced_range,
    products_of_blocks,
    quantize_weights,
    quiet,
    to_int8,
    to_one_scale_int8,
)
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import NEXT
from offramp.runtime.engines.threads import share_global_pool

Feed = Mapping[str, np.ndarray]  # inputs of a segment by name
Feeds = Sequence[Feed]
CONSTANT_WEIGHTS = {"MatMulConstBOnly": True}  # attention's own products have none


def one_scale(source: Path, target: Path, feeds: Feeds) -> None:
    """ONNX Runtime's dynamic quantization: one scale for a tensor, measured at run time."""
    to_one_scale_int8(source, target)


def one_scale_plain_norms(source: Path, target: Path, feeds: Feeds) -> None:
    """One scale for a tensor, with sums that ONNX Runtime does not fuse into layer norms."""
    one_scale(source, target, feeds)
    model = onnx.load(target)
    keep_layer_norms(model)
    onnx.save(model, target)


def scale_a_token(source: Path, target: Path, feeds: Feeds) -> None:
    """What ee-split writes: a scale a token."""
    to_int8(source, target)


def scale_a_token_fused_norms(source: Path, target: Path, feeds: Feeds) -> None:
    """A scale a token, with sums that ONNX Runtime fuses into layer norms, as in the fp32 graph."""
    to_int8(source, target)
    model = onnx.load(target)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type == "Sum":
            node.op_type = "Add"
            while len(node.input) > 2:  # the bias of a product
                both = f"{node.output[0]}_{len(node.input)}"
                nodes.append(helper.make_node("Add", list(node.input[:2]), [both], both))
                node.input[:] = [both, *node.input[2:]]
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, target)


def scale_a_token_plain_operators(source: Path, target: Path, feeds: Feeds) -> None:
    """A scale a token, its products of ONNX's own operators: MatMulInteger, Cast, Mul."""
    to_int8(source, target)
    model = onnx.load(target)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type != "MatMulIntegerToFloat":
            nodes.append(node)
            continue
        activations, weights, _, scales, zero = node.input
        sums, numbers = f"{node.name}_sums", f"{node.name}_numbers"
        nodes += [
            helper.make_node("MatMulInteger", [activations, weights, zero], [sums], node.name),
            helper.make_node("Cast", [sums], [numbers], numbers, to=onnx.TensorProto.FLOAT),
            helper.make_node("Mul", [numbers, scales], [node.output[0]], f"{node.name}_times"),
        ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, target)


def small_weights(source: Path, target: Path, feeds: Feeds, *, block: int, accuracy_level: int) -> None:
    """MatMulNBits: 8-bit weights in blocks; activations in 8 bits in the same blocks, or in float32."""
    model = onnx.load(source)
    onnx.save(
        quantize_weights(model, set(products_of_blocks(source, model)), 8, block, accuracy_level), target
    )


def static_scales(
    source: Path, target: Path, feeds: Feeds, *, method: CalibrationMethod, smooth: bool = False
) -> None:
    """Static QDQ: scales of activations are calibrated once. smooth: see smoothed."""
    before = source
    if smooth:
        before = target.with_suffix(".smooth")
        model = onnx.load(source)
        smoothed(model, products_of_blocks(source, model), feeds)
        onnx.save(model, before)
    with quiet():
        quantize_static(
            before,
            target,
            _Reader(feeds),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul", "Gemm"],
            nodes_to_quantize=products_of_blocks(source, onnx.load(before)),
            per_channel=True,
            reduce_range=needs_reduced_range(),
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=method,
            # The products' outputs stay float32, so that ONNX Runtime fuses each to MatMulIntegerToFloat.
            extra_options=CONSTANT_WEIGHTS | {"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
        )
    if smooth:
        before.unlink()


def smoothed(model: onnx.ModelProto, products: Sequence[str], feeds: Feeds) -> None:
    """Divide the channels of activations by factors, and multiply the rows of weights by them, in place.

    The factors move half of what large channels have into the weights (SmoothQuant, arXiv 2211.10438, with
    strength 0.5). Products that read the same tensor have the same factors. The division stays in the graph:
    a segment does not have the layer norm before it, which would take it.
    """
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        if node.name in products and node.op_type == "MatMul" and node.input[1] in stored:
            readers.setdefault(node.input[0], []).append(node)
    largest = channel_maxima(model, list(readers), feeds)
    for tensor, nodes in readers.items():
        weights = [numpy_helper.to_array(stored[node.input[1]]) for node in nodes]
        rows = np.max([np.abs(array).max(axis=1) for array in weights], axis=0)
        factors = np.sqrt(np.maximum(largest[tensor], 1e-5) / np.maximum(rows, 1e-5)).astype(np.float32)
        divided, name = f"{tensor}_smooth", f"{tensor}_factors"
        model.graph.initializer.append(numpy_helper.from_array(1 / factors, name))
        place = list(model.graph.node).index(nodes[0])
        model.graph.node.insert(place, helper.make_node("Mul", [tensor, name], [divided], divided))
        for node, array in zip(nodes, weights, strict=True):
            scaled = numpy_helper.from_array(array * factors[:, None], node.input[1])
            stored[node.input[1]].CopyFrom(scaled)
            node.input[0] = divided


def channel_maxima(model: onnx.ModelProto, tensors: Sequence[str], feeds: Feeds) -> dict[str, np.ndarray]:
    """The largest magnitude of every channel [in] of these tensors over all feeds."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    inputs = {value.name for value in model.graph.input}
    inner = [tensor for tensor in tensors if tensor not in inputs]
    shown.graph.output.extend(
        helper.make_tensor_value_info(tensor, onnx.TensorProto.FLOAT, None) for tensor in inner
    )
    session = open_session(shown.SerializeToString())
    maxima: dict[str, np.ndarray] = {}
    for feed in feeds:
        values = dict(feed) | dict(zip(inner, session.run(inner, dict(feed)) if inner else [], strict=True))
        for tensor in tensors:
            peak = np.abs(values[tensor]).reshape(-1, values[tensor].shape[-1]).max(axis=0)
            maxima[tensor] = np.maximum(maxima.get(tensor, peak), peak)
    return maxima


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime is not typed
    """Gives the quantizer one feed after another."""

    def __init__(self, feeds: Feeds) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next feed, or None at the end."""
        feed = next(self._feeds, None)
        return None if feed is None else dict(feed)


def open_session(graph: Path | bytes) -> Any:
    """A session of ONNX Runtime on the CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    share_global_pool(options)
    source = graph if isinstance(graph, bytes) else str(graph)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def segment_feeds(bundle: Path, rows: Sequence[Mapping[str, Any]]) -> list[Feeds]:
    """The inputs of every segment for some rows, computed by the fp32 graphs; rows: inputs of the stem."""
    manifest = open_bundle(bundle).manifest
    values = [dict(row) for row in rows]
    feeds: list[Feeds] = []
    for number, segment in enumerate((manifest.stem, *manifest.segments)):
        (graph,) = segment.first_graph.graphs  # blocks that share their weights have no place here
        session = open_session(bundle / graph.file)
        names = [value.name for value in session.get_inputs()]
        outputs = [value.name for value in session.get_outputs()]
        given: list[Feed] = [{name: row[name] for name in names} for row in values]
        if number:
            feeds.append(given)
        for row, feed in zip(values, given, strict=True):
            results = zip(outputs, session.run(outputs, dict(feed)), strict=True)
            row.update((name.removeprefix(NEXT), array) for name, array in results)
    return feeds


TODAY, TOKEN = "one-scale", "token"
CANDIDATES: Mapping[str, Callable[[Path, Path, Feeds], None]] = {
    TODAY: one_scale,
    TOKEN: scale_a_token,
    "one-scale-plain-norms": one_scale_plain_norms,
    "token-fused-norms": scale_a_token_fused_norms,
    "token-plain-operators": scale_a_token_plain_operators,
    "static-minmax": partial(static_scales, method=CalibrationMethod.MinMax),
    "static-percentile": partial(static_scales, method=CalibrationMethod.Percentile),
    "static-entropy": partial(static_scales, method=CalibrationMethod.Entropy),
    "static-smooth": partial(static_scales, method=CalibrationMethod.MinMax, smooth=True),
    "blocks-32": partial(small_weights, block=32, accuracy_level=4),
    "blocks-128": partial(small_weights, block=128, accuracy_level=4),
    "blocks-256": partial(small_weights, block=256, accuracy_level=4),
    "weights-128": partial(small_weights, block=128, accuracy_level=1),
}
# Their graphs differ from static-minmax's in numbers alone, and so take the same time.
SAME_GRAPHS = ("static-percentile", "static-entropy")
