"""ee-verify: is a bundle whole, and would TensorRT take its graphs? Compiled ahead of time, without a GPU.

    ee-verify bundle/              # every file against the manifest
    ee-verify bundle/ --trt        # and its graphs through TensorRT-RTX's parser and compiler

TensorRT itself does not start without a GPU; TensorRT-RTX compiles on the CPU. It has the same parser and API
and another compiler: what it refuses would fail on a device, what it takes is strong evidence and no proof.
int8 and int4 graphs are ONNX Runtime's own; fp32 and fp16 are meant for TensorRT. Profiles and settings are
those with which engine trt builds on a device.
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

from offramp.runtime.bundle.files import Bundle, open_bundle
from offramp.runtime.bundle.manifest import GENERATION, Variant
from offramp.runtime.engines.trt import VARIANTS
from offramp.runtime.engines.trt_build import Log, Profile, build, profiles
from offramp.runtime.errors import BadBundle, BadSetting, OfframpError

TARGETS = ("8.6", "8.9", "12.0")  # compute capabilities: Ampere, Ada, Blackwell
CURE = "pip install tensorrt-rtx-cu13 (dev machines only: 97 MB; it needs no GPU)"


@dataclass(frozen=True)
class Compiled:
    """One graph: bytes of the engine, or None and what TensorRT-RTX said against it."""

    graph: str
    size: int | None
    seconds: float
    problem: str = ""


def compiler() -> Any:
    """The module tensorrt_rtx; ModuleNotFoundError says how to get it."""
    try:
        return import_module("tensorrt_rtx")
    except ImportError as problem:
        raise ModuleNotFoundError(f"TensorRT-RTX cannot be imported ({problem}): {CURE}") from None


def compile_graph(
    trt: Any, data: bytes, graph: Variant, known: Sequence[Profile], targets: Sequence[str] = TARGETS
) -> Compiled:
    """Compile the bytes of one graph for every target, as engine trt would for the GPU that it finds."""
    started = time.perf_counter()

    def adjust(config: Any) -> None:
        config.num_compute_capabilities = len(targets)
        for at, target in enumerate(targets):
            # One that is declined would be left out without a word.
            if not config.set_compute_capability(_capability(trt, target), at):
                raise BadBundle(f"{graph.file}: TensorRT-RTX declines to compile it for {target}")

    try:
        blob, _ = build(trt, Log(trt), data, graph, known, adjust=adjust)
    except BadBundle as problem:
        # After any error it asks for a GPU, too, which says nothing about the graph.
        said = [part for part in str(problem).split("; ") if "cudaError" not in part]
        return Compiled(graph.file, None, time.perf_counter() - started, "; ".join(said))
    return Compiled(graph.file, len(blob), time.perf_counter() - started)


def check(
    bundle: Bundle, variants: Sequence[str] = VARIANTS, targets: Sequence[str] = TARGETS
) -> Iterator[Compiled]:
    """Every graph of the bundle in these variants, those of them that it has, stem first."""
    trt, manifest = compiler(), bundle.manifest
    if manifest.task == GENERATION:
        raise BadSetting(f"{bundle.folder} generates text, which engine trt does not walk yet")
    graphs = [manifest.stem.variants[manifest.variants[0]]]
    for variant in (name for name in manifest.variants if name in variants):
        graphs += [stage.variants[variant] for stage in manifest.segments]
    for graph in graphs:
        yield compile_graph(trt, bundle.read(graph.file), graph, profiles(manifest), targets)


def _capability(trt: Any, target: str) -> Any:
    """The compiler's own constant; BadSetting names those that there are."""
    known = [name for name in vars(trt.ComputeCapability) if re.fullmatch(r"SM\d+", name)]
    if (name := f"SM{target.replace('.', '')}") not in known:
        offers = ", ".join(f"{one[2:-1]}.{one[-1]}" for one in known)
        raise BadSetting(f"--target {target}: TensorRT-RTX compiles for {offers}")
    return getattr(trt.ComputeCapability, name)


@click.command(help=__doc__, context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=click.Path(path_type=Path), default=Path("bundle/"))
@click.option("--trt", is_flag=True, help="Compile its graphs with TensorRT-RTX, which has to be installed.")
@click.option("--variant", help="Precision that is compiled. [default: those of fp32 and fp16 that it has]")
@click.option("--target", "targets", multiple=True, default=TARGETS, help="Compute capability, such as 8.6.")
def main(bundle: Path, trt: bool, variant: str | None, targets: tuple[str, ...]) -> None:
    refused = 0
    try:
        opened = open_bundle(bundle)
        opened.verify()
        click.echo(f"{bundle}: {len(opened.manifest.files)} files as the manifest says")
        if trt and variant not in (None, *opened.manifest.variants):
            raise click.UsageError(f"--variant {variant}: it offers {', '.join(opened.manifest.variants)}")
        for found in check(opened, VARIANTS if variant is None else [variant], targets) if trt else ():
            said = "refused" if found.size is None else f"{found.size:,} bytes, {found.seconds:.1f} s"
            click.echo(f"{found.graph}: {said}")
            if found.problem:
                click.echo(f"  {found.problem}", err=True)
            refused += found.size is None
    except (OfframpError, ModuleNotFoundError) as problem:
        click.echo(f"ee-verify: {problem}", err=True)
        sys.exit(2)
    sys.exit(1 if refused else 0)


if __name__ == "__main__":
    main()
