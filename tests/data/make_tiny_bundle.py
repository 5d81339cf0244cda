"""Write tests/data/tiny_bundle: a random network of a few kilobytes with most kinds of tensor of a bundle.

    python tests/data/make_tiny_bundle.py          (needs onnx; the bundle is checked in, tests need only
    onnxruntime)

Beside it tests/data/tiny_baselines: the same network as single graphs, joined from the bundle's graphs, with
their list.

Three segments of 1, 2 and 1 blocks, width 16, mean pooling, evidence, gates at the first two; fp32, and int8
with weights that really are 8 bits. Tests may use no number of it, only relations, so that any exporter's
bundle can take its place.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, checker, compose, helper, numpy_helper
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from offramp.runtime.bundle.manifest import (
    NEXT,
    FileFact,
    Macs,
    Manifest,
    OperatingPoint,
    RuleSpec,
    Segment,
    Tensor,
    TextInput,
    Variant,
)

HIDDEN, LABELS, LONGEST = 16, ("negative", "positive"), 48
CLASSES = len(LABELS)
EVIDENCE = 2 * CLASSES + 1
BLOCKS = ((1,), (2, 3), (4,))
WORDS = [
    "the",
    "a",
    "film",
    "plot",
    "scene",
    "was",
    "is",
    "and",
    "very",
    "quite",
    "not",
    "at",
    "all",
    "good",
    "fine",
    "lovely",
    "warm",
    "bad",
    "poor",
    "awful",
    "cold",
    "dull",
]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]

TOKENS = [
    Tensor(name, "int64", ("batch", "seq")) for name in ("input_ids", "attention_mask", "token_type_ids")
]
FLOWS = [
    Tensor("hidden", "float32", ("batch", "seq", HIDDEN)),
    Tensor("evidence", "float32", ("batch", EVIDENCE)),
]
NEXT_FLOWS = [Tensor(NEXT + flow.name, flow.dtype, flow.shape) for flow in FLOWS]
SHARED = [Tensor("mask", "float32", ("batch", 1, 1, "seq")), Tensor("pool", "float32", ("batch", 1, "seq"))]
LOGITS, GATE = Tensor("logits", "float32", ("batch", CLASSES)), Tensor("gate", "float32", ("batch",))


class Graph:
    """Nodes and weights, as they are added."""

    def __init__(self, seed: int, eight_bits: bool = False) -> None:
        self.nodes, self.weights = [], []
        self.random, self.eight_bits = np.random.default_rng(seed), eight_bits

    def add(self, kind: str, *inputs: str, to: str = "", **facts: object) -> str:
        output = to or f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], **facts))
        return output

    def constant(self, array: np.ndarray) -> str:
        name = f"constant_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def matrix(self, rows: int, columns: int, spread: float) -> str:
        """A random matrix; of int8 variants: int8 numbers with one scale, float32 in the graph."""
        values = self.random.normal(0, spread, (rows, columns)).astype(np.float32)
        if not self.eight_bits:
            return self.constant(values)
        scale = np.float32(np.abs(values).max() / 127)
        numbers = self.constant(np.round(values / scale).astype(np.int8))
        return self.add("DequantizeLinear", numbers, self.constant(np.array(scale)))

    def ints(self, *numbers: int) -> str:
        return self.constant(np.array(numbers, np.int64))

    def save(self, path: Path, inputs: list[Tensor], outputs: list[Tensor]) -> Variant:
        types = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
        ends = [
            [helper.make_tensor_value_info(t.name, types[t.dtype], list(t.shape)) for t in side]
            for side in (inputs, outputs)
        ]
        graph = helper.make_graph(self.nodes, path.stem, *ends, initializer=self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        checker.check_model(model, full_check=True)
        path.write_bytes(model.SerializeToString())
        return Variant(path.name, tuple(inputs), tuple(outputs))


def embed(g: Graph, vocabulary: int) -> str:
    """Hidden, mask and pool of a stem; gives 1 for each token that is not padding, float32 [batch, seq]."""
    words = g.add("Gather", g.matrix(vocabulary, HIDDEN, 0.8), "input_ids")
    g.add(
        "Add", words, g.add("Gather", g.matrix(2, HIDDEN, 0.3), "token_type_ids"), to="hidden"
    )  # [batch, seq, hidden]
    real = "real"  # by hand: "to" is also the name of Cast's attribute
    g.nodes.append(helper.make_node("Cast", ["attention_mask"], [real], to=TensorProto.FLOAT))
    absent = g.add("Sub", g.constant(np.float32(1.0)), real)
    low = g.add("Mul", absent, g.constant(np.finfo(np.float32).min))
    g.add("Unsqueeze", low, g.ints(1, 2), to="mask")  # [batch, 1, 1, seq]
    share = g.add("Div", real, g.add("ReduceSum", real, g.ints(1), keepdims=1))
    g.add("Unsqueeze", share, g.ints(1), to="pool")  # [batch, 1, seq]
    return real


def stem(path: Path) -> Variant:
    g = Graph(0)
    real = embed(g, len(VOCABULARY))
    nothing = g.add(
        "Mul",
        g.add("ReduceSum", real, g.ints(1), keepdims=1),
        g.constant(np.zeros((1, EVIDENCE), np.float32)),
    )
    g.add("Identity", nothing, to="evidence")
    return g.save(path, TOKENS, [*FLOWS, *SHARED])


def run_blocks(g: Graph, number: int) -> tuple[str, str]:
    """The blocks of a segment; gives its hidden state [batch, seq, hidden], and pooled [batch, hidden]."""
    hidden, last = "hidden", number == len(BLOCKS) - 1
    for block in BLOCKS[number]:
        end = "" if last or block != BLOCKS[number][-1] else "next_hidden"
        mixed = g.add("MatMul", hidden, g.add("Transpose", hidden, perm=[0, 2, 1]))
        scores = g.add("Add", g.add("Unsqueeze", mixed, g.ints(1)), "mask")  # [batch, 1, seq, seq]
        weights = g.add("Squeeze", g.add("Softmax", scores, axis=-1), g.ints(1))
        change = g.add("MatMul", g.add("MatMul", weights, hidden), g.matrix(HIDDEN, HIDDEN, 0.4))
        hidden = g.add(
            "Add", g.add("Mul", hidden, g.constant(np.float32(0.7))), g.add("Tanh", change), to=end
        )
    return hidden, g.add("Squeeze", g.add("MatMul", "pool", hidden), g.ints(1))


def segment(path: Path, number: int, eight_bits: bool) -> Variant:
    g, last = Graph(number + 1, eight_bits), number == len(BLOCKS) - 1
    _, pooled = run_blocks(g, number)
    g.eight_bits = False  # the decision is taken in full precision
    g.add("MatMul", pooled, g.matrix(HIDDEN, CLASSES, 2.5), to="logits")
    if last:
        return g.save(path, [FLOWS[0], *SHARED], [LOGITS])
    odds = g.add("Softmax", "logits", axis=-1)
    seen = g.add("Concat", odds, odds, g.add("ReduceMax", odds, g.ints(1), keepdims=1), axis=1)
    evidence = g.add("Add", "evidence", seen, to="next_evidence")
    read = g.add("Concat", pooled, evidence, axis=1)
    score = g.add("MatMul", read, g.matrix(HIDDEN + EVIDENCE, 1, 1.0))
    g.add("Sigmoid", g.add("Squeeze", score, g.ints(1)), to="gate")
    return g.save(path, [*FLOWS, *SHARED], [*NEXT_FLOWS, LOGITS, GATE])


def tokenizer(path: Path) -> None:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    words.save(str(path))


def chain(bundle: Path, variant: str, exits: int) -> onnx.GraphProto:
    """The stem and the first segments as one graph: a segment's names get segment_XX/ in front."""
    ending = "" if variant == "fp32" else f"_{variant}"
    whole = onnx.load(bundle / "stem.onnx").graph
    names = {entry.name: entry.name for entry in whole.output}  # in a segment: in the chain
    del whole.output[:]
    for number in range(exits):
        prefix = f"segment_{number:02d}/"
        part = onnx.load(bundle / f"segment_{number:02d}{ending}.onnx").graph
        part_inputs = {entry.name for entry in part.input}
        inner = compose.add_prefix_graph(part, prefix)
        for node in inner.node:
            for at, name in enumerate(node.input):
                plain = name.removeprefix(prefix)
                node.input[at] = names[plain] if plain in part_inputs else name
        whole.node.extend(inner.node)
        whole.initializer.extend(inner.initializer)
        names |= {flow.name: prefix + NEXT + flow.name for flow in FLOWS}
    return whole


def save_baseline(graph: onnx.GraphProto, path: Path, outputs: list[onnx.ValueInfoProto]) -> None:
    graph.name = path.stem
    graph.output.extend(outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())


def baselines(
    bundle: Path,
    folder: Path,
    outputs: list[Tensor],
    labels: tuple[str, ...],
    kinds: tuple[str, ...] = ("monolith", "monolith_int8", "nested", "truncated_01"),
) -> None:
    """Monolith in both variants, the first exit alone, and a graph that answers as the gate rule does.

    That one runs everything and picks: a stand-in for nested branches, with their inputs and outputs.
    outputs: those of the last segment, the answer last, which alone the nested graph gives.
    """
    folder.mkdir(exist_ok=True)
    last = len(BLOCKS)
    float32, int64 = TensorProto.FLOAT, TensorProto.INT64
    listed = []
    for name in kinds:
        kind, _, ending = name.partition("_")
        variant, number = (
            ("int8" if ending == "int8" else "fp32"),
            (int(ending) if kind == "truncated" else last),
        )
        graph = chain(bundle, variant, number)
        given = outputs[-1:] if kind == "nested" else outputs
        results = {tensor.name: f"segment_{number - 1:02d}/{tensor.name}" for tensor in given}
        infos = [helper.make_tensor_value_info(t.name, float32, list(t.shape)) for t in given]
        if kind == "nested":
            ((answer, result),) = results.items()
            graph.input.append(helper.make_tensor_value_info("threshold", float32, []))
            infos.append(helper.make_tensor_value_info("exit", int64, [1]))
            numbers = [numpy_helper.from_array(np.array([k + 1], np.int64), f"exit_{k}") for k in range(last)]
            graph.initializer.extend(numbers)
            exit = f"exit_{last - 1}"
            for k in reversed(range(last - 1)):
                leaves = f"leaves_{k}"
                graph.node.append(
                    helper.make_node("Greater", [f"segment_{k:02d}/gate", "threshold"], [leaves])
                )
                for value, choice in ((result, f"segment_{k:02d}/{answer}"), (exit, f"exit_{k}")):
                    graph.node.append(helper.make_node("Where", [leaves, choice, value], [f"{value}_{k}"]))
                result, exit = f"{result}_{k}", f"{exit}_{k}"
            graph.node.append(helper.make_node("Identity", [exit], ["exit"]))
            results[answer] = result
        for output, result in results.items():
            graph.node.append(helper.make_node("Identity", [result], [output]))
        save_baseline(graph, folder / f"{name}.onnx", infos)
        data = (folder / f"{name}.onnx").read_bytes()
        facts = {"name": name, "kind": kind, "variant": variant, "file": f"{name}.onnx", "exit": number}
        listed.append(facts | {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)})
    value = {"format": 1, "labels": labels, "graphs": listed}
    (folder / "baselines.json").write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def main(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    tokenizer(folder / "tokenizer.json")
    graphs = [Segment("stem", (), Macs(), {"fp32": stem(folder / "stem.onnx")})]
    for number, blocks in enumerate(BLOCKS):
        name = f"segment_{number:02d}"
        variants = {
            "fp32": segment(folder / f"{name}.onnx", number, eight_bits=False),
            "int8": segment(folder / f"{name}_int8.onnx", number, eight_bits=True),
        }
        macs = Macs(
            token=len(blocks) * HIDDEN**2 + HIDDEN, pair=len(blocks) * 2 * HIDDEN, row=HIDDEN * (CLASSES + 1)
        )
        graphs.append(Segment(name, blocks, macs, variants))
    files = {}
    for path in sorted(folder.iterdir()):
        if path.name != "manifest.json":
            data = path.read_bytes()
            files[path.name] = FileFact(hashlib.sha256(data).hexdigest(), len(data))
    gate, patience = RuleSpec("gate", {"threshold": 0.5}), RuleSpec("patience", {"patience": 1.0})
    manifest = Manifest(
        format=1,
        task="text-classification",
        labels=LABELS,
        input=TextInput("tokenizer.json", "", 0, LONGEST),
        hidden_size=HIDDEN,
        vocab_size=len(VOCABULARY),
        blocks=BLOCKS[-1][-1],
        stem=graphs[0],
        segments=tuple(graphs[1:]),
        rule=gate,
        points=(
            OperatingPoint("default", gate, "fp32", "none", "dev", {"accuracy": 0.5}),
            OperatingPoint("fast", patience, "int8", "none", "dev", {"accuracy": 0.5}),
        ),
        files=files,
        provenance={"generator": "tests/data/make_tiny_bundle.py", "weights": "random"},
    )
    (folder / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")


if __name__ == "__main__":
    here = Path(__file__).parent
    main(here / "tiny_bundle")
    baselines(here / "tiny_bundle", here / "tiny_baselines", [LOGITS], LABELS)
