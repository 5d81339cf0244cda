"""Coverage-guided fuzzing of all that reads bytes of others: manifests, graphs, lines, images.

    make fuzz                                            5 minutes over all targets
    python tests/fuzz.py --seconds 7200 --target graph   2 hours of one

Each target accepts any bytes and may raise typed errors alone; what else it must hold is in its docstring.
Atheris (libFuzzer) mutates inputs towards new branches, one process a target; without it, inputs are mutated
at random. Inputs that were interesting, and those that failed, stay in build/fuzz. Exit code 1: a target
failed.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from math import prod
from pathlib import Path
from typing import NamedTuple

try:
    import atheris
except ImportError:  # it has no wheels for all systems
    atheris = None

TESTS = Path(__file__).resolve().parent
CORPUS = TESTS / "data" / "fuzz_corpus.tar.gz"  # inputs of 2 hours, up to 12 kB each, by target
KEPT = TESTS.parent / "build" / "fuzz"
SEEDS = TESTS / "data"
MAX_MEGABYTES, MAX_SECONDS = 3000, 20  # of one input

HERE = "--here"  # the process that fuzzes one target; its parent needs no instruments

with atheris.instrument_imports(include=["offramp"]) if atheris and HERE in sys.argv else nullcontext():
    from offramp.runtime.bundle.checks import read_manifest
    from offramp.runtime.bundle.graph_checks import OPERATORS, check_graph
    from offramp.runtime.bundle.manifest import ImageInput
    from offramp.runtime.errors import BadBundle, BadInput, BadManifest
    from offramp.runtime.inputs.images import picture_pixels
    from offramp.runtime.inputs.lines import IMAGES, PROMPTS, TEXTS, read_lines

PICTURE = ImageInput(8, 8, (8,), "bilinear", "RGB", 1 / 255, (0.5,) * 3, (0.5,) * 3)


class Target(NamedTuple):
    """Something that reads bytes: the check, and inputs from which mutations start."""

    check: Callable[[bytes], None]
    seeds: Callable[[], Iterable[bytes]]


def check_manifest_text(data: bytes) -> None:
    """A manifest is refused, or it is the same after it was written and read again."""
    try:
        manifest = read_manifest(data.decode("utf-8"), source="fuzz")
    except (BadManifest, UnicodeDecodeError):
        return
    assert read_manifest(manifest.to_json(), source="again") == manifest


def check_graph_bytes(data: bytes) -> None:
    """A graph is refused, or what ONNX's own parser reads in it is allowed, too."""
    import onnx

    try:
        facts = check_graph(data, "fuzz")
    except BadBundle:
        return
    try:
        model = onnx.load_from_string(data)
    except Exception:  # types of values are skipped: an engine refuses what is wrong there
        return
    nodes = model.graph.node
    assert len(nodes) == facts.nodes and not model.functions and not model.graph.sparse_initializer
    tensors = [*model.graph.initializer, *(a.t for node in nodes for a in node.attribute if a.HasField("t"))]
    for node in nodes:
        assert node.op_type in OPERATORS["" if node.domain == "ai.onnx" else node.domain]
        assert not any(a.HasField("g") or a.graphs or a.tensors or a.strings for a in node.attribute)
    for tensor in tensors:
        assert not tensor.external_data and tensor.data_location == onnx.TensorProto.DEFAULT
        assert prod(tensor.dims) <= 2 * tensor.ByteSize()


def check_lines(data: bytes) -> None:
    """Every line becomes one Line in its place, with a text that can be written, or a problem."""
    for form in ("auto", "text", "json"):
        for names in (TEXTS, IMAGES, PROMPTS):
            lines = list(read_lines(io.BytesIO(data), form, names))
            assert [line.number for line in lines] == list(range(1, len(lines) + 1))
            for line in lines:
                json.dumps([line.text, line.problem], ensure_ascii=False).encode("utf-8", "surrogateescape")


def check_image(data: bytes) -> None:
    """A picture is refused, or gives pixels of the right size."""
    try:
        pixels = picture_pixels(data, PICTURE)
    except BadInput:
        return
    assert pixels.shape == (8, 8, 3) and pixels.dtype == "uint8"


def manifest_seeds() -> Iterable[bytes]:
    """Manifests of the tiny bundles, without the white space."""
    for path in sorted(SEEDS.glob("**/manifest.json")):
        yield json.dumps(json.loads(path.read_text(encoding="utf-8"))).encode()


def graph_seeds() -> Iterable[bytes]:
    """Graphs of the tiny bundles."""
    return (path.read_bytes() for path in sorted(SEEDS.glob("**/*.onnx")))


def line_seeds() -> Iterable[bytes]:
    """Lines of every kind."""
    yield b'plain text\n\nanother\r\n{"text": "x"}\n'
    yield '{"text": "good", "text_b": "b"}\n{"text": "\\ud83d\\ude00"}\n{"text": "straße"}\n'.encode()
    yield b'{"image": "a.png"}\n{"prompt": "x", "max_new_tokens": 3, "stop": ["a"]}\n'
    yield b'{"messages": [{"role": "user", "content": "x"}]}\n\xef\xbb\xbf\xff\n'


def image_seeds() -> Iterable[bytes]:
    """Small pictures in several formats and modes."""
    from PIL import Image

    for mode in ("RGB", "L", "P", "RGBA", "I;16", "1"):
        for form in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
            stream = io.BytesIO()
            try:
                Image.new(mode, (9, 7), 1).save(stream, form)
            except (OSError, KeyError):  # a format that has no such mode
                continue
            yield stream.getvalue()


TARGETS = {
    "manifest": Target(check_manifest_text, manifest_seeds),
    "graph": Target(check_graph_bytes, graph_seeds),
    "lines": Target(check_lines, line_seeds),
    "image": Target(check_image, image_seeds),
}


def write_seeds(name: str) -> Path:
    """Write the seeds of a target, and what earlier runs found, into its folder of kept inputs."""
    folder = KEPT / name
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(CORPUS) as corpus:
        for member in corpus:
            file = corpus.extractfile(member)
            if member.name.startswith(f"{name}/") and file is not None:
                (folder / Path(member.name).name).write_bytes(file.read())
    for number, data in enumerate(TARGETS[name].seeds()):
        (folder / f"seed_{number:03d}").write_bytes(data)
    return folder


def mutate_at_random(name: str, seconds: float, seed: int = 0) -> int:
    """Mutate seeds of a target at random and check each; returns how many were checked.

    An input that fails is kept and its error raised.
    """
    draw, seeds = random.Random(seed), [*TARGETS[name].seeds()]
    end, count = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        data = bytearray(draw.choice(seeds))
        for _ in range(draw.randint(1, 8)):
            place, other = draw.randrange(len(data) + 1), draw.choice(seeds)
            start, size = draw.randrange(len(other)), draw.randint(0, 16)
            cut = draw.choice((0, 0, 1, size))
            data[place : place + cut] = draw.choice(
                (b"", bytes([draw.randrange(256)]), other[start : start + size])
            )
        try:
            TARGETS[name].check(bytes(data))
        except BaseException:
            (KEPT / f"{name}-failed").write_bytes(data)
            raise
        count += 1
    return count


def fuzz(name: str, seconds: int) -> None:
    """Fuzz one target in this process, which then ends; exit code 0 unless an input failed."""
    folder = write_seeds(name)
    if atheris is None:
        print(f"{name}: {mutate_at_random(name, seconds)} inputs, at random: there is no atheris here")
        sys.exit(0)
    limits = [f"-max_total_time={seconds}", f"-rss_limit_mb={MAX_MEGABYTES}", f"-timeout={MAX_SECONDS}"]
    options = [*limits, "-print_final_stats=1", f"-artifact_prefix={KEPT / name}-", "-max_len=65536"]
    atheris.Setup([sys.argv[0], *options, str(folder)], TARGETS[name].check)
    atheris.Fuzz()


def main() -> int:
    """Fuzz the targets one after another, each in its own process, and print how many inputs each read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=int, default=300, help="for all targets together")
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all")
    parser.add_argument(HERE, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.target or list(TARGETS)
    each = max(1, options.seconds // len(names))
    if options.here:
        fuzz(names[0], each)
    failed = []
    for name in names:
        command = [sys.executable, __file__, HERE, "--target", name, "--seconds", str(each)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        count = re.search(r"number_of_executed_units: (\d+)", done.stderr)
        print(
            done.stdout.strip() or f"{name}: {count.group(1) if count else 'no'} inputs in {each} s",
            flush=True,
        )
        if done.returncode:
            failed.append(name)
            print("\n".join(done.stderr.splitlines()[-25:]), file=sys.stderr)
    if failed:
        print(f"failed: {', '.join(failed)}; the inputs are in {KEPT}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
