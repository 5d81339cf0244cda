"""Who decodes at a precision, each as a function from prompt to answer: for decoders.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import onnxruntime

from offramp.benchmarks.decoder_rivals import Genai, Llama, Rival, genai_model, llama_model
from offramp.benchmarks.decoder_turns import Answer, Order, Says, Writes, clocked
from offramp.benchmarks.whole import OneGraph
from offramp.runtime import load
from offramp.runtime.engines.threads import claim
from offramp.runtime.generate import generate
from offramp.runtime.writer import Writer

GGUF = {"fp32": "F32", "int8": "Q8_0", "int4": "Q4_0_pure"}  # of llama.cpp's kinds the one of the same bits
THREADS = 2


def asking(rival: Rival) -> Says:
    """A worker's answers, by its own clock."""

    def says(prompt: list[int], most: int) -> Answer:
        told = rival.greedy(prompt, most)
        return Answer(list(told.ids), told.first_s, list(told.seconds))

    return says


def writing(writer: Writer) -> Writes:
    """Full depth by a session's engine."""
    return lambda prompt, most: (t.id for t in generate(writer.decoder, prompt, most, stop=()))


def whole_of(scratch: Path, variant: str) -> Path:
    """The one graph's file."""
    return scratch / ("one.onnx" if variant == "fp32" else f"one_{variant}.onnx")


def saying(writes: Writes) -> Says:
    """Answers of one in this process."""
    return lambda prompt, most: clocked(writes(prompt, most))


@contextmanager
def cuts(scratch: Path, variant: str, names: Sequence[str], order: Order) -> Iterator[dict[str, Writes]]:
    """Contenders of full by name, opened in this order: the one graph, and the bundles of these names."""
    found: dict[str, Writes] = {}
    with ExitStack() as stack:
        for name in sorted(["one graph", *names], key=order):
            if name == "one graph":
                found[name] = OneGraph(whole_of(scratch, variant), claim(onnxruntime, None, True)).generate
                continue
            opened = load(scratch / name, rule="never", variant=variant, threads=None, share=False)
            writer = stack.enter_context(opened)
            assert isinstance(writer, Writer)
            found[name] = writing(writer)
        yield {name: found[name] for name in ("one graph", *names)}


@contextmanager
def field(
    model: Path, scratch: Path, variant: str, facts: dict[str, Any], order: Order
) -> Iterator[dict[str, Says]]:
    """Contenders by name: the bundle "auto" of the scratch folder, its one graph, onnxruntime-genai and
    llama.cpp; what the rivals said of themselves goes to `facts`.
    """
    with ExitStack() as stack:
        ours = stack.enter_context(cuts(scratch, variant, ["auto"], order))
        genai = stack.enter_context(Genai(genai_model(model, variant, scratch / "genai"), THREADS))
        llama = stack.enter_context(Llama(llama_model(model, GGUF[variant], scratch / "llama"), THREADS))
        facts[variant] = {"genai": genai.facts, "llama": llama.facts}
        yield {
            "offramp": saying(ours["auto"]),
            "one graph": saying(ours["one graph"]),
            "onnxruntime-genai": asking(genai),
            "llama.cpp": asking(llama),
        }
