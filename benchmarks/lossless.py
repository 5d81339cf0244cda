"""Lossless mode: drafts by early exits against the full depth, prompt by prompt in turns.

    python benchmarks/lossless.py --bundle trained/ --bundle untrained/ --texts films/test.jsonl \
        --out benchmarks/results/lossless_NAME.json

Every prompt (the first --prompt tokens of a text) is answered at full depth and by drafts, in changing order,
--tokens tokens each, the ends of answers not heeded. "same" counts answers that are those of the full depth,
id by id; "speed" is the full depth's seconds over the way's, all prompts together, prompts' own passes left
out; "speed_median" the median of prompts. The way "speculative" chooses for itself and learns from prompt to
prompt; those named (exit, drafts) do not. How often drafts must be right is what draft_costs.py tells.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from offramp.runtime import load
from offramp.runtime.generate import Way, full, generate
from offramp.runtime.generator import Writer
from offramp.runtime.rules.speculative import Drafting
from offramp.runtime.tuning.report import machine
from offramp.training.checkpoint import write_json


def prompts_of(writer: Writer, texts: Path, count: int, tokens: int) -> list[list[int]]:
    """The first tokens of the first texts that are long enough."""
    found: list[list[int]] = []
    with texts.open(encoding="utf-8") as lines:
        for line in lines:
            ids = writer.ids_of(json.loads(line)["text"])
            if len(ids) >= tokens and len(found) < count:
                found.append(ids[:tokens])
    if len(found) < count:
        raise click.ClickException(f"{texts}: {len(found)} texts of {tokens} tokens, {count} are asked for")
    return found


def answered(writer: Writer, prompt: list[int], most: int, way: Way) -> tuple[list[int], float]:
    """Ids, and seconds from the first token to the last."""
    ids, seen = [], list[float]()
    for token in generate(writer.decoder, prompt, most, stop=(), way=way):
        ids.append(token.id)
        seen.append(time.perf_counter())
    return ids, seen[-1] - seen[0]


def contest(writer: Writer, prompts: list[list[int]], most: int, fixed: list[tuple[int, int]]) -> Any:
    """All ways on all prompts."""
    segments = len(writer.manifest.segments)
    ways: dict[str, Way] = {"full": full, "speculative": Drafting(range(1, segments))}
    ways |= {f"{e},{d}": Drafting(range(1, segments), (e, d)) for e, d in fixed if e < segments}
    for way in ways.values():
        answered(writer, prompts[0], most, way)
    ways |= {"speculative": Drafting(range(1, segments))}  # has learned nothing yet
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    same, names = dict.fromkeys(ways, 0), list(ways)
    for turn, prompt in enumerate(track(prompts, str(writer.folder), console=Console(stderr=True))):
        ids: dict[str, list[int]] = {}
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            ids[name], took = answered(writer, prompt, most, ways[name])
            seconds[name].append(took)
        for name in names:
            same[name] += ids[name] == ids["full"]
    rows = {}
    for name, way in ways.items():
        taken = np.array(seconds[name])
        ratios = np.array(seconds["full"]) / taken
        rows[name] = {
            "same": same[name],
            "speed": round(float(sum(seconds["full"]) / taken.sum()), 4),
            "speed_median": round(float(np.median(ratios)), 4),
            "speed_5_95": [round(float(x), 3) for x in np.percentile(ratios, [5, 95])],
            "tokens_per_s": round(float((most - 1) * len(prompts) / taken.sum()), 2),
        }
        if isinstance(way, Drafting):
            rows[name] |= {
                "rounds": way.rounds,
                "offered": way.offered,
                "accepted": {e: round(way.accepted[e] / n, 4) for e, n in way.offered.items() if n},
            }
    return {"ways": rows}


@click.command(context_settings={"show_default": True})
@click.option("--bundle", "bundles", multiple=True, required=True, type=click.Path(exists=True))
@click.option("--texts", required=True, type=click.Path(exists=True, path_type=Path), help="Rows {text}.")
@click.option("--variant", default="fp32", help="Precision.")
@click.option("--count", default=100, help="Prompts.")
@click.option("--prompt", default=24, help="Tokens of a prompt.")
@click.option("--tokens", default=64, help="Tokens of an answer.")
@click.option(
    "--fixed",
    default="1,1 1,2 1,3 2,2",
    help="Ways that do not choose: exit,drafts; those whose exit a bundle lacks are left out.",
)
@click.option("--threads", type=int, help="As load() takes it.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file.")
def main(bundles: tuple[str, ...], texts: Path, out: Path | None, **o: Any) -> None:
    """Measure, print the table and write it."""
    fixed = [(int(pair.split(",")[0]), int(pair.split(",")[1])) for pair in o["fixed"].split()]
    found: dict[str, Any] = {}
    for bundle in bundles:
        with load(bundle, variant=o["variant"], rule="never", threads=o["threads"]) as writer:
            assert isinstance(writer, Writer)
            prompts = prompts_of(writer, texts, o["count"], o["prompt"])
            found[Path(bundle).name] = {
                "cuts": [segment.blocks[-1] for segment in writer.manifest.segments],
                **contest(writer, prompts, o["tokens"], fixed),
                "engine": dict(writer.engine.facts),
            }
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        facts = {"command": "benchmarks/lossless.py", "texts": texts.name, **o, "machine": machine()}
        write_json(out, facts | {"bundles": found})
    for name, one in found.items():
        table = Table(title=f"{name}, segments end behind {one['cuts']}")
        for column in ("way", "same", "speed", "median", "tokens/s", "accepted"):
            table.add_column(column)
        for way, row in one["ways"].items():
            accepted = ", ".join(f"exit {e}: {a:.0%}" for e, a in row.get("accepted", {}).items())
            cells = (way, row["same"], row["speed"], row["speed_median"], row["tokens_per_s"], accepted)
            table.add_row(*map(str, cells))
        Console(width=120).print(table)


if __name__ == "__main__":
    main()
