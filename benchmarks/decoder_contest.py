"""Who decodes at a precision, each as a function from prompt to answer: for decoders.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import onnxruntime

from offramp.benchmarks.decoder_rivals import Genai, Llama, Rival, genai_model, llama_model
from offramp.benchmarks.decoder_turns import Answer, Says, Writes, clocked
from offramp.benchmarks.whole import OneGraph
from offramp.runtime import load
from offramp.runtime.engines.threads import claim
from offramp.runtime.generate import generate
from offramp.runtime.generator import Writer

GGUF = {"fp32": "F32", "int8": "Q8_0", "int4": "Q4_0_pure"}  # of llama.cpp's kinds the one of the same bits
THREADS = 2
FIELD = OURS, ONE, GENAI, LLAMA = "offramp", "one graph", "onnxruntime-genai", "llama.cpp"


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
def cuts(scratch: Path, variant: str, order: Sequence[str]) -> Iterator[dict[str, Writes]]:
    """Contenders by name, opened in this order: "one graph", and bundles of the scratch folder."""
    found: dict[str, Writes] = {}
    with ExitStack() as stack:
        for name in order:
            if name == ONE:
                found[name] = OneGraph(whole_of(scratch, variant), claim(onnxruntime, None, True)).generate
                continue
            opened = load(scratch / name, rule="never", variant=variant, threads=None, share=False)
            writer = stack.enter_context(opened)
            assert isinstance(writer, Writer)
            found[name] = writing(writer)
        yield found


@contextmanager
def field(
    model: Path, scratch: Path, variant: str, facts: dict[str, Any], order: Sequence[str]
) -> Iterator[dict[str, Says]]:
    """Contenders by name, FIELD, opened in this order; what rivals said of themselves goes to `facts`."""
    found: dict[str, Says] = {}
    with ExitStack() as stack:
        for name in order:
            if name in (OURS, ONE):
                mine = "auto" if name == OURS else ONE
                found[name] = saying(stack.enter_context(cuts(scratch, variant, [mine]))[mine])
                continue
            rival: Rival
            if name == GENAI:
                rival = stack.enter_context(Genai(genai_model(model, variant, scratch / "genai"), THREADS))
            else:
                kind = GGUF[variant]
                rival = stack.enter_context(Llama(llama_model(model, kind, scratch / "llama"), THREADS))
            facts[name], found[name] = rival.facts, asking(rival)
        yield found
