"""An fp32 graph into fp16, int8 (weights and activations) or int4 (weights alone), in the blocks alone."""

from __future__ import annotations

import contextlib
import logging
import platform
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic

from offramp.export.fp16 import halve

VARIANTS = ("fp32", "fp16", "int8", "int4")  # what can be written: fp32 and what is made from it
BLOCK = 128  # weights that share a scale in int4
WEIGHTS_ALONE = {"int8": 8, "int4": 4}  # bits of what weights_alone writes
FINE = 32  # weights that share a scale there: a decoder's errors add up from token to token
OWN = ("exit/", "policy/")  # modules of a decoder's segment that stay as they are


def to_fp16(source: Path, target: Path) -> float:
    """Write the fp16 form of a graph that to_onnx wrote; gives its size as a share of the original's.

    Weights and arithmetic inside blocks are float16; pooling, exit, policy and forecast stay float32. So does
    all that the graph reads and puts out: variants mix in one walk and share the stem. It is for GPUs, which
    multiply float16 several times faster; a CPU runs it slower than fp32.
    """
    model = onnx.load(source)
    _products_of_blocks(source, model)
    # What rewrites put in place of the exporter's nodes has no type, and every float must be known as one.
    made = halve(onnx.shape_inference.infer_shapes(model, strict_mode=True), in_block)
    onnx.checker.check_model(made, full_check=True)  # types too: a float16 beside a float32 is refused
    target.write_bytes(made.SerializeToString())
    return target.stat().st_size / source.stat().st_size


def to_int8(source: Path, target: Path, *, reduce_range: bool | None = None) -> float:
    """Write the int8 form of a graph that to_onnx wrote; gives its size as a share of the original's.

    Only products with weights inside blocks become int8: exit and policy, whose few operators decide where a
    row leaves, stay fp32, and so do softmax, layer norm and attention's own products. Weights are int8 with a
    scale a column; activations are quantized a tensor at run time. reduce_range: 7 bits for weights, None: as
    needs_reduced_range() says of this machine.
    """
    inside = _products_of_blocks(source, onnx.load(source))
    reduced = needs_reduced_range() if reduce_range is None else reduce_range
    with _quiet():
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul", "Gemm"],
            nodes_to_quantize=inside,
            per_channel=True,
            reduce_range=reduced,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},  # attention's products have no weight to quantize ahead
        )
    return target.stat().st_size / source.stat().st_size


def to_int4(source: Path, target: Path) -> float:
    """Write the int4 form of a graph that to_onnx wrote; gives its size as a share of the original's.

    Weights of products inside blocks in 4 bits, symmetric, one scale for BLOCK of them; activations are
    quantized to 8 bits as they come. It pays where reading weights is the time: short inputs, small caches.
    Its operator (MatMulNBits) is ONNX Runtime's own.
    """
    model = onnx.load(source)
    return _few_bits(model, set(_products_of_blocks(source, model)), 4, BLOCK, source, target)


def weights_alone(name: str, source: Path, target: Path) -> float:
    """Write the int8 or int4 form of a decoder's segment, fill, head or one graph; gives its size as a share.

    Weights alone: activations are quantized in pieces of one token, so that a token says the same among
    others as alone, which to_int8's scale a tensor does not allow. Translators and policies stay fp32.
    """
    model = onnx.load(source)
    _untie(model)
    products = {
        node.name for node in model.graph.node if node.op_type == "MatMul" and not node.name.startswith(OWN)
    }
    return _few_bits(model, products, WEIGHTS_ALONE[name], FINE, source, target)


def _untie(model: onnx.ModelProto) -> None:
    """Turn weights that a node transposes at run time into such that stand transposed: where stem and head
    are one graph and share a table, the head's product has no weight of its own to quantize.
    """
    kept = {one.name: one for one in model.graph.initializer}
    for node in [one for one in model.graph.node if one.op_type == "Transpose" and one.input[0] in kept]:
        turned = onnx.numpy_helper.to_array(kept[node.input[0]])
        order = next((list(one.ints) for one in node.attribute if one.name == "perm"), None)
        made = onnx.numpy_helper.from_array(np.ascontiguousarray(turned.transpose(order)), node.output[0])
        model.graph.initializer.append(made)
        model.graph.node.remove(node)


def _few_bits(
    model: onnx.ModelProto, products: set[str], bits: int, block: int, source: Path, target: Path
) -> float:
    """Write a graph with the weights of these products in few bits; gives its size as a share."""
    others = [node.name for node in model.graph.node if node.name not in products]
    with _quiet():
        nbits = _nbits()
        config = nbits.DefaultWeightOnlyQuantConfig(
            block_size=block, is_symmetric=True, accuracy_level=4, bits=bits, op_types_to_quantize=("MatMul",)
        )
        made = nbits.MatMulNBitsQuantizer(model, nodes_to_exclude=others, algo_config=config)
        made.process()
    target.write_bytes(made.model.model.SerializeToString())
    return target.stat().st_size / source.stat().st_size


def to_variant(name: str, source: Path, target: Path, *, reduce_range: bool | None = None) -> float:
    """Write the graph's form of that name, all but fp32; gives its size as a share of the original's."""
    if name == "fp16":
        return to_fp16(source, target)
    if name == "int8":
        return to_int8(source, target, reduce_range=reduce_range)
    if name == "int4":
        return to_int4(source, target)
    raise ValueError(f"variant {name!r}; choose one of {', '.join(VARIANTS[1:])}")


def needs_reduced_range(machine: str | None = None, cpuinfo: str | None = None) -> bool:
    """Whether weights must keep to 7 bits here (or where `platform.machine()` and /proc/cpuinfo say so).

    x86 without VNNI adds pairs of uint8 * int8 products in 16 bits, which overflow at full range and silently
    spoil the result; with VNNI (AVX512 or AVX) and on ARM sums have 32 bits. A bundle that is split on one
    machine and walked on another needs the answer for the latter: ee-split --int8-range reduced is right
    everywhere and costs one bit.
    """
    machine = platform.machine() if machine is None else machine
    if machine.lower() not in ("x86_64", "amd64", "i686", "i386"):
        return False
    if cpuinfo is None:
        with contextlib.suppress(OSError):  # no such file but on Linux: not known, so the careful answer
            cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    return not {"avx512_vnni", "avx_vnni"} & set((cpuinfo or "").split())


def in_block(name: str) -> bool:
    """Whether a node belongs to a block: to_onnx names nodes by their module."""
    return "blocks." in name.rpartition("/")[0]


def _products_of_blocks(source: Path, model: onnx.ModelProto) -> list[str]:
    """Names of the products inside blocks."""
    inside = [
        node.name for node in model.graph.node if node.op_type in ("MatMul", "Gemm") and in_block(node.name)
    ]
    if not inside:
        raise ValueError(f"{source}: no product of a block in it; variants are made from what to_onnx wrote")
    return inside


def _nbits() -> Any:
    """ONNX Runtime's quantizer to few bits; importing it turns on INFO for the whole process, which is turned
    off again.
    """
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    module = import_module("onnxruntime.quantization.matmul_nbits_quantizer")
    root.handlers[:] = handlers
    root.setLevel(level)
    return module


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the quantizer's advice to pre-process: these graphs come optimized from the exporter."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
