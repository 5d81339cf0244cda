"""Tables and pages of comparisons: the page of one ee-compare, and docs/comparison.md over all data sets.

    python benchmarks/compare/pages.py    # reads compare_*.json and agreement_*.json of benchmarks/results

A result file with non-empty "settings" is compared with the file of the same data without settings, row by
row, since both resampled the same rows.
"""

from __future__ import annotations

import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from offramp.benchmarks.compare.frontiers import Floats, difference_interval
from offramp.runtime.tuning.report import write_atomically

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "comparison.md"
REFERENCE = "max_probability (joint)"
FIGURES = (
    "accuracy_at_half",
    "macs_saved",
    "bops_saved",
    "random",
    "static",
    "above",
    "below",
    "elue",
    "ece_raw",
    "ece",
    "set_size",
    "time_share",
)
HEAD = ("method (rule)", *(name.replace("_", " ") for name in FIGURES), "difference", "verdict")
INTRODUCTION = """# Methods compared

Written by `python benchmarks/compare/pages.py` from `benchmarks/results/compare_*.json`, which the commands
below made. Settings were chosen on dev; test was read once.

- Accuracy (standard deviation over seeds), savings and controls are those of one point: the most accurate
  one on dev among those that save half of the multiply-accumulates. random: exits drawn at random with the
  same histogram. static: a truncated network of equal cost.
- above, below: area between the method's frontier and that of max-probability on the joint checkpoint. elue:
  mean over the frontier of accuracy less that of truncated networks of equal cost. ece: calibration error,
  raw and at temperatures fitted on dev. set size: of 95 % conformal sets. time share: of the monolith's time,
  in per cent.
- difference: mean accuracy between 30 and 60 % of multiply-accumulates saved, less that of max-probability on
  the joint checkpoint, with its 95 % interval over resampled rows, the same rows for both and for all seeds.
  The interval does not cover other seeds.
"""
AGREEMENT = """## Torch and the bundle decide alike

The same rows through the trained modules and through the exported bundle, by two programs. same: the same
segments in the same precision and the same label. ties: decided differently, but no probability and no gate
before that differed by more than 1e-5. other: neither; in fp32 there must be none. In int8 a number between
two grid points may be rounded either way and changes everything after it, so torch in float64 does not decide
as torch in float32 does either; the bundle is compared with that.
"""
# Each line has its own dash too, so that lines are distinct without colour.
COLOURS = ("#3b82f6", "#e8590c", "#2f9e44", "#ae3ec9", "#1098ad", "#d6336c", "#b08900", "#868e96")
DASHES = ("-", "--", "-.", ":")
_INK = "#010203"  # replaced by the page's own colour of text
STYLE = """
:root { color-scheme: light dark; --ink: #1c2128; --back: #fff; --line: #8886 }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e8ee; --back: #14181d } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back);
       max-width: 68rem; margin: 2rem auto; padding: 0 1rem }
svg { width: 100%; height: auto } .wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line) }
th:first-child, td:first-child { text-align: left }
"""
LEGEND = """
At the setting that was the most accurate on dev among those that save half of the multiply-accumulates or
more: accuracy (standard deviation over seeds), share saved of multiply-accumulates and of bit operations, the
accuracy of exits drawn at random with the same histogram (random) and of a truncated network of equal cost
(static), calibration error (ece, 15 bins of equal mass, raw and at the temperatures of dev) and mean size of
95 % conformal sets, time as a share of the monolith's, all on test, in percent. Against max-probability
on the joint checkpoint between 30 and 60 % saved: area above and below its line, and the difference of the
means with its 95 % interval over resampled rows. elue: mean over the line of accuracy less that of truncated
networks of equal cost.
"""
AXES = {
    "macs": "multiply-accumulates saved, %",
    "bops": "bit operations spent, % (logarithmic)",
    "layers": "layers saved, %",
    "ms": "time, % of the monolith's",
}


def table_rows(result: dict[str, Any]) -> list[list[str]]:
    """Table rows of a comparison, one a method: means over seeds, deviation of the accuracy, the verdict."""
    rows = []
    for name, seeds in result["methods"].items():
        cells = []
        for figure in FIGURES:
            values = [figures[figure] for figures in seeds if figure in figures]
            cells.append(f"{np.mean(values):.2f}" if values else "-")
        accuracy = [figures["accuracy_at_half"] for figures in seeds]
        if len(accuracy) > 1:
            cells[0] += f" ({np.std(accuracy, ddof=1):.2f})"
        against = result["against_max_probability"].get(name)
        difference = "-" if against is None else format_difference(against)
        rows.append([name, *cells, difference, verdict(seeds, against)])
    return rows


def verdict(seeds: list[dict[str, Any]], against: Mapping[str, float] | None) -> str:
    """Which controls a method does not beat and whether it differs from the reference, in words; else ""."""
    if against is None:
        return ""
    mean = {
        name: float(np.mean([figures[name] for figures in seeds]))
        for name in ("accuracy_at_half", "random", "static")
    }
    lost = [name for name in ("random", "static") if mean["accuracy_at_half"] <= mean[name]]
    words = [f"does not beat {name}" for name in lost]
    if against["high"] < 0:
        words.append("below max-probability")
    if against["low"] > 0:
        words.append("above max-probability")
    return "; ".join(words)


def format_difference(figures: Mapping[str, float]) -> str:
    """A difference and its interval as text, such as "+0.12 [-0.03, +0.27]"."""
    return f"{figures['difference']:+.2f} [{figures['low']:+.2f}, {figures['high']:+.2f}]"


def side_of_zero(figures: Mapping[str, float]) -> str:
    """The side of zero on which an interval lies, "above" or "below"; "not apart" if it contains zero."""
    if figures["low"] > 0:
        return "above"
    return "below" if figures["high"] < 0 else "not apart"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows), ""]


def read_results(kind: str = "compare") -> list[dict[str, Any]]:
    """The content of all result files KIND_*.json, in the order of their names."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob(f"{kind}_*.json"))]


def differences_of(result: dict[str, Any], name: str) -> Floats:
    """A method's difference from max-probability, mean over seeds: over all rows, then for every resample."""
    mean = result["against_max_probability"][name]["difference"]
    return np.array([mean, *result["draws"][name]])


def all_data_rows(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """One table row for each method that all data sets have; each data set has the same weight."""
    rows = []
    for name in results[0]["draws"]:
        if name == REFERENCE or not all(name in result["draws"] for result in results):
            continue
        mean = difference_interval([differences_of(result, name) for result in results])
        each = [f"{result['against_max_probability'][name]['difference']:+.2f}" for result in results]
        rows.append([name, *each, format_difference(mean), side_of_zero(mean)])
    return rows


def summary_table(results: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown lines of the table over all data sets; empty if there is only one."""
    plain = [result for result in results if not result["settings"]]
    if len(plain) < 2:
        return []
    head = ("method (rule)", *(result["data"] for result in plain), "all, 95 %", "against max-probability")
    return markdown_table(head, all_data_rows(plain))


def other_setting_rows(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Table rows that compare results of other settings of a recipe with those of its default settings."""
    plain = {result["data"]: result for result in results if not result["settings"]}
    rows = []
    for result in results:
        default = plain.get(result["data"])
        if not result["settings"] or default is None or result["seeds"] != default["seeds"]:
            continue
        for name in result["draws"]:
            if name.endswith("(joint)"):
                continue
            gain = difference_interval([differences_of(result, name) - differences_of(default, name)])
            seeds = (r["methods"][name] for r in (result, default))
            means = (np.mean([figures["accuracy_at_half"] for figures in each]) for each in seeds)
            cells = [result["data"], name, " ".join(result["settings"]), *(f"{mean:.2f}" for mean in means)]
            rows.append([*cells, format_difference(gain), side_of_zero(gain)])
    return rows


def timed_point_rows(result: dict[str, Any]) -> list[list[str]]:
    """Table rows of the timed points of every method."""
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


def agreement_table(result: dict[str, Any]) -> list[str]:
    """Markdown lines for a result file of agreement.py: its command, and a table of all comparisons."""
    head = [name.replace("_", " ") for name in result["lines"][0]]
    rows = [[str(value).replace("_", " ") for value in line.values()] for line in result["lines"]]
    return [f"    python {result['command']}", "", *markdown_table(head, rows)]


def comparison_document(results: Sequence[dict[str, Any]], agreements: Sequence[dict[str, Any]] = ()) -> str:
    """The text of docs/comparison.md."""
    lines = [INTRODUCTION, "## Over all data sets", "", *summary_table(results)]
    for result in (result for result in results if not result["settings"]):
        seeds = ", ".join(map(str, result["seeds"]))
        title = f"## {result['data']} ({result['rows']['test']} rows of test, seeds {seeds})"
        lines += [title, "", f"    {result['command']}", "", *markdown_table(HEAD, table_rows(result))]
        if "milliseconds" in result:
            about = result["milliseconds"]
            words = f"Walked at batch 1 ({about['rows']} rows of test, monolith {about['monolith_ms']} ms):"
            head = ("method (rule)", "ms", "% of the monolith", "macs saved %", "accuracy %")
            lines += [words, "", *markdown_table(head, timed_point_rows(result))]
    other = other_setting_rows(results)
    if other:
        names = ("data", "method (rule)", "instead of the default", "accuracy at half", "default's")
        lines += ["## Other settings", "", *markdown_table((*names, "less the default", ""), other)]
    if agreements:
        lines += [AGREEMENT, *(line for result in agreements for line in agreement_table(result))]
    return "\n".join(lines)


def html_page(result: dict[str, Any]) -> str:
    """The HTML page of one comparison: pictures of the frontiers, the table, and the verdicts in words."""
    title, rows = f"{result['data']}: methods compared", table_rows(result)
    verdicts = [f"{row[0]}: {row[-1]}." for row in rows if row[-1]]
    tie = "Every method beats chance and truncation; none is apart from max-probability in every seed."
    words = "".join(f"<li>{html.escape(line)}</li>" for line in verdicts or [tie])
    cells = "".join(f"<tr>{''.join(f'<td>{html.escape(c)}</td>' for c in row)}</tr>" for row in rows)
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in HEAD)
    seeds = ", ".join(map(str, result["seeds"]))
    axes = [axis for axis in AXES if axis != "ms" or "milliseconds" in result]
    pictures = "".join(f"<figure>{frontier_svg(result, axis)}</figure>" for axis in axes)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
        f"<h1>{html.escape(title)}</h1><p>Seeds {seeds}; settings chosen on dev, test read once.</p>"
        f"{pictures}<h2>What beats what</h2><ul>{words}</ul>"
        f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{cells}</tbody></table></div>'
        f"<p>{html.escape(LEGEND)}</p></body></html>\n"
    )


def frontier_of(result: dict[str, Any], name: str, axis: str) -> tuple[np.ndarray, np.ndarray] | None:
    """A method's frontier on an axis, mean over seeds, as x and y values; None for methods without one."""
    if axis == "ms":
        points = sorted((p["share"], p["accuracy"]) for p in result["milliseconds"]["points"].get(name, []))
        return None if not points else (np.array(points)[:, 0], np.array(points)[:, 1])
    lines = [figures["lines"][axis] for figures in result["methods"][name] if "lines" in figures]
    if not lines:
        return None
    saved = np.linspace(max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines), 200)
    mean = np.mean([np.interp(saved, x, y) for x, y in lines], axis=0)
    return (100 - saved if axis == "bops" else saved), mean


def frontier_svg(result: dict[str, Any], axis: str) -> str:
    """The frontiers of all methods on one axis as an SVG element."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "compare"}):
        figure, axes = plt.subplots(figsize=(9, 5), constrained_layout=True)
        for number, (name, seeds) in enumerate(result["methods"].items()):
            look = {"color": COLOURS[number % len(COLOURS)], "label": name}
            line = frontier_of(result, name, axis)
            if line is not None:
                mark = "o" if axis == "ms" else ""
                dash = DASHES[number // len(COLOURS) % len(DASHES)]
                axes.plot(*line, dash, marker=mark, markersize=4, linewidth=1.8, **look)
            elif axis == "macs":
                keys = ("macs_saved", "accuracy_at_half")
                place = [float(np.mean([figures[key] for figures in seeds])) for key in keys]
                axes.plot(*place, "*", markersize=13, **look)
        axes.set(xlabel=AXES[axis], ylabel="accuracy, %")
        if axis == "bops":
            axes.set_xscale("log")
        axes.grid(alpha=0.25)
        legend = axes.legend(loc="best", fontsize="small", frameon=False)
        for label in [*axes.get_xticklabels(), *axes.get_yticklabels(), axes.xaxis.label, axes.yaxis.label]:
            label.set_color(_INK)
        for text in legend.get_texts():
            text.set_color(_INK)
        for spine in axes.spines.values():
            spine.set_color(_INK)
        axes.tick_params(colors=_INK)
        target = io.StringIO()
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    svg = target.getvalue()
    return svg[svg.index("<svg") :].replace(_INK, "currentColor")


@click.command(help=__doc__)
def main() -> None:
    """Write docs/comparison.md from the result files."""
    results = read_results()
    if not results:
        raise click.ClickException(
            f"no compare_*.json in {RESULTS.name}/: run ee-compare and copy its file there"
        )
    write_atomically(DOCUMENT, comparison_document(results, read_results("agreement")))
    click.echo(DOCUMENT.name)


if __name__ == "__main__":
    main()
