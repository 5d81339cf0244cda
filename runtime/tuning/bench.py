"""ee-bench: measures what early exit saves on this machine, against baselines, in turns in one process."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from offramp.runtime.bundle.files import Bundle, open_bundle
from offramp.runtime.bundle.manifest import GENERATION, RuleSpec, TextInput
from offramp.runtime.decoding import Token
from offramp.runtime.engines.threads import usable_cores
from offramp.runtime.errors import BadSetting, OfframpError
from offramp.runtime.generator import TextGenerator
from offramp.runtime.hub.resolve import resolve_bundle
from offramp.runtime.inputs.text import AnyRow, items_to_rows, open_reader
from offramp.runtime.loading import load_generator, load_row_session
from offramp.runtime.row_session import WINDOW, RowSession
from offramp.runtime.rules.resolve import points_to_measure
from offramp.runtime.rules.skip import LIST
from offramp.runtime.tuning import report as pages
from offramp.runtime.tuning.baselines import (
    MONOLITH,
    NESTED,
    GraphFact,
    graph_script,
    nested_threshold,
    open_baseline,
    random_exits,
    read_baselines,
    time_cold_starts,
    walk_arguments,
    walk_script,
)
from offramp.runtime.tuning.figures import (
    answer_figures,
    answer_quality,
    macs_share,
    realised_saving,
    round_figure,
    row_figures,
)
from offramp.runtime.tuning.labelled import read_prompts, read_rows
from offramp.runtime.tuning.right_answers import AnswerReader, Answers
from offramp.runtime.tuning.timing import (
    Batches,
    Candidate,
    RowTimings,
    time_answers,
    time_bulk,
    time_one_answer,
    time_rows,
    time_segments,
    walk_candidate,
)

FULL, RANDOM = "walk full depth", "random exits"
FULL_DEPTH = "full depth"  # of bundles that generate text
BULK_WINDOWS = 2  # windows of rows that are measured in bulk, which suffice for a rate
WARM_UP_TOKENS = 8
ROWS, PROMPTS = 300, 20
NOT_STARTED, INTERRUPTED = 2, 130
AT_LEAST_1, PATH = click.IntRange(min=1), click.Path(path_type=Path)

HELP = """Measure on this machine what early exit saves: accuracy, time and memory, against baselines.

\b
FILE is plain text, one text a line, or JSON lines with "text", for pairs "text_b", and on
every line or on none "label": its name or its number. Without labels there is no accuracy.
For images lines are paths relative to FILE's folder, or JSON with "image".
Other tasks have their own labels (as ee-calibrate reads them), and in place of accuracy the F1
of labels or entities or the rank correlation of numbers; embeddings are compared with those
of full depth.
Candidates, on one thread pool, take turns of a few rows:
  walk NAME        the bundle's operating point of that name
  walk full depth  every row to the last exit
  random exits     as many rows at each exit as the first point has, drawn at random
  graphs           of a folder that ee-split --baselines DIR wrote; a nested graph decides by
                   the first point's threshold

\b
Bundles that generate text: FILE is prompts, one a line, or JSON lines with "prompt" or
"messages"; candidates are full depth and --rules, which take turns of one prompt.
\b
Exit codes: 0 measured; 2 a wrong option, file or bundle; 130 interrupted (Ctrl-C)
"""


@click.command(help=HELP, context_settings={"show_default": True})
@click.option("--bundle", metavar="DIR", type=PATH, default="bundle/", help="The bundle to walk.")
@click.option("--data", metavar="FILE", type=PATH, required=True, help="Lines to answer.")
@click.option("--baselines", metavar="DIR", type=PATH, help="Single graphs to compare with.")
@click.option("--points", metavar="A,B", help='Operating points.  [default: "default", or the first]')
@click.option(
    "--rules", metavar="A,B", help="For generated text: rules, as gate:0.7.  [default: the bundle's]"
)
@click.option("--max-new-tokens", type=AT_LEAST_1, default=64, help="For generated text.")
@click.option("--rows", type=AT_LEAST_1, help="First rows of FILE.  [default: 300, of prompts 20]")
@click.option("--batch-size", type=AT_LEAST_1, default=32, help="Rows together when measuring in bulk.")
@click.option("--turns", "rounds", type=AT_LEAST_1, default=3, help="Rounds over the rows.")
@click.option("--threads", type=AT_LEAST_1, help="Threads of the engine.  [default: one per core]")
@click.option("--budget-ms", type=float, help="Time an answer may take.  [default: the reference's median]")
@click.option("--json", "json_file", metavar="OUT", type=PATH, help="Write every figure as JSON.")
@click.option("--report", metavar="OUT", type=PATH, help="Write one HTML page with pictures.")
def main(json_file: Path | None, report: Path | None, **options: Any) -> None:
    """Run ee-bench: measure a bundle, print the table, and write the files that were asked for."""
    code = NOT_STARTED
    try:
        pages.check_output_files(json_file, report)  # before the measurement, which takes minutes
        figures, table = _measure_bundle(report is not None, **options)
        try:
            if json_file is not None:
                text = json.dumps(figures, indent=1, ensure_ascii=False, allow_nan=False)
                pages.write_atomically(json_file, text + "\n")
            if report is not None:
                pages.write_atomically(report, pages.html_page(figures))
        finally:
            click.echo(table)  # minutes of measuring must not be lost if a file cannot be written
        code = 0
    except (KeyboardInterrupt, click.Abort):
        code = INTERRUPTED
    except OfframpError as problem:
        click.echo(f"ee-bench: {problem}", err=True)
    except OSError as problem:
        click.echo(f"ee-bench: {problem.filename or 'output'}: {problem.strerror or problem}", err=True)
    sys.exit(code)


def _measure_bundle(
    page: bool, rules: str | None, max_new_tokens: int, rows: int | None, **options: Any
) -> tuple[dict[str, Any], str]:
    """Measure a bundle by its task; gives figures and their text. page: whether a page is to be written."""
    options["bundle"] = Path(resolve_bundle(options["bundle"], command=True))
    bundle = open_bundle(options["bundle"])
    if bundle.manifest.task != GENERATION:
        if rules is not None:
            task = bundle.manifest.task
            raise BadSetting(
                f"--rules is for generated text; the task of {bundle.folder} is {task}: say --points"
            )
        figures = measure_classifier(**options, rows=rows or ROWS)
        return figures, pages.classification_text(figures)
    for name in ("baselines", "points", "budget_ms"):
        if page or options[name] is not None:
            flag = "report" if page else name.replace("_", "-")
            raise BadSetting(f"--{flag} is not for generated text, the task of {bundle.folder}")
    shared = {name: options[name] for name in ("data", "rounds", "threads")}
    figures = measure_generation(
        bundle, rules=rules, max_new_tokens=max_new_tokens, rows=rows or PROMPTS, **shared
    )
    return figures, pages.generation_text(figures)


def measure_classifier(
    bundle: Path,
    data: Path,
    *,
    baselines: Path | None = None,
    points: str | None = None,
    rows: int = ROWS,
    batch_size: int = 32,
    rounds: int = 3,
    threads: int | None = None,
    budget_ms: float | None = None,
    starts: int = 3,
) -> dict[str, Any]:
    """Measure every figure of a bundle that answers texts or images, as written to JSON.

    See figures.py for units. The quality of the answers has the name of the task's metric; unless that is
    accuracy, `about` states the name as "quality". rounds: over the rows. starts: new processes of each kind.
    Raises BadInput naming the line, and what load() and read_baselines() raise.
    """
    if budget_ms is not None and not 0 < budget_ms < float("inf"):
        raise BadSetting(f"budget {budget_ms:g} ms: expected a number above 0")
    opened = open_bundle(bundle)
    manifest, reader = opened.manifest, open_reader(opened)
    text = manifest.input if isinstance(manifest.input, TextInput) else None
    items, labels, rows_there = read_rows(
        data, manifest.labels, rows, images=text is None, kind=manifest.kind
    )
    started = time.perf_counter()
    encoded = [items_to_rows(reader, [item])[0] for item in items]
    tokenizing = (time.perf_counter() - started) / len(items)
    singles: list[Batches] = [[(np.zeros(1, np.int64), reader.arrays([row]))] for row in encoded]
    with ExitStack() as stack:
        running = open_candidates(opened, baselines, points, threads, singles, stack)
        full, candidates, monolith = running.full, running.candidates, running.monolith
        timings = time_rows(candidates, singles, rounds)
        windows: list[tuple[Batches, int]] = []
        in_bulk = encoded[: BULK_WINDOWS * batch_size * WINDOW]
        for start in range(0, len(in_bulk), batch_size * WINDOW):
            window = in_bulk[start : start + batch_size * WINDOW]
            windows.append((list(full.batches(window, batch_size)), len(window)))
        rates = time_bulk([c for c in candidates if c.bulk], windows, batch_size, rounds)
        segments = [{"name": name, "ms": round_figure(ms)} for name, ms in time_segments(full, singles)]
        environment = _environment(full)
    reference = monolith.name if monolith is not None else FULL
    reference_median = float(np.median(timings[reference].seconds))
    budget = reference_median if budget_ms is None else budget_ms / 1e3
    answers_of = AnswerReader(manifest)
    wanted = _wanted(answers_of, labels, encoded, timings[FULL])
    lengths = [row.length for row in encoded]
    graphs = (manifest.stem, *manifest.segments)
    # Multiply-accumulates of a walk to each exit [rows, exits], those of the stem included.
    macs = np.array([[graph.macs.of(n) for graph in graphs] for n in lengths], float).cumsum(axis=1)[:, 1:]
    results = []
    for c in candidates:
        answers = timings[c.name]
        rule = None if c.rule is None else _rule_json(c.rule)
        facts: dict[str, Any] = {
            "name": c.name,
            "kind": c.kind,
            "variant": c.variant,
            "rule": rule,
            "bytes": c.bytes,
        }
        facts[answers_of.metric] = answer_quality(answers_of, answers, wanted)
        facts |= row_figures(answers, timings[reference], macs, budget)
        bulk: dict[str, float | None] = {"rows_per_second": None, "realised_in_bulk": None}
        if c.bulk:
            share = macs_share(answers.exits[:, : len(in_bulk)], macs[: len(in_bulk)])
            time_share = rates[reference] / rates[c.name]
            bulk = {
                "rows_per_second": round_figure(rates[c.name]),
                "realised_in_bulk": realised_saving(time_share, share),
            }
        results.append(facts | bulk)
    about: dict[str, Any] = {
        **environment,
        "bundle": str(bundle),
        "bundle_bytes": _bundle_bytes(opened),
        "data": str(data),
        "rows": len(items),
        "rows_in_bulk": len(in_bulk),
        "rows_there": rows_there,
        "mean_tokens": round_figure(float(np.mean(lengths))),
        "turns": rounds,
        "batch_size": batch_size,
        "tokenizing_ms": round_figure(1e3 * tokenizing),
        "reference": reference,
        "budget_ms": round_figure(1e3 * budget),
        "left_out": running.left_out,
    }
    if answers_of.metric != pages.ACCURACY:
        about["quality"] = answers_of.metric
    scripts: dict[str, tuple[str, list[Any]]] = {}
    item = [items[0]] if isinstance(items[0], str) else list(items[0])
    scripts[candidates[0].name] = (
        walk_script(manifest.kind),
        walk_arguments(bundle, candidates[0], threads, item),
    )
    if monolith is not None and baselines is not None and text is not None:
        paths = [str(baselines / monolith.file), str(bundle / text.tokenizer), text.longest, text.prefix]
        decided = [manifest.labels, manifest.thresholds]
        scripts[reference] = (graph_script(manifest), [*paths, *decided, threads or usable_cores(), item])
    cold = time_cold_starts(scripts, starts)
    return {"format": 1, "about": about, "candidates": results, "segments": segments, "cold_start": cold}


def _wanted(
    answers: AnswerReader, labels: Answers | None, rows: Sequence[AnyRow], full: RowTimings
) -> Answers | None:
    """The right answers of rows; None without labels. Those of a task without any are full depth's."""
    if not answers.has_labels:
        of_full: Answers = full.answers[0]
        return of_full
    return None if labels is None else answers.wanted(labels, rows)


@dataclass(frozen=True)
class OpenCandidates:
    """The opened candidates of a benchmark, walks first.

    full: the session at full depth. monolith: the first monolith, or None. left_out: name and reason of each
    candidate that is not measured.
    """

    full: RowSession[Any]
    candidates: list[Candidate]
    monolith: GraphFact | None
    left_out: list[str]


def open_candidates(
    bundle: Bundle,
    baselines: Path | None,
    points: str | None,
    threads: int | None,
    singles: Sequence[Batches],
    stack: ExitStack,
) -> OpenCandidates:
    """Open all candidates, and run each once on a row of every length, so that none is timed cold.

    Walks do not share weights: shared ones would be in the cache after the previous walk, as those of a
    single graph never are. Sessions that are opened later run 1 to 3 % faster, and graphs are opened last,
    which favours them over the walks.
    """
    manifest = bundle.manifest
    graphs = () if baselines is None else read_baselines(baselines, manifest).graphs
    candidates: list[Candidate] = []
    for name in points_to_measure(manifest, points):
        session = stack.enter_context(
            load_row_session(bundle.folder, point=name, threads=threads, share=False, global_pool=True)
        )
        candidates.append(walk_candidate(session, f"walk {name}" if name else "walk", "walk"))
    full = stack.enter_context(
        load_row_session(bundle.folder, rule="never", threads=threads, share=False, global_pool=True)
    )
    first = candidates[0] if candidates else None
    candidates.append(walk_candidate(full, FULL, "full"))
    left_out = []
    if first is None:
        left_out.append(f"{RANDOM}: no operating point to draw like")
    else:
        exits = np.concatenate([first.run(single, 1, 1)()[1] for single in singles])
        rule = random_exits(np.bincount(exits - 1, minlength=len(manifest.segments)).tolist())
        session = stack.enter_context(
            load_row_session(
                bundle.folder,
                rule="never",
                variant=first.variant,
                threads=threads,
                share=False,
                global_pool=True,
            )
        )
        candidates.append(replace(walk_candidate(session, RANDOM, "random", rule), rule=rule.spec))
    for graph in graphs:
        assert baselines is not None  # otherwise there are no graphs
        threshold = nested_threshold(manifest, first.rule if first else None)
        if graph.kind == NESTED and threshold is None:
            left_out.append(f"{graph.name}: it decides by another rule than the first point")
            continue
        if graph.name in [c.name for c in candidates]:
            raise BadSetting(f"{baselines}: graph {graph.name!r} has the name of a walk; rename one of them")
        candidates.append(open_baseline(baselines, graph, manifest, threads=threads, threshold=threshold))
    lengths = {next(iter(single[0][1].values())).shape: single for single in singles}
    for candidate in candidates:
        for single in lengths.values():
            candidate.run(single, 1, 1)
    monolith = next((graph for graph in graphs if graph.kind == MONOLITH), None)
    return OpenCandidates(full, candidates, monolith, left_out)


def measure_generation(
    bundle: Bundle,
    data: Path,
    *,
    rules: str | None = None,
    rows: int = PROMPTS,
    max_new_tokens: int = 64,
    rounds: int = 3,
    variant: str | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Measure every figure of a bundle that generates text, as written to JSON.

    rules: names, each with a threshold after a colon, as in "gate:0.7,fixed:2"; None: the bundle's rule.
    rounds: over the prompts. Raises BadInput naming the line, BadSetting, and what load() raises.
    """
    with ExitStack() as stack:
        sessions: dict[str, TextGenerator] = {}
        for name, options in rule_options(rules, bundle).items():
            session = load_generator(
                bundle.folder, variant=variant, threads=threads, global_pool=True, **options
            )
            sessions[name] = stack.enter_context(session)
        full = sessions[FULL_DEPTH]
        prompts, rows_there = read_prompts(data, rows, full.encode_prompt)
        # Answers do not end early, so that all candidates give the same number of tokens.
        generators = {
            name: partial(_tokens, session, max_new_tokens=max_new_tokens)
            for name, session in sessions.items()
        }
        for session in sessions.values():
            warm_up = partial(_tokens, session, max_new_tokens=min(WARM_UP_TOKENS, max_new_tokens))
            time_one_answer(warm_up, prompts[0])
        timings = time_answers(generators, prompts, rounds)
        results = [
            {"name": name, "rule": _rule_json(session.rule)}
            | answer_figures(timings[name], timings[FULL_DEPTH])
            | _drafts(session)
            for name, session in sessions.items()
        ]
        about = {
            **_environment(full),
            "variant": full.variant,
            "bundle": str(bundle.folder),
            "bundle_bytes": _bundle_bytes(bundle),
            "segments_end_after": [segment.blocks[-1] for segment in bundle.manifest.segments],
            "data": str(data),
            "rows": len(prompts),
            "rows_there": rows_there,
            "mean_tokens": round(float(np.mean([len(ids) for ids in prompts])), 1),
            "max_new_tokens": max_new_tokens,
            "turns": rounds,
        }
    return {"format": 1, "about": about, "candidates": results}


def rule_options(rules: str | None, bundle: Bundle) -> dict[str, Mapping[str, Any]]:
    """The keyword arguments of load() for each candidate that generates text; full depth is always the first.

    rules: as in measure_generation.
    """
    names = [bundle.manifest.rule.name] if rules is None else [part.strip() for part in rules.split(",")]
    options: dict[str, Mapping[str, Any]] = {FULL_DEPTH: {"rule": "never"}}
    for name in filter(None, names):
        rule, _, number = name.partition(":")
        try:
            settings: dict[str, Any] = {"rule": rule, **({"threshold": float(number)} if number else {})}
        except ValueError:  # speculative:lookup, which load() reads itself
            settings = {"rule": name}
        if LIST in name:  # skip:-3-7, and skip:-3, which looks like a number
            settings = {"rule": name}
        if rule != "never":
            options[name] = settings
    return options


def _tokens(session: TextGenerator, ids: Sequence[int], *, max_new_tokens: int) -> Iterator[Token]:
    return session.tokens(ids, max_new_tokens, stop_ids=())


def _drafts(session: TextGenerator) -> dict[str, Any]:
    """The number of verified drafts and the accepted share by exit, and the number of verifying runs."""
    stats = session.draft_stats
    if stats is None:
        return {}
    offered = {exit: number for exit, number in stats.offered.items() if number}
    accepted = {exit: round(stats.accepted[exit] / number, 4) for exit, number in offered.items()}
    return {"drafts": {"offered": offered, "accepted": accepted, "rounds": stats.rounds}}


def _environment(session: RowSession[Any] | TextGenerator) -> dict[str, str]:
    """The machine, and the engine that actually runs."""
    engine = session.engine
    return {**pages.machine_facts(), "engine": engine.name, "device": engine.device, **engine.facts}


def _bundle_bytes(bundle: Bundle) -> int:
    return sum(fact.bytes for fact in bundle.manifest.files.values())


def _rule_json(rule: RuleSpec) -> dict[str, Any]:
    skipped = {"skipped": list(rule.skipped)} if rule.skipped else {}
    return {"name": rule.name, "parameters": rule.parameters, **skipped}


if __name__ == "__main__":
    main()
