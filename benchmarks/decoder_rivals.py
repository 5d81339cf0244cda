"""Rivals of a decoder on the CPU: onnxruntime-genai and llama.cpp, each a process in its own environment.

A benchmark opens Genai(genai_model(...)) and Llama(llama_model(...)) and asks them in turn, prompt by prompt.
Nothing else may be busy meanwhile, a spinning pool neither: llama.cpp's threads spin until the last of them
is done, and where one of them has no core that is a time slice a matrix.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from offramp.benchmarks.fetch import cache_folder

PACKAGES = {
    "genai": ("onnxruntime-genai==0.18.0", "onnxruntime==1.32.0"),
    "llama": ("cmake==4.4.4", "ninja==1.13.2", "numpy", "typing-extensions", "diskcache", "jinja2"),
}
# There is no wheel of it, and those of other bindings are for AVX2 alone: this is compiled for the machine it
# runs on. It carries llama.cpp's own converter too.
LLAMA = (
    "llama-cpp-python==0.3.36",
    "llama_cpp_python-0.3.36.tar.gz",
    "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
)
SENTENCEPIECE = "sentencepiece==0.2.3"  # the converter imports it, whatever the tokenizer
# GCC 12 takes the load of AMX's configuration for one of 8 bytes and drops the other stores: a prompt in Q8_0
# or Q4_0 ends in a fault (ggml-org/llama.cpp#26954). With this line before the load the stores stay.
AMX = ("    _tile_loadconfig(&tc);\n", '    __asm__ volatile("" : : "m"(tc));\n')

PRECISIONS = ("fp32", "int8", "int4")
KINDS = ("F32", "F16", "Q8_0", "Q4_0", "Q4_0_pure")
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Greedy:
    """Tokens after a prompt, and what they took: seconds to the first, seconds between it and each later one
    [tokens - 1], and the ids [tokens].
    """

    first_s: float
    seconds: tuple[float, ...]
    ids: tuple[int, ...]


class Rival:
    """A worker process that answers a line of JSON with a line of JSON; `facts` is what it said of itself."""

    def __init__(self, command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> None:
        """Start it and wait until its model is loaded; RuntimeError, with its last words, where it ends."""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the worker
        self._worker = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
            env={**os.environ, **(environment or {})},
        )
        self.facts: dict[str, str] = json.loads(self._line())

    def greedy(self, prompt_ids: Sequence[int], tokens: int) -> Greedy:
        """Each time the likeliest token, `tokens` of them: a stop is one more. RuntimeError where it ends."""
        assert self._worker.stdin
        try:
            self._worker.stdin.write(json.dumps({"prompt_ids": list(prompt_ids), "tokens": tokens}) + "\n")
            self._worker.stdin.flush()
        except (OSError, ValueError):
            raise self._ended() from None
        told = json.loads(self._line())
        return Greedy(told["first_s"], tuple(told["seconds"]), tuple(told["ids"]))

    def close(self) -> None:
        """End the worker; again does nothing."""
        assert self._worker.stdin and self._worker.stdout
        with contextlib.suppress(OSError):  # where it had ended before, with a question unread
            self._worker.stdin.close()  # it answers until its input ends
        try:
            self._worker.wait(10)
        except subprocess.TimeoutExpired:
            self._worker.kill()
            self._worker.wait()
        self._worker.stdout.close()
        self._errors.close()

    def __enter__(self) -> Rival:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _line(self) -> str:
        assert self._worker.stdout
        line: str = self._worker.stdout.readline()
        if not line:
            raise self._ended()
        return line

    def _ended(self) -> RuntimeError:
        if self._errors.closed:
            return RuntimeError("the worker was closed")
        code = self._worker.wait()
        self._errors.seek(0)
        words = self._errors.read().decode(errors="replace")[-2000:]
        self.close()
        return RuntimeError(f"the worker ended with {code}: {words}")


class Genai(Rival):
    """onnxruntime-genai with a folder of genai_model; profile: how its name begins, None: there is none."""

    def __init__(self, folder: Path, threads: int = 2, profile: Path | None = None) -> None:
        python = environment("genai") / "bin" / "python"
        asked = [] if profile is None else [profile]
        super().__init__([python, "-I", HERE / "worker_genai.py", folder, str(threads), *asked])


class Llama(Rival):
    """llama.cpp with a file of llama_model: `context` tokens at most, keys and values in `kv` (f16, its own
    choice, or f32).
    """

    def __init__(self, file: Path, threads: int = 2, context: int = 2048, kv: str = "f16") -> None:
        python = environment("llama") / "bin" / "python"
        words = (str(threads), str(context), kv)
        super().__init__([python, "-I", HERE / "worker_llama.py", file, *words])


def environment(name: str) -> Path:
    """The virtual environment of a rival (genai or llama), made once in the cache folder.

    For llama it compiles llama.cpp for this machine's CPU: with a C++ compiler, in some minutes, on as many
    cores as CMAKE_BUILD_PARALLEL_LEVEL says. Raises SystemExit where it cannot be made.
    """
    folder = cache_folder() / "rivals" / name
    pins = "\n".join((*PACKAGES[name], *((*LLAMA, SENTENCEPIECE, *AMX) if name == "llama" else ())))
    made = folder / "made.txt"
    if not made.is_file() or made.read_text(encoding="utf-8") != pins:
        print(f"making {folder}", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        pip: list[str | Path] = [
            folder / "bin" / "python",
            "-m",
            "pip",
            "--quiet",
            "--disable-pip-version-check",
        ]
        _run([*pip, "install", *PACKAGES[name]])
        if name == "llama":
            _llama(folder, pip)
        made.write_text(pins, encoding="utf-8")
    return folder


def _llama(folder: Path, pip: list[str | Path]) -> None:
    requirement, name, sha256 = LLAMA
    source, build = folder / "source", folder / "source" / "build"
    # Its binary dependencies may come as wheels, itself only as source.
    _run([*pip, "download", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", folder, requirement])
    found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    if found != sha256:
        raise SystemExit(f"{name}: sha256 {found}, expected {sha256}")
    with tarfile.open(folder / name) as archive:
        archive.extractall(folder, filter="data")
    (folder / name).unlink()
    (folder / name.removesuffix(".tar.gz")).rename(source)
    kernels = source / "vendor" / "llama.cpp" / "ggml" / "src" / "ggml-cpu" / "amx" / "mmq.cpp"
    text = kernels.read_text(encoding="utf-8")
    if text.count(AMX[0]) != 1:
        raise SystemExit(f"{kernels} is not the one that the repair is for")
    kernels.write_text(text.replace(AMX[0], AMX[1] + AMX[0]), encoding="utf-8")
    cmake = folder / "bin" / "cmake"
    parts = ("COMMON", "TESTS", "TOOLS", "EXAMPLES", "SERVER", "APP")
    chosen = [f"-DLLAMA_BUILD_{part}=OFF" for part in parts]
    chosen += ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON"]
    ninja = ("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={folder / 'bin' / 'ninja'}")
    _run([cmake, *ninja, "-S", source / "vendor" / "llama.cpp", "-B", build, *chosen])
    _run([cmake, "--build", build, "--target", "llama"])
    (packages,) = folder.glob("lib/python*/site-packages")
    shutil.copytree(source / "llama_cpp", packages / "llama_cpp")
    shutil.copytree(build / "bin", packages / "llama_cpp" / "lib", symlinks=True, dirs_exist_ok=True)
    _run([*pip, "install", "--no-deps", "--target", source / "converter", SENTENCEPIECE])


def genai_model(hf_folder: Path, precision: str, out: Path) -> Path:
    """The folder out/PRECISION (fp32, int8 or int4) that onnxruntime-genai's own builder writes from a folder
    of transformers; made once.

    int8 and int4 are MatMulNBits in blocks of 32, symmetric, with activations in int8. The builder runs in
    the environment of this process and needs the extra export.
    """
    folder = out / precision
    if not folder.is_dir():
        (packages,) = environment("genai").glob("lib/python*/site-packages")
        builder = packages / "onnxruntime_genai" / "models" / "builder.py"
        options = [] if precision == "fp32" else ["--extra_options", "accuracy_level=4", "block_size=32"]
        beside = out / f"{precision}.writing"
        out.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(beside, ignore_errors=True)
        with tempfile.TemporaryDirectory() as cache:
            ends = ("-p", precision, "-e", "cpu", "-i", hf_folder, "-o", beside, "-c", cache)
            _run([sys.executable, builder, *ends, *options])
        beside.rename(folder)
    return folder


def llama_model(hf_folder: Path, kind: str, out: Path) -> Path:
    """The file out/KIND.gguf that llama.cpp's own converter (F32, F16) and quantiser (Q8_0, Q4_0, Q4_0_pure)
    write from a folder of transformers; made once, the quantised ones from F32.gguf beside them.

    Q4_0 is llama.cpp's recipe, which keeps a tied embedding in more bits (Q6_K, or Q8_0 where the width is no
    multiple of 256); Q4_0_pure has every matrix in Q4_0.
    """
    file = out / f"{kind}.gguf"
    if not file.is_file():
        out.mkdir(parents=True, exist_ok=True)
        rival, beside = environment("llama"), file.with_suffix(".writing")
        if kind in ("F32", "F16"):
            code = rival / "source" / "vendor" / "llama.cpp"
            paths = os.pathsep.join(map(str, (code / "gguf-py", rival / "source" / "converter")))
            convert: list[str | Path] = [sys.executable, code / "convert_hf_to_gguf.py", hf_folder]
            _run([*convert, "--outtype", kind.lower(), "--outfile", beside], PYTHONPATH=paths)
        else:
            quantize = (HERE / "worker_llama.py", "--quantize", llama_model(hf_folder, "F32", out))
            _run([rival / "bin" / "python", "-I", *quantize, beside, kind])
        beside.rename(file)
    return file


def _run(command: Sequence[str | Path], **environment: str) -> None:
    """Run it silently; SystemExit with the end of what it printed where it fails."""
    words = [str(word) for word in command]
    ran = subprocess.run(words, env={**os.environ, **environment}, capture_output=True, check=False)
    if ran.returncode:
        raise SystemExit(f"{' '.join(words)}\n{(ran.stdout + ran.stderr).decode(errors='replace')[-3000:]}")
