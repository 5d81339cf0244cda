"""benchmarks/decoder_rivals.py without the rivals: its protocol, its workers on doubles of their libraries,
and what it would run to make an environment and a model.
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

from offramp.benchmarks import decoder_rivals
from offramp.benchmarks.decoder_rivals import Genai, Greedy, Llama, Rival, genai_model, llama_model

# It counts on from the prompt's last token, and ends without an answer at the token 99.
STAND_IN = """
import json, sys
print(json.dumps({"stand-in": sys.argv[1]}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    last = asked["prompt_ids"][-1]
    if last == 99:
        sys.exit("no token after 99")
    ids = [last + 1 + i for i in range(asked["tokens"])]
    print(json.dumps({"first_s": 0.5, "seconds": [0.25] * (len(ids) - 1), "ids": ids}), flush=True)
"""

# onnxruntime_genai whose next token is the last one plus one, of 50 words; prompt and tokens must fit.
GENAI = """
import json, os
print("a library may print")
class Config:
    def __init__(self, folder): self.said = {}
    def overlay(self, text): self.said = json.loads(text)["model"]
class Model:
    def __init__(self, config):
        options = {"intra_op_num_threads": 2}
        assert config.said == {"eos_token_id": 49, "decoder": {"session_options": options}}
class GeneratorParams:
    def __init__(self, model): pass
    def set_search_options(self, do_sample, max_length): self.most = max_length
class Generator:
    def __init__(self, model, params): self.ids, self.most = [], params.most
    def append_tokens(self, ids): self.ids += ids
    def generate_next_token(self):
        assert len(self.ids) < self.most
        self.ids.append((self.ids[-1] + 1) % 50)
    def get_next_tokens(self): return self.ids[-1:]
"""

# llama_cpp whose next token is the sum of all that it holds, of 50 words; its quantiser writes its orders.
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
def stand_in(tmp_path: Path) -> Iterator[Rival]:
    file = tmp_path / "stand_in.py"
    file.write_text(STAND_IN, encoding="utf-8")
    with Rival([sys.executable, file, "here"]) as rival:
        yield rival


@pytest.fixture
def libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Doubles of both libraries, and environments whose Python, ours, finds them."""
    for name, text in (("onnxruntime_genai.py", GENAI), ("llama_cpp.py", LLAMA)):
        (tmp_path / name).write_text(text, encoding="utf-8")
    for package in ("onnxruntime_genai", "onnxruntime"):
        facts = tmp_path / f"{package}-1.2.dist-info" / "METADATA"
        facts.parent.mkdir()
        facts.write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n", encoding="utf-8")
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    # -I, which keeps the caller's paths out, is the first word.
    script = f'#!/bin/sh\nshift\nPYTHONPATH="{tmp_path}" exec "{sys.executable}" "$@"\n'
    python.write_text(script, encoding="utf-8")
    python.chmod(0o755)
    monkeypatch.setattr(decoder_rivals, "environment", lambda name: tmp_path)
    (tmp_path / "genai_config.json").write_text('{"model": {"vocab_size": 50}}', encoding="utf-8")
    return tmp_path


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    """What would be run to make models, each writing the file or folder that its command names."""
    ran: Commands = []

    def run(command: list[str | Path], **environment: str) -> None:
        words = [str(word) for word in command]
        ran.append((words, environment))
        if "-o" in words:
            Path(words[words.index("-o") + 1]).mkdir()
        else:
            Path(words[-1] if "--outfile" in words else words[-2]).touch()

    rival = tmp_path / "rival"
    (rival / "lib" / "python3.10" / "site-packages").mkdir(parents=True)
    monkeypatch.setattr(decoder_rivals, "environment", lambda name: rival)
    monkeypatch.setattr(decoder_rivals, "_run", run)
    return ran


def test_a_worker_answers_until_it_is_closed(stand_in: Rival) -> None:
    assert stand_in.facts == {"stand-in": "here"}
    assert stand_in.greedy([4, 7], 3) == Greedy(0.5, (0.25, 0.25), (8, 9, 10))
    assert stand_in.greedy([1], 1) == Greedy(0.5, (), (2,))
    stand_in.close()
    stand_in.close()
    with pytest.raises(RuntimeError, match="closed"):
        stand_in.greedy([1], 1)


def test_a_worker_that_ends_is_quoted(stand_in: Rival) -> None:
    with pytest.raises(RuntimeError, match="ended with 1: no token after 99"):
        stand_in.greedy([99], 1)
    with pytest.raises(RuntimeError):
        stand_in.greedy([1], 1)


def test_a_worker_that_does_not_start_is_quoted() -> None:
    with pytest.raises(RuntimeError, match="no such model"):
        Rival([sys.executable, "-c", "raise SystemExit('no such model')"])


def test_genai_worker(libraries: Path) -> None:
    with Genai(libraries) as rival:
        assert rival.facts == {"onnxruntime-genai": "1.2", "onnxruntime": "1.2"}
        told = rival.greedy([9, 5], 4)
        assert told.ids == (6, 7, 8, 9) and len(told.seconds) == 3
        assert told.first_s >= 0 and min(told.seconds) >= 0
        assert rival.greedy([46], 3).ids == (47, 48, 49)  # nothing was asked after the stop
        with pytest.raises(RuntimeError, match="token 49 came"):
            rival.greedy([47], 3)


def test_llama_worker(libraries: Path) -> None:
    with Llama(Path("file"), context=8) as rival:
        assert rival.facts == {"llama-cpp-python": "0", "built for": "AVX = 1"}
        told = rival.greedy([1, 2], 3)
        assert told.ids == (3, 6, 12) and len(told.seconds) == 2
        assert rival.greedy([5], 2).ids == (5, 10)  # of the first prompt nothing is left
        with pytest.raises(RuntimeError, match="llama_decode returned 1 for 9 tokens"):
            rival.greedy([1] * 9, 1)
    with pytest.raises(RuntimeError, match="did not open none"):
        Llama(Path("none"), context=8)


@pytest.mark.slow
def test_both_take_turns(libraries: Path) -> None:
    with Genai(libraries) as one, Llama(Path("file"), context=8) as other:
        for start in (1, 2):
            assert one.greedy([start], 2).ids == (start + 1, start + 2)
            assert other.greedy([start], 2).ids == (start, 2 * start)


def test_llama_worker_quantises(libraries: Path) -> None:
    script = decoder_rivals.HERE / "worker_llama.py"
    words: list[str | Path] = [libraries / "bin" / "python", "-I", script, "--quantize"]
    for kind, asked in (("Q8_0", "7 False"), ("Q4_0", "2 False"), ("Q4_0_pure", "2 True")):
        decoder_rivals._run([*words, "F32.gguf", libraries / kind, kind])
        assert (libraries / kind).read_text(encoding="utf-8") == asked
    with pytest.raises(SystemExit, match="did not quantise none"):
        decoder_rivals._run([*words, "none", libraries / "out", "Q8_0"])


def test_models_are_made_once(tmp_path: Path, commands: Commands) -> None:
    out = tmp_path / "out"
    for _ in range(2):
        assert genai_model(tmp_path / "hf", "int4", out) == out / "int4"
        assert genai_model(tmp_path / "hf", "fp32", out) == out / "fp32"
        assert llama_model(tmp_path / "hf", "Q8_0", out) == out / "Q8_0.gguf"
    assert sorted(file.name for file in out.iterdir()) == ["F32.gguf", "Q8_0.gguf", "fp32", "int4"]
    (int4, _), (fp32, _), (convert, paths), (quantize, _) = commands
    assert int4[-2:] == ["accuracy_level=4", "block_size=32"] and "--extra_options" not in fp32
    assert int4[0] == convert[0] == sys.executable  # torch and transformers are here, and not in the rivals
    assert convert[3:5] == ["--outtype", "f32"] and len(paths["PYTHONPATH"].split(os.pathsep)) == 2
    assert quantize[-3:] == [str(out / "F32.gguf"), str(out / "Q8_0.writing"), "Q8_0"]


def test_what_fails_is_quoted_and_leaves_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_rivals, "environment", lambda name: tmp_path)
    with pytest.raises(SystemExit, match=r"convert_hf_to_gguf\.py"):  # there is none
        llama_model(tmp_path, "F16", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_environments_are_made_once_and_again_for_other_pins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []
    monkeypatch.setenv("OFFRAMP_CACHE", str(tmp_path))
    monkeypatch.setattr(decoder_rivals, "_run", lambda words: ran.append([str(word) for word in words]))
    monkeypatch.setattr(venv, "create", lambda folder, with_pip: folder.mkdir(parents=True))
    for _ in range(2):
        folder = decoder_rivals.environment("genai")
        assert folder == tmp_path / "rivals" / "genai"
    assert len(ran) == 1 and ran[0][-2:] == list(decoder_rivals.PACKAGES["genai"])
    monkeypatch.setitem(decoder_rivals.PACKAGES, "genai", ("onnxruntime-genai==0",))
    (folder / "stale").touch()
    decoder_rivals.environment("genai")
    assert len(ran) == 2 and [file.name for file in folder.iterdir()] == ["made.txt"]


def test_llama_is_compiled_from_the_pinned_source_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requirement, name, _ = decoder_rivals.LLAMA
    root = tmp_path / name.removesuffix(".tar.gz")
    kernels = root / "vendor" / "llama.cpp" / "ggml" / "src" / "ggml-cpu" / "amx" / "mmq.cpp"
    kernels.parent.mkdir(parents=True)
    kernels.write_text("{\n" + decoder_rivals.AMX[0] + "}\n", encoding="utf-8")
    (root / "llama_cpp").mkdir()
    (root / "llama_cpp" / "llama.py").touch()
    with tarfile.open(tmp_path / name, "w:gz") as archive:
        archive.add(root, root.name)
    ran: list[list[str]] = []

    def run(command: list[str | Path]) -> None:
        ran.append([str(word) for word in command])
        if "download" in command:
            shutil.copy(tmp_path / name, folder)
        elif "--build" in command:
            library = folder / "source" / "build" / "bin" / "libllama.so"
            library.parent.mkdir(parents=True)
            library.touch()

    monkeypatch.setenv("OFFRAMP_CACHE", str(tmp_path))
    monkeypatch.setattr(decoder_rivals, "_run", run)
    folder = tmp_path / "rivals" / "llama"
    packages = folder / "lib" / "python3.10" / "site-packages"
    monkeypatch.setattr(venv, "create", lambda folder, with_pip: packages.mkdir(parents=True))
    with pytest.raises(SystemExit, match="sha256"):
        decoder_rivals.environment("llama")
    assert not (folder / "source").exists() and not (folder / "made.txt").exists()

    found = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    monkeypatch.setattr(decoder_rivals, "LLAMA", (requirement, name, found))
    ran.clear()
    assert decoder_rivals.environment("llama") == folder
    _, download, configure, build, _ = ran
    assert download[-1] == requirement and "-DGGML_NATIVE=ON" in configure and build[-1] == "llama"
    repaired = (folder / "source" / kernels.relative_to(root)).read_text(encoding="utf-8")
    assert repaired == "{\n" + decoder_rivals.AMX[1] + decoder_rivals.AMX[0] + "}\n"
    assert (packages / "llama_cpp" / "llama.py").is_file()
    assert (packages / "llama_cpp" / "lib" / "libllama.so").is_file()
