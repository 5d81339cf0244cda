"""The HTML page of one comparison: pictures of the frontiers, and the tables."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from offramp.benchmarks.compare.pages import (
    HALF_HEAD,
    HALF_LEGEND,
    LAYERS_HEAD,
    LEGEND,
    NEAR_HEAD,
    PUBLISHED_HEAD,
    RECIPE_HEAD,
    VERDICT_HEAD,
    half_rows,
    layers_rows,
    near_rows,
    published_rows,
    recipe_rows,
    seeds_text,
    verdict_rows,
)
from offramp.runtime.tuning.report import page_style

# Each line has its own dash too, so that lines are distinct without colour.
COLOURS = ("#3b82f6", "#e8590c", "#2f9e44", "#ae3ec9", "#1098ad", "#d6336c", "#b08900", "#868e96")
DASHES = ("-", "--", "-.", ":")
_INK = "#010203"  # replaced by the page's own colour of text
_VIEWPORT = '<meta name="viewport" content="width=device-width, initial-scale=1">'
AXES = {
    "macs": "multiply-accumulates saved, %",
    "bops": "bit operations spent, % (logarithmic)",
    "layers": "layers saved, %",
    "ms": "time, % of the fp32 graph's",
}


def html_page(result: Mapping[str, Any]) -> str:
    """The HTML page of one comparison: pictures of the frontiers and all tables."""
    title = f"{result['data']}: methods compared"
    axes = [axis for axis in AXES if axis != "ms" or "milliseconds" in result]
    pictures = "".join(
        f"<figure><h2>Accuracy against {AXES[axis].split(',')[0]}</h2>{frontier_svg(result, axis)}</figure>"
        for axis in axes
    )
    legend = "".join(f"<li>{html.escape(line)}</li>" for line in LEGEND[2:].split("\n- "))
    parts = [
        _table(f"Scores against {result['reference']}", VERDICT_HEAD, verdict_rows(result)),
        f"<ul>{legend}</ul>",
        _table("Recipes", RECIPE_HEAD, recipe_rows(result)),
        _table("Points that training set", PUBLISHED_HEAD, published_rows(result)),
        _table("Layers saved at a loss, %", LAYERS_HEAD, layers_rows(result)),
        _table("At the point that saves half", HALF_HEAD, half_rows(result)),
        f"<p>{html.escape(HALF_LEGEND)}</p>",
    ]
    if "milliseconds" in result:
        about = result["milliseconds"]
        words = f"Within {about['max_drop']:g} points of full depth of {about['full_depth_of']}, on dev"
        parts.append(_table(words, NEAR_HEAD, near_rows(result)))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{_VIEWPORT}\n'
        f"<title>{html.escape(title)}</title>\n<style>{page_style()}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{html.escape(title)}</h1>\n<p>{html.escape(seeds_text(result))}; settings chosen on dev, test "
        f'read once.</p>\n<div class="pictures">{pictures}</div>\n{"".join(parts)}\n</main>\n</body>\n'
        "</html>\n"
    )


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with its heading; nothing without rows."""
    if not rows:
        return ""
    cells = "".join(f"<tr>{''.join(f'<td>{html.escape(c)}</td>' for c in row)}</tr>" for row in rows)
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{cells}</tbody></table>"
    return f'<h2>{html.escape(title)}</h2><div class="wide">{table}</div>'


def frontier_of(result: Mapping[str, Any], name: str, axis: str) -> tuple[np.ndarray, np.ndarray] | None:
    """A method's frontier on an axis, mean over seeds, as x and y values; None for methods without one."""
    if axis == "ms":
        points = sorted((p["share"], p["accuracy"]) for p in result["milliseconds"]["points"].get(name, []))
        return None if not points else (np.array(points)[:, 0], np.array(points)[:, 1])
    saved, accuracy = map(np.array, result["methods"][name]["lines"][axis])
    return (100 - saved if axis == "bops" else saved), accuracy


def frontier_svg(result: Mapping[str, Any], axis: str) -> str:
    """The frontiers of all methods on one axis as an SVG element."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "compare",
            "text.color": _INK,
            "axes.labelcolor": _INK,
            "axes.edgecolor": _INK,
            "xtick.color": _INK,
            "ytick.color": _INK,
        }
    ):
        # So small that text can be read where a phone shows the picture.
        figure, axes = plt.subplots(figsize=(4.8, 4.6), layout="constrained")
        axes.spines[["top", "right"]].set_visible(False)
        for number, name in enumerate(result["methods"]):
            line = frontier_of(result, name, axis)
            if line is not None:
                mark = "o" if axis == "ms" else ""
                dash = DASHES[number // len(COLOURS) % len(DASHES)]
                look = {"color": COLOURS[number % len(COLOURS)], "label": name}
                axes.plot(*line, dash, marker=mark, markersize=4, linewidth=1.8, **look)
        if axis == "macs":
            for number, (name, entry) in enumerate(result["recipes"].items()):
                place = [
                    float(np.mean([seed[key] for seed in entry["first_right"]]))
                    for key in ("macs_saved", "accuracy")
                ]
                colour = COLOURS[number % len(COLOURS)]
                star = f"first right ({name})"
                axes.plot(*place, "*", markersize=11, color=colour, label=star, linestyle="none")
        axes.set(xlabel=AXES[axis], ylabel="accuracy, %")
        if axis == "bops":
            axes.set_xscale("log")
            low, high = axes.get_xlim()
            ticks = [percent for percent in (1, 2, 5, 10, 20, 50, 100) if low <= percent <= high]
            axes.set_xticks(ticks, [str(percent) for percent in ticks])
            axes.minorticks_off()
        axes.grid(alpha=0.25)
        # Below the picture: inside it would cover lines.
        look = {"frameon": False, "fontsize": 8, "handlelength": 1.6, "columnspacing": 1.0}
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, **look)
        target = io.StringIO()
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    svg = target.getvalue()
    return svg[svg.index("<svg") :].replace(_INK, "currentColor")
