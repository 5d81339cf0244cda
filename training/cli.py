"""ee-train and ee-eval: the two commands of training."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import click

from offramp.runtime.progress import format_seconds
from offramp.runtime.summary import CommandOutput, Summary, free_path, output_options
from offramp.training.recipes import RECIPES

# A test compares them with models.tasks, whose import is slow.
TASKS = (
    "classification",
    "multi-label-classification",
    "token-classification",
    "regression",
    "sentence-embedding",
)

# The modules of the extra `train`; a missing one is reported before any of them is imported.
NEEDED = ("torch", "transformers", "datasets", "accelerate", "optimum", "safetensors", "rich", "matplotlib")
HELP = {"help_option_names": ["-h", "--help"], "show_default": True}


class TrainCliError(click.ClickException):
    """Error for options or data that cannot be used: one line on stderr and exit code 2."""

    exit_code = 2


@click.command(context_settings=HELP)
@click.option(
    "--model",
    help="Backbone or fine-tuned classifier: hub name or folder (BERT, RoBERTa, DeBERTa, ModernBERT, ViT, "
    "DINOv2 and others; an unknown type is answered with the list); for recipes layerskip, consistentee_lm "
    "and layer_selection a causal language model (Llama, Mistral, Qwen2, Qwen3, GPT-2), pretrained or the "
    "result of one of these recipes.",
)
@click.option(
    "--init",
    "init",
    help="Continue from a trained checkpoint folder instead of --model; the joint warm start is skipped.",
)
@click.option(
    "--data",
    required=True,
    help="Hub name (name or name:configuration), folder of train/dev/test files, one file, folder of images. "
    "Files: JSON lines, JSON, CSV with any of , ; tab |, parquet, lines of text where no labels are needed; "
    "also compressed. For language models rows of text, or of prompt and completion, of which completions "
    "are learned.",
)
@click.option(
    "--recipe",
    type=click.Choice(RECIPES),
    help="How to train.  [default: attach if --model holds a fine-tuned classifier, else offramp]",
)
@click.option(
    "--task",
    type=click.Choice(TASKS),
    help="What an answer is: one label, several labels, a label for each word, a number, or an embedding.  "
    "[default: that of --model's trained head, else by the data's labels]",
)
@click.option(
    "--unfreeze",
    type=click.IntRange(min=1),
    is_flag=False,
    flag_value=2,
    metavar="[EPOCHS]",
    help="Recipe attach: train everything afterwards, for 2 epochs or as many as named; "
    "answers at full depth may change.",
)
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
    type=click.Choice(["mean", "cls", "attention"]),
    help="How an exit reads the tokens: their mean (of an image: of its patches), the first, or a mean with "
    "weights that each exit learns.  [default: the recipe's]",
)
@click.option(
    "--head",
    type=click.Choice(["linear", "mlp"]),
    help="What an exit is after pooling: one linear layer, or two.  [default: the recipe's]",
)
@click.option(
    "--ensemble/--no-ensemble",
    default=None,
    help="Join the logits of all exits so far by learned weights.  [default: the recipe's]",
)
@click.option("--prefix", default="", help='Put before every text, such as "query: " for E5 models.')
@click.option(
    "--max-length",
    default=128,
    type=click.IntRange(min=4),
    help="Longest input in tokens; longer is cut.",
)
@click.option("--seed", default=0, help="Seed of everything random.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16"]),
    default="auto",
    help="auto: bf16 where the hardware supports it.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="A setting of the recipe, such as alpha=0.03; repeat for more.",
)
@click.option(
    "--image-size",
    type=click.IntRange(min=1),
    help="Side of the images that the network reads, a multiple of its patches; position embeddings are "
    "interpolated to it.  [default: the model's]",
)
@click.option(
    "--no-crop",
    is_flag=True,
    help="Resize the whole image to that size instead of cropping the centre as the model's preprocessor "
    "does.",
)
@click.option(
    "--augment",
    default="none",
    help="Augmentation of training images: none, or some of flip (left to right), crop (moved by an eighth).",
)
@click.option(
    "--balance",
    is_flag=True,
    help="Repeat training rows of rarer labels, so that all labels are equally frequent.",
)
@click.option("--save-every", default=120.0, help="Seconds between saved states.")
@click.option("--overwrite", is_flag=True, help="Replace a finished checkpoint in --out.")
@click.option("--text-column", default="text", help="Column of the text.")
@click.option("--text-b-column", default="text_b", help="Column of the second text, if the data has one.")
@click.option("--label-column", default="label", help="Column of the label.")
@click.option("--image-column", default="image", help="Column of the image, where there is no text.")
@output_options
def train(
    overwrite: bool,
    out: Path,
    unfreeze: int | None,
    settings: tuple[str, ...],
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train a network with exits and write a checkpoint folder.

    Killed and started again with the same command, it resumes. Settings of the recipes: --set with a wrong
    name lists them.

    Progress goes to stderr. At the end stdout gets what was measured on the dev split: as a panel on a
    terminal, else, and with --json, as one JSON object.
    """
    output = CommandOutput(quiet, as_json)
    _require_extra()
    from offramp.training.options import TrainConfig
    from offramp.training.train import train as run_training

    if (out / "training.json").is_file() and not overwrite:
        raise TrainCliError(f"{out} holds a finished checkpoint; choose another --out, or say --overwrite")
    if out.exists() and not (out / "training.json").is_file() and any(out.iterdir()):
        raise TrainCliError(f"{out} exists and is not a checkpoint; choose another --out")
    # With --overwrite the old checkpoint stays until the new one is complete.
    started = time.monotonic()
    with _plain_errors(), output.progress():
        words = settings if unfreeze is None else (*settings, f"unfreeze={unfreeze}")
        training = run_training(TrainConfig(out=out, settings=words, **options))
    facts = {"checkpoint": str(out), **training.get("dev", {})}
    output.finish(training_summary(out, training, time.monotonic() - started), json.dumps(facts))


def training_summary(out: Path, training: Mapping[str, Any], seconds: float) -> Summary:
    """What ee-train writes at its end; training: the content of training.json."""
    dev: Mapping[str, Any] = training.get("dev", {})
    counts = training["data"]["rows"]
    rows = [("checkpoint", str(out)), ("recipe", str(training["recipe"]))]
    rows.append(("rows", ", ".join(f"{count} {split}" for split, count in counts.items())))
    points = {point["name"]: point["measured"] for point in training.get("operating_points", ())}
    default = points.get("default", {})
    quality = next(iter(default), "")  # it is the first figure
    if isinstance(full := dev.get("full_depth"), (int, float)):
        rows.append(("full depth", f"{full:.2f} % {quality}".rstrip() + " on dev"))
    if isinstance(given := dev.get("same_as_given"), (int, float)):
        rows.append(("as before", f"{given:.2f} % of dev answered as by the given model"))
    if "macs_saved" in default:
        saved = f"{default['macs_saved']:.1f} % of the computation saved"
        rows.append(("early exit", f"{default[quality]:.2f} % {quality} on dev, {saved}"))
    rows.append(("time", format_seconds(seconds)))
    facts = {"checkpoint": str(out), **dev}
    target = free_path(out.with_name("bundle"))
    return Summary("Training finished", rows, facts, ("ee-split", str(out), "--out", str(target)))


@click.command(context_settings=HELP)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--data", required=True, help="As in ee-train.")
@click.option("--split", default="test", help="Split on which the checkpoint is evaluated.")
@click.option("--calibration-split", default="dev", help="Split on which operating points are chosen.")
@click.option(
    "--max-accuracy-drop",
    default=1.0,
    help="Accuracy points that an operating point may lose against full depth, on --calibration-split.",
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
def evaluate(**options: Any) -> None:
    """Evaluate a checkpoint: each exit, the learned policy against the standard rules, controls and oracle.

    The table goes to stdout; without --json and --picture the files eval.json and eval.png are written into
    the current folder.
    """
    _require_extra()
    from offramp.training.report import EvaluationConfig, evaluate_checkpoint

    with _plain_errors():
        evaluate_checkpoint(EvaluationConfig(**options))


def _require_extra() -> None:
    """Raise TrainCliError with the command that installs the extra if one of its modules is missing."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise TrainCliError(f"{missing[0]} is not installed: run pip install 'offramp[train]' first")


class _plain_errors:
    """Context that turns errors that a user can fix into one line and exit code 2, and Ctrl-C into exit code
    130.

    Any other error is a bug and keeps its traceback.
    """

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        from offramp.runtime.errors import BadSetting
        from offramp.training.checkpoint import BadCheckpoint
        from offramp.training.data import BadData
        from offramp.training.options import BadModel

        if isinstance(problem, KeyboardInterrupt):
            click.echo("interrupted; the same command goes on from the last saved state", err=True)
            sys.exit(130)
        if isinstance(problem, (BadCheckpoint, BadData, BadModel, BadSetting)):
            raise TrainCliError(str(problem)) from None
