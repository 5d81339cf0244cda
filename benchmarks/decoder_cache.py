"""Deferred and propagated caches: what tokens that left early do to those behind them, and what it takes.

    python benchmarks/decoder_cache.py --bundle BUNDLE --model MODEL --texts films/test.jsonl \
        --rule gate --thresholds 0.3,0.5,0.7 --out benchmarks/results/decoder_cache_NAME.json

Texts are read as they stand (teacher forcing): the first --prompt tokens at full depth, then one token after
another, each as far as the rule has it go, --tokens in all. By cache: perplexity of the tokens behind the
prompt, mean depth at which they were told, blocks run a token, time by that of the full depth (both caches
and the full depth take turns, text by text; median). "deep_diff" is the largest difference between logits of
tokens that went to the end and those that transformers gives the whole text at once; "deep" how many went.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM

from offramp.benchmarks.lossless import prompts_of
from offramp.runtime import RuleSpec, load, rules
from offramp.runtime.generate import SILENT, Exiting
from offramp.runtime.generator import Writer
from offramp.runtime.sequence import Lane
from offramp.runtime.tuning.report import machine
from offramp.runtime.ways import CACHES
from offramp.training.checkpoint import write_json


def read(writer: Writer, ids: list[int], prompt: int, way: Exiting, truth: np.ndarray) -> dict[str, Any]:
    """Of one text: nats by token, depths, blocks run, seconds, and how far deep tokens are from `truth`
    [tokens, vocabulary].
    """
    lane = Lane(writer.decoder)
    lane.feed(ids[:prompt])
    lane.through(most=prompt)
    nats, depths, ran, seconds, apart = list[float](), list[int](), lane.ran, 0.0, list[float]()
    for at in range(prompt, len(ids) - 1):
        started = time.perf_counter()
        logits, depth = way.step(lane, ids[at])
        seconds += time.perf_counter() - started
        depths.append(depth)
        top = float(logits.max())
        nats.append(top + float(np.log(np.exp(logits - top).sum())) - float(logits[ids[at + 1]]))
        if depth == writer.manifest.blocks:
            apart.append(float(np.abs(logits - truth[at]).max()))
    return {"nats": nats, "depths": depths, "ran": lane.ran - ran, "seconds": seconds, "apart": apart}


def summary(told: list[dict[str, Any]], full: list[dict[str, Any]]) -> dict[str, Any]:
    """Over all texts."""
    tokens = sum(len(one["nats"]) for one in told)
    apart = [x for one in told for x in one["apart"]]
    ratios = [one["seconds"] / other["seconds"] for one, other in zip(told, full, strict=True)]
    return {
        "perplexity": round(float(np.exp(sum(sum(one["nats"]) for one in told) / tokens)), 3),
        "depth": round(float(np.mean([d for one in told for d in one["depths"]])), 3),
        "ran": round(sum(one["ran"] for one in told) / tokens, 3),
        "time": round(float(np.median(ratios)), 4),
        "deep": len(apart),
        "deep_diff": max(apart) if apart else None,
    }


@click.command(context_settings={"show_default": True})
@click.option("--bundle", required=True, type=click.Path(exists=True))
@click.option("--model", required=True, help="What the bundle was made of.")
@click.option("--texts", required=True, type=click.Path(exists=True, path_type=Path), help="Rows {text}.")
@click.option("--rule", default="gate", help="As load() takes it.")
@click.option("--thresholds", default="0.3,0.5,0.7", help="Of the rule.")
@click.option("--count", default=20, help="Texts.")
@click.option("--prompt", default=32, help="Tokens read at full depth.")
@click.option("--tokens", default=128, help="Tokens read of a text.")
@click.option("--threads", type=int, help="As load() takes it.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file.")
def main(bundle: str, model: str, texts: Path, out: Path | None, **o: Any) -> None:
    """Measure, print the table and write it."""
    found: dict[str, Any] = {}
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with load(bundle, rule="never", threads=o["threads"]) as writer:
        assert isinstance(writer, Writer)
        count, thresholds = len(writer.manifest.segments), [float(x) for x in o["thresholds"].split(",")]

        def way(spec: RuleSpec, fills: bool) -> Callable[[], Exiting]:
            asks = spec.name not in (*SILENT, "never")  # at full depth no exit is asked: a head costs blocks
            return lambda: Exiting(rules.bind(spec, count), asks, fills, count)

        ways = {"full": way(RuleSpec("never", {}), False)}
        for threshold in thresholds:
            parameter = rules.main_parameter(o["rule"])
            spec = RuleSpec(o["rule"], {str(parameter): threshold})
            ways |= {f"{cache}, {threshold:g}": way(spec, cache == "propagate") for cache in CACHES}
        told: dict[str, list[Any]] = {name: [] for name in ways}
        rows = prompts_of(writer, texts, o["count"], o["tokens"])
        names = list(ways)
        for turn, ids in enumerate(track(rows, "texts", console=Console(stderr=True))):
            with torch.no_grad():
                truth = whole(torch.tensor([ids])).logits[0].numpy()
            for at in range(len(names)):
                name = names[(at + turn) % len(names)]
                told[name].append(read(writer, ids, o["prompt"], ways[name](), truth))
        found = {name: summary(some, told["full"]) for name, some in told.items()}
    facts = {"command": "benchmarks/decoder_cache.py", "bundle": Path(bundle).name, "texts": texts.name}
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, {**facts, **o, "machine": machine(), "ways": found})
    table = Table(title=f"{Path(bundle).name}, rule {o['rule']}")
    table.add_column("cache, threshold")
    for column in next(iter(found.values())):
        table.add_column(column)
    for name, row in found.items():
        table.add_row(name, *map(str, row.values()))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
