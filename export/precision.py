"""Write an fp32 graph in fp16, int8 or int4: the blocks of any network, and a decoder's heads."""

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

from offramp.export.fp16 import convert_nodes_to_fp16
from offramp.export.int8 import to_token_products
from offramp.export.to_onnx import VENDOR

VARIANTS = ("fp32", "fp16", "int8", "int4")  # the others are written from fp32
BLOCK = 128  # weights that share a scale in int4
BITS = {"int8": 8, "int4": 4}  # bits of the weights that to_small_weights writes
FINE = 32  # weights that share a scale in to_small_weights: a decoder's errors add up from token to token
HEAD_BITS = 8  # bits of a head's weights in to_small_weights
HEAD = "words"  # module whose product gives logits (DecoderHead)
EMBEDDED = "input_ids"  # what looks up the table of embeddings
KEPT = ("exit/", "policy/", "controllers/")  # modules of a decoder's segment that stay float32


def to_fp16(source: Path, target: Path) -> float:
    """Write the fp16 form of a graph that to_onnx wrote, and return its size as a share of the original's.

    Weights and arithmetic inside blocks are float16; pooling, exit, policy and forecast stay float32, and so
    do inputs and outputs: variants mix in one walk and share the stem. It is for GPUs, which multiply float16
    several times faster; a CPU runs it slower than fp32.
    """
    model = onnx.load(source)
    products_of_blocks(source, model)
    # Nodes that rewrites inserted have no types yet, and the conversion needs to know every float.
    halved = convert_nodes_to_fp16(onnx.shape_inference.infer_shapes(model, strict_mode=True), in_block)
    onnx.checker.check_model(halved, full_check=True)  # types too: a float16 beside a float32 is refused
    target.write_bytes(halved.SerializeToString())
    return target.stat().st_size / source.stat().st_size


def to_int8(source: Path, target: Path, *, reduce_range: bool | None = None) -> float:
    """Write the int8 form of a graph that to_onnx wrote, and return its size as a share of the original's.

    Only products with weights inside blocks become int8: exit and policy, whose few operators decide where a
    row exits, stay fp32, and so do softmax, layer norm and attention's own products. Weights are int8 with a
    scale a column; activations are quantized at run time with a scale a token, so that a row's answer does
    not depend on the rows beside it (see int8.py). reduce_range: 7 bits for weights; None: if
    needs_reduced_range() is true of this machine.
    """
    model = onnx.load(source)
    inside = set(products_of_blocks(source, model))
    reduced = needs_reduced_range() if reduce_range is None else reduce_range
    to_token_products(model, inside, reduced=reduced)
    target.write_bytes(model.SerializeToString())
    return target.stat().st_size / source.stat().st_size


def to_one_scale_int8(source: Path, target: Path, *, reduce_range: bool | None = None) -> float:
    """Write the int8 form that ONNX Runtime's dynamic quantization gives; see to_int8 for what becomes int8.

    Activations have one scale a tensor, so that an answer depends on the rows beside it, but a step is
    faster than with a scale a token. It is what a user's own int8 graph is, so single graphs with which a
    walk is compared are written so.
    """
    reduced = needs_reduced_range() if reduce_range is None else reduce_range
    with quiet():
        from onnxruntime.quantization import QuantType, quantize_dynamic  # here: bundles do not need it

        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul", "Gemm"],
            nodes_to_quantize=products_of_blocks(source, onnx.load(source)),
            per_channel=True,
            reduce_range=reduced,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},  # attention's products have no weight to quantize ahead
        )
    return target.stat().st_size / source.stat().st_size


def to_int4(source: Path, target: Path) -> float:
    """Write the int4 form of a graph that to_onnx wrote, and return its size as a share of the original's.

    Weights of products inside blocks have 4 bits, symmetric, one scale for BLOCK of them; activations are
    quantized to 8 bits at run time. It saves time if reading weights takes most of the time: short inputs,
    small caches. Its operator (MatMulNBits) is ONNX Runtime's own.
    """
    model = onnx.load(source)
    model = quantize_weights(model, set(products_of_blocks(source, model)), 4, BLOCK)
    target.write_bytes(model.SerializeToString())
    return target.stat().st_size / source.stat().st_size


def to_small_weights(name: str, source: Path, target: Path) -> float:
    """Write a decoder's graph with int8 or int4 weights, and return its size as a share of the original's.

    source: a stem, segment, cache fill, head or monolith. Weights alone are stored in 8 or 4 bits, the table
    of embeddings and heads in 8 (in 4, a head alone raises the perplexity of SmolLM2-135M by 7 %);
    activations are quantized token by token, in blocks of FINE, so that a token gets the same logits among
    others as alone. Exits and policies stay fp32.
    """
    model = onnx.load(source)
    _store_transposed(model)
    _quantize_embeddings(model)
    products = {
        node.name for node in model.graph.node if node.op_type == "MatMul" and not node.name.startswith(KEPT)
    }
    heads = {product for product in products if _is_of_head(product)}
    model = quantize_weights(model, products - heads, BITS[name], FINE)
    model = quantize_weights(model, heads, HEAD_BITS, FINE)
    target.write_bytes(model.SerializeToString())
    return target.stat().st_size / source.stat().st_size


def _store_transposed(model: onnx.ModelProto) -> None:
    """Store weights transposed instead of transposing them at run time.

    If stem and head are one graph and share a table, the head's product has no weight of its own to quantize.
    """
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    transposes = [n for n in model.graph.node if n.op_type == "Transpose" and n.input[0] in weights]
    for node in transposes:
        array = onnx.numpy_helper.to_array(weights[node.input[0]])
        order = next((list(fact.ints) for fact in node.attribute if fact.name == "perm"), None)
        stored = onnx.numpy_helper.from_array(np.ascontiguousarray(array.transpose(order)), node.output[0])
        model.graph.initializer.append(stored)
        model.graph.node.remove(node)


def _quantize_embeddings(model: onnx.ModelProto) -> None:
    """Store the table of embeddings in 8 bits, FINE numbers with a scale (operator GatherBlockQuantized).

    A head in 4 bits leaves the table as the largest part of a small model otherwise.
    """
    tables = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "Gather" or node.input[0] not in tables or node.input[1] != EMBEDDED:
            continue
        name = node.input[0]
        table = onnx.numpy_helper.to_array(tables[name])
        if table.ndim != 2 or table.shape[1] % FINE:
            continue
        blocks = table.reshape(len(table), -1, FINE)
        scales = np.maximum(np.abs(blocks).max(axis=-1) / 127, np.float32(1e-30)).astype(np.float32)
        rounded = (np.rint(blocks / scales[..., None]) + 128).astype(np.uint8).reshape(table.shape)
        small = onnx.numpy_helper.from_array(rounded, f"{name}_8_bits")
        scale = onnx.numpy_helper.from_array(scales, f"{name}_scales")
        model.graph.initializer.extend([small, scale])
        del node.attribute[:]
        del node.input[:]
        node.op_type, node.domain = "GatherBlockQuantized", VENDOR
        node.input.extend([small.name, EMBEDDED, scale.name])
        facts = {"bits": 8, "block_size": FINE, "gather_axis": 0, "quantize_axis": 1}
        node.attribute.extend(onnx.helper.make_attribute(key, value) for key, value in facts.items())
        if not any(name in other.input for other in model.graph.node):
            model.graph.initializer.remove(tables[name])
        if all(entry.domain != VENDOR for entry in model.opset_import):
            model.opset_import.append(onnx.helper.make_opsetid(VENDOR, 1))


def _is_of_head(product: str) -> bool:
    """Whether a product gives logits: the name of its node begins with the module, such as head.words."""
    return product.rpartition("/")[0].rpartition(".")[2] == HEAD


def quantize_weights(
    model: onnx.ModelProto, products: set[str], bits: int, block: int, accuracy_level: int = 4
) -> onnx.ModelProto:
    """Store the weights of these products of a graph in few bits, as operator MatMulNBits.

    Returns the changed graph, which may be the one that was given. block: weights, and activations, that
    share a scale. accuracy_level: 4 for activations in 8 bits, 1 for activations in float32.
    """
    if not products:
        return model
    others = [node.name for node in model.graph.node if node.name not in products]
    with quiet():
        nbits = _nbits()
        config = nbits.DefaultWeightOnlyQuantConfig(
            block_size=block,
            is_symmetric=True,
            accuracy_level=accuracy_level,
            bits=bits,
            op_types_to_quantize=("MatMul",),
        )
        quantizer = nbits.MatMulNBitsQuantizer(model, nodes_to_exclude=others, algo_config=config)
        quantizer.process()
    changed: onnx.ModelProto = quantizer.model.model
    return changed


def write_variant(
    name: str,
    source: Path,
    target: Path,
    *,
    weights_only: bool = False,
    reduce_range: bool | None = None,
    baseline: bool = False,
) -> float:
    """Write a graph in a variant other than fp32, and return its size as a share of the original's.

    weights_only: int8 and int4 as to_small_weights writes them. reduce_range: see to_int8. baseline: int8 as
    to_one_scale_int8 writes it, for a graph with which walks are compared.
    """
    if name == "fp16":
        return to_fp16(source, target)
    if weights_only and name in BITS:
        return to_small_weights(name, source, target)
    if name == "int8":
        return (to_one_scale_int8 if baseline else to_int8)(source, target, reduce_range=reduce_range)
    if name == "int4":
        return to_int4(source, target)
    raise ValueError(f"variant {name!r}; choose one of {', '.join(VARIANTS[1:])}")


def needs_reduced_range(machine: str | None = None, cpuinfo: str | None = None) -> bool:
    """Whether int8 weights must keep to 7 bits on this machine.

    machine, cpuinfo: platform.machine() and /proc/cpuinfo of another machine.

    x86 without VNNI adds pairs of uint8 * int8 products in 16 bits, which overflow at full range and silently
    spoil the result; with VNNI (AVX512 or AVX) and on ARM sums have 32 bits. A bundle that is written on one
    machine and walked on another needs the answer for the latter: ee-split --int8-range reduced is right
    everywhere and costs one bit.
    """
    machine = platform.machine() if machine is None else machine
    if machine.lower() not in ("x86_64", "amd64", "i686", "i386"):
        return False
    if cpuinfo is None:
        with contextlib.suppress(OSError):  # no such file except on Linux; unknown counts as without VNNI
            cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    return not {"avx512_vnni", "avx_vnni"} & set((cpuinfo or "").split())


def in_block(name: str) -> bool:
    """Whether a node of this name belongs to a block; to_onnx names nodes by their modules."""
    return "blocks." in name.rpartition("/")[0]


def products_of_blocks(source: Path, model: onnx.ModelProto) -> list[str]:
    """Names of the products inside blocks."""
    inside = [
        node.name for node in model.graph.node if node.op_type in ("MatMul", "Gemm") and in_block(node.name)
    ]
    if not inside:
        raise ValueError(f"{source}: it has no product of a block; write variants from what to_onnx wrote")
    return inside


def _nbits() -> Any:
    """Import ONNX Runtime's quantizer to few bits.

    The import sets the process's log level to INFO; the old level is restored.
    """
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    module = import_module("onnxruntime.quantization.matmul_nbits_quantizer")
    root.handlers[:] = handlers
    root.setLevel(level)
    return module


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the quantizer's advice to pre-process: these graphs come optimized from the exporter."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
