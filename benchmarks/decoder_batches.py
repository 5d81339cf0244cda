"""Decoders, many texts at once: tokens a second by the number of texts that are generated together.

    python benchmarks/decoder_batches.py --bundle bundle/ --texts TEXTS --variant int4 --out BATCHES.json

Each of --sizes answers the same prompts at full depth, so many at once, in turns within a round; a round is a
new process. "decoding" is the speed after the prompts: tokens that came after the last first token and before
the first text ended, a second; at size 1 that of all texts together, one after another. "whole" counts
everything, prompts included. Ratios are to size 1, geometric mean over rounds with its error. "same":
answers with the ids of size 1. With --queued, so many prompts of 8 to 200 tokens wait for --memory-texts
places, and each joins when another one ends: "queued" counts the answers that are the same alone. Memory: the
resident set of a process that has opened the bundle and run a prompt, and when --memory-texts texts have
--context tokens each.
"""

from __future__ import annotations

import itertools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.progress import track

from offramp.benchmarks.decoders import print_table, read_prompts
from offramp.runtime import TextGenerator, load_generator
from offramp.runtime.batching import DecodingLoop
from offramp.runtime.tuning.report import machine_facts
from offramp.training.checkpoint import write_json

MEMORY_PROMPT = 16  # tokens
QUEUED_PROMPTS = (8, 200, 24, 60, 130)  # tokens, in turn
WORKER = [sys.executable, "-m", "offramp.benchmarks.decoder_batches", "--worker"]
Run = dict[str, Any]  # ids by prompt, seconds and tokens of the whole and of decoding


def open_loop(session: TextGenerator, size: int) -> DecodingLoop:
    """A loop that generates up to `size` texts at once, none of which reads the cache of another."""
    return DecodingLoop(
        session.engine,
        [session.bound_rule],
        session.manifest,
        session.manifest.variants.index(session.variant),
        limit=size,
        prefix_cache=False,
    )


def generate_together(session: TextGenerator, prompts: Sequence[list[int]], tokens: int, size: int) -> Run:
    """Answer prompts, `size` at once, with so many tokens each; stop tokens are ignored.

    The prompts are answered group by group, so that the texts of a group begin and end together.
    """
    ids: list[list[int]] = []
    whole, decoding, counted, resident = 0.0, 0.0, 0, 0.0
    for at in range(0, len(prompts), size):
        group = prompts[at : at + size]
        loop = open_loop(session, size)
        started = time.perf_counter()
        answers = {loop.add(prompt, tokens, ()): list[int]() for prompt in group}
        begun = ended = 0.0  # when the last text had its first token, and when the first one had all
        while loop.unfinished:
            for number, result in loop.advance():
                if isinstance(result, Exception):
                    raise result
                answers[number].append(result.id)
                if begun and not ended:
                    counted += 1
                if not begun and all(answers.values()):
                    begun = time.perf_counter()
                if not ended and len(answers[number]) == tokens:
                    ended = time.perf_counter()
        whole += time.perf_counter() - started
        resident = resident_mb()
        decoding += ended - begun
        loop.close()
        ids += answers.values()
    return {"ids": ids, "whole_s": whole, "decoding_s": decoding, "decoded": counted, "resident_mb": resident}


def answer_queue(session: TextGenerator, prompts: Sequence[list[int]], tokens: int, size: int) -> list[Any]:
    """Ids of the answers to prompts that wait together and join, up to `size` at once, as others end."""
    loop = open_loop(session, size)
    answers = {loop.add(prompt, tokens, ()): list[int]() for prompt in prompts}
    while loop.unfinished:
        for number, result in loop.advance():
            if isinstance(result, Exception):
                raise result
            answers[number].append(result.id)
    loop.close()
    return list(answers.values())


def count_equal(session: TextGenerator, prompts: Sequence[list[int]], tokens: int, size: int) -> str:
    """How many prompts have the same answer in a queue of `size` at once as alone."""
    together = answer_queue(session, prompts, tokens, size)
    alone = (answer_queue(session, [prompt], tokens, 1)[0] for prompt in prompts)
    equal = sum(one == other for one, other in zip(together, alone, strict=True))
    return f"{equal} of {len(prompts)}"


def resident_mb() -> float:
    """Resident set of this process in megabytes."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 1e6


def run_worker(request: Run) -> Run:
    """What a process does: time all sizes in an order that is drawn, or reach a memory."""
    with load_generator(
        request["bundle"], rule="never", variant=request["variant"], global_pool=True
    ) as session:
        if "context" in request:
            session.warm_up()
            opened, texts = resident_mb(), int(request["texts"])
            tokens = int(request["context"]) - MEMORY_PROMPT
            run = generate_together(session, [[7 + n] * MEMORY_PROMPT for n in range(texts)], tokens, texts)
            return {"opened": opened, "all_texts": run["resident_mb"]}
        sizes = np.random.default_rng(request["seed"]).permutation(request["sizes"]).tolist()
        generate_together(session, request["prompts"][:2], 4, 2)
        return {
            str(size): generate_together(session, request["prompts"], request["tokens"], size)
            for size in sizes
        }


def run_fresh(request: Run) -> Run:
    """The result of run_worker in a new process."""
    done = subprocess.run(WORKER, input=json.dumps(request), check=True, stdout=subprocess.PIPE, text=True)
    result: Run = json.loads(done.stdout.splitlines()[-1])
    return result


def batch_figures(rounds: Sequence[Run], sizes: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Speeds by size, and their ratios to the first size."""
    figures: dict[str, dict[str, Any]] = {}
    base = str(sizes[0])
    for size in map(str, sizes):
        row: dict[str, Any] = {}
        for kind, tokens in (("decoding", "decoded"), ("whole", None)):
            logs = np.log(
                [_speed(run[size], kind, tokens) / _speed(run[base], kind, tokens) for run in rounds]
            )
            row[f"{kind}_tokens_per_s"] = round(
                float(np.median([_speed(run[size], kind, tokens) for run in rounds])), 1
            )
            row[f"{kind}_ratio"] = round(float(np.exp(logs.mean())), 3)
            row[f"{kind}_error"] = (
                round(float(logs.std(ddof=1) / len(logs) ** 0.5), 3) if len(logs) > 1 else None
            )
        pairs = [
            (answer, alone)
            for run in rounds
            for answer, alone in zip(run[size]["ids"], run[base]["ids"], strict=True)
        ]
        row["same"] = f"{sum(answer == alone for answer, alone in pairs)} of {len(pairs)}"
        figures[size] = row
    return figures


def _speed(run: Run, kind: str, tokens: str | None) -> float:
    count = run[tokens] if tokens else sum(map(len, run["ids"]))
    return float(count / run[f"{kind}_s"])


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--texts", type=click.Path(exists=True, path_type=Path), help="Rows {text}.")
@click.option("--variant", default="fp32")
@click.option("--sizes", default="1,2,4,8", help="Texts at once, 1 first.")
@click.option("--prompts", "count", default=16, help="Prompts of a round, of --prompt tokens.")
@click.option("--prompt", default=24)
@click.option("--tokens", default=64, help="Of an answer.")
@click.option("--rounds", default=4)
@click.option("--queued", default=0, help="Prompts of mixed length that wait for a place; 0: none.")
@click.option("--memory-texts", default=8)
@click.option("--context", default=512, help="Tokens of a text, where memory is read; 0 leaves it out.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file.")
@click.option("--worker", is_flag=True, hidden=True)
def main(
    bundle: Path | None,
    texts: Path | None,
    variant: str,
    sizes: str,
    count: int,
    prompt: int,
    tokens: int,
    rounds: int,
    queued: int,
    memory_texts: int,
    context: int,
    out: Path | None,
    worker: bool,
) -> None:
    """Measure a bundle; see the head of this file."""
    if worker:
        click.echo(json.dumps(run_worker(json.loads(sys.stdin.read()))))
        return
    if bundle is None or texts is None:
        raise click.UsageError("--bundle and --texts are needed")
    numbers = [int(size) for size in sizes.split(",")]
    with load_generator(bundle, rule="never", variant=variant) as session:
        prompts = read_prompts(session, texts, count * rounds, prompt)
        facts, equal = dict(session.engine.facts), ""
        if queued:
            cut = itertools.cycle(QUEUED_PROMPTS)
            mixed = [ids[: next(cut)] for ids in read_prompts(session, texts, queued, max(QUEUED_PROMPTS))]
            equal = count_equal(session, mixed, tokens, memory_texts)
    request = {"bundle": str(bundle), "variant": variant, "sizes": numbers, "tokens": tokens}
    results = [
        run_fresh({**request, "prompts": prompts[n * count : (n + 1) * count], "seed": n})
        for n in track(range(rounds), "rounds", console=Console(stderr=True))
    ]
    figures = batch_figures(results, numbers)
    memory: Run = {}
    if context:
        asked = {"bundle": str(bundle), "variant": variant, "context": context, "texts": memory_texts}
        memory = {name: round(mb, 1) for name, mb in run_fresh(asked).items()}
    if out is not None:
        about: dict[str, Any] = {
            "command": "benchmarks/decoder_batches.py",
            "bundle": bundle.name,
            "variant": variant,
        }
        about |= {"texts": texts.name, "prompts": count, "prompt": prompt, "tokens": tokens, "rounds": rounds}
        about |= {"memory_texts": memory_texts, "context": context}
        about |= {"queued": equal} if equal else {}
        machine = machine_facts() | facts
        write_json(out, {**about, "machine": machine, "sizes": figures, "resident_mb": memory})
    print_table(f"{bundle.name}, {variant}; resident MB {memory}; queued {equal or 'none'}", figures)


if __name__ == "__main__":
    main()
