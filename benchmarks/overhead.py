"""What walking segments costs against the same network as one graph, and whether time follows depth.

    python benchmarks/overhead.py --json benchmarks/results/overhead.json

Random BERTs (or --checkpoint) with an exit and a policy after every block, split and exported here. At batch
1, contenders taking turns in one process on one thread pool and one arena: the full-depth walk under the rule
gate, the same network with the same exits and policies as one ORT session, the network with its last exit
alone, which says less, and the walk's own bound sessions in a bare loop, which no walker can go below. Times
include everything after tokenizing: binding, running, reading the gate, the rule. What a process opens first
runs 1 to 3 % slower than what it opens last, so the bundle is opened twice, before and after the graphs, and
every figure is over the turns of both.

In fp32 the walk to each exit is held against that exit's share of the full walk and against the nested-If
graph, which leaves at the same exit: policies are set so that a threshold chooses it. Before each of these
runs the one graph runs untimed: a shallow walk would otherwise find its few segments in the cache, where the
full walk's are not.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
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

from offramp.benchmarks.clock import Timings, interleave
from offramp.export.monolith import write_monolith
from offramp.export.nested import nest
from offramp.models import EarlyExitNetwork, NetworkSpec
from offramp.models.policies.consistentee import Policy
from offramp.runtime import Session, load
from offramp.runtime.engines import threads
from offramp.runtime.rules import RuleSpec, bind
from offramp.runtime.tuning.report import machine
from offramp.runtime.walker import walk
from offramp.training.checkpoint import Checkpoint, TextFacts, load_checkpoint, save_checkpoint

WITH, ALONE, NESTED = "one graph with all exits", "one graph, last exit alone", "nested if"
Inputs = dict[str, Any]
Run = Callable[[], object]


def random_checkpoint(folder: Path, blocks: int, width: int) -> Path:
    """A BERT of that size with random weights: time does not depend on what weights say. Gates grow from exit
    to exit and depend on nothing else, so that a threshold says where every row leaves.
    """
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "intermediate_size": 4 * width,
    }
    heads = 12 if width % 12 == 0 else width // 32
    config = BertConfig(num_attention_heads=heads, vocab_size=1000, **sizes)
    spec = NetworkSpec(("negative", "positive"), tuple(range(1, blocks + 1)), policy="statistics")
    tokenizer = folder / "tokenizer.json"
    Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1}, unk_token="[UNK]")).save(str(tokenizer))
    network = EarlyExitNetwork(AutoModel.from_config(config), spec).eval()
    with torch.no_grad():
        for number, policy in enumerate(network.policies):
            assert isinstance(policy, Policy) and policy.slope is not None
            policy.slope.zero_()
            policy.bias.fill_(_bias(number))
    save_checkpoint(Checkpoint(network, TextFacts("", 1, 512), tokenizer, {}), folder / "ckpt")
    return folder / "ckpt"


def _bias(number: int) -> float:
    return 0.5 * number - 3.0


def threshold_of(exit: int) -> float:
    """Lets rows of such a network go at that exit (1-based) and not before."""
    return float(1 / (1 + np.exp(-(_bias(exit - 1) - 0.25))))


def some_inputs(length: int) -> Inputs:
    """One row of that many tokens."""
    ids = np.random.default_rng(length).integers(5, 1000, (1, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def a_walk(session: Session, inputs: Inputs, threshold: float) -> Run:
    """A walk of one row under rule gate; a threshold of 1: to the end, every gate read and none taken."""
    manifest, row = session.manifest, np.zeros(1, np.int64)
    rule = bind(RuleSpec("gate", {"threshold": threshold}), len(manifest.segments))
    sizes = {"rows": 1, "segments": len(manifest.segments), "classes": len(manifest.labels), "limit": 1}
    number = manifest.variants.index(session.variant)
    return lambda: walk(session.engine, rule, [(row, inputs)], variant=number, **sizes)


def a_graph(session: Any, inputs: Inputs) -> Run:
    """One run of a single graph."""
    given = {entry.name: inputs[entry.name] for entry in session.get_inputs()}
    return lambda: session.run(None, given)


def a_loop(session: Session, inputs: Inputs) -> Run:
    """The walk's own sessions run one after another and nothing else: what no walker can go below."""
    engine: Any = session.engine
    number = session.manifest.variants.index(session.variant)
    state = engine.begin(inputs)
    runs = [state.buffers.stem]
    for k in range(len(session.manifest.segments)):
        engine.step(k, number, state)
        runs.append(state.buffers.bound[k, number, k % 2][0])

    def run() -> None:
        for one in runs:
            one()

    run.memory = state.buffers  # type: ignore[attr-defined]  # what the bindings point to
    return run


def pooled(pairs: list[Timings], name: str, against: str) -> list[float]:
    """Median, 5th and 95th percentile of the ratio turn by turn, over the turns of all pairs."""
    ratios = np.concatenate([pair.seconds[name] / pair.seconds[against] for pair in pairs])
    return [round(float(value), 4) for value in np.percentile(ratios, [50, 5, 95])]


def in_full(walks: list[Session], graphs: Mapping[str, Any], length: int, turns: int) -> dict[str, Any]:
    """Ratios of the full walk and of the bare loop against each graph at one length."""
    inputs = some_inputs(length)
    found: dict[str, Any] = {}
    for name, session in graphs.items():
        single = a_graph(session, inputs)
        pairs = [interleave({"walk": a_walk(w, inputs, 1.0), name: single}, turns // 2) for w in walks]
        found[f"walk / {name}"] = pooled(pairs, "walk", name)
        found[f"{name} ms"] = round(1e3 * float(np.mean([pair.median(name) for pair in pairs])), 3)
        found["walk ms"] = round(1e3 * float(np.mean([pair.median("walk") for pair in pairs])), 3)
        pairs = [interleave({"loop": a_loop(w, inputs), name: single}, turns // 4) for w in walks]
        found[f"bare loop / {name}"] = pooled(pairs, "loop", name)
    return found


def by_depth(session: Session, graphs: Mapping[str, Any], length: int, turns: int) -> dict[str, Any]:
    """At every exit: the walk against that exit's share of the full walk, and against the nested graph."""
    inputs, segments = some_inputs(length), len(session.manifest.segments)
    share, nested = [], []
    for k in range(1, segments + 1):
        threshold = threshold_of(k) if k < segments else 1.0
        given = inputs | {"threshold": np.array(threshold, np.float32)}
        if graphs[NESTED].run(["exit"], {e.name: given[e.name] for e in graphs[NESTED].get_inputs()})[0] != k:
            raise SystemExit(f"the nested graph does not leave at exit {k}")
        contenders: dict[str, Run] = {
            "full": a_walk(session, inputs, 1.0),
            "exit": a_walk(session, inputs, threshold),
            "stem": lambda: session.engine.drop(session.engine.begin(inputs)),
            NESTED: a_graph(graphs[NESTED], given),
        }
        timings = interleave(contenders, turns, between=a_graph(graphs[ALONE], inputs))
        stem, full = timings.median("stem"), timings.median("full")
        share.append(round(timings.median("exit") / (stem + (full - stem) * k / segments), 4))
        nested.append(round(timings.ratio("exit", NESTED), 4))
    return {"exit time / (stem + share of the rest)": share, "walk / nested if, by exit": nested}


def measured(
    source: Path, name: str, wishes: dict[str, Any], *, random: bool, scratch: Path
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Every row of one network, and the facts of the engine."""
    # The user's own command, so that what is timed is what users get.
    program, variants = str(Path(sys.executable).parent / "ee-split"), wishes["variants"]
    words = ["--out", str(scratch / "bundle"), "--variants", ",".join(variants)]
    words += ["--monolith", str(scratch / "alone.onnx")]
    subprocess.run([program, str(source), *words], check=True, stdout=sys.stderr)
    write_monolith(load_checkpoint(source), scratch / "with.onnx", exits=True)
    rows = []
    for variant in variants:
        walks = [load(scratch / "bundle", rule="never", variant=variant, share=False)]
        files = {ALONE: "alone.onnx" if variant == "fp32" else f"alone_{variant}.onnx"}
        if variant == "fp32":
            files[WITH] = "with.onnx"
            if random:
                stages = (walks[0].manifest.stem, *walks[0].manifest.segments)
                stem, *rest = [scratch / "bundle" / stage.variants["fp32"].file for stage in stages]
                (scratch / "nested.onnx").write_bytes(nest(stem, rest).SerializeToString())
                files[NESTED] = "nested.onnx"
        options = onnxruntime.SessionOptions()
        threads.fit(options)  # the walk's pool: same threads, same optimisation level
        options.add_session_config_entry("session.use_env_allocators", "1")  # and the walk's arena
        graphs = {
            kind: onnxruntime.InferenceSession(scratch / file, options, providers=["CPUExecutionProvider"])
            for kind, file in files.items()
        }
        walks.append(load(scratch / "bundle", rule="never", variant=variant, share=False))
        facts = dict(walks[0].engine.facts)
        plain = {kind: graph for kind, graph in graphs.items() if kind != NESTED}
        for length in wishes["lengths"]:
            click.echo(f"{name} {variant}, {length} tokens", err=True)
            row: dict[str, Any] = {"network": name, "variant": variant, "length": length}
            row |= in_full(walks, plain, length, wishes["turns"])
            if NESTED in graphs:
                row |= by_depth(walks[-1], graphs, length, max(10, wishes["turns"] // 8))
            rows.append(row)
        for session in walks:
            session.close()
    return rows, facts


def table(rows: list[dict[str, Any]]) -> Table:
    """One line for each network, variant and length."""
    shown = Table(title="batch 1; ratios: median (5..95 %)")
    columns = ("network", "tokens", f"walk / {ALONE}", f"bare loop / {ALONE}", f"walk / {WITH}")
    for column in (*columns, "exit k / (stem + k share)", "walk / nested if"):
        shown.add_column(column, justify="right")
    for row in rows:
        cells = [f"{row['network']} {row['variant']}", str(row["length"])]
        for pair in (f"walk / {ALONE}", f"bare loop / {ALONE}", f"walk / {WITH}"):
            cells.append("{:.3f} ({:.3f}..{:.3f})".format(*row[pair]) if pair in row else "")
        for values in ("exit time / (stem + share of the rest)", "walk / nested if, by exit"):
            cells.append(f"{min(row[values]):.3f}..{max(row[values]):.3f}" if values in row else "")
        shown.add_row(*cells)
    return shown


@click.command(context_settings={"show_default": True})
@click.option(
    "--checkpoint",
    type=click.Path(exists=True, path_type=Path),
    help="Measure this one instead of random weights.",
)
@click.option("--sizes", default="6x384,12x384,12x768", help="Blocks x width of random networks.")
@click.option("--variants", default="fp32,int8", help="As in ee-split.")
@click.option("--lengths", default="16,32,64,128", help="Tokens.")
@click.option("--turns", default=200, help="Turns of every pair at every length.")
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Where to write the figures."
)
def main(
    checkpoint: Path | None, sizes: str, variants: str, lengths: str, turns: int, json_file: Path | None
) -> None:
    """Split, export, take turns, print the ratios."""
    wishes = {
        "variants": variants.split(","),
        "turns": turns,
        "lengths": [int(n) for n in lengths.split(",")],
    }
    rows: list[dict[str, Any]] = []
    for size in [str(checkpoint)] if checkpoint else sizes.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            source = checkpoint or random_checkpoint(Path(scratch), *map(int, size.split("x")))
            more, facts = measured(source, size, wishes, random=checkpoint is None, scratch=Path(scratch))
            rows += more
    Console(width=170).print(table(rows))
    if json_file is not None:
        result = {"machine": {**machine(), **facts}, "turns": turns, "rows": rows}
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
