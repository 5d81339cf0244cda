"""What walking segments costs against the same network as one graph, and whether time follows depth.

    python benchmarks/overhead.py --json benchmarks/results/overhead.json

A random BERT of 12 blocks by 384 (or --checkpoint) with an exit and a policy after every block, split and
exported here. At batch 1, contenders taking turns in one process on one thread pool: the full-depth walk, the
walk to every exit, and the same network without exits as one ORT session. Times include everything after
tokenizing: binding, running, reading the gate, the rule.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models
from transformers import AutoModel, BertConfig

from offramp.benchmarks.clock import interleave
from offramp.models import EarlyExitNetwork, NetworkSpec
from offramp.runtime import Session, load
from offramp.runtime.engines import threads
from offramp.runtime.rules import RuleSpec, bind
from offramp.runtime.walker import walk
from offramp.training.checkpoint import Checkpoint, TextFacts, save_checkpoint


def random_checkpoint(folder: Path, blocks: int, width: int) -> Path:
    """A BERT of that size with random weights and policies: time does not depend on what weights say."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "intermediate_size": 4 * width,
    }
    config = BertConfig(num_attention_heads=width // 32, vocab_size=1000, **sizes)
    spec = NetworkSpec(("negative", "positive"), tuple(range(1, blocks + 1)), policy="statistics")
    tokenizer = folder / "tokenizer.json"
    Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1}, unk_token="[UNK]")).save(str(tokenizer))
    network = EarlyExitNetwork(AutoModel.from_config(config), spec).eval()
    save_checkpoint(Checkpoint(network, TextFacts("", 1, 512), tokenizer, {}), folder / "ckpt")
    return folder / "ckpt"


def measure(session: Session, monolith: Any, length: int, turns: int) -> dict[str, Any]:
    """Ratios at one length: the full walk and the walk to each exit against the one graph, medians over
    turns.
    """
    rng = np.random.default_rng(length)
    ids = rng.integers(5, 1000, (1, length))
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    segments, classes = len(session.manifest.segments), len(session.manifest.labels)
    given = {entry.name: inputs[entry.name] for entry in monolith.get_inputs()}
    row = np.zeros(1, np.int64)

    sizes = {"rows": 1, "segments": segments, "classes": classes, "limit": 1}

    def to_exit(number: int) -> Any:
        rule = bind(RuleSpec("fixed", {"exit": float(number)}), segments)
        return lambda: walk(session.engine, rule, [(row, inputs)], **sizes)

    whole = {"full walk": to_exit(segments), "one graph": lambda: monolith.run(["logits"], given)}
    against = interleave(whole, turns)
    low, high = against.spread("full walk", "one graph")
    # Each exit against the full walk and the stem alone: with all exits in one turn, shallow segments would
    # run twelve times as often as the deepest and be found warm in the cache.
    off = []
    for k in range(1, segments + 1):
        trio = {
            "exit": to_exit(k),
            "full walk": whole["full walk"],
            "stem": lambda: session.engine.drop(session.engine.begin(inputs)),
        }
        timings = interleave(trio, max(10, turns // 4))
        stem, full = timings.median("stem"), timings.median("full walk")
        off.append(timings.median("exit") / (stem + (full - stem) * k / segments))
    return {
        "length": length,
        "full walk / one graph": round(against.ratio("full walk", "one graph"), 4),
        "spread 5..95": [round(low, 4), round(high, 4)],
        "exit time / (stem + share of the rest)": [round(value, 4) for value in off],
        "one graph ms": round(1e3 * against.median("one graph"), 3),
        "full walk ms": round(1e3 * against.median("full walk"), 3),
        "stem ms": round(1e3 * stem, 3),
    }


@click.command(context_settings={"show_default": True})
@click.option(
    "--checkpoint",
    type=click.Path(exists=True, path_type=Path),
    help="Measure this one instead of random weights.",
)
@click.option("--blocks", default=12, help="Blocks of the random network.")
@click.option("--width", default=384, help="Width of the random network.")
@click.option("--lengths", default="16,32,128", help="Tokens.")
@click.option("--turns", default=200, help="Turns of every contender at every length.")
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Where to write the figures."
)
def main(
    checkpoint: Path | None, blocks: int, width: int, lengths: str, turns: int, json_file: Path | None
) -> None:
    """Split, export, take turns, print the ratios."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = checkpoint or random_checkpoint(folder, blocks, width)
        # The user's own command, so that what is timed is what users get.
        program = str(Path(sys.executable).parent / "ee-split")
        graph = folder / "monolith.onnx"
        words = ["--out", str(folder / "bundle"), "--variants", "fp32", "--monolith", str(graph)]
        split = [program, str(source), *words]
        subprocess.run(split, check=True, stdout=sys.stderr)
        with load(folder / "bundle", rule="never") as session:
            options = onnxruntime.SessionOptions()
            threads.fit(options)  # the walk's pool: same threads, same optimisation level
            options.add_session_config_entry("session.use_env_allocators", "1")  # and the walk's arena
            monolith = onnxruntime.InferenceSession(
                folder / "monolith.onnx", options, providers=["CPUExecutionProvider"]
            )
            rows = [measure(session, monolith, int(length), turns) for length in lengths.split(",")]
            facts = dict(session.engine.facts)
    table = Table(title=f"{blocks} x {width}, batch 1" if checkpoint is None else f"{checkpoint}, batch 1")
    for name in ("tokens", "full walk / one graph", "5..95 %", "exit k / (stem + k share): min..max"):
        table.add_column(name, justify="right")
    for found in rows:
        off = found["exit time / (stem + share of the rest)"]
        low, high = found["spread 5..95"]
        table.add_row(
            str(found["length"]),
            f"{found['full walk / one graph']:.3f}",
            f"{low:.3f}..{high:.3f}",
            f"{min(off):.3f}..{max(off):.3f}",
        )
    Console().print(table)
    if json_file is not None:
        result = {
            "network": str(checkpoint or f"random BERT {blocks} x {width}"),
            "engine": facts,
            "machine": platform.processor() or platform.machine(),
            "rows": rows,
        }
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
