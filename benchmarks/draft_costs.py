"""What runs of a decoder take on 1 to 5 tokens, and how often drafts must be right for 1.2 x full depth.

    python benchmarks/draft_costs.py --bundle trained/ --bundle untrained/ \
        --out benchmarks/results/draft_costs_NAME.json

Every segment, the head and the drafting head run on so many tokens in turns; medians. A round of n drafts
behind exit e is n + 1 tokens to e, one at a time, n drafting heads, and one run of what is behind e, head
too, on n + 1 tokens; it gives as many tokens as drafts in a row were right, and one. "accepted": the chance
of a draft, each alike, at which that is WISHED times the tokens/s of full depth; "speed_at_most" where all
are right.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from offramp.runtime import load
from offramp.runtime.generator import Writer
from offramp.runtime.sequence import Lane
from offramp.runtime.tuning.report import machine
from offramp.training.checkpoint import write_json

WISHED = 1.2
DRAFTS = (1, 2, 3, 4)
PROMPT = 48  # tokens before the runs that are timed

Took = dict[tuple[str, int], float]  # (segment's number, "head" or "draft"; tokens) -> median seconds


def medians(writer: Writer, turns: int) -> Took:
    """What every stage takes, by tokens."""
    lane = Lane(writer.decoder)
    lane.feed([1] * PROMPT)
    for segment in range(len(lane.filled)):
        lane.advance(segment, PROMPT)
    seen: dict[tuple[str, int], list[float]] = {}

    def clocked(name: str, tokens: int, run: Any) -> Any:
        started = time.perf_counter()
        made = run()
        seen.setdefault((name, tokens), []).append(time.perf_counter() - started)
        return made

    for turn in track(range(turns + 3), writer.folder.name, console=Console(stderr=True)):
        for tokens in np.random.default_rng(turn).permutation(np.arange(1, max(DRAFTS) + 2)).tolist():
            lane.truncate(PROMPT)
            lane.feed([2] * tokens)
            for number in range(len(lane.filled)):
                made = clocked(str(number), tokens, lambda n=number, t=tokens: lane.advance(n, t))
            clocked("head", tokens, lambda hidden=made.hidden: lane.cache.logits(hidden))
            if tokens == 1:
                clocked("draft", 1, lambda hidden=made.hidden: lane.cache.logits(hidden, True))
    return {key: float(np.median(taken[3:])) for key, taken in seen.items()}  # the first ones bind memory


def needs(took: Took, segments: int) -> list[dict[str, Any]]:
    """By exit and drafts: see above; accepted is None where no chance is enough."""

    def deep(first: int, tokens: int) -> float:
        return sum(took[str(n), tokens] for n in range(first, segments)) + took["head", tokens]

    found, shares = [], np.linspace(0, 1, 1001)
    for exit in range(1, segments):
        shallow = sum(took[str(n), 1] for n in range(exit))
        for drafts in DRAFTS:
            takes = (drafts + 1) * shallow + drafts * took["draft", 1] + deep(exit, drafts + 1)
            rates = np.sum([shares**n for n in range(drafts + 1)], axis=0) * deep(0, 1) / takes
            enough = shares[rates >= WISHED]
            accepted = round(float(enough[0]), 3) if len(enough) else None
            best = round(float(rates[-1]), 3)
            found.append({"exit": exit, "drafts": drafts, "accepted": accepted, "speed_at_most": best})
    return found


@click.command(context_settings={"show_default": True})
@click.option("--bundle", "bundles", multiple=True, required=True, type=click.Path(exists=True))
@click.option("--variant", default="fp32", help="Precision.")
@click.option("--turns", default=40, help="Runs of each kind.")
@click.option("--threads", type=int, help="As load() takes it.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file.")
def main(bundles: tuple[str, ...], out: Path | None, **o: Any) -> None:
    """Measure, print the table and write it."""
    found: dict[str, Any] = {}
    for bundle in bundles:
        with load(bundle, variant=o["variant"], rule="never", threads=o["threads"]) as writer:
            assert isinstance(writer, Writer)
            took, segments = medians(writer, o["turns"]), writer.manifest.segments
            found[Path(bundle).name] = {
                "cuts": [segment.blocks[-1] for segment in segments],
                "ms": {f"{name}, {tokens}": round(1e3 * s, 4) for (name, tokens), s in took.items()},
                "needs": needs(took, len(segments)),
            }
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        facts = {"command": "benchmarks/draft_costs.py", **o, "machine": machine()}
        write_json(out, facts | {"wished": WISHED, "bundles": found})
    for name, one in found.items():
        table = Table(
            "exit", "drafts", "accepted", "at most", title=f"{name}: drafts for {WISHED} x full depth"
        )
        for row in one["needs"]:
            table.add_row(*map(str, row.values()))
        Console(width=120).print(table)


if __name__ == "__main__":
    main()
