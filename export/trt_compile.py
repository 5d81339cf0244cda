"""ee-verify: check a bundle's files, and compile its graphs for TensorRT ahead of time, without a GPU.

\b
    ee-verify bundle/              # compare every file with the manifest, and check its graphs (SECURITY.md)
    ee-verify bundle/ --key FILE   # and verify that this key signed it
    ee-verify bundle/ --trt        # and compile its graphs with TensorRT-RTX

TensorRT itself does not start without a GPU; TensorRT-RTX compiles on the CPU. It has the same parser and API
and another compiler: a graph that it refuses would fail on a device; one that it compiles will very probably
work, which is no proof. int8 and int4 graphs are for ONNX Runtime alone; fp32 and fp16 are for TensorRT, too.
Profiles and settings are those with which engine trt builds on a device.
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
from offramp.runtime.engines.trt_build import ErrorLog, Profile, build_engine, build_profiles
from offramp.runtime.errors import BadBundle, BadSetting, OfframpError
from offramp.runtime.hub.resolve import resolve_bundle

TARGETS = ("8.6", "8.9", "12.0")  # compute capabilities: Ampere, Ada, Blackwell
CURE = "pip install tensorrt-rtx-cu13 (dev machines only: 97 MB; it needs no GPU)"


@dataclass(frozen=True)
class CompiledGraph:
    """Result of compiling one graph: the engine's size in bytes, or None and TensorRT-RTX's error messages.

    graph: its file. seconds: time of the compilation.
    """

    graph: str
    size: int | None
    seconds: float
    problem: str = ""


def import_compiler() -> Any:
    """Import the module tensorrt_rtx; raises ModuleNotFoundError that names the package to install."""
    try:
        return import_module("tensorrt_rtx")
    except ImportError as problem:
        raise ModuleNotFoundError(f"TensorRT-RTX cannot be imported ({problem}): {CURE}") from None


def compile_graph(
    trt: Any, data: bytes, graph: Variant, known: Sequence[Profile], targets: Sequence[str] = TARGETS
) -> CompiledGraph:
    """Compile one graph for every target, with the settings of engine trt.

    trt: module tensorrt_rtx. data: the graph's bytes. targets: compute capabilities such as "8.6".
    """
    started = time.perf_counter()

    def adjust(config: Any) -> None:
        config.num_compute_capabilities = len(targets)
        for number, target in enumerate(targets):
            # The compiler would leave out a declined target without an error.
            if not config.set_compute_capability(_capability(trt, target), number):
                raise BadBundle(f"{graph.file}: TensorRT-RTX declines to compile it for {target}")

    try:
        blob, _ = build_engine(trt, ErrorLog(trt), data, graph, known, adjust=adjust)
    except BadBundle as problem:
        # After any error the compiler also reports that there is no GPU, which is no error of the graph.
        messages = [message for message in str(problem).split("; ") if "cudaError" not in message]
        return CompiledGraph(graph.file, None, time.perf_counter() - started, "; ".join(messages))
    return CompiledGraph(graph.file, len(blob), time.perf_counter() - started)


def compile_bundle(
    bundle: Bundle, variants: Sequence[str] = VARIANTS, targets: Sequence[str] = TARGETS
) -> Iterator[CompiledGraph]:
    """Compile the graphs of a bundle in these variants, the stem first; variants it lacks are left out."""
    trt, manifest = import_compiler(), bundle.manifest
    if manifest.task == GENERATION:
        raise BadSetting(f"{bundle.folder} generates text, which engine trt does not walk yet")
    graphs = [manifest.stem.variants[manifest.variants[0]]]
    for variant in (name for name in manifest.variants if name in variants):
        graphs += [graph for segment in manifest.segments for graph in segment.variants[variant].graphs]
    for graph in dict.fromkeys(graphs):  # segments may share one
        yield compile_graph(trt, bundle.read(graph.file), graph, build_profiles(manifest), targets)


def _capability(trt: Any, target: str) -> Any:
    """The compiler's constant for a target such as "8.6"; raises BadSetting that lists those that exist."""
    known = [name for name in vars(trt.ComputeCapability) if re.fullmatch(r"SM\d+", name)]
    if (name := f"SM{target.replace('.', '')}") not in known:
        offers = ", ".join(f"{constant[2:-1]}.{constant[-1]}" for constant in known)
        raise BadSetting(f"--target {target}: TensorRT-RTX compiles for {offers}")
    return getattr(trt.ComputeCapability, name)


@click.command(help=__doc__, context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=click.Path(path_type=Path), default=Path("bundle/"))
@click.option("--key", type=click.Path(path_type=Path), help="Public key that must have signed the bundle.")
@click.option("--trt", is_flag=True, help="Compile its graphs with TensorRT-RTX, which must be installed.")
@click.option("--variant", help="Variant to compile. [default: those of fp32 and fp16 that it has]")
@click.option("--target", "targets", multiple=True, default=TARGETS, help="Compute capability, such as 8.6.")
def main(bundle: Path, key: Path | None, trt: bool, variant: str | None, targets: tuple[str, ...]) -> None:
    """Command ee-verify: check the files of a bundle and, with --trt, compile its graphs."""
    refused = 0
    try:
        opened = open_bundle(resolve_bundle(bundle, command=True), key)
        opened.verify()
        click.echo(f"{bundle}: {len(opened.manifest.files)} files as the manifest says")
        if key is not None:
            click.echo(f"{bundle}: signed by {key}")
        if trt and variant not in (None, *opened.manifest.variants):
            raise click.UsageError(f"--variant {variant}: it offers {', '.join(opened.manifest.variants)}")
        for result in (
            compile_bundle(opened, VARIANTS if variant is None else [variant], targets) if trt else ()
        ):
            is_refused = result.size is None
            outcome = "refused" if is_refused else f"{result.size:,} bytes, {result.seconds:.1f} s"
            click.echo(f"{result.graph}: {outcome}")
            if result.problem:
                click.echo(f"  {result.problem}", err=True)
            refused += is_refused
    except (OfframpError, ModuleNotFoundError) as problem:
        click.echo(f"ee-verify: {problem}", err=True)
        sys.exit(2)
    sys.exit(1 if refused else 0)


if __name__ == "__main__":
    main()
