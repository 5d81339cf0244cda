"""Whether guaranteed settings keep their word: risk control on hundreds of draws of calibration rows.

    python benchmarks/risk.py measure CHECKPOINT DATA --name sst2 --model e5-small --json \\
      benchmarks/results/risk_sst2.json
    python benchmarks/risk.py demo demo/bundle CALIBRATION TEST --json benchmarks/results/demo_risk.json
    python benchmarks/risk.py pictures    # of docs/operating-points.md, from risk_*.json
    make figures                          # its tables

CHECKPOINT is a classifier from ee-train, or one that ee-compare trained; the outputs of its exits on the test
split are stored beside it. Nothing was trained or chosen on these rows. Settings are those that ee-calibrate
tests (fixed_settings), for a bundle without temperatures. Beside risk control stands naive tuning: the
cheapest of the same settings whose risk on the same calibration rows is within the limit.

Two designs. "exact": calibration rows are drawn with replacement, half as many as there are rows; the rows
are the population, so that the risk of a setting is known exactly, and a word is broken if this risk is above
the limit. "halves": calibration rows are a random half without replacement, and the other half is the test. A
test of so few rows shows more than the limit by chance, too: of a setting whose risk is the limit, nearly
half of the test halves do.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from offramp.benchmarks.compare.pages import markdown_table, read_results
from offramp.benchmarks.compare.pictures import COLOURS
from offramp.runtime.bundle.manifest import CLASSIFICATION
from offramp.runtime.rules.sweep import ExitMacs, ExitTable, fixed_settings, setting_rule, swept_rules
from offramp.runtime.tuning.report import write_atomically
from offramp.runtime.tuning.risk import LEAST_SHARE, control_risk, rows_needed

ROOT = Path(__file__).resolve().parent.parent
LIMITS = (0.01, 0.02, 0.05)
CONFIDENCE = 0.9
GROUPED_RULE = "max_probability"  # the rule that is tested within groups as well
FULL_DEPTH = -1  # in place of a setting
GROUPED_LIMIT = 0.05  # the one of the table
DESIGNS, METHODS = ("exact", "halves"), ("guaranteed", "naive")
RISKS = {"disagreement": "disagreement", "error_increase": "error increase"}
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.9, 0.95)

ROWS_HEAD = ("limit", "confidence", *RISKS.values(), "disagreement within groups")
RISK_HEAD = (
    *("data", "calibration rows", "risk", "limit", "layers saved, %", "broken, %"),
    *("naive: layers saved, %", "naive: broken, %", "other half: broken, %", "other half, naive: broken, %"),
)
GROUP_HEAD = (
    *("data", "groups", "layers saved, %", "broken, %", "at full depth, %"),
    *("naive over all rows: layers saved, %", "broken within a group, %"),
)
KEPT_PICTURE, SAVED_PICTURE = ROOT / "docs" / "risk-kept.svg", ROOT / "docs" / "risk-saved.svg"

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Settings:
    """All settings of one rule on all rows of a data set.

    order: the sequences in which they are tested, as indices. depth [settings, rows]: the block after which
    each row leaves, of `blocks`. exits, labels [settings, rows]: the exit, and the label that is answered.
    losses: by risk [settings, rows].
    """

    order: list[list[int]]
    blocks: int
    depth: NDArray[np.int16]
    exits: NDArray[np.int16]
    labels: NDArray[np.int16]
    losses: Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Promise:
    """What is asked for: a risk, the limit, and the groups within which it holds ("all" for none).

    low: the least loss. group_count: how many groups there are.
    """

    risk: str
    limit: float
    groups: str = "all"
    low: float = 0.0
    group_count: int = 0

    def excess(self, losses: NDArray[Any], groups: Ids | None) -> float:
        """The risk on rows as a share of the limit: above 1 if the word is broken; losses, groups [rows]."""
        if groups is None:
            return float(losses.mean()) / self.limit
        lost = np.bincount(groups, weights=losses, minlength=self.group_count)
        shares = np.bincount(groups, minlength=self.group_count) / len(losses)
        return float((lost / len(losses) / np.maximum(shares, LEAST_SHARE)).max()) / self.limit


def settings_of(rule: str, table: ExitTable, costs: ExitMacs) -> Settings:
    """Simulate every setting that ee-calibrate tests for a rule on the outputs of all exits."""
    sequences = fixed_settings(rule, table.logits.shape[1])
    values = [value for sequence in sequences for value in sequence]
    ends = np.cumsum([0, *map(len, sequences)])
    order = [list(range(start, end)) for start, end in pairwise(ends)]
    exits = np.array(
        [table.exits(setting_rule(rule, value)) for value in tqdm(values, rule, file=sys.stderr)]
    )
    answers = table.logits.argmax(-1)
    labels = answers[np.arange(len(answers)), exits]
    lost = (labels != table.labels).astype(np.int8) - (answers[:, -1] != table.labels).astype(np.int8)
    losses = {"disagreement": labels != answers[:, -1], "error_increase": lost}
    depth, at, answered = (array.astype(np.int16) for array in (costs.blocks[exits], exits, labels))
    return Settings(order, int(costs.blocks[-1]), depth, at, answered, losses)


def promises(rule: str, table: ExitTable) -> Iterator[Promise]:
    """The promises that are tested of a rule."""
    for limit in LIMITS:
        yield Promise("disagreement", limit)
        yield Promise("error_increase", limit, low=-1.0)
        if rule == GROUPED_RULE:
            yield Promise("disagreement", limit, "class", group_count=table.logits.shape[2])
            yield Promise("disagreement", limit, "exit", group_count=table.logits.shape[1])


def choose(settings: Settings, promise: Promise, rows: Ids, *, naive: bool) -> int:
    """The setting with the least mean depth that is within the limit on rows, FULL_DEPTH if there is none.

    naive: by the observed risk alone, over all rows; else by risk control.
    """
    losses = settings.losses[promise.risk][:, rows]
    if naive:
        valid = np.flatnonzero(losses.mean(1) <= promise.limit)
    else:
        groups = None if promise.groups == "all" else groups_of(settings, promise.groups)[:, rows]
        valid = control_risk(
            *(losses, settings.order, promise.limit, CONFIDENCE),
            low=promise.low,
            groups=groups,
            group_count=promise.group_count,
        )
    if not len(valid):
        return FULL_DEPTH
    return int(valid[settings.depth[valid][:, rows].mean(1).argmin()])


def groups_of(settings: Settings, name: str) -> Ids:
    """The group of each row at each setting [settings, rows]: the answered label, or the exit."""
    return (settings.labels if name == "class" else settings.exits).astype(np.int64)


def draw(design: str, rows: int, generator: np.random.Generator) -> tuple[Ids, Ids]:
    """Calibration rows and the rows on which the word is checked, of one design."""
    if design == "exact":
        return generator.integers(0, rows, rows // 2), np.arange(rows)
    order = generator.permutation(rows)
    return order[: rows // 2], order[rows // 2 :]


def measure_promise(
    settings: Settings, promise: Promise, design: str, splits: int, *, naive: bool
) -> dict[str, Any]:
    """How often the setting chosen on random rows breaks its word, and what it saves.

    The draws are the same for every promise and method.
    """
    excess, saved, full = list[float](), list[float](), 0
    for split in range(splits):
        chosen_on, checked_on = draw(design, settings.depth.shape[1], np.random.default_rng([0, split]))
        index = choose(settings, promise, chosen_on, naive=naive)
        if index == FULL_DEPTH:
            excess, saved, full = [*excess, 0.0], [*saved, 0.0], full + 1
            continue
        groups = None
        if promise.groups != "all":
            groups = groups_of(settings, promise.groups)[index, checked_on]
        excess.append(promise.excess(settings.losses[promise.risk][index, checked_on], groups))
        saved.append(100 * (1 - float(settings.depth[index, checked_on].mean()) / settings.blocks))
    return {
        "risk": promise.risk,
        "groups": promise.groups,
        "limit": promise.limit,
        "design": design,
        "method": METHODS[naive],
        # 1e-9: a risk that is the limit is not above it, whatever the last digit of a quotient
        "broken": round(float(np.mean(np.array(excess) > 1 + 1e-9)), 4),
        "risk_quantiles": [round(float(q) * promise.limit, 5) for q in np.quantile(excess, QUANTILES)],
        "layers_saved": round(float(np.mean(saved)), 2),
        "full_depth": round(full / splits, 4),
    }


@click.group(help=__doc__)
def main() -> None:
    """The command group of this benchmark."""


@main.command()
@click.argument("checkpoint", type=click.Path(exists=True, path_type=Path))
@click.argument("data")
@click.option("--name", required=True, help="Name of the data set in the tables.")
@click.option("--model", "model_name", required=True, help="Name of the model in the tables.")
@click.option("--json", "result", required=True, type=click.Path(path_type=Path), help="Result file.")
@click.option("--splits", default=200, show_default=True, help="Draws of calibration rows.")
@click.option("--rules", help="Rules, separated by commas [default: all that only exit and apply].")
def measure(
    checkpoint: Path, data: str, name: str, model_name: str, result: Path, splits: int, rules: str | None
) -> None:
    """Measure one checkpoint on the test rows of DATA, and write the result file."""
    from offramp.benchmarks.compare.exit_outputs import collect_outputs  # imports torch

    outputs = collect_outputs(checkpoint, data, ("test",)).exit_outputs("test")
    table, costs = outputs.table, outputs.costs
    known = [rule for rule in swept_rules(CLASSIFICATION) if rule != "gate" or table.gates is not None]
    lines = []
    for rule in known if rules is None else rules.split(","):
        settings = settings_of(rule, table, costs)
        cases = list(product(promises(rule, table), DESIGNS, (False, True)))
        for promise, design, naive in tqdm(cases, f"{name} {rule}", file=sys.stderr):
            lines.append({"rule": rule, **measure_promise(settings, promise, design, splits, naive=naive)})
    rows = len(table.labels)
    about = {"data": name, "model": model_name, "rows": rows, "calibration_rows": rows // 2, "splits": splits}
    about["confidence"] = CONFIDENCE
    command = (
        f"benchmarks/risk.py measure {checkpoint.name} {Path(data).name} --name {name} --model {model_name}"
    )
    command += f" --json benchmarks/results/{result.name}" + (f" --rules {rules}" if rules else "")
    text = ",\n".join(" " + json.dumps(line) for line in lines)
    head = json.dumps({"command": command, "about": about})[:-1]
    write_atomically(result, f'{head},\n"lines": [\n{text}\n]}}\n')


@main.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.argument("calibration", type=click.Path(exists=True, path_type=Path))
@click.argument("test", type=click.Path(exists=True, path_type=Path))
@click.option("--risk", "limit", default=0.05, show_default=True, help="Limit of disagreement.")
@click.option("--confidence", default=0.99, show_default=True, help="Confidence of the guarantee.")
@click.option("--seeds", default=20, show_default=True, help="Splits.")
@click.option("--json", "result", type=click.Path(path_type=Path), help="Result file.")
def demo(
    bundle: Path,
    calibration: Path,
    test: Path,
    limit: float,
    confidence: float,
    seeds: int,
    result: Path | None,
) -> None:
    """Split the rows of two files again, find a guaranteed point as ee-calibrate does, and check it on test.

    Nothing may have been trained or chosen on these rows. The parts have the sizes of the files. Ends with 1
    if any seed's point disagrees with full depth on more of its test rows than the limit.
    """
    from offramp.runtime.loading import load_row_session
    from offramp.runtime.tuning.exit_tables import measure_exit_table
    from offramp.runtime.tuning.guarantees import RiskOptions, guaranteed_points
    from offramp.runtime.tuning.labelled import LabelledRows, read_labelled

    with load_row_session(bundle, rule="never", global_pool=True) as session:
        parts = [read_labelled(file, session.labels) for file in (calibration, test)]
        items = [item for part in parts for item in part.items]
        labels = np.concatenate([part.labels for part in parts])
        variant = session.manifest.variants[0]
        table, _ = measure_exit_table(session, LabelledRows("all", tuple(items), labels), variant)
        answers = table.logits.argmax(-1)
        lines = []
        for seed in tqdm(range(seeds), "seeds", file=sys.stderr):
            order = np.random.default_rng(seed).permutation(len(items))
            chosen_on, checked_on = order[: len(parts[0].items)], order[len(parts[0].items) :]
            rows = LabelledRows("part", tuple(items[row] for row in chosen_on), labels[chosen_on])
            kept = guaranteed_points(session, rows, RiskOptions((limit,), confidence))
            point = next(point for point in kept.points if point.guarantee and point.variant == variant)
            assert point.guarantee is not None
            exits = table.exits(point.rule)
            lost = (answers[np.arange(len(items)), exits] != answers[:, -1])[checked_on]
            figures = {"observed": point.guarantee.observed, "bound": point.guarantee.bound}
            figures |= {"test": round(float(lost.mean()), 5), "layers_saved": point.measured["layers_saved"]}
            lines.append({"seed": seed, **figures, "kept": bool(lost.mean() <= limit)})
            click.echo(json.dumps(lines[-1]))
    kept_seeds = sum(line["kept"] for line in lines)
    rows_of = {"calibration_rows": len(parts[0].items), "test_rows": len(parts[1].items)}
    about = {"limit": limit, "confidence": confidence, **rows_of, "kept": kept_seeds, "seeds": seeds}
    click.echo(json.dumps(about))
    if result is not None:
        write_atomically(result, json.dumps({"about": about, "lines": lines}, indent=1) + "\n")
    sys.exit(kept_seeds < seeds)


@main.command()
def pictures() -> None:
    """Draw the pictures of docs/operating-points.md from the result files."""
    results = read_results("risk")
    write_atomically(KEPT_PICTURE, _svg(lambda axes: draw_risks(axes, results), height=3.2))
    write_atomically(SAVED_PICTURE, _svg(lambda axes: draw_saved(axes, results), height=3.2))


def risk_tables() -> list[str]:
    """Markdown lines of the tables of docs/operating-points.md; none without result files."""
    results = read_results("risk")
    if not results:
        return []
    about = results[0]["about"]
    lines = ["Rows that are needed if none of them has a loss:", ""]
    lines += markdown_table(ROWS_HEAD, row_counts())
    lines += ["Points that broke their word, design *exact*:", "", *summary_lines(results)]
    lines += ["", f"Rule {GROUPED_RULE}, by data set, risk and limit:", ""]
    rows = []
    for result, risk, limit in product(results, RISKS, LIMITS):
        exact, naive, half, naive_half = (
            find_line(result, GROUPED_RULE, risk, "all", limit, design, method)
            for design, method in product(DESIGNS, METHODS)
        )
        cells = [result["about"]["data"], result["about"]["calibration_rows"], RISKS[risk], f"{limit:g}"]
        cells += [saved_text(exact), percent(exact), f"{naive['layers_saved']:.1f}", percent(naive)]
        rows.append([*cells, percent(half), percent(naive_half)])
    lines += markdown_table(RISK_HEAD, rows)
    lines += [
        "Every rule at limit 0.02 of disagreement: layers saved in percent (draws broken in percent):",
        "",
    ]
    lines += markdown_table(
        ("rule", "", *(result["about"]["data"] for result in results)), rule_rows(results)
    )
    lines += [f"Within groups, rule {GROUPED_RULE}, limit {GROUPED_LIMIT:g} of disagreement:", ""]
    lines += markdown_table(GROUP_HEAD, group_rows(results))
    lines += demo_lines()
    commands = dict.fromkeys(f"    python {result['command']}" for result in results)
    return [
        *lines,
        f"{about['splits']} draws a cell, confidence {about['confidence']:g}. Commands:",
        "",
        *commands,
    ]


def demo_lines() -> list[str]:
    """Markdown lines on the demo's guaranteed point over seeds of its split; none without its result file."""
    for result in read_results("demo"):
        about, lines = result["about"], result["lines"]
        worst = 100 * max(line["test"] for line in lines)
        saved = np.mean([line["layers_saved"] for line in lines])
        return [
            f"The point of `make demo` (disagreement at most {about['limit']:g}, confidence "
            f"{about['confidence']:g}, {about['calibration_rows']} rows) kept its word on the test part of "
            f"{about['test_rows']} rows in {about['kept']} of {about['seeds']} seeds of the split; the most "
            f"was {worst:.2f} %, and it saved {saved:.1f} % of the layers in the mean.",
            "",
        ]
    return []


def row_counts() -> list[list[Any]]:
    """Table rows of the fewest rows with which limits can be shown, by limit and confidence."""
    return [
        [
            *(f"{limit:g}", f"{confidence:g}", rows_needed(limit, confidence)),
            rows_needed(limit, confidence, low=-1, binary=False),
            rows_needed(limit, confidence, grouped=True),
        ]
        for confidence, limit in product((0.9, 0.95), LIMITS)
    ]


def summary_lines(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """How many cells broke their word more often than the confidence and chance allow, and the worst.

    Cells in which every draw ended at full depth are left out: they could not break it.
    """
    splits = results[0]["about"]["splits"]
    allowed = 1 - CONFIDENCE + 2 * float(np.sqrt(CONFIDENCE * (1 - CONFIDENCE) / splits))
    every = [line for result in results for line in result["lines"] if line["design"] == "exact"]
    lines = []
    for method in METHODS:
        cells = [line for line in every if line["method"] == method]
        shares = np.array([line["broken"] for line in cells if line["full_depth"] < 1])
        often, mean, worst = (shares > allowed).sum(), 100 * shares.mean(), 100 * shares.max()
        lines.append(
            f"- {method}: {len(shares)} of {len(cells)} cells (data, rule, risk, groups, limit) had a point; "
            f"{often} of them broke their word in more than {100 * allowed:.1f} % of the draws, that is 10 % "
            f"and two standard errors of {splits} draws; mean {mean:.1f} %, at most {worst:.1f} %."
        )
    return lines


def find_line(result: Mapping[str, Any], rule: str, risk: str, groups: str, *rest: Any) -> dict[str, Any]:
    """The line of a result; rest: limit, design, method. Raises StopIteration if it is not there."""
    wanted = (rule, risk, groups, *rest)
    names = ("rule", "risk", "groups", "limit", "design", "method")
    return next(line for line in result["lines"] if tuple(line[name] for name in names) == wanted)


def rule_rows(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Table rows of every rule and method, by data set; a dash where a rule was not measured."""
    rules = dict.fromkeys(line["rule"] for result in results for line in result["lines"])
    rows = []
    for rule, method in product(rules, METHODS):
        cells = []
        for result in results:
            known = any(line["rule"] == rule for line in result["lines"])
            line = find_line(result, rule, "disagreement", "all", 0.02, "exact", method) if known else None
            cells.append("-" if line is None else f"{line['layers_saved']:.1f} ({percent(line)})")
        rows.append([rule, method, *cells])
    return rows


def group_rows(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Table rows of the promises within groups, beside naive tuning and the promise over all rows."""
    rows = []
    for result, groups in product(results, ("class", "exit")):
        lines = [
            find_line(result, GROUPED_RULE, "disagreement", groups, GROUPED_LIMIT, "exact", m)
            for m in METHODS
        ]
        cells = [f"{lines[0]['layers_saved']:.1f}", percent(lines[0]), f"{100 * lines[0]['full_depth']:.0f}"]
        naive = [f"{lines[1]['layers_saved']:.1f}", percent(lines[1])]
        rows.append([result["about"]["data"], groups, *cells, *naive])
    return rows


def percent(line: Mapping[str, Any]) -> str:
    """The share of draws whose word was broken, in percent."""
    return f"{100 * line['broken']:.1f}"


def saved_text(line: Mapping[str, Any]) -> str:
    """Layers saved in percent; a dash if no draw carried the promise."""
    return "-" if line["full_depth"] == 1 else f"{line['layers_saved']:.1f}"


def draw_risks(axes: Any, results: Sequence[Mapping[str, Any]]) -> None:
    """The true risk over all draws at limit 0.02 of disagreement, by data set and method."""
    names = []
    for place, (result, method) in enumerate(product(results, METHODS)):
        line = find_line(result, GROUPED_RULE, "disagreement", "all", 0.02, "exact", method)
        low, first, median, third, _, high = (100 * value for value in line["risk_quantiles"])
        colour = COLOURS[METHODS.index(method)]
        axes.plot([low, high], [place, place], color=colour, linewidth=1.5)
        axes.plot([first, third], [place, place], color=colour, linewidth=7, solid_capstyle="butt")
        axes.plot([median], [place], "|", color="white", markersize=7, markeredgewidth=2)
        names.append(f"{result['about']['data']}, {method}")
    axes.axvline(2.0, color="black", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("true disagreement, % (dashed: the limit; bar: middle half, line: 90 % of the draws)")


def draw_saved(axes: Any, results: Sequence[Mapping[str, Any]]) -> None:
    """Layers saved by limit, guaranteed and naive, for each data set."""
    for result, (method, dash) in product(results, zip(METHODS, ("-", ":"), strict=True)):
        saved = [
            find_line(result, GROUPED_RULE, "disagreement", "all", limit, "exact", method)["layers_saved"]
            for limit in LIMITS
        ]
        name = result["about"]["data"]
        colour = COLOURS[[r["about"]["data"] for r in results].index(name)]
        label = name if method == METHODS[0] else f"{name}, naive"
        axes.plot([100 * limit for limit in LIMITS], saved, dash, marker="o", color=colour, label=label)
    axes.set(xlabel="limit of disagreement, %", ylabel="layers saved, %", ylim=(0, 100))
    axes.legend(fontsize="x-small", ncols=2, frameon=False)


def _svg(paint: Callable[[Any], None], *, height: float) -> str:
    """A picture as SVG text, the same for the same data."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "risk", "font.size": 9}):
        figure, axes = plt.subplots(figsize=(7.5, height), constrained_layout=True)
        paint(axes)
        axes.grid(alpha=0.25)
        target = io.StringIO()
        figure.savefig(target, format="svg", metadata={"Date": None})
        plt.close(figure)
    return target.getvalue()


if __name__ == "__main__":
    main()
