"""Worker of benchmarks/decoder_rivals.py: greedy tokens of llama.cpp, a line of JSON for a line of JSON.

A script for the rival's own environment, where offramp is not: `worker_llama.py FILE THREADS CONTEXT KV`, or
`worker_llama.py --quantize FROM TO KIND`.
"""

from __future__ import annotations

import ctypes
import importlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

FILE_TYPES = {"Q8_0": 7, "Q4_0": 2}  # llama.h: enum llama_ftype
CACHE_TYPES = {"f32": 0, "f16": 1}  # ggml.h: enum ggml_type


def quantize(lib: Any, source: str, target: str, kind: str) -> None:
    """Quantise a file of fp32 weights; a kind that ends in _pure keeps no matrix in more bits."""
    params = lib.llama_model_quantize_default_params()
    params.ftype, params.pure = FILE_TYPES[kind.removesuffix("_pure")], kind.endswith("_pure")
    if lib.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama.cpp did not quantise {source}")


def opened(lib: Any, file: str, threads: int, context: int, kv: str) -> Callable[[Sequence[int], bool], int]:
    """What finds the token after some, of the model in a GGUF file; `fresh` forgets what was before them."""
    model = lib.llama_model_load_from_file(file.encode(), lib.llama_model_default_params())
    params = lib.llama_context_default_params()
    # A prompt of any length is one call.
    params.n_ctx = params.n_batch = context
    params.n_threads = params.n_threads_batch = threads
    params.type_k = params.type_v = CACHE_TYPES[kv]
    held = lib.llama_init_from_model(model, params)
    if not held:
        raise RuntimeError(f"llama.cpp did not open {file}")
    words = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    memory = lib.llama_get_memory(held)
    numpy = importlib.import_module("numpy")

    def after(ids: Sequence[int], fresh: bool) -> int:
        if fresh:
            lib.llama_memory_clear(memory, False)
        array = (lib.llama_token * len(ids))(*ids)  # the batch points to it
        if failed := lib.llama_decode(held, lib.llama_batch_get_one(array, len(ids))):
            raise RuntimeError(f"llama_decode returned {failed} for {len(ids)} tokens")
        return int(numpy.ctypeslib.as_array(lib.llama_get_logits_ith(held, -1), (words,)).argmax())

    return after


def main() -> None:
    """Quantise a file, or tell once what runs and then answer every line."""
    # The answers alone go to the pipe: whatever the library prints goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    lib = importlib.import_module("llama_cpp")
    if sys.argv[1] == "--quantize":
        return quantize(lib, *sys.argv[2:])
    file, threads, context, kv = sys.argv[1:]
    after = opened(lib, file, int(threads), int(context), kv)
    facts = {"llama-cpp-python": lib.__version__, "built for": lib.llama_print_system_info().decode()}
    print(json.dumps(facts), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        ids: list[int] = []
        ends = []
        start = time.perf_counter()
        for i in range(asked["tokens"]):
            ids.append(after(ids[-1:] or asked["prompt_ids"], not i))
            ends.append(time.perf_counter())
        seconds = [later - earlier for earlier, later in itertools.pairwise(ends)]
        told = {"first_s": ends[0] - start, "seconds": seconds, "ids": ids}
        print(json.dumps(told), file=answers, flush=True)


if __name__ == "__main__":
    main()
