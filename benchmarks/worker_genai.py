"""Worker of benchmarks/decoder_rivals.py: greedy tokens of onnxruntime-genai, a line of JSON for a line of
JSON.

A script for the rival's own environment, where offramp is not: `worker_genai.py FOLDER THREADS [PROFILE]`,
PROFILE being how the name of ONNX Runtime's profile begins.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any


def rare(folder: str) -> int:
    """The last token of the vocabulary, in the place of the model's stop: without one it takes a stop from
    elsewhere.
    """
    with open(os.path.join(folder, "genai_config.json"), encoding="utf-8") as file:
        return int(json.load(file)["model"]["vocab_size"]) - 1


def opened(
    folder: str, threads: int, stop: int, profile: str | None = None
) -> Callable[[Sequence[int], int], Any]:
    """What begins a generator of so many tokens after a prompt, of the model in a folder of the builder."""
    genai = importlib.import_module("onnxruntime_genai")
    config = genai.Config(folder)
    options: dict[str, Any] = {"intra_op_num_threads": threads}
    if profile is not None:
        options["enable_profiling"] = profile
    asked = {"eos_token_id": stop, "decoder": {"session_options": options}}
    config.overlay(json.dumps({"model": asked}))
    model = genai.Model(config)

    def begin(prompt: Sequence[int], tokens: int) -> Any:
        params = genai.GeneratorParams(model)
        # max_length is also how many keys and values the generator keeps room for.
        params.set_search_options(do_sample=False, max_length=len(prompt) + tokens)
        generator = genai.Generator(model, params)
        generator.append_tokens(list(prompt))
        return generator

    return begin


def main() -> None:
    """Tell once what runs, then answer every line."""
    # The answers alone go to the pipe: whatever the library prints goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    stop = rare(sys.argv[1])
    begin = opened(sys.argv[1], int(sys.argv[2]), stop, *sys.argv[3:])
    packages = ("onnxruntime-genai", "onnxruntime")
    print(json.dumps({name: importlib.metadata.version(name) for name in packages}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        ids: list[int] = []
        ends = []
        start = time.perf_counter()
        generator = begin(asked["prompt_ids"], asked["tokens"])
        for _ in range(asked["tokens"]):
            generator.generate_next_token()
            ids.append(int(generator.get_next_tokens()[0]))
            ends.append(time.perf_counter())
        if stop in ids[:-1]:
            raise RuntimeError(f"token {stop} came, and onnxruntime-genai stops after it")
        seconds = [later - earlier for earlier, later in itertools.pairwise(ends)]
        told = {"first_s": ends[0] - start, "seconds": seconds, "ids": ids}
        print(json.dumps(told), file=answers, flush=True)


if __name__ == "__main__":
    main()
