"""make demo: MiniLM on film reviews, from training to answers: a promise, whether it is kept, and the gain.

    python benchmarks/demo.py [--out demo] [--epochs 2]

It prints each command before it runs it, so that users can repeat it.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np

from offramp.benchmarks.fetch import fetch_minilm, write_rotten_tomatoes
from offramp.runtime.bundle.manifest import Manifest
from offramp.runtime.progress import format_seconds
from offramp.runtime.summary import Summary, show

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
# Rows that neither train nor choose anything, taken from those for training: on fewer, the least share of
# other answers that can be promised leaves little to save.
CALIBRATION_ROWS = 1700
RISK, CONFIDENCE = 0.05, 0.99
EXAMPLES = (
    "a stirring , funny film that stays with you",
    "flat , noisy and far too long",
    "it has its moments , though you must wait for them",
    "not the disaster that its trailer promised",
)


def run_command(*words: str) -> None:
    """Print a command and run it; if it fails, end the demo with its exit code."""
    click.secho("\n$ " + shlex.join(words), bold=True)
    program = (
        [str(BIN / words[0]), *words[1:]] if words[0].startswith("ee-") else [sys.executable, *words[1:]]
    )
    done = subprocess.run(program, cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def set_calibration_rows_apart(data: Path, file: Path) -> None:
    """Move the last CALIBRATION_ROWS rows of the training data into a file of their own.

    data: folder of the data set. The rows are in a random order already (write_rotten_tomatoes).
    """
    train = data / "train.jsonl"
    lines = train.read_text(encoding="utf-8").splitlines(keepends=True)
    train.write_text("".join(lines[:-CALIBRATION_ROWS]), encoding="utf-8")
    file.write_text("".join(lines[-CALIBRATION_ROWS:]), encoding="utf-8")


def require_same_rows(training: Path, rows: Path) -> None:
    """End the demo if there is a checkpoint that was trained on other rows: some would now calibrate it."""
    if training.is_file():
        trained = json.loads(training.read_text(encoding="utf-8"))["data"]["rows"]["train"]
        count = len(rows.read_text(encoding="utf-8").splitlines())
        if trained != count:
            raise SystemExit(
                f"demo: {training.parent} was trained on {trained} rows, not these {count}: remove it"
            )


@click.command(context_settings={"show_default": True})
@click.option("--out", default="demo", help="Folder for data, checkpoint and bundle, under the checkout.")
@click.option(
    "--epochs", default=2, help="Passes over the training data that fine-tune; one more trains all."
)
def main(out: str, epochs: int) -> None:
    """Train, split, calibrate and run on real weights and real reviews; print the promise and the gain."""
    started = time.monotonic()
    folder = ROOT / out
    folder.mkdir(exist_ok=True)
    model, data = fetch_minilm(), write_rotten_tomatoes(folder / "data")
    set_calibration_rows_apart(data, folder / "calibration.jsonl")
    require_same_rows(folder / "ckpt" / "training.json", data / "train.jsonl")
    if not (folder / "ckpt" / "training.json").is_file():
        words = ["--model", str(model), "--data", str(data), "--out", f"{out}/ckpt"]
        run_command("ee-train", *words, "--set", f"epochs={epochs}", "--set", "joint_epochs=1")
    run_command(
        *("python", "export/split.py", f"{out}/ckpt", "--out", f"{out}/bundle", "--overwrite"),
        *("--dev", f"{out}/data/dev.jsonl"),
    )
    run_command(
        *("ee-calibrate", f"{out}/calibration.jsonl", "--bundle", f"{out}/bundle"),
        *("--risk", f"{RISK:g}", "--confidence", f"{CONFIDENCE:g}"),
    )
    examples = folder / "examples.txt"
    examples.write_text("\n".join(EXAMPLES) + "\n", encoding="utf-8")
    run_command("ee-run", "--bundle", f"{out}/bundle", "--stats", f"{out}/examples.txt")
    print_comparison(folder, data)
    rows = [("bundle", f"{out}/bundle"), ("time", format_seconds(time.monotonic() - started))]
    serve = ("ee-serve", f"{out}/bundle", "--open")
    click.echo()
    show(Summary("The demo is done", rows, {}, serve, "See it walk while you type:"), sys.stdout)


def print_comparison(folder: Path, data: Path) -> None:
    """Print what test says of the promise, and accuracy and time at batch 1 of walks and the single graph.

    folder: that of the demo, with bundle and checkpoint. data: folder of the data set.
    """
    import onnxruntime

    from offramp.export.classifier import ExportableClassifier
    from offramp.export.monolith import write_monolith
    from offramp.runtime import load_classifier
    from offramp.runtime.engines import threads
    from offramp.runtime.tuning.timing import time_in_turns, time_ratio
    from offramp.training.checkpoint import load_checkpoint

    rows = [json.loads(line) for line in (data / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = [row["text"] for row in rows]
    with (
        load_classifier(folder / "bundle", point="default", global_pool=True) as early,
        load_classifier(folder / "bundle", rule="never", global_pool=True) as full,
        tempfile.TemporaryDirectory() as scratch,
    ):
        graph = Path(scratch) / "monolith.onnx"
        write_monolith(ExportableClassifier(load_checkpoint(folder / "ckpt")), graph)
        options = onnxruntime.SessionOptions()
        threads.share_global_pool(options)  # the pool that the walk uses: same threads for both
        monolith = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        names = [entry.name for entry in monolith.get_inputs()]

        def label_by_monolith(text: str) -> str:
            inputs = early.encode(text)
            logits = monolith.run(["logits"], {name: inputs[name] for name in names})[0]
            return early.labels[int(np.argmax(logits))]

        answers = {"early exit": [early(t) for t in texts], "full walk": [full(t) for t in texts]}
        labels = {name: [answer.label for answer in of_walk] for name, of_walk in answers.items()}
        labels["one graph"] = [label_by_monolith(text) for text in texts]
        accuracy = {
            name: np.mean([label == row["label"] for label, row in zip(predicted, rows, strict=True)])
            for name, predicted in labels.items()
        }
        sample = texts[:100]
        seconds = time_in_turns(
            {
                "early exit": lambda: [early(text) for text in sample],
                "full walk": lambda: [full(text) for text in sample],
                "one graph": lambda: [label_by_monolith(text) for text in sample],
            },
            rounds=9,
            warmup=1,
        )
    differ = np.mean([a != b for a, b in zip(labels["early exit"], labels["full walk"], strict=True)])
    print_promise(early.manifest, float(differ), len(texts))
    depth = np.mean([answer.depth for answer in answers["early exit"]])
    click.secho(
        f"\n{len(texts)} test reviews, batch 1, tokenizing included, candidates taking turns:", bold=True
    )
    click.echo(f"{'':12}{'accuracy %':>12}{'mean exit':>12}{'time / one graph':>19}")
    blocks = answers["full walk"][0].depth
    for name, exits in (("one graph", blocks), ("full walk", blocks), ("early exit", depth)):
        ratio = time_ratio(seconds[name], seconds["one graph"])[0]
        click.echo(f"{name:12}{100 * accuracy[name]:12.2f}{exits:12.2f}{ratio:19.2f}")


def print_promise(manifest: Manifest, differ: float, rows: int) -> None:
    """Print the guarantee of the bundle's default point beside what test says.

    differ: share of the test rows, of which there are `rows`, with another answer than full depth.
    """
    guarantee = next(point.guarantee for point in manifest.points if point.name == "default")
    if guarantee is None:
        raise SystemExit("demo: the default point of the bundle has no guarantee; ee-calibrate --risk failed")
    click.secho(
        f"\nPromised, from {guarantee.rows} reviews that neither trained nor chose anything:", bold=True
    )
    click.echo(
        f"another answer than full depth for at most {guarantee.limit:.1%} of reviews, "
        f"with confidence {guarantee.confidence:.0%}"
    )
    word = "kept" if differ <= guarantee.limit else "not kept"
    click.echo(f"{rows} test reviews: {differ:.1%}; the promise is {word}")


if __name__ == "__main__":
    main()
