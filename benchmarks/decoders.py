"""Decoders: segments against the monolith, baselines, memory, and the lossless rule.

    python benchmarks/decoders.py full --model MODEL --scratch DIR --texts TEXTS --out FULL.json
    python benchmarks/decoders.py baselines --model MODEL --scratch DIR --texts TEXTS --out BASELINES.json
    python benchmarks/decoders.py memory --scratch DIR --texts TEXTS --out MEMORY.json
    python benchmarks/decoders.py lossless --bundle trained/ --bundle untrained/ --texts TEXTS --out FILE
    python benchmarks/decoders.py lossless --bundle untrained/ --texts ROWS --prompts summaries --out FILE

full: bundles of several numbers of segments and that of --segments auto, in turns of a few tokens with the
graph that ee-split --monolith writes, at three precisions. Ratios are speeds of a prompt's median token over
the monolith's, geometric mean, with the standard error over pairs of rounds; "same": number of answers with
the ids that transformers generates (fp32, of the first 20 prompts) or the monolith (int8, int4).
baselines: the cut of auto beside onnxruntime-genai and llama.cpp, prompt by prompt in turns; they are
processes that wait while another one answers.
memory: resident set of fresh processes that read and write up to 1,024 tokens; with --model, of
onnxruntime-genai and llama.cpp, too. All but the monolith hold a tokenizer.
Bundles stay in --scratch and are written once; `full` comes first.
lossless: every prompt is answered at full depth and under rule speculative, in turns, stop tokens ignored.
"same" counts answers that are those of full depth, id by id; "speed" is the seconds of full depth over the
rule's, all prompts together, first tokens left out; "speed_median" the median over prompts. The rule chooses
source and number of drafts itself and learns from prompt to prompt; with --fixed it does not. With --prompts
summaries or edits the answers repeat much of the prompts (repeated_prompts.py), and end at stop tokens.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
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

from offramp.benchmarks.decoder_candidates import (
    GENAI,
    LLAMA,
    MONOLITH,
    OFFRAMP,
    WITH_BASELINES,
    Round,
    monolith_file,
    open_baseline,
    run_fresh_round,
)
from offramp.benchmarks.repeated_prompts import read_repeated_prompts
from offramp.benchmarks.workers import read_context, resident_mb
from offramp.export.auto import choose_segment_count, even_cuts
from offramp.export.bundle import write_bundle
from offramp.export.decoder import open_decoder
from offramp.export.monolith import write_monolith
from offramp.export.options import ExportOptions
from offramp.runtime import TextGenerator, load_generator
from offramp.runtime.decoding import Token
from offramp.runtime.rules import RuleSpec
from offramp.runtime.tuning.report import machine_facts
from offramp.runtime.tuning.timing import time_answers
from offramp.training.checkpoint import read_json, write_json

VARIANTS = ("fp32", "int8", "int4")
SEGMENTS = (30, 10, 5, 3, 1)  # numbers of segments, where the model has as many blocks
HELD_TO_TRANSFORMERS = 20  # prompts


def write_bundles(model: Path, scratch: Path) -> dict[str, Any]:
    """Write the bundles and the monolith that are missing in `scratch`; gives the cuts of auto and their
    table.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    source, options = open_decoder(model), ExportOptions(VARIANTS)
    if not (scratch / "auto.json").is_file():
        choice = choose_segment_count(source, VARIANTS)
        click.echo(choice.table, err=True)
        write_json(scratch / "auto.json", {"cuts": choice.cuts, "table": choice.table.splitlines()})
    auto = read_json(scratch / "auto.json")
    blocks = source.network.block_count
    cuts = {f"segments_{count}": even_cuts(blocks, count) for count in SEGMENTS if count <= blocks}
    for name, ends in {"auto": auto["cuts"], **cuts}.items():
        if not (scratch / name).is_dir():
            write_bundle(source, source.split(ends), scratch / name, options)
    if not monolith_file(scratch, "fp32").is_file():
        write_monolith(source, monolith_file(scratch, "fp32"), options)
    return auto


def read_prompts(session: TextGenerator, texts: Path, count: int, tokens: int) -> list[list[int]]:
    """The first `tokens` ids of each of the first `count` texts that are long enough."""
    prompts: list[list[int]] = []
    with texts.open(encoding="utf-8") as lines:
        for line in lines:
            ids = session.encode_prompt(json.loads(line)["text"])
            if len(ids) >= tokens and len(prompts) < count:
                prompts.append(ids[:tokens])
    if len(prompts) < count:
        raise click.ClickException(f"{texts}: {len(prompts)} texts of {tokens} tokens, expected {count}")
    return prompts


def read_short_prompts(scratch: Path, texts: Path, count: int, tokens: int = 24) -> list[list[int]]:
    """Prompts of 24 token ids, or another number, from the first `count` texts that are long enough."""
    with load_generator(scratch / "auto", rule="never", global_pool=True) as session:
        return read_prompts(session, texts, count, tokens)


def generate_by_transformers(model: Path, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """Token ids that transformers generates greedily after each prompt; stop tokens are ignored."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, trust_remote_code=False).eval()
    network.generation_config.eos_token_id = None
    answers = []
    with torch.no_grad():
        for prompt in track(prompts, "transformers", console=Console(stderr=True)):
            output = network.generate(torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False)
            answers.append([int(token) for token in output[0, len(prompt) :]])
    return answers


def run_rounds(
    request: dict[str, Any],
    names: list[str],
    prompts: list[list[int]],
    count: int,
    facts: dict[str, Any] | None = None,
) -> list[Round]:
    """Run `count` rounds in new processes, each with an equal share of the prompts.

    Rounds come in pairs, of which the second opens the candidates in reverse order. facts: gets the versions
    of baselines.
    """
    size, rounds = -(-len(prompts) // count), []
    starts = range(0, len(prompts), size)
    for number, at in enumerate(track(starts, "rounds", console=Console(stderr=True))):
        order = np.random.default_rng(number // 2).permutation(names).tolist()
        order = order[::-1] if number % 2 else order
        more = {"names": order, "prompts": prompts[at : at + size], "seed": number}
        answers = run_fresh_round({**request, **more}, {} if facts is None else facts)
        rounds.append({name: answers[name] for name in names})
    return rounds


def compare_rounds(
    rounds: list[Round], reference: str, expected: list[list[int]]
) -> dict[str, dict[str, Any]]:
    """Figures of every candidate over all rounds, beside those of the reference.

    tokens_per_s: over all prompts, slow moments of the machine included. ratio: speed of a prompt's median
    token over the reference's, geometric mean over pairs of rounds; error: its standard error; ratio_median:
    the median over prompts. same: number of answers that are the expected ones.
    """
    figures = {}
    base = [np.log([np.median(answer.step_s) for answer in answers[reference]]) for answers in rounds]
    for name in rounds[0]:
        logs = [
            log - np.log([np.median(answer.step_s) for answer in answers[name]])
            for log, answers in zip(base, rounds, strict=True)
        ]
        pairs = np.array([np.concatenate(logs[at : at + 2]).mean() for at in range(0, len(logs), 2)])
        error = pairs.std(ddof=1) / len(pairs) ** 0.5 if len(pairs) > 1 else float("nan")
        answers = [answer for by_name in rounds for answer in by_name[name]]
        steps = [step for answer in answers for step in answer.step_s]
        figures[name] = {
            "tokens_per_s": round(len(steps) / sum(steps), 2),
            "ratio": round(float(np.exp(pairs.mean())), 4),
            "error": None if np.isnan(error) else round(float(error), 4),
            "ratio_median": round(float(np.exp(np.median(np.concatenate(logs)))), 4),
            "first_ms": round(1e3 * float(np.median([answer.first_s for answer in answers])), 2),
            "same": sum(answer.ids == ids for answer, ids in zip(answers, expected, strict=False)),
        }
    return figures


def print_table(title: str, rows: dict[str, dict[str, Any]]) -> None:
    """Print rows of figures by name as a table; its columns are the keys of the first row."""
    table = Table("", *next(iter(rows.values())), title=title)
    for name, row in rows.items():
        table.add_row(name, *map(str, row.values()))
    Console(width=120).print(table)


@click.group(help=__doc__)
def main() -> None:
    """The command group of the decoder benchmarks."""


MODEL = click.option("--model", required=True, type=click.Path(exists=True, path_type=Path))
SCRATCH = click.option("--scratch", required=True, type=click.Path(path_type=Path), help="For bundles.")
TEXTS = click.option(
    "--texts", required=True, type=click.Path(exists=True, path_type=Path), help="Rows {text}."
)
COUNT = click.option("--count", default=24, show_default=True, help="Prompts.")
TOKENS = click.option("--tokens", default=64, show_default=True, help="Tokens of an answer.")
ROUNDS = click.option("--rounds", default=8, show_default=True, help="Fresh processes.")
OUT = click.option("--out", type=click.Path(path_type=Path), help="JSON file.")


@main.command()
@MODEL
@SCRATCH
@TEXTS
@COUNT
@TOKENS
@ROUNDS
@click.option("--alone", is_flag=True, help="The cut of auto and the monolith, without other cuts.")
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
    """Compare the speed of bundles at full depth with that of the monolith."""
    auto, figures = write_bundles(model, scratch), dict[str, dict[str, dict[str, Any]]]()
    others = [f"segments_{n}" for n in SEGMENTS if (scratch / f"segments_{n}").is_dir()]
    names = [MONOLITH, "auto", *([] if alone else others)]
    prompts = read_short_prompts(scratch, texts, count)
    facts: dict[str, Any] = {"command": "benchmarks/decoders.py full" + " --alone" * alone}
    facts |= {"model": model.name, "prompts": count, "tokens": tokens, "rounds": rounds}
    facts |= {"texts": texts.name, "held_to_transformers": min(count, HELD_TO_TRANSFORMERS)}
    by_transformers = generate_by_transformers(model, prompts[:HELD_TO_TRANSFORMERS], tokens)
    for variant in VARIANTS:
        request = {"scratch": str(scratch), "variant": variant, "tokens": tokens}
        measured = run_rounds(request, names, prompts, rounds)
        by_monolith = [answer.ids for answers in measured for answer in answers[MONOLITH]]
        expected = by_transformers if variant == "fp32" else by_monolith
        figures[variant] = compare_rounds(measured, MONOLITH, expected)
        print_table(f"{model.name}, {variant}, auto cuts after {auto['cuts']}", figures[variant])
        if out is not None:
            write_json(out, {**facts, "machine": machine_facts(), "auto": auto, "candidates": figures})


@main.command()
@MODEL
@SCRATCH
@TEXTS
@COUNT
@TOKENS
@ROUNDS
@click.option(
    "--with",
    "names",
    multiple=True,
    type=click.Choice(WITH_BASELINES[1:]),
    default=WITH_BASELINES[1:],
    show_default=True,
    help="What stands beside the bundle.",
)
@click.option("--prompt", default=24, show_default=True, help="Tokens of a prompt.")
@click.option("--variants", default=",".join(VARIANTS), show_default=True, help="Precisions.")
@OUT
def baselines(
    model: Path,
    scratch: Path,
    texts: Path,
    count: int,
    tokens: int,
    rounds: int,
    names: tuple[str, ...],
    prompt: int,
    variants: str,
    out: Path | None,
) -> None:
    """Compare the speed of a bundle with onnxruntime-genai and llama.cpp, at three precisions."""
    versions: dict[str, Any] = {variant: {} for variant in variants.split(",")}
    if unknown := versions.keys() - {*VARIANTS}:
        raise click.BadParameter(f"--variants {', '.join(sorted(unknown))}: choose of {', '.join(VARIANTS)}")
    auto, figures = read_json(scratch / "auto.json"), dict[str, Any]()
    prompts = read_short_prompts(scratch, texts, count, prompt)
    facts = {"command": "benchmarks/decoders.py baselines", "model": model.name, "prompts": count}
    facts |= {"prompt": prompt, "tokens": tokens, "rounds": rounds, "texts": texts.name}
    facts |= {"cuts": auto["cuts"], "machine": machine_facts()}
    for variant in versions:
        request = {"model": str(model), "scratch": str(scratch), "variant": variant, "tokens": tokens}
        measured = run_rounds(request, [OFFRAMP, *names], prompts, rounds, versions[variant])
        offramp_ids = [answer.ids for answers in measured for answer in answers[OFFRAMP]]
        figures[variant] = compare_rounds(measured, OFFRAMP, offramp_ids)
        print_table(f"{model.name}, {variant}", figures[variant])
        if out is not None:  # after each precision: a compiler may run before the next one
            write_json(out, {**facts, "baselines": versions, "candidates": figures})


@main.command()
@SCRATCH
@TEXTS
@click.option("--context", default=1024, show_default=True, help="Tokens read and written in all.")
@click.option("--rounds", default=3, show_default=True, help="Fresh processes of each kind.")
@click.option("--model", type=click.Path(exists=True, path_type=Path), help="For baselines, which are added.")
@OUT
def memory(
    scratch: Path, texts: Path, context: int, rounds: int, model: Path | None, out: Path | None
) -> None:
    """Measure the resident set of the walk, of the monolith and, with --model, of the baselines."""
    figures: dict[str, dict[str, Any]] = {}
    ids = read_context(scratch, str(texts), context // 2)
    for variant in VARIANTS:
        names = ("segments", MONOLITH, *(() if model is None else (GENAI, LLAMA)))
        for name in names:
            runs = []
            for _ in range(rounds):
                if model is not None and name in (GENAI, LLAMA):
                    with open_baseline(name, model, scratch, variant) as baseline:
                        baseline.answer(ids, context - len(ids))
                        runs.append(resident_mb(baseline.process_id))
                else:
                    runs.append(_memory_of_walk(name, scratch, variant, texts, context))
            resident, peak = np.median(runs, axis=0)
            figures[f"{name}, {variant}"] = {"resident_mb": round(resident, 1), "peak_mb": round(peak, 1)}
        monolith = figures[f"{MONOLITH}, {variant}"]
        for name in names:
            row = figures[f"{name}, {variant}"]
            row["ratio"] = round(row["resident_mb"] / monolith["resident_mb"], 4)
            row["peak_ratio"] = round(row["peak_mb"] / monolith["peak_mb"], 4)
    if out is not None:
        facts = {"command": "benchmarks/decoders.py memory", "context": context, "rounds": rounds}
        write_json(out, {**facts, "machine": machine_facts(), "candidates": figures})
    print_table(f"memory at {context} tokens", figures)


def _memory_of_walk(kind: str, scratch: Path, variant: str, texts: Path, context: int) -> tuple[float, float]:
    """Resident set and its peak in MB of a new process; kind: "segments" or the monolith."""
    worker = [sys.executable, "-m", "offramp.benchmarks.workers", "memory", kind, str(scratch), variant]
    done = subprocess.run([*worker, str(texts), str(context)], check=True, capture_output=True, text=True)
    resident, peak = map(float, done.stdout.split())
    return resident, peak


@main.command()
@click.option("--bundle", "bundles", multiple=True, required=True, type=click.Path(exists=True))
@TEXTS
@click.option("--variant", default="fp32", show_default=True, help="Precision.")
@click.option("--count", default=100, show_default=True, help="Prompts.")
@click.option("--prompt", default=24, show_default=True, help="Tokens of a prompt.")
@click.option(
    "--prompts",
    "kind",
    type=click.Choice(("beginnings", "summaries", "edits")),
    default="beginnings",
    show_default=True,
    help="Beginnings of --prompt tokens, or whole prompts whose answers repeat them.",
)
@TOKENS
@click.option(
    "--fixed",
    default="",
    help="Fixed exits and numbers of drafts beside the rule's own choice, such as '1,1 1,2 2,2'; exits that "
    "a bundle lacks are left out.",
)
@click.option("--threads", type=int, help="As in ee-run.")
@OUT
def lossless(
    bundles: tuple[str, ...],
    texts: Path,
    variant: str,
    count: int,
    prompt: int,
    kind: str,
    tokens: int,
    fixed: str,
    threads: int | None,
    out: Path | None,
) -> None:
    """Compare rule speculative, which drafts by early exits and by lookups, with full depth."""
    pairs = [(int(exit), int(drafts)) for exit, drafts in (pair.split(",") for pair in fixed.split())]
    figures: dict[str, Any] = {}
    for bundle in bundles:
        with ExitStack() as stack:
            options: dict[str, Any] = {"variant": variant, "threads": threads}
            full = stack.enter_context(load_generator(bundle, rule="never", **options, global_pool=True))
            if kind == "beginnings":
                prompts = read_prompts(full, texts, count, prompt)
            else:
                prompts = read_repeated_prompts(full, kind, texts, count, tokens)
            rules = {"speculative": RuleSpec("speculative", {})}
            for exit, drafts in pairs:
                if exit < len(full.manifest.segments):
                    parameters = {"exit": float(exit), "drafts": float(drafts)}
                    rules[f"{exit},{drafts}"] = RuleSpec("speculative", parameters)
            sessions = {"full": full}
            for name, rule in rules.items():
                sessions[name] = stack.enter_context(
                    load_generator(bundle, rule=rule, **options, global_pool=True)
                )
            figures[Path(bundle).name] = {
                "cuts": [segment.blocks[-1] for segment in full.manifest.segments],
                "rules": lossless_figures(sessions, prompts, tokens, () if kind == "beginnings" else None),
                "engine": dict(full.engine.facts),
            }
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        facts: dict[str, Any] = {"command": "benchmarks/decoders.py lossless", "fixed": fixed}
        facts |= {
            "texts": texts.name,
            "variant": variant,
            "count": count,
            "prompts": kind,
            "prompt": prompt if kind == "beginnings" else None,
            "tokens": tokens,
            "threads": threads,
        }
        write_json(out, {**facts, "machine": machine_facts(), "bundles": figures})
    for name, figure in figures.items():
        print_table(f"{name}, segments end after {figure['cuts']}", figure["rules"])


def lossless_figures(
    sessions: dict[str, TextGenerator],
    prompts: list[list[int]],
    tokens: int,
    stop_ids: Sequence[int] | None = (),
) -> dict[str, dict[str, Any]]:
    """Time the sessions' answers in turns; figures by session, compared with session "full".

    stop_ids: at which answers end, by default none; None: those of the bundle.
    """
    generators = {name: partial(_tokens, session, tokens, stop_ids) for name, session in sessions.items()}
    for session in sessions.values():
        for _ in session.tokens(prompts[0], min(8, tokens), ()):
            pass
    timings = time_answers(generators, prompts, 1)
    ids = {name: [[t.id for t in answer] for answer in timing.tokens] for name, timing in timings.items()}
    full_s = timings["full"].after_first
    longer = [number for number, answer in enumerate(ids["full"]) if len(answer) > 1]
    rows = {}
    for name, timing in timings.items():
        ratios = full_s[longer] / timing.after_first[longer]
        further = sum(map(len, ids[name])) - len(prompts)  # tokens after the first ones
        rows[name] = {
            "same": sum(answer == full for answer, full in zip(ids[name], ids["full"], strict=True)),
            "speed": round(float(full_s.sum() / timing.after_first.sum()), 4),
            "speed_median": round(float(np.median(ratios)), 4),
            "speed_5_95": [round(float(x), 3) for x in np.percentile(ratios, [5, 95])],
            "tokens_per_s": round(further / float(timing.after_first.sum()), 2),
        }
        rows[name] |= draft_figures(sessions[name])
    return rows


def draft_figures(session: TextGenerator) -> dict[str, Any]:
    """The numbers of rounds and drafts by source, and the share accepted; empty for rules without drafts."""
    stats = session.draft_stats
    if stats is None:
        return {}
    accepted = {e: round(stats.accepted[e] / n, 4) for e, n in stats.offered.items() if n}
    return {"rounds": stats.rounds, "offered": stats.offered, "accepted": accepted}


def _tokens(
    session: TextGenerator, max_new_tokens: int, stop_ids: Sequence[int] | None, ids: Sequence[int]
) -> Iterator[Token]:
    return session.tokens(ids, max_new_tokens, stop_ids)


if __name__ == "__main__":
    main()
