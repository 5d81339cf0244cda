"""What walking segments costs against the same network as one graph, and whether time follows depth.

    python benchmarks/overhead.py --json benchmarks/results/overhead.json

A random BERT of 12 blocks by 384 (or --checkpoint) with an exit and a policy after every block, split and
exported here. At batch 1, contenders taking turns in one process on one thread pool and one arena: the
full-depth walk under the rule gate, the same network with the same exits and policies as one ORT session, and
the network with its last exit alone, which says less. Times include everything after tokenizing: binding,
running, reading the gate, the rule. What a process opens first runs 1 to 3 % slower than what it opens last,
so the bundle is opened twice, before and after the graphs, and every figure is over the turns of both.

The walk to an exit is held against that exit's share of the full walk. Before each of these runs the one
graph runs untimed: a shallow walk would otherwise find its few segments in the cache, where the full walk's
are not.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
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
from offramp.export.monolith import write_monolith
from offramp.models import EarlyExitNetwork, NetworkSpec
from offramp.runtime import Session, load
from offramp.runtime.engines import threads
from offramp.runtime.rules import RuleSpec, bind
from offramp.runtime.walker import walk
from offramp.training.checkpoint import Checkpoint, TextFacts, load_checkpoint, save_checkpoint

WITH, ALONE = "one graph with all exits", "one graph, last exit alone"


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


def measure(walks: list[Session], graphs: dict[str, Any], length: int, turns: int) -> dict[str, Any]:
    """Ratios at one length: the full walk against each graph, the walk to each exit against its share of the
    full walk, medians over turns.
    """
    rng = np.random.default_rng(length)
    ids = rng.integers(5, 1000, (1, length))
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    manifest = walks[0].manifest
    segments, row = len(manifest.segments), np.zeros(1, np.int64)
    sizes = {"rows": 1, "segments": segments, "classes": len(manifest.labels), "limit": 1}

    def to_exit(session: Session, number: int) -> Callable[[], object]:
        spec = RuleSpec("fixed", {"exit": float(number)})
        if number == segments:  # a threshold that no probability is above: the gate is read and never taken
            spec = RuleSpec("gate", {"threshold": 1.0})
        rule = bind(spec, segments)
        return lambda: walk(session.engine, rule, [(row, inputs)], **sizes)

    def graph(name: str) -> Callable[[], object]:
        given = {entry.name: inputs[entry.name] for entry in graphs[name].get_inputs()}
        return lambda: graphs[name].run(None, given)

    def loop(session: Session) -> Callable[[], object]:
        """The same sessions run one after another and nothing else: what no walker can go below."""
        engine: Any = session.engine
        state = engine.begin(inputs)
        bound = [(engine._stem, state.buffers.stem)]
        for k in range(segments):
            engine.step(k, 0, state)
            bound.append(state.buffers.bound[k, 0, k % 2][:2])

        def run() -> None:
            for one, binding in bound:
                one.run_with_iobinding(binding)

        run.memory = state.buffers  # type: ignore[attr-defined]  # what the bindings point to
        return run

    figures: dict[str, Any] = {"length": length}
    pairs = [interleave({"loop": loop(s), WITH: graph(WITH)}, turns // 2) for s in walks]
    figures[f"bare loop / {WITH}"] = round(float(np.mean([pair.ratio("loop", WITH) for pair in pairs])), 4)
    for name in graphs:
        pairs = [interleave({"walk": to_exit(s, segments), name: graph(name)}, turns // 2) for s in walks]
        ratios = np.concatenate([pair.seconds["walk"] / pair.seconds[name] for pair in pairs])
        figures[f"full walk / {name}"] = round(float(np.median(ratios)), 4)
        figures[f"5..95 % / {name}"] = [round(float(value), 4) for value in np.percentile(ratios, [5, 95])]
        figures[f"{name} ms"] = round(1e3 * float(np.mean([pair.median(name) for pair in pairs])), 3)
        figures["full walk ms"] = round(1e3 * float(np.mean([pair.median("walk") for pair in pairs])), 3)
    session = walks[-1]
    off = []
    for k in range(1, segments + 1):
        trio = {
            "full": to_exit(session, segments),
            "exit": to_exit(session, k),
            "stem": lambda: session.engine.drop(session.engine.begin(inputs)),
        }
        timings = interleave(trio, max(10, turns // 4), between=graph(ALONE))
        stem, full = timings.median("stem"), timings.median("full")
        off.append(round(timings.median("exit") / (stem + (full - stem) * k / segments), 4))
    figures["exit time / (stem + share of the rest)"] = off
    figures["stem ms"] = round(1e3 * stem, 3)
    return figures


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
        words = ["--out", str(folder / "bundle"), "--variants", "fp32", "--monolith", str(folder / "alone")]
        subprocess.run([program, str(source), *words], check=True, stdout=sys.stderr)
        write_monolith(load_checkpoint(source), folder / "with", exits=True)
        walks = [load(folder / "bundle", rule="never")]
        options = onnxruntime.SessionOptions()
        threads.fit(options)  # the walk's pool: same threads, same optimisation level
        options.add_session_config_entry("session.use_env_allocators", "1")  # and the walk's arena
        cpu = ["CPUExecutionProvider"]
        graphs = {
            WITH: onnxruntime.InferenceSession(folder / "with", options, providers=cpu),
            ALONE: onnxruntime.InferenceSession(folder / "alone", options, providers=cpu),
        }
        walks.append(load(folder / "bundle", rule="never", share=False))
        rows = [measure(walks, graphs, int(length), turns) for length in lengths.split(",")]
        facts = dict(walks[0].engine.facts)
        for session in walks:
            session.close()
    table = Table(title=f"{blocks} x {width}, batch 1" if checkpoint is None else f"{checkpoint}, batch 1")
    for column in ("tokens", f"walk / {WITH}", f"walk / {ALONE}", "bare loop", "exit k / (stem + k share)"):
        table.add_column(column, justify="right")
    for found in rows:
        cells = [str(found["length"])]
        for name in (WITH, ALONE):
            low, high = found[f"5..95 % / {name}"]
            cells.append(f"{found[f'full walk / {name}']:.3f} ({low:.3f}..{high:.3f})")
        off = found["exit time / (stem + share of the rest)"]
        table.add_row(*cells, f"{found[f'bare loop / {WITH}']:.3f}", f"{min(off):.3f}..{max(off):.3f}")
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
