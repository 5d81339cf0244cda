"""Scripts of decoder benchmarks that run in separate processes.

    workers.py genai FOLDER THREADS             # onnxruntime-genai: a line of JSON for a line of JSON
    workers.py llama FILE THREADS CONTEXT KV    # llama.cpp: the same
    workers.py quantize FROM TO KIND            # llama.cpp: quantise a file of fp32 weights
    workers.py round                            # one round of decoders.py full or baselines: the same
    workers.py memory segments|monolith SCRATCH VARIANT TEXTS CONTEXT    # prints resident and peak MB

genai, llama and quantize run in a baseline's environment, without offramp and its dependencies. Modules
outside the standard library are therefore imported inside the functions that use them.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

FILE_TYPES = {"Q8_0": 7, "Q4_0": 2}  # llama.h: enum llama_ftype
CACHE_TYPES = {"f32": 0, "f16": 1}  # ggml.h: enum ggml_type
Answer = Callable[[list[int], int], Iterable[int]]  # prompt, number of tokens -> ids, as they are generated


def serve(facts: dict[str, str], answer: Answer, answers: TextIO) -> None:
    """Answer requests on stdin until it ends: token ids, and the time of each token, as JSON lines.

    facts: versions, the first line that is written. answers: the stream to write to.
    """
    print(json.dumps(facts), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        ids: list[int] = []
        ends = []
        start = time.perf_counter()
        for token in answer(request["prompt_ids"], request["tokens"]):
            ids.append(token)
            ends.append(time.perf_counter())
        steps = [later - earlier for earlier, later in itertools.pairwise(ends)]
        print(json.dumps({"ids": ids, "first_s": ends[0] - start, "step_s": steps}), file=answers, flush=True)


def redirect_stdout() -> TextIO:
    """A stream to the process's stdout for answers alone; all other output to stdout goes to stderr
    afterwards.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def serve_genai(folder: str, threads: str) -> None:
    """Answer requests on stdin with onnxruntime-genai, from a folder that its builder wrote."""
    answers = redirect_stdout()
    library = importlib.import_module("onnxruntime_genai")
    # The last id of the vocabulary replaces the model's stop token: without an id here the library reads one
    # from another file.
    with open(os.path.join(folder, "genai_config.json"), encoding="utf-8") as file:
        stop = int(json.load(file)["model"]["vocab_size"]) - 1
    config = library.Config(folder)
    options = {"session_options": {"intra_op_num_threads": int(threads)}}
    config.overlay(json.dumps({"model": {"eos_token_id": stop, "decoder": options}}))
    model = library.Model(config)
    tokenizer = library.Tokenizer(model)  # which an application needs, and the other candidates hold as well

    def answer(prompt: list[int], tokens: int) -> Iterable[int]:
        params = library.GeneratorParams(model)
        # max_length is also the number of keys and values for which the generator has memory.
        params.set_search_options(do_sample=False, max_length=len(prompt) + tokens)
        generator = library.Generator(model, params)
        generator.append_tokens(list(prompt))
        for number in range(tokens):
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            yield token
            if token == stop and number + 1 < tokens:
                raise RuntimeError(f"token {stop} came, and onnxruntime-genai stops after it")

    packages = ("onnxruntime-genai", "onnxruntime")
    serve({name: importlib.metadata.version(name) for name in packages}, answer, answers)
    del tokenizer


def serve_llama(file: str, threads: str, context: str, kv: str) -> None:
    """Answer requests on stdin with llama.cpp, from a GGUF file."""
    answers = redirect_stdout()
    library: Any = importlib.import_module("llama_cpp")
    numpy = importlib.import_module("numpy")
    model = library.llama_model_load_from_file(file.encode(), library.llama_model_default_params())
    params = library.llama_context_default_params()
    params.n_ctx = params.n_batch = int(context)  # a prompt of any length is one call
    params.n_threads = params.n_threads_batch = int(threads)
    params.type_k = params.type_v = CACHE_TYPES[kv]
    opened = library.llama_init_from_model(model, params)
    if not opened:
        raise RuntimeError(f"llama.cpp did not open {file}")
    size = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    memory = library.llama_get_memory(opened)

    def next_token(ids: Sequence[int]) -> int:
        array = (library.llama_token * len(ids))(*ids)  # the batch points to it
        if code := library.llama_decode(opened, library.llama_batch_get_one(array, len(ids))):
            raise RuntimeError(f"llama_decode returned {code} for {len(ids)} tokens")
        logits = numpy.ctypeslib.as_array(library.llama_get_logits_ith(opened, -1), (size,))
        return int(logits.argmax())

    def answer(prompt: list[int], tokens: int) -> Iterable[int]:
        library.llama_memory_clear(memory, False)
        ids: Sequence[int] = prompt
        for _ in range(tokens):
            token = next_token(ids)
            yield token
            ids = [token]

    facts = {
        "llama-cpp-python": library.__version__,
        "built for": library.llama_print_system_info().decode(),
    }
    serve(facts, answer, answers)


def quantize_gguf(source: str, target: str, kind: str) -> None:
    """Quantise a GGUF file of fp32 weights into the file `target`.

    kind: Q8_0, Q4_0 or Q4_0_pure, which keeps no matrix in more bits.
    """
    library: Any = importlib.import_module("llama_cpp")
    params = library.llama_model_quantize_default_params()
    params.ftype, params.pure = FILE_TYPES[kind.removesuffix("_pure")], kind.endswith("_pure")
    if library.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama.cpp did not quantise {source}")


def serve_round() -> None:
    """Run the round that a JSON line on stdin requests; its result is a JSON line on stdout."""
    from offramp.benchmarks.decoder_candidates import run_round

    print(json.dumps(run_round(json.loads(sys.stdin.readline()))))


def print_memory(kind: str, scratch: str, variant: str, texts: str, context: str) -> None:
    """Run a decoder over a context, half prompt and half answer, and print its resident set and peak in MB.

    kind: "segments" for the bundle of auto, else the monolith. texts: file of the prompt. context: tokens.
    """
    # Only needed modules are imported, since each adds to the resident set.
    folder, total = Path(scratch), int(context)
    ids = read_context(folder, texts, total // 2)
    tokens = total - len(ids)
    if kind == "segments":
        from offramp.runtime import load_generator

        with load_generator(folder / "auto", rule="never", variant=variant, global_pool=True) as session:
            written = sum(1 for _ in session.tokens(ids, tokens, ()))
            resident, peak = resident_mb()
    else:
        from offramp.benchmarks.decoder_candidates import open_monolith

        monolith = open_monolith(folder, variant)
        written = sum(1 for _ in monolith.generate(ids, tokens))
        resident, peak = resident_mb()
    assert written == tokens
    print(resident, peak)


def read_context(scratch: Path, texts: str, tokens: int) -> list[int]:
    """The first token ids of the texts of a file, one text after another, by the tokenizer of auto."""
    from tokenizers import Tokenizer

    tokenizer, ids = Tokenizer.from_file(str(scratch / "auto" / "tokenizer.json")), list[int]()
    with open(texts, encoding="utf-8") as lines:
        while len(ids) < tokens:
            ids += tokenizer.encode(json.loads(next(lines))["text"]).ids
    return ids[:tokens]


def resident_mb(process_id: int | str = "self") -> tuple[float, float]:
    """The resident set of a process and its peak, in MB (10^6 bytes), as the kernel counts them."""
    status = Path(f"/proc/{process_id}/status").read_text("ascii")
    lines = dict(line.split(":", 1) for line in status.splitlines())
    resident, peak = (int(lines[name].split()[0]) * 1024 / 1e6 for name in ("VmRSS", "VmHWM"))
    return resident, peak


COMMANDS: dict[str, Callable[..., None]] = {
    "genai": serve_genai,
    "llama": serve_llama,
    "quantize": quantize_gguf,
    "round": serve_round,
    "memory": print_memory,
}

if __name__ == "__main__":
    COMMANDS[sys.argv[1]](*sys.argv[2:])
