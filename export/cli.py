"""ee-split: from a checkpoint folder to a verified bundle."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from offramp.export.options import UserError, agree, blocks_of, identity_of, lines_of, outcome, variants_of

if TYPE_CHECKING:
    from offramp.export.split import Segment
    from offramp.training.checkpoint import Checkpoint

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
    "rich",
)


class NotVerified(click.ClickException):
    """One line on stderr, exit code 1 as click has it: the graphs do not say what the network says."""


@click.command(context_settings=HELP)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("bundle"), help="Bundle folder to write."
)
@click.option(
    "--segments",
    help="Where to cut: each (every exit), 'every N' blocks, blocks such as 2,4,6, or auto: times segments "
    "and exits here and keeps the exits that save more than they cost the rows of --dev; of language models "
    "times seams and cuts as finely as 2 % of the speed allow in every variant.  [default: each; of language "
    "models where the training had its exits, else auto]",
)
@click.option(
    "--dev",
    type=click.Path(path_type=Path),
    help='JSON lines with "text" (or "image", a path) and "label", or a folder of images for each label, on '
    "which operating points are measured, for every variant, by the engine itself (as ee-calibrate does); "
    "never the test set. [default: those of the checkpoint]",
)
@click.option(
    "--engine",
    type=click.Choice(["ort", "trt"]),
    default="ort",
    help="On what --segments auto and --dev measure.",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    help="Where they do.  [default: cpu for ort, cuda for trt]",
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
    help="UTF-8 lines to verify on, paths where images are read; the first 256 count. [default: 32 sentences "
    "that come along, or images drawn by chance]",
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
    "--rivals",
    type=click.Path(file_okay=False, path_type=Path),
    help="Also write a folder of single graphs for ee-bench --against: the network without exits in every "
    "variant, all segments in one file with exits inside (nested If), and the network cut off after a few "
    "blocks. --out, --rivals and --monolith must lie apart.",
)
@click.option(
    "--truncate",
    metavar="BLOCKS",
    help="Blocks after which --rivals are cut off, such as 3,4. [default: around mean exits, or the middle]",
)
@click.option(
    "--overwrite", is_flag=True, help="Replace what is in --out and --rivals, once the new is complete."
)
def main(**wish: Any) -> None:
    """Split the trained network in folder CHECKPOINT into ONNX segments and write them as a bundle; or a
    causal language model as transformers saves it (Llama, Mistral, Qwen2, Qwen3, GPT-2).

    Every segment is compared with the network on real text before the bundle gets its name; one that fails is
    not written. Where --segments leaves exits out, policies see the remaining exits alone and the operating
    points, measured with all of them, are left out.

    Exit codes: 0 written, 1 verification failed, 2 the input cannot be used, 130 interrupted.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise UserError(f"{missing[0]} is not installed: run pip install 'offramp[export,cpu]' first")
    from offramp.export.bundle import BadTarget

    before = {path: identity_of(path) for path in map(wish.get, ("out", "monolith", "rivals")) if path}
    try:
        _split(**wish)
    except BadTarget as problem:
        raise UserError(f"{problem}; {outcome(before)}") from None
    except KeyboardInterrupt:
        click.echo(f"interrupted; {outcome(before)}", err=True)
        sys.exit(130)


def _split(
    checkpoint: Path,
    out: Path,
    segments: str | None,
    dev: Path | None,
    engine: str,
    device: str | None,
    variants: str,
    texts: Path | None,
    int8_range: str,
    monolith: Path | None,
    rivals: Path | None,
    truncate: str | None,
    overwrite: bool,
) -> None:
    agree(out, monolith, rivals, truncate)  # before torch is loaded, which takes seconds
    from offramp.export.baselines import write_rivals
    from offramp.export.bundle import check_target, finish, writing
    from offramp.export.describe import describe
    from offramp.export.monolith import write_monoliths
    from offramp.export.precision import needs_reduced_range
    from offramp.export.split import kept_exits, split
    from offramp.export.table import closing_table
    from offramp.export.verify import verify
    from offramp.models.families import UnsupportedFamily
    from offramp.runtime.errors import BadInput, BadSetting, EngineUnavailable
    from offramp.runtime.tuning.calibrate import calibrated
    from offramp.runtime.tuning.labelled import read_labelled
    from offramp.training.checkpoint import TOKENIZER, BadCheckpoint, load_checkpoint

    names = variants_of(variants)
    if (checkpoint / "config.json").is_file() and not (checkpoint / "network.json").exists():
        alone = [n for n, wish in {"--dev": dev, "--texts": texts, "--rivals": rivals}.items() if wish]
        return _decoder(checkpoint, out, segments, names, monolith, overwrite, alone)
    segments = segments or "each"
    reduced = needs_reduced_range() if int8_range == "auto" else int8_range == "reduced"
    try:
        check_target(out, overwrite=overwrite)
        if rivals is not None:
            check_target(rivals, overwrite=overwrite, listing="rivals.json")
        loaded = load_checkpoint(checkpoint)
    except (BadCheckpoint, UnsupportedFamily) as problem:
        raise UserError(str(problem)) from None
    loaded.network.float()
    blocks_of(truncate, loaded.network.spec.exits, "this checkpoint")  # before --segments auto takes minutes
    lines = None if texts is None else lines_of(texts)
    try:
        if dev is not None:  # before minutes go into exporting
            images = loaded.network.family.vision is not None
            read_labelled(dev, loaded.network.spec.labels, images=images)
        if segments.strip() == "auto":
            parts = split(loaded.network, _by_cost(loaded, dev, engine, device), names)
        else:
            parts = split(loaded.network, kept_exits(loaded.network, segments), names)
    except BadInput as problem:
        raise UserError(f"--dev: {problem}") from None
    except (BadSetting, EngineUnavailable) as problem:
        raise UserError(f"--engine {engine}: {problem}") from None
    except ValueError as problem:
        raise UserError(f"--segments {segments} --variants {variants}: {problem}") from None
    blocks = blocks_of(truncate, [part.blocks[-1] for part in parts[1:]], "the bundle")
    dropped = len(loaded.network.spec.exits) - len(parts) + 1
    if dropped and dev is None and loaded.training.get("operating_points"):
        click.echo(f"{dropped} exits left out, so the operating points, measured with all, are too", err=True)
    with writing(out, overwrite=overwrite) as beside:
        _export(parts, names, beside, reduced)
        if loaded.tokenizer is not None:
            shutil.copyfile(loaded.tokenizer, beside / TOKENIZER)
        try:
            report = verify(loaded, beside, parts, names, lines)
        except BadInput as problem:
            raise UserError(f"--texts {texts}: {problem}") from None
        bad = report.first_bad
        if bad is not None:
            raise NotVerified(f"{bad}, at most {bad.allowed:.3g} is right; no bundle was written")
        facts = {"int8": {"reduce_range": reduced}} if "int8" in names else {}
        manifest = finish(beside, describe(loaded, parts, names, facts))
        if dev is not None:
            click.echo("measuring operating points", err=True)
            try:
                manifest = calibrated(beside, dev, engine=engine, device=device)
            except (BadSetting, EngineUnavailable) as problem:
                raise UserError(f"--engine {engine}: {problem}; no bundle was written") from None
    click.echo(closing_table(manifest, report))
    click.echo(f"{out}: written and verified")
    if monolith is not None:
        write_monoliths(loaded, monolith, names, reduce_range=reduced)
    if rivals is not None:
        write_rivals(loaded, out, manifest, rivals, blocks=blocks, overwrite=overwrite, reduce_range=reduced)
        click.echo(f"{rivals}: written")


def _decoder(
    folder: Path,
    out: Path,
    segments: str | None,
    variants: Sequence[str],
    monolith: Path | None,
    overwrite: bool,
    others: Sequence[str],
) -> None:
    """A folder with a causal language model, as transformers or ee-train saves it."""
    from offramp.export.bundle import check_target
    from offramp.export.decoder_auto import choose_cuts
    from offramp.export.decoder_bundle import read_folder, write_decoder
    from offramp.export.decoder_monolith import write_monolith
    from offramp.export.decoder_verify import NotTheNetwork
    from offramp.export.table import decoder_table
    from offramp.models.families import UnsupportedFamily
    from offramp.training.checkpoint import BadCheckpoint

    if others:
        raise UserError(f"{others[0]} is for trained checkpoints: {folder} is a language model")
    check_target(out, overwrite=overwrite)
    try:
        network, training = read_folder(folder)
        cuts: str | Sequence[int] = segments or training.get("exits") or "auto"
        if cuts == "auto":
            choice = choose_cuts(network, folder, variants)
            click.echo(choice.table() + "\n")
            cuts = choice.cuts
        wishes = {"cuts": cuts, "variants": variants, "training": training, "overwrite": overwrite}
        manifest = write_decoder(network, folder, out, **wishes)  # type: ignore[arg-type]
        if monolith is not None:
            click.echo("exporting the monolith", err=True)
            write_monolith(network, monolith, variants)
    except NotTheNetwork as problem:
        raise NotVerified(str(problem)) from None
    except (BadCheckpoint, UnsupportedFamily, OSError, ValueError) as problem:
        raise UserError(f"{folder}: {problem}") from None
    click.echo(decoder_table(manifest))
    click.echo(f"{out}: written and verified, {len(manifest.segments)} segments of {manifest.blocks} blocks")


def _by_cost(checkpoint: Checkpoint, dev: Path | None, engine: str, device: str | None) -> tuple[int, ...]:
    """Blocks to cut after, with the table behind the choice on stdout."""
    from offramp.export.auto import by_cost

    if dev is None:
        raise ValueError("say --dev FILE: which exits pay depends on where rows leave")
    choice = by_cost(checkpoint, dev, engine, device)
    click.echo(choice.table() + "\n")
    return tuple(choice.blocks[at] for at in choice.kept)


def _export(parts: Sequence[Segment], variants: Sequence[str], folder: Path, reduced: bool) -> None:
    from rich.console import Console
    from rich.progress import track

    from offramp.export.precision import to_variant
    from offramp.export.to_onnx import to_onnx
    from offramp.export.verify import file_name

    for part in track(parts, "exporting", console=Console(stderr=True)):
        source = folder / file_name(part.name, "fp32")
        to_onnx(part, source)
        for name in variants[1:] if part.blocks else ():
            to_variant(name, source, folder / file_name(part.name, name), reduce_range=reduced)
    click.echo("verifying", err=True)
