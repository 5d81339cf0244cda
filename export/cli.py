"""Command ee-split: write a verified bundle from a checkpoint folder."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from offramp.export.options import (
    SplitOptions,
    UserError,
    describe_written,
    identity_of,
    parse_blocks,
    read_texts,
)
from offramp.runtime.bundle.manifest import ImageInput, Manifest
from offramp.runtime.progress import announce
from offramp.runtime.summary import TYPED, CommandOutput, Summary, output_options

if TYPE_CHECKING:
    from offramp.export.classifier import ExportableClassifier
    from offramp.export.decoder import ExportableDecoder
    from offramp.export.segments import SplitNetwork
    from offramp.export.verify import VerificationReport

HELP = {"help_option_names": ["-h", "--help"], "show_default": True}
NEEDED = (
    "torch",
    "transformers",
    "optimum",
    "safetensors",
    "tokenizers",
    "onnx",
    "onnxscript",
    "onnxruntime",
)
_FOLDERS = (
    "folder that ee-train wrote (ee-train --out FOLDER), or a language model's as transformers saves it "
    "(config.json, model.safetensors, tokenizer.json)"
)
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class Written(NamedTuple):
    """A bundle that was written: its manifest, and how it was verified."""

    manifest: Manifest
    report: VerificationReport


class VerificationFailed(click.ClickException):
    """A segment's outputs differ from the network's: one line on stderr and exit code 1."""


@click.command(context_settings=HELP)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("bundle"), help="Bundle folder to write."
)
@click.option(
    "--segments",
    help="Where to cut: each (every exit), 'every N' blocks, blocks such as 2,4,6, or auto. auto times "
    "segments and exits on this machine and keeps the exits that save more than they cost for the rows of "
    "--dev; of a language model it times the boundaries of segments and cuts as finely as 1.5 % of the speed "
    "allow in every variant.  [default: each; for a language model the exits of its training, or auto]",
)
@click.option(
    "--dev",
    type=click.Path(path_type=Path),
    help='JSON lines with "text" (or "image", a path) and "label", or a folder of images for each label, on '
    "which operating points are measured, for every variant, with the engine itself (as ee-calibrate does); "
    "never the test set. [default: the checkpoint's points]",
)
@click.option(
    "--engine",
    type=click.Choice(["ort", "trt"]),
    default="ort",
    help="Engine with which --segments auto and --dev measure.",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    help="Device on which they measure.  [default: cpu for ort, cuda for trt]",
)
@click.option(
    "--variants",
    default="fp32,int8",
    help="Precisions to write, fp32 first, such as fp32 or fp32,int8,int4. fp16 is for GPUs, TensorRT and "
    "CUDA (a CPU runs it slower than fp32); int8 and int4 (weights alone) are for CPUs.",
)
@click.option(
    "--texts",
    type=click.Path(path_type=Path),
    help="UTF-8 lines to verify on, paths for images; the first 256 are used. [default: 32 built-in "
    "sentences, or random images]",
)
@click.option(
    "--int8-range",
    type=click.Choice(["auto", "full", "reduced"]),
    default="auto",
    help="Range of int8 weights: full needs VNNI or ARM where the bundle runs, reduced is right everywhere "
    "and one bit coarser, auto asks this machine.",
)
@click.option(
    "--monolith",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write the same network as one graph without exits, other variants beside it, such as "
    "FILE_int8.onnx.",
)
@click.option(
    "--baselines",
    type=click.Path(file_okay=False, path_type=Path),
    help="Also write a folder of single graphs for ee-bench --baselines: the network without exits in every "
    "variant, all segments in one file with exits inside (nested If), and the network cut off after a few "
    "blocks. --out, --baselines and --monolith must be different places.",
)
@click.option(
    "--truncate",
    metavar="BLOCKS",
    help="Blocks after which --baselines are cut off, such as 3,4. [default: around mean exits, or the "
    "middle]",
)
@click.option(
    "--portable",
    is_flag=True,
    help="Of a language model: write graphs of ONNX's own operators, which other engines read, too. They are "
    "slower on a CPU than those with ONNX Runtime's attention, which are the default; fp16 needs them. "
    "ee-run walks language models on a CPU alone.",
)
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace the contents of --out and --baselines, once the new ones are complete.",
)
@output_options
def main(quiet: bool, as_json: bool, **values: Any) -> None:
    """Split the trained network in folder CHECKPOINT into ONNX segments and write them as a bundle; or a
    causal language model as transformers saves it (Llama, Mistral, Qwen2, Qwen3, SmolLM3, Phi-3,
    OLMo 2, Gemma 2 and 3 text, GPT-2, GPT-NeoX).

    Every segment is compared with the network before the bundle gets its name; one that fails is not written.
    Where --segments leaves exits out, policies see the remaining exits alone and the operating points, which
    were measured with all of them, are left out.

    The table of segments goes to stdout; on a terminal a summary follows, with --json it is all.

    Exit codes: 0 written, 1 verification failed, 2 the input cannot be used, 130 interrupted.
    """
    output = CommandOutput(quiet, as_json)
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise UserError(f"{missing[0]} is not installed: run pip install 'offramp[export,cpu]' first")
    options = SplitOptions(**values)  # contradictions first: loading torch takes seconds
    from offramp.export.bundle import BadTarget

    before = {path: identity_of(path) for path in options.targets}
    try:
        with output.progress():
            _require_folder(options.checkpoint)
            if _is_model_folder(options.checkpoint):
                _refuse_encoder(options.checkpoint)
                written = _split_decoder(options, output)
            else:
                written = _split_classifier(options, output)
        output.finish(split_summary(options, *written))
    except BadTarget as problem:
        raise UserError(f"{problem}; {describe_written(before)}") from None
    except KeyboardInterrupt:
        click.echo(f"interrupted; {describe_written(before)}", err=True)
        sys.exit(130)


def _require_folder(folder: Path) -> None:
    """Raise UserError for what is no folder of a checkpoint or of a model, and may be another form of one."""
    if not folder.is_dir():
        if folder.exists():
            raise UserError(f"{folder}: a file; give a {_FOLDERS}. A GGUF file is no such folder")
        name = str(folder)
        hub = f"; a model of the hub is fetched first: hf download {name} --local-dir FOLDER"
        raise UserError(
            f"{folder}: no such folder; give a {_FOLDERS}{hub if _HUB_NAME.fullmatch(name) else ''}"
        )
    if not any((folder / name).exists() for name in ("config.json", "network.json", "weights.safetensors")):
        raise UserError(f"{folder}: neither network.json nor config.json is in it; give a {_FOLDERS}")


def _is_model_folder(folder: Path) -> bool:
    """Whether a folder holds a model that transformers saved."""
    return (folder / "config.json").is_file() and not (folder / "network.json").exists()


def _refuse_encoder(folder: Path) -> None:
    """Raise UserError for a folder of an encoder, which has no exits yet; a causal language model passes."""
    from offramp.models.families import FAMILIES

    try:
        kind = json.loads((folder / "config.json").read_text("utf-8")).get("model_type")
    except (ValueError, AttributeError):
        return  # the decoder's loader names what is wrong
    if kind in FAMILIES:
        raise UserError(
            f"{folder} holds a {kind} model without exits; add them first: "
            f"ee-train --model {folder} --data YOUR_DATA --out ckpt/, then split ckpt/"
        )


def _split_classifier(options: SplitOptions, output: CommandOutput) -> Written:
    """Write the bundle, and baselines if asked for, of a classifier's checkpoint that ee-train wrote."""
    from offramp.export.baselines import write_baselines
    from offramp.export.bundle import check_target
    from offramp.export.classifier import ExportableClassifier
    from offramp.models.families import UnsupportedFamily
    from offramp.runtime.errors import BadInput
    from offramp.runtime.tuning.baselines import FILE_NAME
    from offramp.runtime.tuning.labelled import read_perhaps_labelled
    from offramp.training.checkpoint import BadCheckpoint, load_checkpoint

    export = options.export()
    if options.portable:
        raise UserError(f"--portable is for language models: {options.checkpoint} is none")
    try:
        check_target(options.out, overwrite=options.overwrite)
        if options.baselines is not None:
            check_target(options.baselines, overwrite=options.overwrite, listing=FILE_NAME)
        source = ExportableClassifier(load_checkpoint(options.checkpoint))
    except (BadCheckpoint, UnsupportedFamily) as problem:
        raise UserError(str(problem)) from None
    network = source.network.float()
    # Before --segments auto takes minutes.
    parse_blocks(options.truncate, network.spec.exits, "this checkpoint")
    texts = None if options.texts is None else read_texts(options.texts)
    if options.dev is not None:
        try:
            images, kind = network.family.vision is not None, network.spec.task
            read_perhaps_labelled(options.dev, network.spec.labels, images=images, kind=kind)
        except BadInput as problem:
            raise UserError(f"--dev: {problem}") from None
    split = _cut_classifier(source, options, export.variants, output)
    ends = [segment.blocks[-1] for segment in split.segments]
    blocks = parse_blocks(options.truncate, ends, "the bundle")
    dropped = len(network.spec.exits) - len(ends)
    if dropped and options.dev is None and source.checkpoint.training.get("operating_points"):
        click.echo(f"{dropped} exits left out, so the operating points, measured with all, are too", err=True)
    written = _write(source, split, options, texts, output)
    if options.baselines is not None:
        write_baselines(source, options.out, written.manifest, options.baselines, export, blocks=blocks)
        output.table(f"{options.baselines}: written")
    return written


def _split_decoder(options: SplitOptions, output: CommandOutput) -> Written:
    """Write the bundle of a causal language model in a folder that transformers or ee-train saved."""
    from offramp.export.auto import choose_segment_count
    from offramp.export.bundle import check_target
    from offramp.export.decoder import open_decoder
    from offramp.models.families import UnsupportedFamily
    from offramp.training.checkpoint import BadCheckpoint

    folder, export = options.checkpoint, options.export()
    if "fp16" in export.variants and not options.portable:
        raise UserError(
            f"--variants {options.variants}: fp16 of a language model needs --portable, since "
            "what reads fp16 does not know ONNX Runtime's attention"
        )
    given = {"--dev": options.dev, "--texts": options.texts, "--baselines": options.baselines}
    if refused := next((name for name, value in given.items() if value), None):
        raise UserError(f"{refused} is for trained checkpoints: {folder} is a language model")
    check_target(options.out, overwrite=options.overwrite)
    try:
        source = open_decoder(folder, portable=options.portable)
        cuts = options.segments or source.training.get("exits") or "auto"
        if cuts == "auto":
            choice = choose_segment_count(source, export.variants)
            output.table(choice.table + "\n")
            cuts = choice.cuts
        split = source.split(cuts)
    except (BadCheckpoint, UnsupportedFamily, OSError, ValueError) as problem:
        raise UserError(f"{folder}: {problem}") from None
    return _write(source, split, options, None, output)


def _cut_classifier(
    source: ExportableClassifier, options: SplitOptions, variants: tuple[str, ...], output: CommandOutput
) -> SplitNetwork:
    """Cut the network as option --segments requires; the table of auto is printed on stdout."""
    from offramp.export.auto import choose_exits
    from offramp.runtime.errors import BadInput, BadSetting, EngineUnavailable

    segments = options.segments or "each"
    try:
        if segments.strip() != "auto":
            return source.split(segments, variants)
        if options.dev is None:
            raise ValueError("give --dev FILE: which exits pay depends on where rows exit")
        choice = choose_exits(source, options.dev, options.engine, options.device)
        output.table(choice.table + "\n")
        return source.split(choice.cuts, variants)
    except BadInput as problem:
        raise UserError(f"--dev: {problem}") from None
    except (BadSetting, EngineUnavailable) as problem:
        raise UserError(f"--engine {options.engine}: {problem}") from None
    except ValueError as problem:
        raise UserError(f"--segments {segments} --variants {options.variants}: {problem}") from None


def _write(
    source: ExportableClassifier | ExportableDecoder,
    split: SplitNetwork,
    options: SplitOptions,
    texts: Sequence[str] | None,
    output: CommandOutput,
) -> Written:
    """Write the bundle and, if asked for, the monolith."""
    from offramp.export.bundle import write_bundle
    from offramp.export.monolith import write_monolith
    from offramp.export.table import closing_table
    from offramp.export.verify import NotVerified
    from offramp.runtime.errors import BadBundle, BadInput, BadSetting, EngineUnavailable
    from offramp.runtime.tuning.calibrate import calibrate_classifier

    def measure(folder: Path) -> Manifest:
        assert options.dev is not None
        with announce("measuring operating points"):
            return calibrate_classifier(folder, options.dev, engine=options.engine, device=options.device)

    try:
        manifest, report = write_bundle(
            source,
            split,
            options.out,
            options.export(),
            texts=texts,
            measure=None if options.dev is None else measure,
        )
    except (NotVerified, BadBundle) as problem:
        raise VerificationFailed(f"{problem}; no bundle was written") from None
    except BadInput as problem:
        file = f"--dev {options.dev}" if options.texts is None else f"--texts {options.texts}"
        raise UserError(f"{file}: {problem}; no bundle was written") from None
    except (BadSetting, EngineUnavailable) as problem:
        raise UserError(f"--engine {options.engine}: {problem}; no bundle was written") from None
    output.table(closing_table(manifest, report))
    count = f"{len(manifest.segments)} segments of {manifest.blocks} blocks"
    output.table(f"{options.out}: written and verified, {count}")
    if options.monolith is not None:
        with announce("exporting the monolith"):
            write_monolith(source, options.monolith, options.export())
    return Written(manifest, report)


def split_summary(options: SplitOptions, manifest: Manifest, report: VerificationReport) -> Summary:
    """What ee-split writes at its end."""
    variants, names = manifest.variants, [point.name for point in manifest.points]
    sizes = {variant: _bytes_of(manifest, variant) for variant in variants}
    walked = {difference.segment for difference in report.differences}
    worst = max((report.worst(segment) for segment in walked), default=0.0)  # of the first variant alone
    kept = {
        variant: min(shares)
        for variant in variants[1:]
        if (
            shares := [x.agreement for x in report.losses if x.variant == variant and x.agreement is not None]
        )
    }
    rows = [
        ("bundle", str(options.out)),
        ("segments", f"{len(manifest.segments)} of {manifest.blocks} blocks"),
        *((f"size {variant}", f"{size / 1e6:.1f} MB") for variant, size in sizes.items()),
        ("verified", f"differs from torch by at most {worst:.1e} in {variants[0]}"),
        *((f"{variant} answers", f"{share:.1%} as in {variants[0]}") for variant, share in kept.items()),
        ("points", ", ".join(names) or "none; measure them with ee-calibrate"),
    ]
    extra = {"monolith": options.monolith, "baselines": options.baselines}
    rows += [(name, str(path)) for name, path in extra.items() if path is not None]
    facts = {
        "bundle": str(options.out),
        "segments": len(manifest.segments),
        "blocks": manifest.blocks,
        "variants": list(variants),
        "bytes": sizes,
        "max_difference": worst,
        "answers_kept": kept,
        "points": names,
        **{name: str(path) for name, path in extra.items() if path is not None},
    }
    if isinstance(manifest.input, ImageInput):
        return Summary("Bundle written and verified", rows, facts, ("ee-inspect", str(options.out)))
    command, title = ("ee-run", "--bundle", str(options.out)), TYPED
    return Summary("Bundle written and verified", rows, facts, command, title)


def _bytes_of(manifest: Manifest, variant: str) -> int:
    """Bytes of the graphs that a walk in a variant opens; a segment without it runs in the first variant."""
    segments = [manifest.stem, *manifest.segments]
    if (decoder := manifest.decoder) is not None:
        segments += [*decoder.cache_fills, decoder.head, *decoder.drafting]
    graphs = [segment.variants.get(variant, segment.first_graph).graphs for segment in segments]
    return sum(manifest.files[file].bytes for file in {graph.file for part in graphs for graph in part})
