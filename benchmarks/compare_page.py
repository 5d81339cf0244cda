"""The page of ee-compare: frontiers as one picture, the table, and in words what beats what; one file."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

# Told apart without colour too: each has a dash of its own.
COLOURS = ("#3b82f6", "#e8590c", "#2f9e44", "#ae3ec9", "#1098ad", "#d6336c", "#b08900", "#868e96")
DASHES = ("-", "--", "-.", ":")
_INK = "#010203"  # stands for the page's own colour of text
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
HOW = """
At the setting that was the most accurate on dev among those that save half of the multiply-accumulates or
more: accuracy (standard deviation over seeds), share saved of multiply-accumulates and of bit operations, the
accuracy of exits drawn by chance with the same histogram (random) and of a truncated network of equal cost
(static), calibration error (ece, 15 bins of equal mass, raw and at the temperatures of dev) and mean size of
95 % conformal sets, time as a share of the single graph's, all on test, in percent. Against max-probability
on the joint checkpoint between 30 and 60 % saved: area above and below its line, and the difference of the
means with its 95 % interval over rows drawn anew. elue: mean over the line of what it is above truncated
networks.
"""
AXES = {
    "macs": "multiply-accumulates saved, %",
    "bops": "bit operations spent, % (logarithmic)",
    "layers": "layers saved, %",
    "ms": "time, % of the single graph's",
}


def page(result: dict[str, Any], head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """One HTML page; head and rows: the table of ee-compare, method first and verdict last."""
    title = f"{result['data']}: methods compared"
    said = [f"{row[0]}: {row[-1]}." for row in rows if row[-1]]
    tie = "Every method beats chance and truncation; none is apart from max-probability in every seed."
    words = "".join(f"<li>{html.escape(line)}</li>" for line in said or [tie])
    cells = "".join(f"<tr>{''.join(f'<td>{html.escape(c)}</td>' for c in row)}</tr>" for row in rows)
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    seeds = ", ".join(map(str, result["seeds"]))
    axes = [axis for axis in AXES if axis != "ms" or "milliseconds" in result]
    pictures = "".join(f"<figure>{picture(result, axis)}</figure>" for axis in axes)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
        f"<h1>{html.escape(title)}</h1><p>Seeds {seeds}; settings chosen on dev, test read once.</p>"
        f"{pictures}<h2>What beats what</h2><ul>{words}</ul>"
        f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{cells}</tbody></table></div>'
        f"<p>{html.escape(HOW)}</p></body></html>\n"
    )


def line_of(result: dict[str, Any], name: str, axis: str) -> tuple[np.ndarray, np.ndarray] | None:
    """A method's line on an axis: the mean over seeds where every seed is; None where it has none there."""
    if axis == "ms":
        points = sorted((p["share"], p["accuracy"]) for p in result["milliseconds"]["points"].get(name, []))
        return None if not points else (np.array(points)[:, 0], np.array(points)[:, 1])
    lines = [one["lines"][axis] for one in result["methods"][name] if "lines" in one]
    if not lines:
        return None
    grid = np.linspace(max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines), 200)
    mean = np.mean([np.interp(grid, x, y) for x, y in lines], axis=0)
    return (100 - grid if axis == "bops" else grid), mean


def picture(result: dict[str, Any], axis: str) -> str:
    """Frontiers on one axis as SVG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "compare"}):
        figure, axes = plt.subplots(figsize=(9, 5), constrained_layout=True)
        for number, (name, seeds) in enumerate(result["methods"].items()):
            look = {"color": COLOURS[number % len(COLOURS)], "label": name}
            line = line_of(result, name, axis)
            if line is not None:
                mark = "o" if axis == "ms" else ""
                dash = DASHES[number // len(COLOURS) % len(DASHES)]
                axes.plot(*line, dash, marker=mark, markersize=4, linewidth=1.8, **look)
            elif axis == "macs":
                where = [
                    float(np.mean([one[key] for one in seeds])) for key in ("macs_saved", "accuracy_at_half")
                ]
                axes.plot(*where, "*", markersize=13, **look)
        axes.set(xlabel=AXES[axis], ylabel="accuracy, %")
        if axis == "bops":
            axes.set_xscale("log")
        axes.grid(alpha=0.25)
        legend = axes.legend(loc="best", fontsize="small", frameon=False)
        for part in [*axes.get_xticklabels(), *axes.get_yticklabels(), axes.xaxis.label, axes.yaxis.label]:
            part.set_color(_INK)
        for text in legend.get_texts():
            text.set_color(_INK)
        for spine in axes.spines.values():
            spine.set_color(_INK)
        axes.tick_params(colors=_INK)
        target = io.StringIO()
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    drawn = target.getvalue()
    return drawn[drawn.index("<svg") :].replace(_INK, "currentColor")
