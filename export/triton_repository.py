"""ee-export-triton: write a model repository for NVIDIA's Triton Inference Server from an unchanged bundle.

\b
    ee-export-triton bundle/ repo/
    ee-export-triton bundle/ repo/ --variant fp32 --variant int8 --point default
    tritonserver --model-repository=repo/          # where `pip install offramp` was run, see docs/triton.md

The stem and each segment become models of their own, which ONNX Runtime runs inside of the server, one for
each precision. A further model of the Python backend, named offramp or as --name says, takes texts or images,
walks the segments as ee-run does, and gives labels, scores, exits and depths; segments that no row reaches
are not run. Every file is compared with the bundle's manifest, and every graph is opened once, before the
repository gets its name. It needs onnxruntime (pip install 'offramp[cpu]').
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import click

from offramp.export.triton_config import FREE, ModelTensor, graph_config, walker_config
from offramp.runtime.bundle.files import Bundle, open_bundle
from offramp.runtime.bundle.manifest import FILE_NAME, SIGNATURE_NAME, Manifest, Tensor, TextInput, Variant
from offramp.runtime.engines.graphs import BundleGraphs, import_onnxruntime
from offramp.runtime.engines.tensors import stem_graph
from offramp.runtime.engines.threads import claim_pool
from offramp.runtime.engines.triton import graph_model
from offramp.runtime.errors import BadBundle, BadSetting, OfframpError
from offramp.runtime.hub.resolve import resolve_bundle
from offramp.runtime.inputs.text import LONG_TEXTS, open_reader
from offramp.runtime.loading import ROW_SESSIONS
from offramp.runtime.rules.resolve import bind_for_bundle, resolve_rule
from offramp.runtime.triton_model import (
    BUNDLE,
    MOVES_BETWEEN_VARIANTS,
    TritonSettings,
    check_variants,
    fixed_shape,
    model_inputs,
    model_outputs,
)

ENGINES = ("ort", "trt")
DEVICES = ("cpu", "cuda")
TENSORRT_VARIANTS = ("fp32", "fp16")  # int8 and int4 graphs hold operators that only ONNX Runtime has
WAITING = ".new-by-ee-export-triton"  # end of the name of the folder in which a repository is made
VERSION = "1"  # of every model; a folder of this name holds it
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
LARGEST = 1 << 16  # of each count that can be chosen

MODEL_PY = '''\
"""A bundle of offramp as a model of Triton's Python backend, written by ee-export-triton.

Needs `pip install offramp` in the Python of the server; bundle/ has its manifest and tokenizer.
"""

import triton_python_backend_utils as pb_utils

from offramp.runtime.triton_model import TritonModel


class TritonPythonModel:
    def initialize(self, args):
        self._model = TritonModel(pb_utils, args)

    def execute(self, requests):
        return self._model.execute(requests)

    def finalize(self):
        self._model.close()
'''


@dataclass(frozen=True)
class RepositoryOptions:
    """How a model repository is written.

    name: of the model that walks; the names of graphs begin with it. variants: precisions to write; none:
    those in which the bundle's rule and its points walk. point: the operating point of requests that name
    none. engine: trt lets ONNX Runtime run graphs with TensorRT. device: None leaves it to the server.
    max_batch: most rows that are walked together. queue_delay: microseconds that a request waits for others.
    instances: processes that walk. long_texts: see load(). Raises BadSetting for options out of range and for
    those that contradict each other.
    """

    name: str = "offramp"
    variants: tuple[str, ...] = ()
    point: str | None = None
    engine: str = "ort"
    device: str | None = None
    max_batch: int = 64
    queue_delay: int = 500
    instances: int = 1
    long_texts: str = LONG_TEXTS[0]

    def __post_init__(self) -> None:
        if not MODEL_NAME.fullmatch(self.name):
            raise BadSetting(f"name {self.name!r:.100}: letters, digits, _ . and - make the name of a model")
        for option, value, known in (
            ("engine", self.engine, ENGINES),
            ("device", self.device, (None, *DEVICES)),
            ("long_texts", self.long_texts, LONG_TEXTS),
        ):
            if value not in known:
                raise BadSetting(f"{option} {value!r}: choose one of {', '.join(filter(None, known))}")
        if self.engine == "trt" and self.device == "cpu":
            raise BadSetting("engine trt runs on device cuda alone, not cpu: leave the device out")
        for count, number, least in (
            ("max_batch", self.max_batch, 1),
            ("queue_delay", self.queue_delay, 0),
            ("instances", self.instances, 1),
        ):
            if not least <= number <= LARGEST:
                raise BadSetting(f"{count} {number}: expected {least} to {LARGEST}")

    @property
    def real_device(self) -> str | None:
        """The device of the graphs; None if the server chooses."""
        return "cuda" if self.engine == "trt" else self.device


@dataclass(frozen=True)
class WrittenRepository:
    """What was written: the models that are graphs, the precisions, and that in which rows start."""

    graphs: tuple[str, ...]
    variants: tuple[str, ...]
    variant: str


def write_repository(
    bundle: Bundle,
    folder: Path,
    options: RepositoryOptions | None = None,
    *,
    require_signature: Path | None = None,
) -> WrittenRepository:
    """Write the model repository of a bundle into a folder that is missing or empty.

    It appears complete or not at all: files are written into a hidden folder beside it, which is renamed. An
    empty folder stays the folder that it is, as it may be a mounted one or that of a shell: files are written
    into a hidden folder in it, and the model that walks comes last.
    require_signature: a public key; what was copied is verified with it. Raises BadSetting for a folder that
    holds something or cannot be written, and for options that the bundle does not have, BadBundle,
    BundleNotFound, and EngineUnavailable without onnxruntime.
    """
    options = options or RepositoryOptions()
    check_target(folder)
    settings, variants = _settings(bundle, options)
    ort = import_onnxruntime("cpu")
    if isinstance(bundle.manifest.input, TextInput):
        open_reader(bundle, options.long_texts)  # or it would fail only in the server
    folder = folder.absolute()
    exists = folder.exists()
    new = folder / WAITING if exists else folder.with_name(f".{folder.name}{WAITING}")
    try:
        shutil.rmtree(new, ignore_errors=True)  # of a run that was killed
        new.mkdir(parents=True)
        graphs = _write_graphs(ort, bundle, new, options, settings)
        _write_walker(bundle, new, options, settings)
        _check_copy(bundle, new / options.name / VERSION / BUNDLE, require_signature)
        check_target(folder)  # again, after minutes
        if exists:
            _move_models(new, folder, last=options.name)
        else:
            new.rename(folder)
    except OSError as problem:
        if isinstance(problem, OfframpError):
            raise
        raise BadSetting(f"{folder}: it cannot be written: {problem}") from problem
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return WrittenRepository(graphs, variants, settings.variant)


def check_target(folder: Path) -> None:
    """Raise BadSetting unless a folder is missing or empty: what it holds is never replaced."""
    cure = "name an empty folder, or one that does not exist"
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise BadSetting(f"{folder} is a file or a link, not a folder; {cure}")
    held = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
    if others := [name for name in held if name != WAITING]:
        raise BadSetting(f"{folder} holds {others[0]}, which would be lost; {cure}")


def _move_models(source: Path, folder: Path, *, last: str) -> None:
    """Move all models from one folder to another, one of them after the others; all or none."""
    moved: list[Path] = []
    try:
        for model in sorted(source.iterdir(), key=lambda model: (model.name == last, model.name)):
            model.rename(folder / model.name)
            moved.append(folder / model.name)
    except OSError:
        for model in moved:
            shutil.rmtree(model, ignore_errors=True)
        raise


def _settings(bundle: Bundle, options: RepositoryOptions) -> tuple[TritonSettings, tuple[str, ...]]:
    """How the model walks, and the precisions that are written; the bundle's rule is checked with them."""
    manifest = bundle.manifest
    if manifest.kind not in ROW_SESSIONS:
        raise BadSetting(
            f"{bundle.folder} generates text, and the model of Triton answers row by row: use ee-serve"
        )
    if options.long_texts != LONG_TEXTS[0] and not isinstance(manifest.input, TextInput):
        raise BadSetting(
            f"long_texts {options.long_texts}: {bundle.folder} reads images, so it has no windows"
        )
    if unknown := [name for name in options.variants if name not in manifest.variants]:
        raise BadSetting(
            f"variant {unknown[0]!r} is not in {bundle.folder}; it offers: {', '.join(manifest.variants)}"
        )
    spec, variant = resolve_rule(manifest, point=options.point)
    if options.variants and options.point is None and variant not in options.variants:
        variant = options.variants[0]
    variants = tuple(dict.fromkeys(options.variants)) or _usual_variants(manifest, spec.name, variant)
    check_variants(manifest, spec.name, variant, variants)
    bind_for_bundle(bundle, spec)
    if options.engine == "trt" and (others := [name for name in variants if name not in TENSORRT_VARIANTS]):
        raise BadSetting(
            f"variant {others[0]} is ONNX Runtime's own, and engine trt walks "
            f"{' or '.join(TENSORRT_VARIANTS)}: choose with --variant"
        )
    settings = TritonSettings(
        models=options.name,
        variants=",".join(variants),
        variant=variant,
        point=options.point or "",
        long_texts=options.long_texts,
        rows=str(options.max_batch),
    )
    return settings, variants


def _usual_variants(manifest: Manifest, rule: str, variant: str) -> tuple[str, ...]:
    """The precisions in which the rule and all operating points walk, in the order of the manifest."""
    walked = {variant, *(point.variant for point in manifest.points)}
    if MOVES_BETWEEN_VARIANTS in (
        rule,
        *(point.rule.name for point in manifest.points),
    ):  # it goes on in any of them
        return manifest.variants
    return tuple(name for name in manifest.variants if name in walked)


def _write_graphs(
    ort: ModuleType, bundle: Bundle, folder: Path, options: RepositoryOptions, settings: TritonSettings
) -> tuple[str, ...]:
    """Write a model for each graph that a walk needs; returns their names."""
    opener = BundleGraphs(ort, bundle, "cpu", claim_pool(ort, None, False), {}, share=False)
    models: dict[str, str] = {}  # the file of each model
    for graph, variant in _graphs(bundle.manifest, settings).items():
        model = graph_model(options.name, graph.file)
        if models.setdefault(model, graph.file) != graph.file:
            raise BadBundle(f"{bundle.folder}: {models[model]} and {graph.file} would both be model {model}")
        facts, opened, data = opener.read(graph)
        assert data is not None  # nothing is shared, so nothing is open already
        session, source = opener.open(facts, opened, data).session, bundle.folder / graph.file
        text = graph_config(
            model,
            _tensors(session.get_inputs(), graph.inputs, source),
            _tensors(session.get_outputs(), graph.outputs, source),
            device=options.real_device,
            tensorrt=options.engine == "trt",
            half=variant == "fp16",
        )
        _write_model(folder / model, text, "model.onnx", data)
        if (weights := bundle.weights_of(graph.file)) is not None:  # the graph names this file beside it
            (folder / model / VERSION / weights[0]).write_bytes(bundle.read(weights[0]))
    return tuple(models)


def _graphs(manifest: Manifest, settings: TritonSettings) -> dict[Variant, str]:
    """The graphs that walks need, each once, with the precision of its segment."""
    graphs = {graph: settings.variant for graph in stem_graph(manifest, settings.variant).graphs}
    for variant in settings.variants.split(","):
        for segment in manifest.segments:
            graphs |= {graph: variant for graph in segment.variants[variant].graphs if graph not in graphs}
    return graphs


def _tensors(nodes: Sequence[Any], tensors: Sequence[Tensor], source: Path) -> list[ModelTensor]:
    """The inputs or outputs of a graph in the order of the manifest.

    nodes: as ONNX Runtime gives them. Sizes are the graph's: Triton refuses a model whose configuration
    has a number where the graph has none. source: the graph's file, for errors.
    """
    shapes = {node.name: node.shape for node in nodes}
    if unknown := [tensor.name for tensor in tensors if not shapes[tensor.name]]:
        raise BadBundle(
            f"{source}: the graph does not state how many axes {unknown[0]} has, which Triton needs; write "
            "the bundle again with ee-split"
        )
    return [
        ModelTensor(
            tensor.name,
            tensor.dtype,
            tuple(size if isinstance(size, int) else FREE for size in shapes[tensor.name]),
        )
        for tensor in tensors
    ]


def _write_walker(bundle: Bundle, folder: Path, options: RepositoryOptions, settings: TritonSettings) -> None:
    """Write the Python model: model.py, and what it needs of the bundle."""
    manifest = bundle.manifest
    text = walker_config(
        options.name,
        [
            ModelTensor(tensor.name, tensor.dtype, fixed_shape(tensor), optional)
            for tensor, optional in model_inputs(manifest)
        ],
        [ModelTensor(tensor.name, tensor.dtype, fixed_shape(tensor)) for tensor in model_outputs(manifest)],
        max_batch=options.max_batch,
        queue_delay=options.queue_delay,
        instances=options.instances,
        parameters=settings.parameters(),
    )
    _write_model(folder / options.name, text, "model.py", MODEL_PY.encode("utf-8"))
    copy = folder / options.name / VERSION / BUNDLE
    copy.mkdir()
    (copy / FILE_NAME).write_bytes((bundle.folder / FILE_NAME).read_bytes())
    if (bundle.folder / SIGNATURE_NAME).is_file():
        (copy / SIGNATURE_NAME).write_bytes((bundle.folder / SIGNATURE_NAME).read_bytes())
    if isinstance(manifest.input, TextInput):
        (copy / manifest.input.tokenizer).write_bytes(bundle.read(manifest.input.tokenizer))


def _check_copy(bundle: Bundle, copy: Path, require_signature: Path | None) -> None:
    """Raise BadBundle if the manifest that was copied is not the one whose files were compared."""
    if open_bundle(copy, require_signature).manifest != bundle.manifest:
        raise BadBundle(
            f"{bundle.folder / FILE_NAME}: it changed while it was read; write the repository again"
        )


def _write_model(folder: Path, config: str, name: str, data: bytes) -> None:
    (folder / VERSION).mkdir(parents=True)
    (folder / "config.pbtxt").write_text(config, encoding="utf-8")
    (folder / VERSION / name).write_bytes(data)


@click.command(help=__doc__, context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("repository", metavar="REPO", type=click.Path(path_type=Path))
@click.option(
    "--name", default="offramp", help="Name of the model that walks; names of graphs begin with it."
)
@click.option(
    "--variant",
    "variants",
    multiple=True,
    help="Precision to write; give it several times for several.  [default: those in which the bundle's rule "
    "and its operating points walk]",
)
@click.option("--point", metavar="NAME", help="Operating point of requests that name none.")
@click.option(
    "--engine",
    type=click.Choice(ENGINES),
    default="ort",
    help="trt: ONNX Runtime runs the graphs with its TensorRT provider, on GPUs alone.",
)
@click.option(
    "--device",
    type=click.Choice(DEVICES),
    help="Where the graphs run.  [default: the server chooses: GPUs if it has some]",
)
@click.option("--max-batch", default=64, metavar="ROWS", help="Most rows of a request, and of one walk.")
@click.option(
    "--queue-delay",
    default=500,
    metavar="MICROSECONDS",
    help="How long a request waits for others to join it.",
)
@click.option("--instances", default=1, metavar="COUNT", help="Processes of the model that walks.")
@click.option(
    "--long", "long_texts", type=click.Choice(LONG_TEXTS), default=LONG_TEXTS[0], help="As in ee-run."
)
@click.option(
    "--require-signature",
    metavar="KEY",
    type=click.Path(path_type=Path),
    help="Public key that must have signed the bundle.",
)
def main(bundle: Path, repository: Path, require_signature: Path | None, **options: Any) -> None:
    """Command ee-export-triton; its help is the docstring of this module."""
    try:
        chosen = RepositoryOptions(**options)
        opened = open_bundle(resolve_bundle(bundle, command=True), require_signature)
        written = write_repository(opened, repository, chosen, require_signature=require_signature)
    except OfframpError as problem:
        click.echo(f"ee-export-triton: {problem}", err=True)
        sys.exit(2)
    click.echo(f"{repository}: written, model {chosen.name} over {len(written.graphs)} graphs")
    click.echo(f"precision {', '.join(written.variants)}; rows start in {written.variant}")
    click.echo(f"tritonserver --model-repository={repository}    # where `pip install offramp` was run")


if __name__ == "__main__":
    main()
