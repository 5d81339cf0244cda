"""Baselines of a decoder on the CPU: onnxruntime-genai and llama.cpp, each a process in a separate
environment.

A benchmark opens GenaiProcess(build_genai_model(...)) and LlamaProcess(build_llama_model(...)), which answer
in turns, prompt by prompt. No other process may be busy meanwhile, not even with a spinning thread pool:
llama.cpp's threads spin until the last of them is done, and if one of them has no core, that costs a time
slice for each matrix.
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
from pathlib import Path
from typing import NamedTuple

from offramp.benchmarks.fetch import cache_folder

PACKAGES = {
    "genai": ("onnxruntime-genai==0.18.0", "onnxruntime==1.32.0"),
    "llama": ("cmake==4.4.4", "ninja==1.13.2", "numpy", "typing-extensions", "diskcache", "jinja2"),
}
# llama-cpp-python has no wheel, and wheels of other bindings are for AVX2 alone, so it is compiled for the
# machine on which it runs. Its source also contains llama.cpp's own converter.
LLAMA = (
    "llama-cpp-python==0.3.36",
    "llama_cpp_python-0.3.36.tar.gz",
    "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
)
SENTENCEPIECE = "sentencepiece==0.2.3"  # the converter imports it for every tokenizer
# GCC 12 treats the load of AMX's configuration as one of 8 bytes and drops the other stores: a prompt in Q8_0
# or Q4_0 crashes (ggml-org/llama.cpp#26954). With this line before the load the stores are kept.
AMX = ("    _tile_loadconfig(&tc);\n", '    __asm__ volatile("" : : "m"(tc));\n')

GENAI_FOLDERS = {"fp32": "fp32", "int8": "int8", "int4": "int4_head_int8"}  # by precision
KINDS = ("F32", "F16", "Q8_0", "Q4_0", "Q4_0_pure")
WORKERS = Path(__file__).resolve().with_name("workers.py")


class TimedAnswer(NamedTuple):
    """A generated answer: token ids, seconds to the first token, and seconds from each token to the next.

    step_s [tokens - 1].
    """

    ids: list[int]
    first_s: float
    step_s: list[float]


class BaselineProcess:
    """A worker process that answers each line of JSON with a line of JSON.

    facts: its first line, the versions of its packages.
    """

    def __init__(self, command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> None:
        """Start the worker and wait until its model is loaded.

        Raises RuntimeError with the end of its stderr if it ends before.
        """
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

    def answer(self, prompt: Sequence[int], max_new_tokens: int) -> TimedAnswer:
        """Generate exactly `max_new_tokens` tokens greedily after a prompt; stop tokens do not end the
        answer.

        Raises RuntimeError if the worker ends.
        """
        assert self._worker.stdin
        request = {"prompt_ids": list(prompt), "tokens": max_new_tokens}
        try:
            self._worker.stdin.write(json.dumps(request) + "\n")
            self._worker.stdin.flush()
        except (OSError, ValueError):
            raise self._ended() from None
        return TimedAnswer(**json.loads(self._line()))

    @property
    def process_id(self) -> int:
        """The number of the worker's process."""
        return self._worker.pid

    def close(self) -> None:
        """End the worker; a second call does nothing."""
        assert self._worker.stdin and self._worker.stdout
        with contextlib.suppress(OSError):  # if the worker ended before it read a request
            self._worker.stdin.close()  # the worker answers until its input ends
        try:
            self._worker.wait(10)
        except subprocess.TimeoutExpired:
            self._worker.kill()
            self._worker.wait()
        self._worker.stdout.close()
        self._errors.close()

    def __enter__(self) -> BaselineProcess:
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


class GenaiProcess(BaselineProcess):
    """A worker process that generates with onnxruntime-genai, from a folder written by build_genai_model."""

    def __init__(self, folder: Path, threads: int = 2) -> None:
        python = baseline_environment("genai") / "bin" / "python"
        super().__init__([python, "-I", WORKERS, "genai", folder, str(threads)])


class LlamaProcess(BaselineProcess):
    """A worker process that generates with llama.cpp, from a GGUF file written by build_llama_model.

    context: most tokens of prompt and answer together. kv: type of keys and values, f16 (llama.cpp's default)
    or f32.
    """

    def __init__(self, file: Path, threads: int = 2, context: int = 2048, kv: str = "f16") -> None:
        python = baseline_environment("llama") / "bin" / "python"
        super().__init__([python, "-I", WORKERS, "llama", file, str(threads), str(context), kv])


def baseline_environment(name: str) -> Path:
    """The folder of the virtual environment of a baseline (genai or llama), created once in the cache folder.

    For llama it compiles llama.cpp for this machine's CPU: that needs a C++ compiler and takes some minutes
    on CMAKE_BUILD_PARALLEL_LEVEL cores. Raises SystemExit if it cannot be created.
    """
    folder = cache_folder() / "baselines" / name
    pins = "\n".join((*PACKAGES[name], *((*LLAMA, SENTENCEPIECE, *AMX) if name == "llama" else ())))
    installed = folder / "installed.txt"
    if not installed.is_file() or installed.read_text(encoding="utf-8") != pins:
        print(f"creating {folder}", file=sys.stderr)
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
            _build_llama(folder, pip)
        installed.write_text(pins, encoding="utf-8")
    return folder


def _build_llama(folder: Path, pip: list[str | Path]) -> None:
    requirement, name, sha256 = LLAMA
    source, build = folder / "source", folder / "source" / "build"
    # Only this package is required as source; its dependencies may be wheels.
    _run([*pip, "download", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", folder, requirement])
    digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    if digest != sha256:
        raise SystemExit(f"{name}: sha256 {digest}, expected {sha256}")
    with tarfile.open(folder / name) as archive:
        archive.extractall(folder, filter="data")
    (folder / name).unlink()
    (folder / name.removesuffix(".tar.gz")).rename(source)
    kernels = source / "vendor" / "llama.cpp" / "ggml" / "src" / "ggml-cpu" / "amx" / "mmq.cpp"
    text = kernels.read_text(encoding="utf-8")
    if text.count(AMX[0]) != 1:
        raise SystemExit(f"{kernels} is not the file that the repair is for")
    kernels.write_text(text.replace(AMX[0], AMX[1] + AMX[0]), encoding="utf-8")
    cmake = folder / "bin" / "cmake"
    left_out = ("COMMON", "TESTS", "TOOLS", "EXAMPLES", "SERVER", "APP")
    options = [f"-DLLAMA_BUILD_{component}=OFF" for component in left_out]
    options += ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON"]
    ninja = ("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={folder / 'bin' / 'ninja'}")
    _run([cmake, *ninja, "-S", source / "vendor" / "llama.cpp", "-B", build, *options])
    _run([cmake, "--build", build, "--target", "llama"])
    (packages,) = folder.glob("lib/python*/site-packages")
    shutil.copytree(source / "llama_cpp", packages / "llama_cpp")
    shutil.copytree(build / "bin", packages / "llama_cpp" / "lib", symlinks=True, dirs_exist_ok=True)
    _run([*pip, "install", "--no-deps", "--target", source / "converter", SENTENCEPIECE])


def build_genai_model(hf_folder: Path, precision: str, out: Path) -> Path:
    """Convert a model folder of transformers with onnxruntime-genai's builder; gives out/PRECISION.

    It is written once. precision: fp32, int8 or int4; int8 and int4 are MatMulNBits in blocks of 32,
    symmetric, with activations in int8, and in int4 the head has 8 bits, as in our graphs. The builder runs
    in the environment of this process and needs the extra export.
    """
    folder = out / GENAI_FOLDERS[precision]
    if not folder.is_dir():
        (packages,) = baseline_environment("genai").glob("lib/python*/site-packages")
        builder = packages / "onnxruntime_genai" / "models" / "builder.py"
        options = [] if precision == "fp32" else ["--extra_options", "accuracy_level=4", "block_size=32"]
        # The same rounding as the builder's default, whose names of a head that shares the embeddings fail.
        if precision == "int4":
            options += ["algo_config=rtn", "matmul_mixed_precision=last_matmul:int8"]
        temporary = out / f"{folder.name}.writing"
        out.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        with tempfile.TemporaryDirectory() as cache:
            ends = ("-p", precision, "-e", "cpu", "-i", hf_folder, "-o", temporary, "-c", cache)
            _run([sys.executable, builder, *ends, *options])
        temporary.rename(folder)
    return folder


def build_llama_model(hf_folder: Path, kind: str, out: Path) -> Path:
    """Convert a model folder of transformers to a GGUF file with llama.cpp's tools; gives out/KIND.gguf.

    It is written once, by llama.cpp's converter (F32, F16) or its quantiser (Q8_0, Q4_0, Q4_0_pure), which
    reads F32.gguf in the same folder. Q4_0 is llama.cpp's recipe, which keeps a tied embedding in more bits
    (Q6_K, or Q8_0 if the width is not a multiple of 256); Q4_0_pure has every matrix in Q4_0.
    """
    file = out / f"{kind}.gguf"
    if not file.is_file():
        out.mkdir(parents=True, exist_ok=True)
        folder, temporary = baseline_environment("llama"), file.with_suffix(".writing")
        if kind in ("F32", "F16"):
            code = folder / "source" / "vendor" / "llama.cpp"
            paths = os.pathsep.join(map(str, (code / "gguf-py", folder / "source" / "converter")))
            convert: list[str | Path] = [sys.executable, code / "convert_hf_to_gguf.py", hf_folder]
            _run([*convert, "--outtype", kind.lower(), "--outfile", temporary], PYTHONPATH=paths)
        else:
            quantize = (WORKERS, "quantize", build_llama_model(hf_folder, "F32", out))
            _run([folder / "bin" / "python", "-I", *quantize, temporary, kind])
        temporary.rename(file)
    return file


def _run(command: Sequence[str | Path], **environment: str) -> None:
    """Run a command without printing its output; raise SystemExit with the end of the output if it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(words, env={**os.environ, **environment}, capture_output=True, check=False)
    if done.returncode:
        output = (done.stdout + done.stderr).decode(errors="replace")[-3000:]
        raise SystemExit(f"{' '.join(words)}\n{output}")
