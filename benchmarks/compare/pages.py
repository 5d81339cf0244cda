"""Tables of comparisons, and docs/comparison.md over all data sets.

    python benchmarks/compare/pages.py    # reads compare_*.json and agreement_*.json of benchmarks/results

A result file is called compare_DATA.json, or compare_NAME_DATA.json; files with the same NAME are summarized
together, each data set with the same weight.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from offramp.benchmarks.compare.frontiers import BANDS, HEADLINE
from offramp.benchmarks.compare.judge import FINE_TUNED, LOSSES, OWN, SCORES
from offramp.benchmarks.compare.resampling import LEVEL, holm, mean_interval
from offramp.runtime.tuning.report import write_atomically

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "comparison.md"
FIGURES = (
    "accuracy_at_half",
    "layers_saved",
    "macs_saved",
    "bops_saved",
    "random",
    "static",
    "elue",
    "ece_raw",
    "ece",
    "set_size",
)
SCORE_NAMES = {
    **{band: f"{band} %" for band in BANDS},
    OWN: "saving below own full depth",
    FINE_TUNED: "saving below fine-tuning",
}
VERDICT_HEAD = (
    *("method", "trials", f"accuracy {HEADLINE} %", "difference, 95 %", "p (Holm)"),
    *(f"{band} %" for band in BANDS if band != HEADLINE),
    *("saving below own full depth", "saving below fine-tuning", "reach", "verdict"),
)
HALF_HEAD = ("method", *(name.replace("_", " ") for name in FIGURES), "control")
RECIPE_HEAD = (
    *("recipe", "full depth", "less fine-tuning, 95 %", "first right", "saved there"),
    "rules tried on",
)
LAYERS_HEAD = (
    "method",
    *(f"{loss:g} below own" for loss in LOSSES),
    *(f"{loss:g} below fine-tuning" for loss in LOSSES),
)
PUBLISHED_HEAD = ("model", "point", "accuracy", "less its full depth", "layers saved", "macs saved")
TIMES_HEAD = ("method", "ms", "% of the fp32 graph", "macs saved", "accuracy")
NEAR_HEAD = (
    *("recipe", "precision", "rule", "accuracy", "less fine-tuning, 95 %", "ms"),
    *("x fp32 graph, 95 %", "x int8 graph, 95 %"),
)
LEGEND = f"""- A method is the exits of a recipe with a rule; "published" is one model a point, with
  the points that training set. Settings were chosen on dev; test was read once. trials: settings (of
  "published": points) that were tried on dev. Full depth, and the first exit for all rows, need no tuning,
  and every method may use them.
- A frontier is the polyline through the settings that are more accurate on dev than all cheaper ones; between
  two of them a walk draws one for each row. At savings below that of the most accurate setting on dev, this
  setting is used, which is full depth unless dev shows a better one. Beyond a method's cheapest setting
  (reach, the saving there) the line leads to the first exit for all rows, and beyond that, where no walk of
  this network saves more, the accuracy of the first exit counts.
- accuracy {HEADLINE} %: mean accuracy of the frontier between these savings of multiply-accumulates, the
  headline. difference, and the other bands: less that of the reference method.
- saving below full depth: mean over d from 0 to 5 points of the largest saving at which the frontier is at
  most d below full depth, that of the recipe itself or of ordinary fine-tuning of the same model; less that
  of the reference method.
- Intervals (95 %) and two-sided p-values are over rows of test and over seeds, or over rows only where there
  is one seed. Holm's correction is over all methods of the table. verdict: by p (Holm) below {LEVEL:g}.
"""
HALF_LEGEND = """At the setting that was the most accurate on dev among those that save half of the
multiply-accumulates: accuracy (standard deviation over seeds), the same number of rows at each exit but drawn
at random (random), a truncated network of equal cost (static), elue: mean over the frontier of accuracy less
that of truncated networks of equal cost; ece: calibration error in percent, raw and at temperatures fitted on
dev; set size: of 95 % conformal sets.
"""
INTRODUCTION = f"""# Methods compared

Written by `python benchmarks/compare/pages.py` from `benchmarks/results/compare_*.json`, which the commands
below made. Results of an earlier judge, which scored 30 to 60 % saved, are in `docs/measured.md`.

{LEGEND}"""
NO_RESULTS = """No result file is there yet. `ee-compare` writes compare.json into its --out; copied to
benchmarks/results/compare_DATA.json, it is shown here.
"""
AGREEMENT = """## Torch and the bundle decide alike

The same rows through the trained modules and through the exported bundle, by two programs. same: the same
segments in the same precision and the same label. ties: decided differently, but no probability and no gate
before that differed by more than 1e-5. other: neither; in fp32 there must be none. In int8 a number between
two grid points may be rounded either way and changes everything after it, so torch in float64 does not decide
as torch in float32 does either; the bundle is compared with that.
"""


def verdict_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Table rows of the scores, one a method."""
    rows = []
    for name, method in result["methods"].items():
        scores = result["scores"][name]
        reference = name == result["reference"]
        headline = scores[HEADLINE]
        cells = [name, str(method["trials"]), f"{headline['value']:.2f}"]
        cells += ["reference" if reference else format_difference(headline)]
        cells += ["" if reference else format_p(headline["p_holm"])]
        for score in (*(band for band in BANDS if band != HEADLINE), OWN, FINE_TUNED):
            cells.append(_score_cell(scores.get(score), reference, with_value=score not in BANDS))
        rows.append([*cells, f"{method['reach']:.1f}", "" if reference else side_of_zero(headline)])
    return rows


def _score_cell(score: Mapping[str, float] | None, reference: bool, *, with_value: bool) -> str:
    if score is None:
        return ""
    value = f"{score['value']:.2f}"
    if reference:
        return value
    return f"{value}, {format_difference(score)}" if with_value else format_difference(score)


def half_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Table rows of the point that saves half, one a method: means over seeds, and controls it loses to."""
    rows = []
    for name, method in result["methods"].items():
        cells = []
        for figure in FIGURES:
            values = [figures[figure] for figures in method["seeds"] if figure in figures]
            cells.append(f"{np.mean(values):.2f}" if values else "-")
        cells[0] += _deviation([figures["accuracy_at_half"] for figures in method["seeds"]])
        rows.append([name, *cells, controls(method["seeds"])])
    return rows


def controls(seeds: Sequence[Mapping[str, Any]]) -> str:
    """The controls that a method does not beat at the point that saves half, in words; else ""."""
    mean = {
        name: float(np.mean([figures[name] for figures in seeds]))
        for name in ("accuracy_at_half", "random", "static")
    }
    lost = [name for name in ("random", "static") if mean["accuracy_at_half"] <= mean[name]]
    return f"does not beat {' and '.join(lost)}" if lost else ""


def recipe_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Table rows of recipes: full depth, and the bound of exiting at the first right exit."""
    rows = []
    for name, entry in result["recipes"].items():
        full = entry["full_depth"]
        against = entry.get("against_fine_tuned")
        less = "" if against is None else format_difference(against)
        first = {
            key: np.mean([seed[key] for seed in entry["first_right"]]) for key in ("accuracy", "macs_saved")
        }
        cells = [name, f"{np.mean(full):.2f}{_deviation(full)}", less]
        cells += [f"{first['accuracy']:.2f}", f"{first['macs_saved']:.1f}"]
        rows.append([*cells, entry["same_exits_as"] or "its exits"])
    return rows


def layers_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Table rows of layers saved at a loss, in percent, means over seeds."""
    return [
        [
            name,
            *(f"{saved:.1f}" for saved in method["layers_saved"]["own"]),
            *(f"{saved:.1f}" for saved in method["layers_saved"].get("fine_tuned", [])),
        ]
        + [""] * (0 if "fine_tuned" in method["layers_saved"] else len(LOSSES))
        for name, method in result["methods"].items()
    ]


def published_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Table rows of the operating points that training set, one model a row, means over seeds."""
    rows = []
    for method in (m for m in result["methods"].values() if "published" in m):
        labels = result["recipes"][method["recipe"]]["models"]
        by_seed = method["published"]
        a_model = len(by_seed[0]) // len(labels)
        for at, point in enumerate(by_seed[0]):
            points = [seed[at] for seed in by_seed]
            mean = {
                key: float(np.mean([p[key] for p in points]))
                for key in ("accuracy", "full_depth", "layers_saved", "macs_saved")
            }
            cells = [f"{mean['accuracy']:.2f}{_deviation([p['accuracy'] for p in points])}"]
            cells += [f"{mean['accuracy'] - mean['full_depth']:+.2f}"]
            cells += [f"{mean['layers_saved']:.1f}", f"{mean['macs_saved']:.1f}"]
            rows.append([labels[at // a_model], point["point"], *cells])
    return rows


def timed_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Table rows of the timed settings of every method."""
    return [
        [
            name,
            f"{point['ms']:.2f}",
            f"{point['share']:.1f}",
            f"{point['macs_saved']:.1f}",
            f"{point['accuracy']:.2f}",
        ]
        for name, points in result["milliseconds"]["points"].items()
        for point in points
    ]


def near_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Table rows of the speed-up near ordinary fine-tuning's full depth."""
    rows = []
    for entry in result["milliseconds"]["within"]:
        less = "{:+.2f} [{:+.2f}, {:+.2f}]".format(*entry["difference"])
        parameters = ", ".join(f"{name} {value:.3g}" for name, value in entry["parameters"].items())
        times = ["{:.2f} [{:.2f}, {:.2f}]".format(*entry[f"times_{v}"]) for v in ("fp32", "int8")]
        rule = f"{entry['rule']} {parameters}".strip()
        cells = [entry["recipe"], entry["variant"], rule, f"{entry['accuracy']:.2f}", less]
        rows.append([*cells, f"{entry['ms']:.2f}", *times])
    return rows


def _deviation(values: Sequence[float]) -> str:
    """The standard deviation over seeds in brackets; empty for one seed."""
    return f" ({np.std(values, ddof=1):.2f})" if len(values) > 1 else ""


def format_difference(figures: Mapping[str, float]) -> str:
    """A difference and its interval as text, such as "+0.12 [-0.03, +0.27]"."""
    return f"{figures['difference']:+.2f} [{figures['low']:+.2f}, {figures['high']:+.2f}]"


def format_p(p: float) -> str:
    """A p-value as text."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def side_of_zero(figures: Mapping[str, float]) -> str:
    """ "above" or "below" if the corrected p-value is below 0.05, else "not apart"."""
    if figures["p_holm"] >= LEVEL:
        return "not apart"
    return "above" if figures["difference"] > 0 else "below"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [
        *lines,
        *("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows),
        "",
    ]


def read_results(kind: str = "compare") -> list[dict[str, Any]]:
    """The content of all result files KIND_*.json, in the order of their names."""
    return [read_result_file(file) for file in sorted(RESULTS.glob(f"{kind}_*.json"))]


def read_result_file(file: Path) -> dict[str, Any]:
    """The content of a result file. Operating points of older files, within-1.0, get the name of today."""
    text = re.sub(r"\bwithin-(?=\d)", "dev-", file.read_text(encoding="utf-8"))
    result: dict[str, Any] = json.loads(text)
    return result


def read_comparisons() -> dict[str, list[dict[str, Any]]]:
    """The results of ee-compare by NAME of their files compare_NAME_DATA.json; "" for compare_DATA.json."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(RESULTS.glob("compare_*.json")):
        result = read_result_file(file)
        name = file.stem.removeprefix("compare_").removesuffix(result["data"]).strip("_")
        groups.setdefault(name, []).append(result)
    return groups


def mean_scores(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """By method and score the mean difference over data sets; of methods and scores that all of them have.

    p_holm is corrected over methods, for each score. Raises ValueError if the results have not the same
    reference: their differences are not of one kind.
    """
    references = list(dict.fromkeys(result["reference"] for result in results))
    if len(references) > 1:
        data = ", ".join(result["data"] for result in results)
        raise ValueError(f"{data}: compared with different references, {', '.join(references)}")
    reference, first = results[0]["reference"], results[0]["scores"]
    names = [n for n in first if n != reference and all(n in result["scores"] for result in results)]
    seeds = [len(result["seeds"]) for result in results]
    means: dict[str, dict[str, dict[str, float]]] = {name: {} for name in names}
    for score in SCORES:
        of_score = {}
        for name in names:
            parts = [result["scores"][name].get(score) for result in results]
            if all(part is not None for part in parts):
                of_score[name] = mean_interval([part for part in parts if part is not None], seeds)
        for name, p in holm({name: entry["p"] for name, entry in of_score.items()}).items():
            means[name][score] = of_score[name] | {"p_holm": p}
    return means


def summary_table(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown lines of the headline over data sets with the same reference; empty if there is only one."""
    if len(results) < 2:
        return []
    rows = []
    for name, scores in mean_scores(results).items():
        each = [f"{result['scores'][name][HEADLINE]['difference']:+.2f}" for result in results]
        mean = scores[HEADLINE]
        rows.append([name, *each, format_difference(mean), format_p(mean["p_holm"]), side_of_zero(mean)])
    names = (result["data"] for result in results)
    head = ("method", *names, "all, 95 %", "p (Holm)", f"against {results[0]['reference']}")
    return markdown_table(head, rows)


def summary_notes(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown lines of what the mean over data sets does not contain: errors over seeds, and methods."""
    if len(results) < 2:
        return []
    lines = []
    single = [result["data"] for result in results if len(result["seeds"]) == 1]
    if single:
        lines += [
            f"Data sets with one seed: {', '.join(single)}. Their errors in the mean are over rows only.",
            "",
        ]
    names = dict.fromkeys(name for result in results for name in result["scores"])
    missing = [name for name in names if not all(name in result["scores"] for result in results)]
    if missing:
        lines += [f"Not in the mean, because a data set lacks them: {', '.join(missing)}.", ""]
    return lines


def all_scores_table(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown lines of all scores, mean over data sets; a star where the corrected p is below 0.05."""
    if len(results) < 2:
        return []
    rows = []
    for name, scores in mean_scores(results).items():
        cells = []
        for score in SCORES:
            star = " *" if score in scores and scores[score]["p_holm"] < LEVEL else ""
            cells.append(format_difference(scores[score]) + star if score in scores else "")
        rows.append([name, *cells])
    return markdown_table(("method", *SCORE_NAMES.values()), rows)


def agreement_table(result: dict[str, Any]) -> list[str]:
    """Markdown lines for a result file of agreement.py: its command, and a table of all comparisons."""
    head = [name.replace("_", " ") for name in result["lines"][0]]
    rows = [[str(value).replace("_", " ") for value in line.values()] for line in result["lines"]]
    return [f"    python {result['command']}", "", *markdown_table(head, rows)]


def seeds_text(result: Mapping[str, Any]) -> str:
    """The seeds of a result, and what its intervals cover."""
    seeds = ", ".join(map(str, result["seeds"]))
    return f"seeds {seeds}" if len(result["seeds"]) > 1 else f"seed {seeds}, intervals over rows only"


def result_lines(result: Mapping[str, Any], title: str) -> list[str]:
    """Markdown lines of all tables of one data set."""
    where = f"{result['rows']['test']} rows of test, {seeds_text(result)}"
    lines = [f"## {title} ({where})", "", f"    {result['command']}", ""]
    lines += markdown_table(RECIPE_HEAD, recipe_rows(result))
    lines += [f"Against {result['reference']}:", "", *markdown_table(VERDICT_HEAD, verdict_rows(result))]
    published = published_rows(result)
    if published:
        lines += ["Points that training set:", "", *markdown_table(PUBLISHED_HEAD, published)]
    lines += ["Layers saved at a loss, %:", "", *markdown_table(LAYERS_HEAD, layers_rows(result))]
    lines += [HALF_LEGEND, *markdown_table(HALF_HEAD, half_rows(result))]
    if "milliseconds" in result:
        about = result["milliseconds"]
        graphs = " and ".join(f"{v} {ms:.2f} ms" for v, ms in about["monolith_ms"].items())
        lines += [f"Walked at batch 1 ({about['rows']} rows of test; one graph without exits: {graphs}).", ""]
        drop = f"{about['max_drop']:g} points of full depth of {about['full_depth_of']}"
        lines += [
            f"The setting that saves most on dev within {drop} ({about['full_depth']:.2f} % on test):",
            "",
            *markdown_table(NEAR_HEAD, near_rows(result)),
            "Settings of the methods:",
            "",
            *markdown_table(TIMES_HEAD, timed_rows(result)),
        ]
    return lines


def comparison_document(
    groups: Mapping[str, Sequence[dict[str, Any]]], agreements: Sequence[dict[str, Any]] = ()
) -> str:
    """The text of docs/comparison.md; groups: results by the NAME of their files."""
    lines = [INTRODUCTION, *([] if groups else [NO_RESULTS])]
    for name, results in groups.items():
        summary = summary_table(results)
        if summary:
            title = f"## {name}: over all data sets" if name else "## Over all data sets"
            words = f"Mean accuracy between {HEADLINE} % saved, less that of the reference:"
            lines += [title, "", words, "", *summary, *summary_notes(results)]
            lines += ["All scores (a star: p (Holm) below 0.05):", "", *all_scores_table(results)]
        for result in results:
            lines += result_lines(result, f"{name}: {result['data']}" if name else result["data"])
    if agreements:
        lines += [AGREEMENT, *(line for result in agreements for line in agreement_table(result))]
    return "\n".join(lines)


@click.command(help=__doc__)
def main() -> None:
    """Write docs/comparison.md from the result files."""
    write_atomically(DOCUMENT, comparison_document(read_comparisons(), read_results("agreement")))
    click.echo(DOCUMENT.name)


if __name__ == "__main__":
    main()
