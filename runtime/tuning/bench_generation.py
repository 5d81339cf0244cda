"""ee-bench on a bundle that generates: what its rules save, prompt by prompt, against the full depth."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from offramp.runtime.bundle.files import Bundle
from offramp.runtime.errors import BadInput, BadSetting
from offramp.runtime.generate import Token, generate
from offramp.runtime.generator import Writer
from offramp.runtime.inputs.lines import PROMPTS, read_lines
from offramp.runtime.loading import load
from offramp.runtime.tuning import report as pages

FULL = "full depth"
PLACES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)  # first positions of the histogram's lines, from 1
COLUMNS = ("contender", "tokens/s", "ratio (5..95 %)", "first ms", "p50 ms", "p95 ms", "depth", "ran", "same")
LEGEND = {
    "ratio": "time over the full depth's for the same prompt and turn: median, 5th to 95th percentile",
    "first ms": "median time to the first token; p50 and p95 are of the tokens behind it",
    "depth": "mean number of blocks behind which tokens were said, the first ones left out",
    "ran": "mean number of blocks run for a token, drafts and tokens that had waited included",
    "same": "percent of the answers that are those of the full depth, token for token",
}


@dataclass
class Turns:
    """What one contender did, a list an answer: tokens, and when each was there (seconds from the start)."""

    session: Writer
    tokens: list[list[Token]] = field(default_factory=list)
    stamps: list[list[float]] = field(default_factory=list)

    def answer(self, ids: Sequence[int], most: int) -> None:
        """One more answer, whose end is not heeded: contenders say equally much."""
        said, seen, started = list[Token](), list[float](), time.perf_counter()
        for token in generate(self.session.decoder, ids, most, stop=(), way=self.session.way):
            said.append(token)
            seen.append(time.perf_counter() - started)
        self.tokens.append(said)
        self.stamps.append(seen)

    @property
    def behind(self) -> np.ndarray:
        """Seconds from the first token of each answer to its last [answers]."""
        return np.array([seen[-1] - seen[0] for seen in self.stamps])


def measure_text(
    bundle: Bundle,
    data: Path,
    *,
    rules: str | None = None,
    rows: int = 20,
    most: int = 64,
    turns: int = 3,
    variant: str | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Every figure as it is written to JSON.

    rules: names, a threshold behind a colon, as in "gate:0.7,fixed:2", None: the bundle's own. Raises
    BadInput naming the line, BadSetting, and what load() raises.
    """
    with ExitStack() as stack:
        field_: dict[str, Turns] = {}
        for name, wish in wished(rules, bundle).items():
            session = stack.enter_context(load(bundle.folder, variant=variant, threads=threads, **wish))
            assert isinstance(session, Writer)
            field_[name] = Turns(session)
        full = field_[FULL].session
        prompts, there = read_prompts(data, rows, full)
        for contender in field_.values():
            contender.answer(prompts[0], min(8, most))
            contender.tokens.clear()
            contender.stamps.clear()
        names = list(field_)
        for turn in range(turns):
            for at, ids in enumerate(prompts):
                shift = (turn + at) % len(names)
                for name in names[shift:] + names[:shift]:
                    field_[name].answer(ids, most)
        found = [{"name": name} | figures(one, field_[FULL]) for name, one in field_.items()]
        about = {
            **pages.machine(),
            "engine": full.engine.name,
            "device": full.engine.device,
            **full.engine.facts,
            "variant": full.variant,
            "bundle": str(bundle.folder),
            "bundle_bytes": sum(fact.bytes for fact in bundle.manifest.files.values()),
            "segments_end_behind": [segment.blocks[-1] for segment in bundle.manifest.segments],
            "data": str(data),
            "rows": len(prompts),
            "rows_there": there,
            "mean_tokens": round(float(np.mean([len(ids) for ids in prompts])), 1),
            "max_new_tokens": most,
            "turns": turns,
        }
    return {"format": 1, "about": about, "contenders": found}


def wished(rules: str | None, bundle: Bundle) -> dict[str, dict[str, Any]]:
    """What load() is to be given, by contender; the full depth always, and first."""
    own = bundle.manifest.rule.name
    words = [own] if rules is None else [word.strip() for word in rules.split(",") if word.strip()]
    found: dict[str, dict[str, Any]] = {FULL: {"rule": "never"}}
    for word in words:
        name, _, number = word.partition(":")
        try:
            wish = {"rule": name} | ({"threshold": float(number)} if number else {})
        except ValueError:
            raise BadSetting(f"rules {word!r}: expected NAME or NAME:NUMBER, such as gate:0.7") from None
        if name != "never":
            found[word] = wish
    return found


def read_prompts(path: Path, most: int, session: Writer) -> tuple[list[list[int]], int]:
    """Token ids of the first prompts, and how many the file holds; BadInput names the line."""
    try:
        with path.open("rb") as stream:
            lines = [line for line in read_lines(stream, names=PROMPTS) if line.problem != "empty line"]
    except OSError as problem:
        raise BadInput(f"{path}: {problem.strerror}; name a file of prompts with --data") from problem
    if not lines:
        raise BadInput(f"{path}: no lines in it; put one prompt on each line")
    found = []
    for line in lines[:most]:
        if line.problem is not None:
            raise BadInput(f"{path}:{line.number}: {line.problem}; repair the line or take it out")
        others: Mapping[str, Any] = line.others or {}
        try:
            found.append(session.ids_of(line.text or others.get("messages", "")))
        except BadInput as problem:
            raise BadInput(f"{path}:{line.number}: {problem}") from problem
    return found, len(lines)


def figures(one: Turns, full: Turns) -> dict[str, Any]:
    """Of one contender."""
    steps = np.concatenate([np.diff(seen) for seen in one.stamps]) * 1e3
    later = [token for said in one.tokens for token in said[1:]]
    ratios = one.behind / np.maximum(full.behind, 1e-9)
    same = [
        [token.id for token in mine] == [token.id for token in theirs]
        for mine, theirs in zip(one.tokens, full.tokens, strict=True)
    ]
    low, middle, high = (round(float(x), 4) for x in np.percentile(ratios, [5, 50, 95]))
    found = {
        "rule": {"name": one.session.rule.name, "parameters": one.session.rule.parameters},
        "tokens_per_s": round(len(later) / max(1e-9, float(one.behind.sum())), 3),
        "ratio": middle,
        "ratio_p5": low,
        "ratio_p95": high,
        "first_ms": round(1e3 * float(np.median([seen[0] for seen in one.stamps])), 3),
        "p50_ms": round(float(np.percentile(steps, 50)), 3) if len(steps) else None,
        "p95_ms": round(float(np.percentile(steps, 95)), 3) if len(steps) else None,
        "depth": round(float(np.mean([token.depth for token in later])), 3) if later else None,
        "ran": round(float(np.mean([token.ran for token in later])), 3) if later else None,
        "same": round(float(np.mean(same)), 4),
        "by_position": by_position(one.tokens),
    }
    drafting = one.session.drafting
    if drafting is not None:
        offered = {exit: number for exit, number in drafting.offered.items() if number}
        found["drafts"] = {
            "offered": offered,
            "accepted": {exit: round(drafting.accepted[exit] / n, 4) for exit, n in offered.items()},
            "rounds": drafting.rounds,
        }
    return found


def by_position(answers: Sequence[Sequence[Token]]) -> list[dict[str, Any]]:
    """How many tokens were said behind how many blocks, by their position in the answer (from 1)."""
    found = []
    for first, after in zip(PLACES, (*PLACES[1:], 1 << 30), strict=True):
        depths = [token.depth for said in answers for token in said[first - 1 : after - 1]]
        if depths:
            kinds, counts = np.unique(depths, return_counts=True)
            told = {int(kind): int(count) for kind, count in zip(kinds, counts, strict=True)}
            found.append({"from": first, "mean": round(float(np.mean(depths)), 3), "tokens": told})
    return found


def table(found: Mapping[str, Any]) -> str:
    """All that was measured as plain text."""
    rows = [list(COLUMNS)]
    for one in found["contenders"]:
        ratio = f"{one['ratio']:.3f} ({one['ratio_p5']:.2f}..{one['ratio_p95']:.2f})"
        numbers = [one[name] for name in ("first_ms", "p50_ms", "p95_ms", "depth", "ran")]
        cells = ["-" if number is None else f"{number:.2f}" for number in numbers]
        rows.append([one["name"], f"{one['tokens_per_s']:.1f}", ratio, *cells, f"{100 * one['same']:.1f}"])
    lines = [*pages.aligned(rows), "", *(f"{name:9} {text}" for name, text in LEGEND.items())]
    for one in found["contenders"]:
        for exit, share in one.get("drafts", {}).get("accepted", {}).items():
            offered = one["drafts"]["offered"][exit]
            lines += ["", f"{one['name']}: exit {exit}: {share:.1%} of {offered} drafts were right"]
    places = [str(line["from"]) for line in found["contenders"][0]["by_position"]]
    means = [[one["name"], *(f"{p['mean']:.2f}" for p in one["by_position"])] for one in found["contenders"]]
    lines += ["", *pages.aligned([["mean depth from token", *places], *means])]
    about = {name: value for name, value in found["about"].items() if value != ""}
    return "\n".join([*lines, "", *(f"{name.replace('_', ' '):22} {value}" for name, value in about.items())])
