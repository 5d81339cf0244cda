"""make demo: MiniLM on film reviews, from training to answers, and a measurement of the gain of early exit.

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

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
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


@click.command(context_settings={"show_default": True})
@click.option("--out", default="demo", help="Folder for data, checkpoint and bundle, under the checkout.")
@click.option("--epochs", default=2, help="Passes over the training data.")
def main(out: str, epochs: int) -> None:
    """Train, split and run on real weights and real reviews; print the gain of early exit."""
    started = time.monotonic()
    folder = ROOT / out
    folder.mkdir(exist_ok=True)
    model, data = fetch_minilm(), write_rotten_tomatoes(folder / "data")
    if not (folder / "ckpt" / "training.json").is_file():
        words = ["--model", str(model), "--data", str(data), "--out", f"{out}/ckpt"]
        run_command("ee-train", *words, "--set", f"epochs={epochs}")
    run_command("python", "export/split.py", f"{out}/ckpt", "--out", f"{out}/bundle", "--overwrite")
    examples = folder / "examples.txt"
    examples.write_text("\n".join(EXAMPLES) + "\n", encoding="utf-8")
    run_command("ee-run", "--bundle", f"{out}/bundle", "--stats", f"{out}/examples.txt")
    print_comparison(folder, data)
    minutes = (time.monotonic() - started) / 60
    click.echo(
        f"\nThe demo took {minutes:.1f} minutes. Try: ee-run --bundle {out}/bundle, and type a sentence."
    )


def print_comparison(folder: Path, data: Path) -> None:
    """Print accuracy on test and time at batch 1 of the early-exit walk, the full walk and the single graph.

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
        load_classifier(folder / "bundle") as early,
        load_classifier(folder / "bundle", rule="never") as full,
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
    depth = np.mean([answer.depth for answer in answers["early exit"]])
    click.secho(
        f"\n{len(texts)} test reviews, batch 1, tokenizing included, candidates taking turns:", bold=True
    )
    click.echo(f"{'':12}{'accuracy %':>12}{'mean exit':>12}{'time / one graph':>19}")
    blocks = answers["full walk"][0].depth
    for name, exits in (("one graph", blocks), ("full walk", blocks), ("early exit", depth)):
        ratio = time_ratio(seconds[name], seconds["one graph"])[0]
        click.echo(f"{name:12}{100 * accuracy[name]:12.2f}{exits:12.2f}{ratio:19.2f}")


if __name__ == "__main__":
    main()
