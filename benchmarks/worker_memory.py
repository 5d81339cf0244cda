"""Worker of benchmarks/decoders.py memory: a fresh process that reads half of a context and writes the rest.

    python -m offramp.benchmarks.worker_memory segments|"one graph" SCRATCH VARIANT TEXTS CONTEXT

It prints its resident set at the end and at its peak, in MB (10^6 bytes), as the kernel counts them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import onnxruntime
from tokenizers import Tokenizer

from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.engines.ort_decoder import DecoderEngine
from offramp.runtime.engines.threads import claim
from offramp.runtime.generate import generate


def ids_of(bundle: Path, texts: Path, count: int) -> list[int]:
    """So many tokens of as many texts as that takes."""
    tokenizer, found = Tokenizer.from_file(str(bundle / "tokenizer.json")), list[int]()
    with texts.open(encoding="utf-8") as lines:
        while len(found) < count:
            found += tokenizer.encode(json.loads(next(lines))["text"]).ids
    return found[:count]


def resident() -> Iterator[float]:
    """Of this process, now and at its peak."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(("VmRSS", "VmHWM")):
            yield int(line.split()[1]) * 1024 / 1e6


def main(kind: str, scratch: str, variant: str, texts: str, context: str) -> None:
    folder, total = Path(scratch), int(context)
    ids = ids_of(folder / "auto", Path(texts), total // 2)
    pool = claim(onnxruntime, None, True)
    if kind == "segments":
        engine = DecoderEngine(onnxruntime, open_bundle(folder / "auto"), variant, pool)
        written = sum(1 for _ in generate(engine, ids, total - len(ids), stop=()))
    else:
        from offramp.benchmarks.whole import OneGraph

        one = OneGraph(folder / ("one.onnx" if variant == "fp32" else f"one_{variant}.onnx"), pool)
        written = sum(1 for _ in one.generate(ids, total - len(ids)))
    assert written == total - len(ids)
    peak, now = resident()
    print(now, peak)


if __name__ == "__main__":
    main(*sys.argv[1:])
