"""Time of a decoder's products with weights by bits, block of a scale, and number of tokens in a step.

    python benchmarks/few_bit_products.py --bundle bundle/ --rows 1,2,4,8,16 --json FILE

All products with weights of the fp32 graphs of a bundle (segments, and the head) are written as one graph of
products alone that read a given input, once for each form; weights are random. So the times are a lower bound
for a step of the network in this form, whatever else it does. A form is "fp32", or bits/block of operator
MatMulNBits: symmetric, activations in 8 bits; "zero" for weights with zero points, "float" for activations in
float32. Forms take turns in each round, in an order that is drawn; times are medians over rounds. GB/s: bytes
of weights and scales that a step reads over its time. "read" is what this machine reads of an array that is
larger than its caches, with as many threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.progress import track

from offramp.benchmarks.decoders import print_table
from offramp.export.to_onnx import VENDOR
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.engines.threads import claim_pool, share_global_pool
from offramp.runtime.tuning.report import machine_facts
from offramp.runtime.tuning.timing import take_turns
from offramp.training.checkpoint import write_json

READ_BYTES = 1 << 29  # for each thread: many times the size of caches


BLOCKS = (16, 32, 64, 128, 256)  # that MatMulNBits has


class Form(NamedTuple):
    """How weights are stored and multiplied; bits of 32 is float32."""

    bits: int
    block: int = 0
    zero_points: bool = False
    float_activations: bool = False

    @classmethod
    def parse(cls, text: str) -> Form:
        """Read a form as --forms has it, such as 4/32 or 4/32/zero."""
        if text == "fp32":
            return cls(32)
        bits, *more = text.split("/")
        if bits not in ("4", "8") or not more or not more[0].isdigit() or {*more[1:]} - {"zero", "float"}:
            raise click.BadParameter(f"--forms {text}: give fp32, or such as 4/32, 8/32 or 4/32/zero/float")
        if int(more[0]) not in BLOCKS:
            raise click.BadParameter(f"--forms {text}: a block has {', '.join(map(str, BLOCKS))} weights")
        return cls(int(bits), int(more[0]), "zero" in more, "float" in more)


def product_shapes(bundle: Path) -> list[tuple[int, int]]:
    """The shape [inputs, outputs] of each product with weights in the fp32 segments and head of a bundle."""
    manifest = open_bundle(bundle).manifest
    if manifest.decoder is None:
        raise click.BadParameter(f"{bundle} is no bundle of a language model")
    shapes = []
    for part in (*manifest.segments, manifest.decoder.head):
        for graph in part.variants["fp32"].graphs:
            model = onnx.load(bundle / graph.file)
            weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
            products = (node.input[1] for node in model.graph.node if node.op_type in ("MatMul", "Gemm"))
            shapes += [weights[name] for name in products if len(weights.get(name, ())) == 2]
    return shapes


def write_products(shapes: Sequence[tuple[int, int]], form: Form) -> tuple[onnx.ModelProto, int]:
    """A graph that computes each product of an input of its width; gives the bytes of its weights, too."""
    rng, nodes, tensors, outputs, total = np.random.default_rng(0), [], [], [], 0

    def add(name: str, array: np.ndarray[Any, Any]) -> str:
        nonlocal total
        total += array.nbytes
        tensors.append(numpy_helper.from_array(array, name))
        return name

    for number, (inputs, width) in enumerate(shapes):
        source, output = f"input_{inputs}", f"output_{number}"
        outputs.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, ["rows", width]))
        if form.bits == 32:
            weights = add(f"weights_{number}", rng.standard_normal((inputs, width), np.float32))
            nodes.append(helper.make_node("MatMul", [source, weights], [output]))
            continue
        blocks = -(-inputs // form.block)
        packed = rng.integers(0, 256, (width, blocks, form.block * form.bits // 8), np.uint8)
        names = [source, add(f"weights_{number}", packed)]
        names.append(add(f"scales_{number}", np.full((width, blocks), 0.01, np.float32)))
        if form.zero_points:
            zeros = rng.integers(0, 256, (width, -(-blocks * form.bits // 8)), np.uint8)
            names.append(add(f"zeros_{number}", zeros))
        node = helper.make_node("MatMulNBits", names, [output], domain=VENDOR)
        facts = {"K": inputs, "N": width, "bits": form.bits, "block_size": form.block}
        facts["accuracy_level"] = 1 if form.float_activations else 4
        node.attribute.extend(helper.make_attribute(name, value) for name, value in facts.items())
        nodes.append(node)
    widths = sorted({inputs for inputs, _ in shapes})
    sources = [helper.make_tensor_value_info(f"input_{w}", TensorProto.FLOAT, ["rows", w]) for w in widths]
    graph = helper.make_graph(nodes, "products", sources, outputs, tensors)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(VENDOR, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10), total


def open_products(shapes: Sequence[tuple[int, int]], form: Form) -> tuple[Callable[[int], None], int]:
    """A function that runs a step on so many tokens, and the bytes of weights that it reads."""
    model, total = write_products(shapes, form)
    options = onnxruntime.SessionOptions()
    share_global_pool(options)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    rng = np.random.default_rng(0)

    def run(rows: int) -> None:
        feeds = {
            value.name: rng.standard_normal((rows, value.shape[1]), np.float32)
            for value in session.get_inputs()
        }
        session.run(None, feeds)

    return run, total


def read_speed(threads: int, times: int = 5) -> float:
    """GB/s at which this machine reads memory with so many threads: the best of several times."""
    arrays = [np.ones(READ_BYTES // 8) for _ in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(times):
            started = time.perf_counter()
            list(pool.map(np.max, arrays))
            best = max(best, threads * READ_BYTES / (time.perf_counter() - started))
    return best / 1e9


@click.command(context_settings={"show_default": True}, help=__doc__)
@click.option(
    "--bundle", required=True, type=click.Path(exists=True, path_type=Path), help="With fp32 graphs."
)
@click.option("--forms", default="fp32,8/32,4/32,4/32/zero,4/64,4/128,4/32/float", help="Forms of weights.")
@click.option("--rows", default="1,2,4,8,16", help="Numbers of tokens in a step.")
@click.option("--rounds", default=15, help="Steps of each form and number.")
@click.option("--threads", default=2, help="Threads.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures to a file.")
def main(bundle: Path, forms: str, rows: str, rounds: int, threads: int, json_file: Path | None) -> None:
    """See the docstring of the module."""
    claim_pool(onnxruntime, threads, global_pool=True)
    shapes, counts = product_shapes(bundle), [int(word) for word in rows.split(",")]
    opened = {text: open_products(shapes, Form.parse(text)) for text in forms.split(",")}
    speed, figures = read_speed(threads), dict[str, dict[str, Any]]()
    taken: dict[str, dict[int, list[float]]] = {name: {count: [] for count in counts} for name in opened}
    for count in track(counts, "tokens in a step", console=Console(stderr=True)):
        calls = {name: partial(run, count) for name, (run, _) in opened.items()}
        for name, seconds, _ in take_turns(calls, rounds, seed=np.random.default_rng(count)):
            taken[name][count].append(seconds)
    for name, (_, total) in opened.items():
        medians = {count: float(np.median(taken[name][count])) for count in counts}
        rate = total / medians[counts[0]] / 1e9
        row: dict[str, Any] = {"MB": round(total / 1e6, 1), "GB/s": round(rate, 1)}
        row["of read"] = round(rate / speed, 3)
        row |= {f"ms, {count}": round(1e3 * medians[count], 2) for count in counts}
        for count in counts[1:]:
            row[f"tokens, {count}"] = round(count * medians[counts[0]] / medians[count] / counts[0], 2)
        figures[name] = row
    print_table(f"{len(shapes)} products; memory is read with {speed:.1f} GB/s", figures)
    if json_file is not None:
        facts = {"command": "benchmarks/few_bit_products.py", "products": len(shapes), "rounds": rounds}
        facts |= {"threads": threads, "read_gb_s": round(speed, 1), "machine": machine_facts()}
        write_json(json_file, {**facts, "forms": figures})


if __name__ == "__main__":
    main()
