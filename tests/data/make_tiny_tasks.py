"""Write tests/data/tiny_tasks: a random network of a few kilobytes for each task beside classification.

Beside each bundle the same network as single graphs, in a folder NAME_baselines.

    python tests/data/make_tiny_tasks.py          (needs onnx; the bundles are checked in, tests need only
    onnxruntime)

The blocks are those of tiny_bundle, and the tokenizer cuts words into pieces. Regression has gates. Tests may
use no number of them, only relations, so that any exporter's bundle can take its place.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from make_tiny_bundle import (
    BLOCKS,
    FLOWS,
    GATE,
    HIDDEN,
    LONGEST,
    NEXT_FLOWS,
    SHARED,
    VOCABULARY,
    Graph,
    baselines,
    embed,
    run_blocks,
)
from make_tiny_bundle import TOKENS as INPUTS
from onnx import TensorProto, helper
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from offramp.runtime.bundle.manifest import (
    EMBEDDING,
    MULTI_LABEL,
    REGRESSION,
    TOKENS,
    WORD_STARTS,
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

PIECES = [*VOCABULARY, "##s", "##ly", "##er", "paris", "ann", "##a", "."]
TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
EMOTIONS, THRESHOLDS = ("anger", "joy", "fear"), (0.5, 0.4, 0.7)
SIZE = 8  # of an embedding
SURE = 1e4  # certainty of a token that begins no word
WORDS = Tensor("words", "float32", ("batch", "seq"))
LOGITS = Tensor("logits", "float32", ("batch", 2))

# The exit of a task adds `answer`, and `logits` if it has any, to a graph; the arguments after the graph are
# the hidden state [batch, seq, hidden] and that pooled [batch, hidden].
Exit = Callable[[Graph, str, str], None]


def labels_exit(g: Graph, hidden: str, pooled: str) -> None:
    answer = g.add("MatMul", pooled, g.matrix(HIDDEN, len(EMOTIONS), 2.5), to="answer")
    limits = np.array([[math.log(share / (1 - share)) for share in THRESHOLDS]], np.float32)
    distance = g.add("Abs", g.add("Sub", answer, g.constant(limits)))
    certain(g, g.add("ReduceMin", distance, g.ints(1), keepdims=1))


def tokens_exit(g: Graph, hidden: str, pooled: str) -> None:
    answer = g.add("MatMul", hidden, g.matrix(HIDDEN, len(TAGS), 2.5), to="answer")
    g.nodes.append(helper.make_node("TopK", [answer, g.ints(2)], ["top", "top_labels"]))
    first, second = (
        g.add("Squeeze", g.add("Slice", "top", g.ints(at), g.ints(at + 1), g.ints(2)), g.ints(2))
        for at in range(2)
    )
    margin = g.add("Add", g.add("Sub", first, second), "words")  # [batch, seq]
    certain(g, g.add("ReduceMin", margin, g.ints(1), keepdims=1))


def certain(g: Graph, margin: str) -> None:
    """Logits of a decision and of its nearest alternative; margin [batch, 1]."""
    g.add("Concat", margin, g.add("Mul", margin, g.constant(np.float32(0))), axis=1, to="logits")


def value_exit(g: Graph, hidden: str, pooled: str) -> None:
    # The head is the same in all segments, so that values settle.
    g.add("MatMul", pooled, g.constant(np.linspace(-2, 2, HIDDEN, dtype=np.float32)[:, None]), to="answer")


def embedding_exit(g: Graph, hidden: str, pooled: str) -> None:
    projection = np.random.default_rng(9).normal(0, 1, (HIDDEN, SIZE)).astype(np.float32)
    vector = g.add("MatMul", pooled, g.constant(projection))
    g.add("Div", vector, g.add("ReduceL2", vector, g.ints(1), keepdims=1), to="answer")


def stem(path: Path, words: bool) -> Variant:
    g = Graph(0)
    embed(g, len(PIECES))
    if words:
        begun = "begun"
        g.nodes.append(helper.make_node("Cast", [WORD_STARTS.name], [begun], to=TensorProto.FLOAT))
        g.add("Mul", g.add("Sub", g.constant(np.float32(1)), begun), g.constant(np.float32(SURE)), to="words")
    inputs, outputs = ([*INPUTS, WORD_STARTS], [WORDS]) if words else (INPUTS, [])
    return g.save(path, inputs, [FLOWS[0], *SHARED, *outputs])


def segment(path: Path, number: int, exit: Exit, signals: list[Tensor], gates: bool, words: bool) -> Variant:
    g, last = Graph(number + 1), number == len(BLOCKS) - 1
    hidden, pooled = run_blocks(g, number)
    exit(g, hidden, pooled)
    outputs = list(signals) if last else [NEXT_FLOWS[0], *signals]
    if gates and not last:
        score = g.add("MatMul", pooled, g.matrix(HIDDEN, 1, 2.0))
        g.add("Sigmoid", g.add("Squeeze", score, g.ints(1)), to="gate")
        outputs.append(GATE)
    return g.save(path, [FLOWS[0], *SHARED, *([WORDS] if words else [])], outputs)


def tokenizer(path: Path) -> None:
    pieces = Tokenizer(models.WordPiece({piece: at for at, piece in enumerate(PIECES)}, unk_token="[UNK]"))
    pieces.normalizer = normalizers.Lowercase()
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    pieces.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    pieces.save(str(path))


def write(
    folder: Path,
    task: str,
    exit: Exit,
    signals: list[Tensor],
    rule: RuleSpec,
    labels: tuple[str, ...] = (),
    thresholds: tuple[float, ...] = (),
) -> None:
    folder.mkdir(exist_ok=True, parents=True)
    words, gates = task == TOKENS, task == REGRESSION
    tokenizer(folder / "tokenizer.json")
    graphs = [Segment("stem", (), Macs(), {"fp32": stem(folder / "stem.onnx", words)})]
    for number, blocks in enumerate(BLOCKS):
        name = f"segment_{number:02d}"
        graph = segment(folder / f"{name}.onnx", number, exit, signals, gates, words)
        macs = Macs(token=len(blocks) * HIDDEN**2, pair=len(blocks) * 2 * HIDDEN, row=HIDDEN)
        graphs.append(Segment(name, blocks, macs, {"fp32": graph}))
    files = {}
    for path in sorted(folder.iterdir()):
        if path.name != "manifest.json":
            data = path.read_bytes()
            files[path.name] = FileFact(hashlib.sha256(data).hexdigest(), len(data))
    manifest = Manifest(
        format=1,
        task=task,
        labels=labels,
        input=TextInput("tokenizer.json", "", 0, LONGEST),
        hidden_size=HIDDEN,
        vocab_size=len(PIECES),
        blocks=BLOCKS[-1][-1],
        stem=graphs[0],
        segments=tuple(graphs[1:]),
        rule=rule,
        points=(OperatingPoint("default", rule, "fp32", "none", "dev", {"agreement": 0.5}),),
        files=files,
        provenance={"generator": "tests/data/make_tiny_tasks.py", "weights": "random"},
        thresholds=thresholds,
    )
    (folder / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    kinds = ("monolith", "truncated_01", *(["nested"] if gates else []))
    baselines(folder, folder.with_name(f"{folder.name}_baselines"), signals, labels, kinds)


def answer(*shape: int | str) -> Tensor:
    return Tensor("answer", "float32", ("batch", *shape))


def main(folder: Path) -> None:
    sure = RuleSpec("max_probability", {"threshold": 0.7})
    close = RuleSpec("settled", {"threshold": 0.05})
    labels, tags = [LOGITS, answer(len(EMOTIONS))], [LOGITS, answer("seq", len(TAGS))]
    write(folder / "multi_label", MULTI_LABEL, labels_exit, labels, sure, EMOTIONS, THRESHOLDS)
    write(folder / "tokens", TOKENS, tokens_exit, tags, sure, TAGS)
    write(folder / "regression", REGRESSION, value_exit, [answer(1)], close)
    write(folder / "embedding", EMBEDDING, embedding_exit, [answer(SIZE)], close)


if __name__ == "__main__":
    main(Path(__file__).with_name("tiny_tasks"))
