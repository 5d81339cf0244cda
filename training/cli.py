"""ee-train and ee-eval: the training room's two commands."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from offramp.training.recipes import RECIPES

NEEDED = ("torch", "transformers", "datasets", "accelerate", "optimum", "safetensors", "rich", "matplotlib")
HELP = {"help_option_names": ["-h", "--help"], "show_default": True}


class UserError(click.ClickException):
    """One line on stderr, exit code 2: what the user gave cannot be used."""

    exit_code = 2


@click.command(context_settings=HELP)
@click.option(
    "--model",
    help="Backbone: hub name or folder (BERT, RoBERTa, ELECTRA, DistilBERT, MPNet, ViT, DeiT, DINOv2); for "
    "recipes layerskip, consistentee_lm and layer_selection a causal language model (Llama, Mistral, Qwen2, "
    "Qwen3, GPT-2), as it is or as one of them left it.",
)
@click.option(
    "--init",
    "init",
    help="Go on from a trained checkpoint folder instead of --model; the joint warm start is then skipped.",
)
@click.option(
    "--data",
    required=True,
    help="Hub name (name or name:configuration), folder of train/dev/test files, one file, folder of images. "
    "For language models rows of text, or of prompt and completion, of which completions are learned.",
)
@click.option("--recipe", type=click.Choice(RECIPES), default="consistentee", help="How to train.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("ckpt"),
    help="Checkpoint folder to write.",
)
@click.option(
    "--exits", default="each", help="Blocks followed by an exit: each, 'every N', or a list such as 2,4,6."
)
@click.option(
    "--pooling",
    type=click.Choice(["mean", "cls"]),
    default="mean",
    help="How an exit reads the tokens: their mean (of an image: of its patches), or the first.",
)
@click.option("--prefix", default="", help='Put before every text, such as "query: " for E5 models.')
@click.option(
    "--max-length", default=128, type=click.IntRange(min=4), help="Longest input in tokens; more is cut."
)
@click.option("--seed", default=0, help="Seed of everything random.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16"]),
    default="auto",
    help="auto: bf16 where the hardware has it.",
)
@click.option(
    "--set",
    "wishes",
    multiple=True,
    metavar="NAME=VALUE",
    help="A setting of the recipe, such as alpha=0.03; repeat for more.",
)
@click.option(
    "--image-size",
    type=click.IntRange(min=1),
    help="Side of the images that the network reads, a multiple of its patches; positions are interpolated "
    "to it once.  [default: the model's]",
)
@click.option(
    "--whole-image",
    is_flag=True,
    help="Resize the whole image to that size instead of cutting its centre out as the model's preprocessor "
    "says.",
)
@click.option(
    "--augment",
    default="none",
    help="What is done to training images: none, or some of flip (left to right), crop (moved by an eighth).",
)
@click.option("--save-every", default=120.0, help="Seconds between states to resume from.")
@click.option("--overwrite", is_flag=True, help="Replace a finished checkpoint in --out.")
@click.option("--text-column", default="text", help="Column of the text.")
@click.option("--text-b-column", default="text_b", help="Column of the second text, if the data has one.")
@click.option("--label-column", default="label", help="Column of the label.")
@click.option("--image-column", default="image", help="Column of the image, where there is no text.")
def train(**wish: Any) -> None:
    """Train a network with exits and write a checkpoint folder.

    Killed and started again with the same command, it goes on where it was. Settings of the recipes: see
    --set with a wrong name, which lists them.
    """
    _need_extra()
    from offramp.training.session import TrainingWish, train_wish

    out: Path = wish["out"]
    if (out / "training.json").is_file() and not wish["overwrite"]:
        raise UserError(f"{out} holds a finished checkpoint; choose another --out, or say --overwrite")
    if out.exists() and not (out / "training.json").is_file() and any(out.iterdir()):
        raise UserError(f"{out} exists and is not a checkpoint; choose another --out")
    del wish["overwrite"]  # the old checkpoint stands until the new one is whole
    with _plain_errors():
        told = train_wish(TrainingWish(**wish))
    click.echo(json.dumps({"checkpoint": str(out), **told.get("dev", {})}))


@click.command(context_settings=HELP)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--data", required=True, help="As in ee-train.")
@click.option("--split", default="test", help="Split that is measured.")
@click.option("--points-from", default="dev", help="Split on which operating points are chosen.")
@click.option(
    "--within",
    default=1.0,
    help="Accuracy points that an operating point may lose against full depth, on --points-from.",
)
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Where to write the figures."
)
@click.option(
    "--picture",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where to draw accuracy against mean exit (PNG or SVG).",
)
@click.option("--batch-size", default=32, type=click.IntRange(min=1), help="Rows at a time.")
@click.option("--text-column", default="text", help="Column of the text.")
@click.option("--text-b-column", default="text_b", help="Column of the second text, if the data has one.")
@click.option("--label-column", default="label", help="Column of the label.")
@click.option("--image-column", default="image", help="Column of the image, where there is no text.")
def evaluate(**wish: Any) -> None:
    """Measure a checkpoint: each exit, the learned policy against the standard rules, controls and oracle.

    The table goes to stdout; without --json and --picture the files eval.json and eval.png are written into
    the current folder.
    """
    _need_extra()
    from offramp.training.report import evaluate_checkpoint

    with _plain_errors():
        evaluate_checkpoint(**wish)


def _need_extra() -> None:
    """Say what to install before an import fails somewhere deep."""
    needed = (
        "torch",
        "transformers",
        "datasets",
        "accelerate",
        "optimum",
        "safetensors",
        "rich",
        "matplotlib",
    )
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise UserError(f"{missing[0]} is not installed: run pip install 'offramp[train]' first")


class _plain_errors:
    """Turn the errors that a user can cure into one line and exit code 2; Ctrl-C into 130; anything else
    is a bug and keeps its trace.
    """

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, problem: BaseException | None, trace: Any) -> None:
        from offramp.training.checkpoint import BadCheckpoint
        from offramp.training.data import BadData
        from offramp.training.prepare import BadModel
        from offramp.training.settings import BadSetting

        if isinstance(problem, KeyboardInterrupt):
            click.echo("interrupted; the same command goes on from the last saved state", err=True)
            sys.exit(130)
        if isinstance(problem, (BadCheckpoint, BadData, BadModel, BadSetting)):
            raise UserError(str(problem)) from None
