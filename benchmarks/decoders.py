"""Full-depth decoding: segments against one graph, transformers, onnxruntime-genai and llama.cpp.

    python benchmarks/decoders.py full --model MODEL --scratch DIR --texts TEXTS --out FULL.json
    python benchmarks/decoders.py rivals --model MODEL --scratch DIR --texts TEXTS --out RIVALS.json
    python benchmarks/decoders.py memory --scratch DIR --texts TEXTS --out MEMORY.json

full: cuts of several finenesses and that of --segments auto, in turns of a few tokens with the one graph that
ee-split --monolith writes, at three precisions; ratios are speeds of a prompt's median token over the one
graph's, geometric mean, with the standard error over pairs of rounds; "same" says that ids are those that
transformers generates (fp32, of the first 20 prompts) or that the one graph says (int8, int4).
rivals: the cut of auto beside the other two, prompt by prompt in turns, in processes of their own that wait
while others answer. Every round of both is a fresh process, and every other one opens back to front: what is
opened first gets worse memory.
memory: resident set of fresh processes that read and write up to 1,024 tokens. Bundles stay in --scratch and
are not written twice; full has to come first.
"""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM

from offramp.benchmarks.decoder_contest import FIELD, ONE, OURS
from offramp.benchmarks.decoder_turns import Answer, Round, compared, fresh
from offramp.benchmarks.decoder_turns import rounds as in_rounds
from offramp.benchmarks.lossless import prompts_of
from offramp.export.decoder_auto import choose_cuts, even_cuts
from offramp.export.decoder_bundle import read_folder, write_decoder
from offramp.export.decoder_monolith import write_monolith
from offramp.runtime import load
from offramp.runtime.generator import Writer
from offramp.runtime.tuning.report import machine
from offramp.training.checkpoint import read_json, write_json

VARIANTS = ("fp32", "int8", "int4")
FINENESS = (30, 10, 5, 3, 1)  # segments, where the model has as many blocks


def prepared(model: Path, scratch: Path) -> dict[str, Any]:
    """Write bundles and the one graph, those that are not there yet; gives what auto found."""
    scratch.mkdir(parents=True, exist_ok=True)
    network, _ = read_folder(model)
    if not (scratch / "auto.json").is_file():
        choice = choose_cuts(network, model, VARIANTS)
        click.echo(choice.table(), err=True)
        write_json(scratch / "auto.json", {"cuts": choice.cuts, "table": choice.table().splitlines()})
    chosen = read_json(scratch / "auto.json")
    if not (scratch / "auto").is_dir():
        write_decoder(network, model, scratch / "auto", cuts=chosen["cuts"], variants=VARIANTS)
    if not (scratch / "one.onnx").is_file():
        write_monolith(network, scratch / "one.onnx", VARIANTS)
    for count in FINENESS:
        bundle = scratch / f"segments_{count}"
        if count <= network.block_count and not bundle.is_dir():
            cuts = even_cuts(network.block_count, count)
            write_decoder(network, model, bundle, cuts=cuts, variants=VARIANTS)
    return chosen


def prompts_for(scratch: Path, texts: Path, count: int) -> list[list[int]]:
    """Ids of the beginnings of so many texts."""
    with load(scratch / "auto", rule="never") as writer:
        assert isinstance(writer, Writer)
        return prompts_of(writer, texts, count, 24)


def greedy(model: Path, prompts: list[list[int]], most: int) -> list[list[int]]:
    """What transformers generates, ends of answers not heeded."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    network.generation_config.eos_token_id = None
    found = []
    with torch.no_grad():
        for prompt in track(prompts, "transformers", console=Console(stderr=True)):
            made = network.generate(torch.tensor([prompt]), max_new_tokens=most, do_sample=False)
            found.append([int(token) for token in made[0, len(prompt) :]])
    return found


def asked_of(
    given: dict[str, Any], facts: dict[str, Any], order: list[str], prompts: list[list[int]], seed: int
) -> Round:
    """A round in a fresh process; what rivals say of themselves goes to `facts`."""
    said = fresh("worker_round", {**given, "order": order, "prompts": prompts, "seed": seed})
    facts.update(said["facts"])
    return {name: [Answer(*answer) for answer in answers] for name, answers in said["answers"].items()}


def told(title: str, rows: dict[str, dict[str, Any]]) -> None:
    """A table of these rows, columns as the first has them."""
    table = Table("", *next(iter(rows.values())), title=title)
    for name, row in rows.items():
        table.add_row(name, *map(str, row.values()))
    Console(width=120).print(table)


@click.group()
def main() -> None:
    """See above."""


MODEL = click.option("--model", required=True, type=click.Path(exists=True, path_type=Path))
SCRATCH = click.option("--scratch", required=True, type=click.Path(path_type=Path), help="For bundles.")
TEXTS = click.option("--texts", required=True, type=click.Path(exists=True, path_type=Path))
COUNT = click.option("--count", default=24, show_default=True, help="Prompts.")
TOKENS = click.option("--tokens", default=64, show_default=True, help="Tokens of an answer.")
ROUNDS = click.option("--rounds", default=8, show_default=True, help="Times that all is opened anew.")
OUT = click.option("--out", type=click.Path(path_type=Path), help="JSON file.")


@main.command()
@MODEL
@SCRATCH
@TEXTS
@COUNT
@TOKENS
@ROUNDS
@click.option("--alone", is_flag=True, help="The cut of auto and the one graph, no other cuts beside.")
@OUT
def full(
    model: Path,
    scratch: Path,
    texts: Path,
    count: int,
    tokens: int,
    rounds: int,
    alone: bool,
    out: Path | None,
) -> None:
    """Segments against one graph."""
    chosen, found = prepared(model, scratch), dict[str, dict[str, dict[str, Any]]]()
    others = [f"segments_{n}" for n in FINENESS if (scratch / f"segments_{n}").is_dir()]
    names = ["auto", *([] if alone else others)]
    prompts = prompts_for(scratch, texts, count)
    command = "benchmarks/decoders.py full" + " --alone" * alone
    facts: dict[str, Any] = {"command": command, "model": model.name, "prompts": count}
    facts |= {"tokens": tokens, "rounds": rounds, "texts": texts.name, "held_to_transformers": min(count, 20)}
    right = greedy(model, prompts[:20], tokens)
    for variant in VARIANTS:
        given = {"scratch": str(scratch), "variant": variant, "tokens": tokens}
        said = in_rounds(partial(asked_of, given, {}), [ONE, *names], prompts, rounds)
        theirs = [answer.ids for one in said for answer in one[ONE]]
        found[variant] = compared(said, ONE, right if variant == "fp32" else theirs)
        told(f"{model.name}, {variant}, auto cuts behind {chosen['cuts']}", found[variant])
        if out is not None:
            write_json(out, {**facts, "machine": machine(), "auto": chosen, "contenders": found})


@main.command()
@MODEL
@SCRATCH
@TEXTS
@COUNT
@TOKENS
@ROUNDS
@OUT
def rivals(
    model: Path, scratch: Path, texts: Path, count: int, tokens: int, rounds: int, out: Path | None
) -> None:
    """Beside onnxruntime-genai and llama.cpp, at three precisions."""
    chosen, found = read_json(scratch / "auto.json"), dict[str, Any]()
    facts: dict[str, Any] = {variant: {} for variant in VARIANTS}
    prompts = prompts_for(scratch, texts, count)
    about = {"command": "benchmarks/decoders.py rivals", "model": model.name, "prompts": count}
    about |= {"tokens": tokens, "rounds": rounds, "texts": texts.name}
    about |= {"cuts": chosen["cuts"], "machine": machine()}
    for variant in VARIANTS:
        given = {"model": str(model), "scratch": str(scratch), "variant": variant, "tokens": tokens}
        said = in_rounds(partial(asked_of, given, facts[variant]), FIELD, prompts, rounds)
        found[variant] = compared(said, OURS, [answer.ids for one in said for answer in one[OURS]])
        told(f"{model.name}, {variant}", found[variant])
        if out is not None:  # after each precision: the next one may take a compiler's while
            write_json(out, {**about, "rivals": facts, "contenders": found})


@main.command()
@SCRATCH
@TEXTS
@click.option("--context", default=1024, show_default=True, help="Tokens read and written in all.")
@click.option("--turns", "rounds", default=3, show_default=True, help="Fresh processes of each kind.")
@OUT
def memory(scratch: Path, texts: Path, context: int, rounds: int, out: Path | None) -> None:
    """Resident set of the walk and of the one graph."""
    found: dict[str, dict[str, Any]] = {}
    for variant in VARIANTS:
        for kind in ("segments", "one graph"):
            worker = [sys.executable, "-m", "offramp.benchmarks.worker_memory", kind, str(scratch), variant]
            runs = []
            for _ in range(rounds):
                done = subprocess.run(
                    [*worker, str(texts), str(context)], check=True, capture_output=True, text=True
                )
                runs.append([float(word) for word in done.stdout.split()])
            resident, peak = np.median(runs, axis=0)
            found[f"{kind}, {variant}"] = {"resident_mb": round(resident, 1), "peak_mb": round(peak, 1)}
        for row in (found[f"segments, {variant}"], found[f"one graph, {variant}"]):
            whole = found[f"one graph, {variant}"]
            row["ratio"] = round(row["resident_mb"] / whole["resident_mb"], 4)
            row["peak_ratio"] = round(row["peak_mb"] / whole["peak_mb"], 4)
    if out is not None:
        facts = {"command": "benchmarks/decoders.py memory", "context": context, "rounds": rounds}
        write_json(out, {**facts, "machine": machine(), "contenders": found})
    told(f"memory at {context} tokens", found)


if __name__ == "__main__":
    main()
