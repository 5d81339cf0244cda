"""The command ee-compare: train the models that are missing, judge every method over the whole range of
savings, write the tables.

A method is a recipe's exits with a rule. Every rule of --rules is tried on the exits of every recipe, besides
the recipe's own rule. A spec with several values of a setting, consistentee:alpha=0.01|0.02, is one model a
value; the points that training set for them form one curve, the method "published".

Everything that was computed stays in --out: checkpoints, outputs of their exits, and for each method and seed
the answers to all rows of test, from which --recompute writes the tables again.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from offramp.benchmarks.compare.joining import join
from offramp.benchmarks.compare.judge import LISTING, ROWS, TIMES, judge
from offramp.benchmarks.compare.kept_rows import (
    FORMAT,
    MethodRows,
    has_rows,
    load_rows,
    method_name,
    save_rows,
)
from offramp.benchmarks.compare.pages import VERDICT_HEAD, verdict_rows
from offramp.benchmarks.compare.pictures import html_page
from offramp.benchmarks.compare.specs import (
    PRESETS,
    CommonWords,
    Preset,
    RecipeSpec,
    parse_specs,
    start_of,
)
from offramp.benchmarks.compare.trainings import Trainer
from offramp.runtime.errors import BadSetting
from offramp.runtime.rules.sweep import swept_rules
from offramp.runtime.tuning.report import write_atomically
from offramp.training.recipes import RECIPES

PLAIN_RULES = "max_probability,entropy,margin,patience"
REFERENCE = "joint + max_probability"
FINE_TUNED = "deebert"
RECIPES_DEFAULT = "offramp,deebert"


@dataclass(frozen=True)
class Comparison:
    """What is compared: specs in order, rules that are tried on all exits, seeds; the folder for everything.

    reference: the method whose scores the others are compared with. fine_tuned: the spec whose full depth is
    ordinary fine-tuning, or None. measure: rows of test on which bundles are timed; 0 for none. workers:
    trainings at once.
    """

    specs: Sequence[RecipeSpec]
    rules: Sequence[str]
    seeds: Sequence[int]
    out: Path
    common: CommonWords
    reference: str
    fine_tuned: str | None
    measure: int = 0
    max_drop: float = 0.5
    workers: int = 1


def compare(comparison: Comparison, command: str) -> dict[str, Any]:
    """Train and evaluate all methods, keep their rows, and judge them; gives the content of compare.json."""
    c = comparison
    models = [(model, seed) for seed in c.seeds for spec in c.specs for model in spec.models]
    Trainer(c.out, c.common, c.workers).train_all(models)
    same = same_exits(c)
    recipes: dict[str, dict[str, Any]] = {}
    methods: list[str] = []
    counts: dict[str, int] = {}
    for spec in c.specs:
        entry: dict[str, Any] = {"models": [model.label for model in spec.models]}
        entry |= {"same_exits_as": same.get(spec.text), "first_right": []}
        for seed in c.seeds:
            names, first_right, counts = _evaluate_spec(c, spec, seed, spec.text in same)
            entry["first_right"].append(first_right)
            methods += [name for name in names if name not in methods]
        recipes[spec.text] = entry
    if c.reference not in methods:
        raise BadSetting(f"--reference {c.reference!r} is none of the methods: {', '.join(methods)}")
    if c.measure:
        _measure(c, methods)
    listing = {
        "command": command,
        "settings": list(c.common.settings),
        "data": Path(c.common.data).name,
        "rows": counts,
        "seeds": list(c.seeds),
        "reference": c.reference,
        "fine_tuned": c.fine_tuned,
        "recipes": recipes,
        "methods": methods,
        "times": bool(c.measure),
    }
    write_atomically(c.out / LISTING, json.dumps(listing) + "\n")
    return judge(c.out)


def same_exits(comparison: Comparison) -> dict[str, str]:
    """Specs whose exits are those of an earlier spec for all seeds, and that spec; rules are tried on one."""
    from offramp.benchmarks.compare.exit_outputs import exits_digest

    c = comparison
    earlier: dict[tuple[str, ...], str] = {}
    same = {}
    for spec in c.specs:
        digests = [exits_digest(m.folder(c.out, seed)) for seed in c.seeds for m in spec.models]
        key = tuple(dict.fromkeys(digests))
        if key in earlier:
            same[spec.text] = earlier[key]
        earlier.setdefault(key, spec.text)
    return same


def _evaluate_spec(
    comparison: Comparison, spec: RecipeSpec, seed: int, same: bool
) -> tuple[list[str], dict[str, float], dict[str, int]]:
    """Keep the rows of all methods on a spec's exits; gives their names, figures of exiting at the first
    right exit, and the number of rows of each split.

    same: whether the exits are those of an earlier spec, so that only the recipe's own rule is new.
    """
    from offramp.benchmarks.compare import evaluation
    from offramp.benchmarks.compare.exit_outputs import collect_outputs, exits_digest
    from offramp.training.collect import oracle_point

    c, folder = comparison, comparison.out / ROWS
    models = [collect_outputs(model.folder(c.out, seed), c.common.data) for model in spec.models]
    first = models[0]
    names: list[str] = []

    def keep(rule: str, evaluate: Any, *arguments: Any) -> None:
        name = method_name(spec.text, rule)
        points = [model.checkpoint.training.get("operating_points") for model in models]
        facts = [FORMAT, rule, points, [dict(model.digests) for model in models]]
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        if not has_rows(folder, name, seed, key):
            rows: MethodRows = evaluate(spec.text, *arguments, seed)
            save_rows(rows, folder, key)
        names.append(name)

    if len(models) > 1 or "published_points" in first.checkpoint.training:
        keep(evaluation.PUBLISHED, evaluation.evaluate_published, models)
    forecast = first.checkpoint.network.spec.forecast
    if forecast:
        keep("quee", evaluation.evaluate_quee, first)
        for variant in forecast[1:]:
            keep(f"max_probability in {variant}", evaluation.evaluate_one_variant, first, variant)
    own = () if forecast or (same and first.rule in c.rules) else (first.rule,)
    # Models that differ in their policies alone are one model for the other rules.
    distinct = list({exits_digest(model.folder): model for model in models}.values())
    for rule in dict.fromkeys((*own, *(() if same else c.rules))):
        keep(rule, evaluation.evaluate_exits, models if rule in own else distinct, rule)
    test = first.exit_outputs("test")
    best = oracle_point(test.table, test.costs)
    figures = {"accuracy": best.accuracy, "macs_saved": best.macs_saved}
    return names, figures, {split: len(rows) for split, rows in first.rows.items()}


def _measure(comparison: Comparison, methods: Sequence[str]) -> None:
    """Time the bundles of the first seed of specs with one model, and keep the figures."""
    from offramp.benchmarks.compare.exit_outputs import collect_outputs
    from offramp.benchmarks.compare.milliseconds import time_methods

    c, seed = comparison, comparison.seeds[0]
    outputs = {
        spec.text: collect_outputs(spec.models[0].folder(c.out, seed), c.common.data)
        for spec in c.specs
        if len(spec.models) == 1
    }
    rows = [load_rows(c.out / ROWS, name, seed) for name in methods]
    full_depth_of = c.fine_tuned or c.reference.partition(" + ")[0]
    times = time_methods(rows, outputs, full_depth_of, c.rules, c.measure, c.max_drop)
    write_atomically(c.out / TIMES, json.dumps(times) + "\n")


def print_table(result: Mapping[str, Any]) -> None:
    """Print a table with one line for each method."""
    seeds = ", ".join(map(str, result["seeds"]))
    table = Table(title=f"{result['data']}, test, seeds {seeds}; against {result['reference']}")
    for number, name in enumerate(VERDICT_HEAD):
        table.add_column(name, justify="right" if number else "left")
    for row in verdict_rows(result):
        table.add_row(*row)
    Console(width=220).print(table)


def write_result(out: Path, result: Mapping[str, Any]) -> None:
    """Print the table of a result, and write compare.json and the page compare.html."""
    print_table(result)
    write_atomically(out / "compare.json", json.dumps(result) + "\n")
    write_atomically(out / "compare.html", html_page(result))


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--model", help="As in ee-train.")
@click.option("--data", help="As in ee-train.")
@click.option(
    "--recipes",
    metavar="SPECS",
    help="Recipe specs NAME[:SETTING=VALUE,...], separated by blanks or commas; several values of a setting, "
    f"as in alpha=0.01|0.02, are one model each. NAME is one of {', '.join(RECIPES)}.  "
    f"[default: the preset's, else {RECIPES_DEFAULT}]",
)
@click.option(
    "--preset",
    type=click.Choice(sorted(PRESETS)),
    help="Recipes, rules, reference and 3 seeds. paper: ConsistentEE, its ablations, and PABEE, DeeBERT and "
    "BERxiT with as many epochs; exits: recipe joint with each single setting of the exits.",
)
@click.option(
    "--rules", help=f"Rules that are tried on all exits.  [default: the preset's, else {PLAIN_RULES}]"
)
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    help="Runs of each model: seeds 0, 1, … from --first-seed on.  [default: the preset's, else 1]",
)
@click.option("--first-seed", type=click.IntRange(min=0), default=0, help="The first of these seeds.")
@click.option(
    "--reference",
    metavar="METHOD",
    help="Method that the others are compared with, 'SPEC + RULE'.  "
    f"[default: the preset's, else {REFERENCE!r}]",
)
@click.option(
    "--fine-tuned",
    default=FINE_TUNED,
    metavar="SPEC",
    help="Recipe whose full depth is ordinary fine-tuning; if it is not compared, its columns are empty.",
)
@click.option("--prefix", default="", help="As in ee-train.")
@click.option("--augment", default="none", help="As in ee-train.")
@click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE", help="As in ee-train, for every recipe."
)
@click.option(
    "--measure",
    default=0,
    metavar="ROWS",
    help="Export the bundles of the first seed and time them on this number of rows.",
)
@click.option(
    "--max-drop",
    default=0.5,
    help="Accuracy points below ordinary fine-tuning's full depth, on dev, at which --measure states the "
    "speed-up.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=1,
    help="Trainings at once, each with its share of the cores; their progress goes into OUT/NAME_SEED.log.",
)
@click.option(
    "--join",
    "joined",
    multiple=True,
    metavar="FOLDER",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Only join comparisons with other seeds (--first-seed) into --out, and compute the tables. Give it "
    "for each folder; comparison.json and rows/ are needed of it.",
)
@click.option("--recompute", is_flag=True, help="Only compute the tables again from the rows in --out.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("results"), help="Folder for everything it makes."
)
@click.argument("more", nargs=-1)
def main(
    model: str | None,
    data: str | None,
    recipes: str | None,
    preset: str | None,
    rules: str | None,
    seeds: int | None,
    first_seed: int,
    reference: str | None,
    fine_tuned: str,
    prefix: str,
    augment: str,
    settings: tuple[str, ...],
    measure: int,
    max_drop: float,
    workers: int,
    joined: tuple[Path, ...],
    recompute: bool,
    out: Path,
    more: tuple[str, ...],
) -> None:
    """Train what is missing, judge every method by the same means, print the table, write compare.json and
    the page compare.html.

    A method is the exits of a recipe with a rule. Scores: mean accuracy between 10 and 40, 40 and 80, 80 and
    90 % of multiply-accumulates saved, and the mean saving at 0 to 5 points below full depth. Settings are
    chosen on dev; test is read once. Intervals are over rows and seeds. Started again after an interruption,
    it resumes. Arguments after -- are passed to ee-train whenever --model is, for example -- --image-size
    112 --pooling cls.
    """
    if joined:
        try:
            join(joined, out)
        except BadSetting as problem:
            raise click.UsageError(str(problem)) from None
    if recompute or joined:
        if not (out / LISTING).is_file():
            raise click.UsageError(f"--recompute: {out} holds no comparison; run one with this --out")
        write_result(out, judge(out))
        return
    for name, value in (("--model", model), ("--data", data)):
        if value is None:
            raise click.UsageError(f"Missing option '{name}'.")
    assert model is not None and data is not None
    options = ["--prefix", prefix] if prefix else []
    options += ["--augment", augment] if augment != "none" else []
    words = {"--preset": preset, "--recipes": recipes, "--rules": rules, "--reference": reference}
    words |= {"--fine-tuned": None if fine_tuned == FINE_TUNED else fine_tuned}
    default = Preset("", PLAIN_RULES, REFERENCE, seeds=1)
    chosen = PRESETS[preset] if preset else default
    if preset is None:
        words["--recipes"] = recipes = recipes or RECIPES_DEFAULT
    compared = recipes or chosen.recipes
    seed_list = list(range(first_seed, first_seed + (seeds or chosen.seeds)))
    command = _command(CommonWords(model, data, more, tuple(options), settings), words, seed_list, measure)
    common = CommonWords(model, data, (*chosen.more, *more), tuple(options), (*chosen.settings, *settings))
    rule_names, compared_with = (rules or chosen.rules).split(","), reference or chosen.reference
    try:
        specs = parse_specs(f"{compared_with.partition(' + ')[0]} {compared}")
        _check(specs, rule_names, compared_with, common)
        out.mkdir(parents=True, exist_ok=True)
        comparison = Comparison(
            *(specs, rule_names, seed_list, out, common, compared_with),
            *(spec_of(specs, fine_tuned), measure, max_drop, workers),
        )
        result = compare(comparison, command)
    except BadSetting as problem:
        raise click.UsageError(str(problem)) from None
    except subprocess.CalledProcessError as problem:
        failed = " ".join(map(str, problem.cmd))
        raise click.ClickException(f"{failed} ended with {problem.returncode}") from None
    write_result(out, result)


def _check(specs: Sequence[RecipeSpec], rules: Sequence[str], reference: str, common: CommonWords) -> None:
    """Raise BadSetting for a wrong rule or setting before anything is trained."""
    # Rule gate needs policies: a recipe that trains them has it as its own.
    known = [rule for rule in swept_rules("classification") if rule != "gate"]
    unknown = [rule for rule in rules if rule not in known]
    if unknown:
        raise BadSetting(f"--rules: {unknown[0]!r} is not known; choose among {', '.join(known)}")
    if " + " not in reference:
        raise BadSetting(f"--reference {reference!r}: expected 'RECIPE + RULE'")
    for spec in specs:
        for model in spec.models:
            start_of(model, common)


def spec_of(specs: Sequence[RecipeSpec], name: str) -> str | None:
    """The spec with this text, else the first one of this recipe; None if there is none."""
    of_recipe = [spec.text for spec in specs if spec.models[0].recipe == name]
    return name if name in (spec.text for spec in specs) else next(iter(of_recipe), None)


def _command(common: CommonWords, words: Mapping[str, str | None], seeds: Sequence[int], measure: int) -> str:
    """The command of a comparison as text, folders by their names; words: options that may be None."""
    settings = [word for setting in common.settings for word in ("--set", setting)]
    chosen = [word for name, value in words.items() if value for word in (name, value)]
    arguments = [common.model, "--data", common.data, *common.options, *settings, *chosen]
    plain = [Path(word).name if Path(word).exists() else word for word in arguments]
    tail = ["--first-seed", str(seeds[0])] if seeds[0] else []
    tail += ["--seeds", str(len(seeds)), *(["--measure", str(measure)] if measure else [])]
    tail += ["--", *common.more] if common.more else []
    return shlex.join(["ee-compare", "--model", *plain, *tail])


if __name__ == "__main__":
    main()
