"""Tests of benchmarks.decoder_baselines without the baselines: its protocol, its workers on doubles of their
libraries, and the commands that create environments and models.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tarfile
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from offramp.benchmarks import decoder_baselines
from offramp.benchmarks.decoder_baselines import (
    BaselineProcess,
    GenaiProcess,
    LlamaProcess,
    TimedAnswer,
    build_genai_model,
    build_llama_model,
)

# Each token is the one before it plus one; the process ends without an answer at the token 99.
STAND_IN = """
import json, sys
print(json.dumps({"stand-in": sys.argv[1]}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    last = request["prompt_ids"][-1]
    if last == 99:
        sys.exit("no token after 99")
    ids = [last + 1 + i for i in range(request["tokens"])]
    print(json.dumps({"ids": ids, "first_s": 0.5, "step_s": [0.25] * (len(ids) - 1)}), flush=True)
"""

# onnxruntime_genai whose next token is the last one plus one, modulo 50; prompt and tokens must fit.
GENAI = """
import json, os
print("a library may print")
class Config:
    def __init__(self, folder): self.model = {}
    def overlay(self, text): self.model = json.loads(text)["model"]
class Model:
    def __init__(self, config):
        options = {"intra_op_num_threads": 2}
        assert config.model == {"eos_token_id": 49, "decoder": {"session_options": options}}
class Tokenizer:
    def __init__(self, model): assert isinstance(model, Model)
class GeneratorParams:
    def __init__(self, model): pass
    def set_search_options(self, do_sample, max_length): self.max_length = max_length
class Generator:
    def __init__(self, model, params): self.ids, self.max_length = [], params.max_length
    def append_tokens(self, ids): self.ids += ids
    def generate_next_token(self):
        assert len(self.ids) < self.max_length
        self.ids.append((self.ids[-1] + 1) % 50)
    def get_next_tokens(self): return self.ids[-1:]
"""

# llama_cpp whose next token is the sum of all tokens in its memory, modulo 50; its quantiser writes its
# parameters.
LLAMA = """
import ctypes
__version__ = "0"
llama_token = ctypes.c_int32
held = []
class Params(ctypes.Structure):
    names = ("n_ctx", "n_batch", "n_threads", "n_threads_batch", "type_k", "type_v")
    _fields_ = [(name, ctypes.c_int) for name in names]
class Quantize(ctypes.Structure):
    _fields_ = [("ftype", ctypes.c_int), ("pure", ctypes.c_bool)]
llama_model_quantize_default_params = Quantize
llama_context_default_params = Params
def llama_model_quantize(source, target, params):
    if source == b"none": return 1
    open(target, "w").write(f"{params._obj.ftype} {params._obj.pure}")
    return 0
def llama_model_default_params(): return None
def llama_model_load_from_file(file, params): return file if file != b"none" else None
def llama_init_from_model(model, params):
    assert (params.n_ctx, params.n_batch, params.n_threads, params.n_threads_batch) == (8, 8, 2, 2)
    assert params.type_k == params.type_v == 1
    return model
def llama_model_get_vocab(model): return None
def llama_vocab_n_tokens(vocab): return 50
def llama_get_memory(context): return None
def llama_memory_clear(memory, data): held.clear()
def llama_batch_get_one(array, count): return list(array)[:count]
def llama_decode(context, batch):
    held.extend(batch)
    return int(len(held) > 8)
def llama_get_logits_ith(context, i):
    logits = (ctypes.c_float * 50)()
    logits[sum(held) % 50] = 1
    return ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
def llama_print_system_info(): return b"AVX = 1"
"""

Commands = list[tuple[list[str], dict[str, str]]]


@pytest.fixture
def stand_in(tmp_path: Path) -> Iterator[BaselineProcess]:
    file = tmp_path / "stand_in.py"
    file.write_text(STAND_IN, encoding="utf-8")
    with BaselineProcess([sys.executable, file, "here"]) as process:
        yield process


@pytest.fixture
def libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Doubles of both libraries, and environments whose Python is this one and finds them."""
    for name, text in (("onnxruntime_genai.py", GENAI), ("llama_cpp.py", LLAMA)):
        (tmp_path / name).write_text(text, encoding="utf-8")
    for package in ("onnxruntime_genai", "onnxruntime"):
        facts = tmp_path / f"{package}-1.2.dist-info" / "METADATA"
        facts.parent.mkdir()
        facts.write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n", encoding="utf-8")
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    # The first argument is -I, which ignores the caller's paths.
    script = f'#!/bin/sh\nshift\nPYTHONPATH="{tmp_path}" exec "{sys.executable}" "$@"\n'
    python.write_text(script, encoding="utf-8")
    python.chmod(0o755)
    monkeypatch.setattr(decoder_baselines, "baseline_environment", lambda name: tmp_path)
    (tmp_path / "genai_config.json").write_text('{"model": {"vocab_size": 50}}', encoding="utf-8")
    return tmp_path


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    """The commands that write models, each replaced by creating the file or folder that it names."""
    commands: Commands = []

    def run(command: list[str | Path], **environment: str) -> None:
        words = [str(word) for word in command]
        commands.append((words, environment))
        if "-o" in words:
            Path(words[words.index("-o") + 1]).mkdir()
        else:
            Path(words[-1] if "--outfile" in words else words[-2]).touch()

    folder = tmp_path / "environment"
    (folder / "lib" / "python3.10" / "site-packages").mkdir(parents=True)
    monkeypatch.setattr(decoder_baselines, "baseline_environment", lambda name: folder)
    monkeypatch.setattr(decoder_baselines, "_run", run)
    return commands


def test_a_worker_answers_until_it_is_closed(stand_in: BaselineProcess) -> None:
    assert stand_in.facts == {"stand-in": "here"}
    assert stand_in.answer([4, 7], 3) == TimedAnswer([8, 9, 10], 0.5, [0.25, 0.25])
    assert stand_in.answer([1], 1) == TimedAnswer([2], 0.5, [])
    stand_in.close()
    stand_in.close()
    with pytest.raises(RuntimeError, match="closed"):
        stand_in.answer([1], 1)


def test_the_error_of_a_worker_that_ends_is_quoted(stand_in: BaselineProcess) -> None:
    with pytest.raises(RuntimeError, match="ended with 1: no token after 99"):
        stand_in.answer([99], 1)
    with pytest.raises(RuntimeError):
        stand_in.answer([1], 1)


def test_the_error_of_a_worker_that_does_not_start_is_quoted() -> None:
    with pytest.raises(RuntimeError, match="no such model"):
        BaselineProcess([sys.executable, "-c", "raise SystemExit('no such model')"])


def test_genai_worker(libraries: Path) -> None:
    with GenaiProcess(libraries) as process:
        assert process.facts == {"onnxruntime-genai": "1.2", "onnxruntime": "1.2"}
        answer = process.answer([9, 5], 4)
        assert answer.ids == [6, 7, 8, 9] and len(answer.step_s) == 3
        assert answer.first_s >= 0 and min(answer.step_s) >= 0
        assert process.answer([46], 3).ids == [47, 48, 49]  # the stop token may be the last one
        with pytest.raises(RuntimeError, match="token 49 came"):
            process.answer([47], 3)


@pytest.mark.slow
def test_llama_worker(libraries: Path) -> None:
    with LlamaProcess(Path("file"), context=8) as process:
        assert process.facts == {"llama-cpp-python": "0", "built for": "AVX = 1"}
        answer = process.answer([1, 2], 3)
        assert answer.ids == [3, 6, 12] and len(answer.step_s) == 2
        assert process.answer([5], 2).ids == [5, 10]  # the first prompt was forgotten
        with pytest.raises(RuntimeError, match="llama_decode returned 1 for 9 tokens"):
            process.answer([1] * 9, 1)
    with pytest.raises(RuntimeError, match="did not open none"):
        LlamaProcess(Path("none"), context=8)


@pytest.mark.slow
def test_both_take_turns(libraries: Path) -> None:
    with GenaiProcess(libraries) as genai, LlamaProcess(Path("file"), context=8) as llama:
        for start in (1, 2):
            assert genai.answer([start], 2).ids == [start + 1, start + 2]
            assert llama.answer([start], 2).ids == [start, 2 * start]


@pytest.mark.slow
def test_llama_worker_quantises(libraries: Path) -> None:
    python = libraries / "bin" / "python"
    words: list[str | Path] = [python, "-I", decoder_baselines.WORKERS, "quantize"]
    for kind, parameters in (("Q8_0", "7 False"), ("Q4_0", "2 False"), ("Q4_0_pure", "2 True")):
        decoder_baselines._run([*words, "F32.gguf", libraries / kind, kind])
        assert (libraries / kind).read_text(encoding="utf-8") == parameters
    with pytest.raises(SystemExit, match="did not quantise none"):
        decoder_baselines._run([*words, "none", libraries / "out", "Q8_0"])


def test_models_are_written_once(tmp_path: Path, commands: Commands) -> None:
    out = tmp_path / "out"
    for _ in range(2):
        assert build_genai_model(tmp_path / "hf", "int4", out) == out / "int4_head_int8"
        assert build_genai_model(tmp_path / "hf", "fp32", out) == out / "fp32"
        assert build_llama_model(tmp_path / "hf", "Q8_0", out) == out / "Q8_0.gguf"
    assert sorted(file.name for file in out.iterdir()) == ["F32.gguf", "Q8_0.gguf", "fp32", "int4_head_int8"]
    (int4, _), (fp32, _), (convert, paths), (quantize, _) = commands
    assert int4[-4:-2] == ["accuracy_level=4", "block_size=32"] and "--extra_options" not in fp32
    assert int4[0] == convert[0] == sys.executable  # torch and transformers are not in the other environments
    assert convert[3:5] == ["--outtype", "f32"] and len(paths["PYTHONPATH"].split(os.pathsep)) == 2
    assert quantize[-3:] == [str(out / "F32.gguf"), str(out / "Q8_0.writing"), "Q8_0"]


def test_a_failing_command_is_quoted_and_leaves_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_baselines, "baseline_environment", lambda name: tmp_path)
    with pytest.raises(SystemExit, match=r"convert_hf_to_gguf\.py"):  # there is none
        build_llama_model(tmp_path, "F16", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_environments_are_created_once_and_again_for_other_pins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setenv("OFFRAMP_CACHE", str(tmp_path))
    monkeypatch.setattr(
        decoder_baselines, "_run", lambda words: commands.append([str(word) for word in words])
    )
    monkeypatch.setattr(venv, "create", lambda folder, with_pip: folder.mkdir(parents=True))
    for _ in range(2):
        folder = decoder_baselines.baseline_environment("genai")
        assert folder == tmp_path / "baselines" / "genai"
    assert len(commands) == 1 and commands[0][-2:] == list(decoder_baselines.PACKAGES["genai"])
    monkeypatch.setitem(decoder_baselines.PACKAGES, "genai", ("onnxruntime-genai==0",))
    (folder / "stale").touch()
    decoder_baselines.baseline_environment("genai")
    assert len(commands) == 2 and [file.name for file in folder.iterdir()] == ["installed.txt"]


def test_llama_is_compiled_from_the_pinned_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requirement, name, _ = decoder_baselines.LLAMA
    root = tmp_path / name.removesuffix(".tar.gz")
    kernels = root / "vendor" / "llama.cpp" / "ggml" / "src" / "ggml-cpu" / "amx" / "mmq.cpp"
    kernels.parent.mkdir(parents=True)
    kernels.write_text("{\n" + decoder_baselines.AMX[0] + "}\n", encoding="utf-8")
    (root / "llama_cpp").mkdir()
    (root / "llama_cpp" / "llama.py").touch()
    with tarfile.open(tmp_path / name, "w:gz") as archive:
        archive.add(root, root.name)
    commands: list[list[str]] = []

    def run(command: list[str | Path]) -> None:
        commands.append([str(word) for word in command])
        if "download" in command:
            shutil.copy(tmp_path / name, folder)
        elif "--build" in command:
            library = folder / "source" / "build" / "bin" / "libllama.so"
            library.parent.mkdir(parents=True)
            library.touch()

    monkeypatch.setenv("OFFRAMP_CACHE", str(tmp_path))
    monkeypatch.setattr(decoder_baselines, "_run", run)
    folder = tmp_path / "baselines" / "llama"
    packages = folder / "lib" / "python3.10" / "site-packages"
    monkeypatch.setattr(venv, "create", lambda folder, with_pip: packages.mkdir(parents=True))
    with pytest.raises(SystemExit, match="sha256"):
        decoder_baselines.baseline_environment("llama")
    assert not (folder / "source").exists() and not (folder / "installed.txt").exists()

    digest = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    monkeypatch.setattr(decoder_baselines, "LLAMA", (requirement, name, digest))
    commands.clear()
    assert decoder_baselines.baseline_environment("llama") == folder
    _, download, configure, build, _ = commands
    assert download[-1] == requirement and "-DGGML_NATIVE=ON" in configure and build[-1] == "llama"
    repaired = (folder / "source" / kernels.relative_to(root)).read_text(encoding="utf-8")
    assert repaired == "{\n" + decoder_baselines.AMX[1] + decoder_baselines.AMX[0] + "}\n"
    assert (packages / "llama_cpp" / "llama.py").is_file()
    assert (packages / "llama_cpp" / "lib" / "libllama.so").is_file()
