"""ee-verify: is a bundle whole, and would TensorRT take its graphs? Compiled ahead of time, without a GPU.

    ee-verify bundle/              # every file against the manifest
    ee-verify bundle/ --trt        # and every graph through TensorRT-RTX's parser and compiler

TensorRT itself does not start without a GPU; TensorRT-RTX compiles on the CPU. It has the same parser and API
and another compiler: what it refuses would fail on a device, what it takes is strong evidence and no proof.
int8 and int4 graphs are ONNX Runtime's own; fp32 is what is meant for TensorRT.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from offramp.runtime.bundle import Bundle, open_bundle
from offramp.runtime.errors import BadSetting, OfframpError
from offramp.runtime.manifest import TextInput, Variant

TARGETS = ("8.6", "8.9", "12.0")  # compute capabilities: Ampere, Ada, Blackwell
CURE = "pip install tensorrt-rtx-cu13 (dev machines only: 97 MB; it needs no GPU)"
ROWS = (1, 1, 32)  # least, usual and most rows of a step
Shapes = tuple[tuple[int, ...], ...]  # least, usual, most


@dataclass(frozen=True)
class Compiled:
    """One graph: bytes of the engine, or None and what TensorRT-RTX said against it."""

    graph: str
    size: int | None
    seconds: float
    problems: tuple[str, ...]


def compiler() -> Any:
    """The module tensorrt_rtx; ModuleNotFoundError says how to get it."""
    try:
        return import_module("tensorrt_rtx")
    except ImportError as problem:
        raise ModuleNotFoundError(f"TensorRT-RTX cannot be imported ({problem}): {CURE}") from None


def profile(shape: Sequence[int | str], tokens: Shapes) -> Shapes:
    """Least, usual and most of one input; tokens: the same three of ("batch", "seq")."""
    return tuple(
        tuple(dim if isinstance(dim, int) else sizes[dim == "seq"] for dim in shape) for sizes in tokens
    )


def sizes_of(bundle: Bundle) -> Shapes:
    """(batch, seq) at the least, usually and at the most; images have one length, fixed in their graphs."""
    reads = bundle.manifest.input
    longest = reads.longest if isinstance(reads, TextInput) else 1
    return tuple(zip(ROWS, (1, min(64, longest), longest), strict=True))


def compile_graph(
    trt: Any, file: Path, variant: Variant, sizes: Shapes, targets: Sequence[str] = TARGETS
) -> Compiled:
    """Parse and compile one graph for every target, under the profile of its inputs."""
    log, started = _log(trt), time.perf_counter()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    blob = None
    if parser.parse_from_file(str(file)):
        shapes, config = builder.create_optimization_profile(), builder.create_builder_config()
        for tensor in variant.inputs:
            shapes.set_shape(tensor.name, *profile(tensor.shape, sizes))
        config.add_optimization_profile(shapes)
        config.num_compute_capabilities = len(targets)
        # A target that is refused would be left out without a word.
        taken = [config.set_compute_capability(_capability(trt, to), at) for at, to in enumerate(targets)]
        blob = builder.build_serialized_network(network, config) if all(taken) else None
    size = None if blob is None else int(blob.nbytes)
    problems = () if size is not None else tuple(log.errors) or ("no reason was given",)
    return Compiled(file.name, size, time.perf_counter() - started, problems)


def check(bundle: Bundle, variant: str = "fp32", targets: Sequence[str] = TARGETS) -> Iterator[Compiled]:
    """Every graph of the bundle in one variant, stem first."""
    trt, manifest = compiler(), bundle.manifest
    for stage in (manifest.stem, *manifest.segments):
        graph = stage.variants.get(variant) or stage.variants[manifest.variants[0]]
        yield compile_graph(trt, bundle.folder / graph.file, graph, sizes_of(bundle), targets)


def _capability(trt: Any, target: str) -> Any:
    """The compiler's own constant; BadSetting names those that there are."""
    known = [name for name in vars(trt.ComputeCapability) if re.fullmatch(r"SM\d+", name)]
    if (name := f"SM{target.replace('.', '')}") not in known:
        offers = ", ".join(f"{one[2:-1]}.{one[-1]}" for one in known)
        raise BadSetting(f"--target {target}: TensorRT-RTX compiles for {offers}")
    return getattr(trt.ComputeCapability, name)


def _log(trt: Any) -> Any:
    """A logger that keeps errors; its class is made here, since its base is only there with the module."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            # After any error it asks for a GPU, too: that says nothing about the graph.
            if severity <= trt.ILogger.Severity.ERROR and "cudaError" not in message:
                self.errors.append(message.strip())

    return Log()


@click.command(help=__doc__, context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=click.Path(path_type=Path), default=Path("bundle/"))
@click.option("--trt", is_flag=True, help="Compile every graph with TensorRT-RTX, which has to be installed.")
@click.option("--variant", default="fp32", help="Precision of the graphs that are compiled.")
@click.option("--target", "targets", multiple=True, default=TARGETS, help="Compute capability, such as 8.6.")
def main(bundle: Path, trt: bool, variant: str, targets: tuple[str, ...]) -> None:
    refused = 0
    try:
        opened = open_bundle(bundle)
        opened.verify()
        click.echo(f"{bundle}: {len(opened.manifest.files)} files as the manifest says")
        if trt and variant not in opened.manifest.variants:
            raise click.UsageError(f"--variant {variant}: it offers {', '.join(opened.manifest.variants)}")
        for found in check(opened, variant, targets) if trt else ():
            said = "refused" if found.size is None else f"{found.size:,} bytes, {found.seconds:.1f} s"
            click.echo(f"{found.graph}: {said}")
            for problem in found.problems:
                click.echo(f"  {problem}", err=True)
            refused += found.size is None
    except (OfframpError, ModuleNotFoundError) as problem:
        click.echo(f"ee-verify: {problem}", err=True)
        sys.exit(2)
    sys.exit(1 if refused else 0)


if __name__ == "__main__":
    main()
