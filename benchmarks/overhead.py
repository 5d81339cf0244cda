"""Measure the cost of walking segments against one graph, of starting a process, and its memory.

    python benchmarks/overhead.py single --json FILE
    python benchmarks/overhead.py bulk --bundle bundle/ --baselines baselines/ --data test.jsonl --json FILE
    python benchmarks/overhead.py cold --bundle bundle/ --baselines baselines/ --json FILE
    python benchmarks/overhead.py memory --bundle tests/data/tiny_bundle --json FILE

single: random BERTs (or --checkpoint) with an exit and a policy after every block, split and exported here.
At batch 1, in turns in one process, on one thread pool and one arena: the full-depth walk under rule gate;
the same network with the same exits and policies as one session ("one graph with all exits"); the network
with its last exit alone, which computes less; and the walk's own bound sessions in a bare loop, a lower bound
for any walker. Times include everything after tokenizing: binding, running, reading the gate, the rule. The
session that a process opens first runs 1 to 3 % slower than the last, so the bundle is opened twice, before
and after the graphs, and every figure is over the rounds of both. In fp32 the walk to each exit is compared
with that exit's share of the full walk and with the nested-If graph, which leaves at the same exit: the
policies are such that a threshold chooses the exit. Before each of these runs the one graph runs untimed:
otherwise a shallow walk would find its few segments in the cache, unlike the full walk. bulk: rows per second
of the full walk over those of the monolith, on the same batches of windows sorted by length; every exit and
policy of the walk is computed and none is taken. cold: a new process from start to end on one line of input:
ee-run against a script of ten lines (MONOLITH_SCRIPT), as a user would write it with the monolith,
onnxruntime and tokenizers. memory: resident memory of `ee-run -` over a long input: it must not grow with the
number of lines.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import IO, Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from offramp.runtime import load_classifier
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import TextInput
from offramp.runtime.classifier import Classifier
from offramp.runtime.engines import threads
from offramp.runtime.inputs.text import items_to_rows, open_reader
from offramp.runtime.row_session import WINDOW
from offramp.runtime.rules import RuleSpec, bind
from offramp.runtime.tuning.baselines import MONOLITH, open_baseline, read_baselines
from offramp.runtime.tuning.labelled import read_rows
from offramp.runtime.tuning.report import machine_facts
from offramp.runtime.tuning.timing import (
    Batches,
    take_turns,
    time_bulk,
    time_in_turns,
    time_ratio,
    walk_candidate,
)
from offramp.runtime.walker import walk

WITH, ALONE, NESTED = "one graph with all exits", "one graph, last exit alone", "nested if"
LOOP = "bare loop"
FULL_WALK = RuleSpec("gate", {"threshold": 1.0})  # every gate is read and none is taken
WARMUP = 3
# Heavy modules are imported where they are used: on Linux the peak memory of a child process begins with that
# of this process, and `cold` measures it.
LINE = "a stirring , funny film that stays with you"
MONOLITH_SCRIPT = """
import numpy, onnxruntime
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file({tokenizer!r})
graph = onnxruntime.InferenceSession({graph!r}, providers=["CPUExecutionProvider"])
for line in open({lines!r}, encoding="utf-8"):
    encoded = tokenizer.encode({prefix!r} + line.strip())
    ids = dict(input_ids=encoded.ids, attention_mask=encoded.attention_mask, token_type_ids=encoded.type_ids)
    inputs = {{entry.name: numpy.array([ids[entry.name]]) for entry in graph.get_inputs()}}
    print({labels!r}[int(graph.run(["logits"], inputs)[0][0].argmax())])
"""
WORDS = ("a", "film", "that", "is", "good", "bad", "warm", "cold", "and", "very", "long", "or", "short")
Inputs = dict[str, Any]
Run = Callable[[], object]


def random_checkpoint(folder: Path, blocks: int, width: int) -> Path:
    """Write a checkpoint of a BERT of this size with random weights into `folder`; gives the checkpoint's
    folder.

    Times do not depend on weights. Gates grow from exit to exit and are the same for all rows, so that a
    threshold chooses the exit of every row.
    """
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoModel, BertConfig

    from offramp.models import EarlyExitNetwork, NetworkSpec
    from offramp.models.policies.consistentee import ConsistentEEPolicy
    from offramp.training.checkpoint import Checkpoint, TextFacts, save_checkpoint

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
    network = EarlyExitNetwork(AutoModel.from_config(config, trust_remote_code=False), spec).eval()
    with torch.no_grad():
        for number, policy in enumerate(network.policies):
            assert isinstance(policy, ConsistentEEPolicy) and policy.slope is not None
            policy.slope.zero_()
            policy.bias.fill_(_gate_bias(number))
    save_checkpoint(Checkpoint(network, TextFacts("", 1, 512), tokenizer, {}), folder / "ckpt")
    return folder / "ckpt"


def _gate_bias(number: int) -> float:
    return 0.5 * number - 3.0


def threshold_for_exit(exit: int) -> float:
    """The threshold of rule gate with which all rows of a random_checkpoint leave at this exit (1-based)."""
    return float(1 / (1 + np.exp(-(_gate_bias(exit - 1) - 0.25))))


def random_inputs(rows: int, length: int) -> Inputs:
    """Inputs of rows with random token ids, without padding: arrays [rows, length] by name."""
    ids = np.random.default_rng(length).integers(5, 1000, (rows, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def walk_run(session: Classifier, inputs: Inputs, threshold: float) -> Run:
    """A function that walks these rows under rule gate.

    With threshold 1 it walks to the end: every gate is read and no row leaves early.
    """
    manifest, rows = session.manifest, np.arange(len(inputs["input_ids"]))
    rule = bind(RuleSpec("gate", {"threshold": threshold}), len(manifest.segments))
    sizes = {"rows": len(rows), "segments": len(manifest.segments), "classes": len(manifest.labels)}
    variant = manifest.variants.index(session.variant)
    return lambda: walk(session.engine, rule, [(rows, inputs)], variant=variant, limit=len(rows), **sizes)


def graph_run(session: Any, inputs: Inputs) -> Run:
    """A function that runs a single graph on these inputs."""
    known = {entry.name: inputs[entry.name] for entry in session.get_inputs()}
    return lambda: session.run(None, known)


def loop_run(session: Classifier, inputs: Inputs) -> Run:
    """A function that runs the walk's bound sessions in a bare loop, a lower bound for any walker."""
    walk_run(session, inputs, 1.0)()  # binds
    engine: Any = session.engine
    variant = session.manifest.variants.index(session.variant)
    state = engine.begin(inputs)
    bound, segments = state.buffers.bound, range(len(session.manifest.segments))
    runs = [state.buffers.stem, *(bound[k, variant, k % 2][0] for k in segments)]

    def run() -> None:
        for call in runs:
            call()

    run.memory = state.buffers  # type: ignore[attr-defined]  # the bindings point to it
    return run


def pooled_ratio(pairs: list[dict[str, list[float]]], name: str, reference: str) -> list[float]:
    """Median, 5th and 95th percentile of the ratio of two candidates' times, over the rounds of all pairs.

    pairs: seconds of each round by candidate; one dictionary for each opened session.
    """
    seconds, base = (np.concatenate([pair[key] for pair in pairs]) for key in (name, reference))
    return [round(value, 4) for value in time_ratio(seconds, base)]


def mean_ms(pairs: list[dict[str, list[float]]], name: str) -> float:
    """A candidate's median milliseconds, averaged over the pairs."""
    return round(1e3 * float(np.mean([np.median(pair[name]) for pair in pairs])), 3)


def full_depth_figures(
    sessions: list[Classifier], graphs: Mapping[str, Any], length: int, rounds: int
) -> dict[str, Any]:
    """Time ratios of the full walk and of the bare loop to each graph, at one length in tokens."""
    inputs = random_inputs(1, length)
    figures: dict[str, Any] = {}
    for name, graph in graphs.items():
        single = graph_run(graph, inputs)
        walks = [{"walk": walk_run(session, inputs, 1.0), name: single} for session in sessions]
        pairs = [time_in_turns(calls, rounds // 2, warmup=WARMUP) for calls in walks]
        figures[f"walk / {name}"] = pooled_ratio(pairs, "walk", name)
        figures[f"{name} ms"], figures["walk ms"] = mean_ms(pairs, name), mean_ms(pairs, "walk")
        loops = [{LOOP: loop_run(session, inputs), name: single} for session in sessions]
        pairs = [time_in_turns(calls, rounds // 4, warmup=WARMUP) for calls in loops]
        figures[f"{LOOP} / {name}"] = pooled_ratio(pairs, LOOP, name)
    return figures


def depth_figures(session: Classifier, graphs: Mapping[str, Any], length: int, rounds: int) -> dict[str, Any]:
    """Time of the walk to every exit, over that exit's share of the full walk and over the nested graph."""
    inputs, segments = random_inputs(1, length), len(session.manifest.segments)
    share, nested = [], []
    for k in range(1, segments + 1):
        threshold = threshold_for_exit(k) if k < segments else 1.0
        with_threshold = inputs | {"threshold": np.array(threshold, np.float32)}
        names = [entry.name for entry in graphs[NESTED].get_inputs()]
        if graphs[NESTED].run(["exit"], {name: with_threshold[name] for name in names})[0] != k:
            raise SystemExit(f"the nested graph does not leave at exit {k}")
        calls: dict[str, Run] = {
            "full": walk_run(session, inputs, 1.0),
            "exit": walk_run(session, inputs, threshold),
            "stem": lambda: session.engine.drop(session.engine.begin(inputs)),
            NESTED: graph_run(graphs[NESTED], with_threshold),
        }
        before = graph_run(graphs[ALONE], inputs)
        seconds = time_in_turns(calls, rounds, warmup=WARMUP, before=before)
        stem, full, exit = (float(np.median(seconds[name])) for name in ("stem", "full", "exit"))
        share.append(round(exit / (stem + (full - stem) * k / segments), 4))
        nested.append(round(time_ratio(seconds["exit"], seconds[NESTED])[0], 4))
    return {"exit time / (stem + share of the rest)": share, "walk / nested if, by exit": nested}


def measure_network(
    checkpoint: Path,
    name: str,
    variants: Sequence[str],
    lengths: Sequence[int],
    rounds: int,
    *,
    random: bool,
    scratch: Path,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Split and measure one network; gives one row for each variant and length, and the engine's facts."""
    import onnxruntime

    from offramp.export.classifier import ExportableClassifier
    from offramp.export.monolith import write_monolith
    from offramp.export.nested import nest_segments
    from offramp.training.checkpoint import load_checkpoint

    # The command that users run, so that the timed bundle is the one that they get.
    program = str(Path(sys.executable).parent / "ee-split")
    words = ["--out", str(scratch / "bundle"), "--variants", ",".join(variants)]
    words += ["--monolith", str(scratch / "alone.onnx")]
    subprocess.run([program, str(checkpoint), *words], check=True, stdout=sys.stderr)
    source = ExportableClassifier(load_checkpoint(checkpoint))
    write_monolith(source, scratch / "with.onnx", exits=True)
    rows = []
    for variant in variants:
        walk = partial(load_classifier, rule="never", variant=variant, share=False, global_pool=True)
        sessions = [walk(scratch / "bundle")]
        files = {ALONE: "alone.onnx" if variant == "fp32" else f"alone_{variant}.onnx"}
        if variant == "fp32":
            files[WITH] = "with.onnx"
            if random:
                segments = (sessions[0].manifest.stem, *sessions[0].manifest.segments)
                parts = [segment.variants["fp32"].graphs for segment in segments]
                (stem,), *rest = [[scratch / "bundle" / graph.file for graph in part] for part in parts]
                (scratch / "nested.onnx").write_bytes(nest_segments(stem, rest).SerializeToString())
                files[NESTED] = "nested.onnx"
        options = onnxruntime.SessionOptions()
        threads.share_global_pool(options)  # the walk's pool: same threads, same optimisation level
        options.add_session_config_entry("session.use_env_allocators", "1")  # and the walk's arena
        graphs = {
            kind: onnxruntime.InferenceSession(scratch / file, options, providers=["CPUExecutionProvider"])
            for kind, file in files.items()
        }
        sessions.append(walk(scratch / "bundle"))
        facts = dict(sessions[0].engine.facts)
        plain = {kind: graph for kind, graph in graphs.items() if kind != NESTED}
        for length in lengths:
            click.echo(f"{name} {variant}, {length} tokens", err=True)
            row: dict[str, Any] = {"network": name, "variant": variant, "length": length}
            row |= full_depth_figures(sessions, plain, length, rounds)
            if NESTED in graphs:
                row |= depth_figures(sessions[-1], graphs, length, max(10, rounds // 8))
            rows.append(row)
        for session in sessions:
            session.close()
    return rows, facts


def single_table(rows: list[dict[str, Any]]) -> Table:
    """The table of command single, with one line for each network, variant and length."""
    table = Table(title="batch 1; ratios: median (5..95 %)")
    pairs = (f"walk / {ALONE}", f"{LOOP} / {ALONE}", f"walk / {WITH}")
    for column in ("network", "tokens", *pairs, "exit k / (stem + k share)", "walk / nested if"):
        table.add_column(column, justify="right")
    for row in rows:
        cells = [f"{row['network']} {row['variant']}", str(row["length"])]
        cells += ["{:.3f} ({:.3f}..{:.3f})".format(*row[pair]) if pair in row else "" for pair in pairs]
        for values in ("exit time / (stem + share of the rest)", "walk / nested if, by exit"):
            cells.append(f"{min(row[values]):.3f}..{max(row[values]):.3f}" if values in row else "")
        table.add_row(*cells)
    return table


@click.group(help=__doc__)
def main() -> None:
    """The command group of the overhead benchmarks."""


FOLDER = click.Path(path_type=Path)
BUNDLE = click.option(
    "--bundle", type=FOLDER, default=Path("bundle"), show_default=True, help="As in ee-run."
)
BASELINES = click.option("--baselines", type=FOLDER, required=True, help="Folder of ee-split --baselines.")
JSON = click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="File for the figures."
)


def write_figures(file: Path | None, figures: dict[str, Any]) -> None:
    """Write the figures as JSON if a file is given."""
    if file is not None:
        file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


@main.command(context_settings={"show_default": True})
@click.option("--checkpoint", type=click.Path(exists=True, path_type=Path), help="Instead of random weights.")
@click.option("--sizes", default="6x384,12x384,12x768", help="Blocks x width of random networks.")
@click.option("--variants", default="fp32,int8", help="As in ee-split.")
@click.option("--lengths", default="16,32,64,128", help="Tokens.")
@click.option("--turns", "rounds", default=200, help="Rounds of every pair at every length.")
@JSON
def single(
    checkpoint: Path | None, sizes: str, variants: str, lengths: str, rounds: int, json_file: Path | None
) -> None:
    """Time the walk against one graph at batch 1."""
    rows: list[dict[str, Any]] = []
    facts: dict[str, str] = {}
    counts = [int(length) for length in lengths.split(",")]
    for size in [str(checkpoint)] if checkpoint else sizes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            scratch, random = Path(folder), checkpoint is None
            network = checkpoint or random_checkpoint(scratch, *map(int, size.split("x")))
            more, facts = measure_network(
                network, size, variants.split(","), counts, rounds, random=random, scratch=scratch
            )
            rows += more
    Console(width=170).print(single_table(rows))
    write_figures(json_file, {"machine": {**machine_facts(), **facts}, "turns": rounds, "rows": rows})


@main.command(context_settings={"show_default": True})
@BUNDLE
@BASELINES
@click.option("--data", type=FOLDER, required=True, help="As in ee-bench.")
@click.option("--batch-size", default=32, help="Rows in a batch.")
@click.option("--rows", default=512, help="Most rows that are read.")
@click.option("--turns", "rounds", default=7, help="Rounds.")
@JSON
def bulk(
    bundle: Path, baselines: Path, data: Path, batch_size: int, rows: int, rounds: int, json_file: Path | None
) -> None:
    """Measure rows per second of the full walk over those of the monolith, in every variant."""
    figures: list[dict[str, Any]] = []
    opened = open_bundle(bundle)
    manifest, reader = opened.manifest, open_reader(opened)
    items, _, _ = read_rows(data, manifest.labels, rows)
    encoded = items_to_rows(reader, items)
    graphs = read_baselines(baselines, manifest).graphs
    with ExitStack() as stack:
        for variant in manifest.variants:
            session = load_classifier(bundle, rule=FULL_WALK, variant=variant, share=False, global_pool=True)
            stack.enter_context(session)
            fact = next(graph for graph in graphs if (graph.kind, graph.variant) == (MONOLITH, variant))
            monolith = open_baseline(baselines, fact, manifest, threads=None, threshold=None)
            windows: list[tuple[Batches, int]] = []
            for start in range(0, len(encoded), batch_size * WINDOW):
                window = encoded[start : start + batch_size * WINDOW]
                windows.append((list(session.batches(window, batch_size)), len(window)))
            candidates = [walk_candidate(session, "walk", "full"), monolith]
            ratios = []
            for _ in range(rounds):
                rates = time_bulk(candidates, windows, batch_size, 1)
                ratios.append(rates["walk"] / rates[monolith.name])
            row = {"variant": variant, "rows_per_second": round(rates["walk"], 1)}
            row |= {"ratio": round(float(np.median(ratios)), 4), "each": [round(r, 3) for r in ratios]}
            figures.append(row)
            click.echo(f"{bundle.name} {variant}: {row}")
    write_figures(json_file, {"machine": machine_facts(), "bundle": bundle.name, "rows": figures})


def run_process(command: Sequence[str]) -> int:
    """Run a command in a process to its end; gives the peak of its resident set in bytes."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[0]} ended with {process.returncode}")
    return usage.ru_maxrss * 1024


@main.command(context_settings={"show_default": True})
@BUNDLE
@BASELINES
@click.option("--turns", "rounds", default=15, help="Processes of each kind.")
@JSON
def cold(bundle: Path, baselines: Path, rounds: int, json_file: Path | None) -> None:
    """Time new processes that read one line of input, as ee-run and as a script around the monolith."""
    manifest = open_bundle(bundle).manifest
    if not isinstance(manifest.input, TextInput):
        raise click.ClickException(f"{bundle}: this benchmark is for text")
    with tempfile.TemporaryDirectory() as scratch:
        lines = Path(scratch) / "line.txt"
        lines.write_text(LINE + "\n", encoding="utf-8")
        facts: dict[str, Any] = {"tokenizer": str(bundle / manifest.input.tokenizer), "lines": str(lines)}
        facts |= {"graph": str(baselines / "monolith.onnx"), "prefix": manifest.input.prefix}
        script = MONOLITH_SCRIPT.format(labels=list(manifest.labels), **facts)
        run = [str(Path(sys.executable).parent / "ee-run"), "--bundle", str(bundle)]
        commands = {
            "ee-run": [*run, str(lines)],
            "ee-run --rule never": [*run, "--rule", "never", str(lines)],
            "monolith": [sys.executable, "-c", script],
        }
        for command in commands.values():  # brings the files into the system's cache
            run_process(command)
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        peaks: dict[str, list[int]] = {name: [] for name in commands}
        calls = {name: partial(run_process, command) for name, command in commands.items()}
        for name, taken, peak in take_turns(calls, rounds):
            seconds[name].append(taken)
            peaks[name].append(peak)
    rows: list[dict[str, Any]] = []
    for name in commands:
        row: dict[str, Any] = {"command": name, "seconds": round(float(np.median(seconds[name])), 4)}
        row |= {"ratio": round(time_ratio(seconds[name], seconds["monolith"])[0], 3)}
        rows.append(row | {"peak_mb": round(float(np.median(peaks[name])) / 1e6, 1)})
    table = Table(title=f"a fresh process on one line, medians of {rounds}")
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)
    write_figures(
        json_file, {"machine": machine_facts(), "bundle": bundle.name, "turns": rounds, "rows": rows}
    )


def resident_mib(process: int) -> float:
    """Resident memory of a process in MiB, as the kernel counts it."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise SystemExit("this kernel has no VmRSS in /proc")


def write_lines(target: IO[bytes], lines: int) -> None:
    """Write this number of lines of 1 to 15 words to a pipe and close it."""
    for number in range(lines):
        words = [WORDS[(number * 7 + place * place) % len(WORDS)] for place in range(1 + number % 15)]
        target.write((" ".join(words) + "\n").encode())
    target.close()


@main.command(context_settings={"show_default": True})
@click.option("--bundle", default="tests/data/tiny_bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--lines", default=1_000_000, type=click.IntRange(min=100))
@click.option("--batch-size", default=32)
@JSON
def memory(bundle: Path, lines: int, batch_size: int, json_file: Path | None) -> None:
    """Measure the resident memory of ee-run at a hundred places of a long input."""
    program = Path(sys.executable).parent / "ee-run"
    command = [str(program), "--bundle", str(bundle), "--batch-size", str(batch_size), "-"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    threading.Thread(target=write_lines, args=(process.stdin, lines), daemon=True).start()
    samples, every = [], lines // 100
    answers = 0
    for _ in tqdm(process.stdout, total=lines, unit="line", mininterval=2):
        answers += 1
        if answers % every == 0 and answers < lines:
            samples.append(round(resident_mib(process.pid), 1))
    code = process.wait()
    tenth = len(samples) // 10
    figures = {
        "lines": lines,
        "answers": answers,
        "exit code": code,
        "MiB after a tenth": samples[tenth],
        "MiB at the end": samples[-1],
        "growth MiB": round(max(samples[tenth:]) - samples[tenth], 1),
    }
    click.echo(json.dumps(figures, indent=1))
    write_figures(json_file, figures | {"MiB along the way": samples})
    if answers != lines or code != 0:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
