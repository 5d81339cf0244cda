"""The output of ee-bench: tables of plain text, and one HTML page that loads nothing.

matplotlib (extra `bench`) draws the pictures and is imported for them only.
"""

from __future__ import annotations

import io
import os
import platform
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any

from offramp.runtime.errors import BadSetting, EngineUnavailable
from offramp.runtime.rules.speculative import source_name

Figures = Mapping[str, Any]
_TIMES = ("mean ms", "p50 ms", "p95 ms", "p99 ms", "ratio (5..95 %)")
ACCURACY = "accuracy"  # the quality of answers if the figures name no other one
COLUMNS = ("candidate", *_TIMES, "exit", ACCURACY, "in time", "realised", "rows/s", "in bulk", "MB")
QUALITIES = {
    ACCURACY: "percent of the rows whose answer is the label",
    "f1": "F1 in percent of the labels, or entities, of all rows together",
    "spearman": "rank correlation (Spearman's) of answers and labels, in percent",
    "cosine": "mean cosine of the answers and those of full depth, in percent",
}
LEGEND = {
    "ratio": "time over the reference's for the same row in the same round: median, 5th to 95th percentile",
    "exit": "mean number of the exit that answered, counted from 1",
    ACCURACY: QUALITIES[ACCURACY],
    "in time": "percent of the rows that are answered within the budget",
    "realised": "share of the time saved over share of the multiply-accumulates saved",
    "rows/s": "rows per second in batches of rows of like length; in bulk: realised, of that time",
    "MB": "size of the graph files",
}
GENERATION_COLUMNS = (
    *("candidate", "tokens/s", "ratio (5..95 %)", "first ms", "p50 ms", "p95 ms"),
    *("depth", "blocks run", "same"),
)
GENERATION_LEGEND = {
    "ratio": "time over full depth's for the same prompt and round: median, 5th to 95th percentile",
    "first ms": "median time to the first token; p50 and p95 are of the tokens after it",
    "depth": "mean number of blocks after which tokens were predicted, without the first tokens",
    "blocks run": "mean number of blocks run for a token, drafts and deferred tokens included",
    "same": "percent of the answers that equal those of full depth, token for token",
}
_DEMO_STYLE = Path(__file__).parents[2] / "web" / "style.css"  # in a checkout and in the installed wheel
# Readable on white and on black.
_FIRST = ("#3b82f6", "#e8590c", "#2f9e44", "#ae3ec9", "#1098ad", "#d6336c", "#b08900", "#868e96")
COLOURS = (*_FIRST, "#a0522d", "#20c997", "#f783ac", "#5f6fb3")
_INK = "#010203"  # placeholder for the page's colour of text


def check_output_files(json_file: Path | None, page_file: Path | None) -> None:
    """Check that the output files can be written, before minutes of measuring.

    Raises BadSetting if a folder is missing, EngineUnavailable for a page without matplotlib.
    """
    for path in (json_file, page_file):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            what = "is a folder" if path.is_dir() else f"there is no folder {path.parent}"
            raise BadSetting(f"{path}: {what}; name a file in a folder that is there")
    if page_file is not None:
        _import_matplotlib("figure")


def machine_facts() -> dict[str, str]:
    """Facts of this machine and the time, which are the first entries of every page and file of figures."""
    return {
        "when": datetime.now().astimezone().isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def write_atomically(path: Path, text: str) -> None:
    """Write a text file beside its target, then rename it, so that the target is never half written."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8", newline="\n")
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def quality_name(figures: Figures) -> str:
    """The name of the quality of the answers, a name in QUALITIES."""
    return str(figures["about"].get("quality", ACCURACY))


def columns(figures: Figures) -> list[str]:
    """The head of the table of candidates: COLUMNS with the name of the quality."""
    return [quality_name(figures) if name == ACCURACY else name for name in COLUMNS]


def legend(figures: Figures) -> dict[str, str]:
    """What the columns mean, by name, in the order of LEGEND."""
    quality = quality_name(figures)
    return {
        quality if name == ACCURACY else name: QUALITIES[quality] if name == ACCURACY else text
        for name, text in LEGEND.items()
    }


def candidate_rows(figures: Figures) -> list[list[str]]:
    """The table rows of a bundle that answers texts or images: one for each candidate, see columns."""
    quality = quality_name(figures)
    rows = []
    for candidate in figures["candidates"]:
        variant = "" if candidate["variant"] in candidate["name"] else f" ({candidate['variant']})"
        rows.append(
            [
                candidate["name"] + variant,
                *(f"{candidate[name]:.3f}" for name in ("mean_ms", "p50_ms", "p95_ms", "p99_ms")),
                f"{candidate['ratio']:.3f} ({candidate['ratio_p5']:.2f}..{candidate['ratio_p95']:.2f})",
                f"{candidate['mean_exit']:.2f}",
                _format_number(candidate[quality], ".1f"),
                f"{100 * candidate['goodput']:.1f}",
                _format_number(candidate["realised"], ".2f"),
                _format_number(candidate["rows_per_second"], ".0f"),
                _format_number(candidate["realised_in_bulk"], ".2f"),
                f"{candidate['bytes'] / 1e6:.1f}",
            ]
        )
    return rows


def classification_text(figures: Figures) -> str:
    """The text with all figures of a bundle that answers texts or images.

    Candidates, segments, cold start, conditions.
    """
    lines = align_columns([columns(figures), *candidate_rows(figures)])
    lines += ["", *(f"{name:9} {text}" for name, text in legend(figures).items())]
    lines += [
        "",
        *align_columns([["segment", "ms"], *([s["name"], f"{s['ms']:.3f}"] for s in figures["segments"])]),
    ]
    lines += [
        "",
        *align_columns([["fresh process", "s to the first answer", "peak MB"], *_cold_start_rows(figures)]),
    ]
    lines += ["", *(f"{name:14} {text}" for name, text in conditions(figures))]
    return "\n".join(lines)


def generation_text(figures: Figures) -> str:
    """The text with all figures of a bundle that generates text: candidates, drafts, depths, conditions."""
    candidates = figures["candidates"]
    rows = [list(GENERATION_COLUMNS)]
    for candidate in candidates:
        ratio = "-"
        if candidate["ratio"] is not None:
            ratio = f"{candidate['ratio']:.3f} ({candidate['ratio_p5']:.2f}..{candidate['ratio_p95']:.2f})"
        numbers = [_format_number(candidate[name], ".2f") for name in _GENERATION_NUMBERS]
        rows.append(
            [
                candidate["name"],
                _format_number(candidate["tokens_per_s"], ".1f"),
                ratio,
                *numbers,
                f"{100 * candidate['same']:.1f}",
            ]
        )
    lines = [*align_columns(rows), "", *(f"{name:11} {text}" for name, text in GENERATION_LEGEND.items())]
    for candidate in candidates:
        for exit, share in candidate.get("drafts", {}).get("accepted", {}).items():
            offered = candidate["drafts"]["offered"][exit]
            name = f"{candidate['name']}: {source_name(exit)}"
            lines += ["", f"{name}: {share:.1%} of {offered} drafts were accepted"]
    positions = [str(line["from"]) for line in candidates[0]["by_position"]]
    means = [
        [candidate["name"], *(f"{line['mean']:.2f}" for line in candidate["by_position"])]
        for candidate in candidates
    ]
    lines += ["", *align_columns([["mean depth from token", *positions], *means]), ""]
    about = {name: value for name, value in figures["about"].items() if value != ""}
    return "\n".join([*lines, *(f"{name.replace('_', ' '):22} {value}" for name, value in about.items())])


def conditions(figures: Figures) -> list[tuple[str, str]]:
    """The conditions under which the figures were measured, as pairs of name and text."""
    about = dict(figures["about"])
    about["rows"] = f"{about['rows']} of {about.pop('rows_there')}"
    about["bundle"] = f"{about['bundle']} ({about.pop('bundle_bytes') / 1e6:.1f} MB)"
    about["left_out"] = "; ".join(about["left_out"])
    return [(name.replace("_", " "), str(value)) for name, value in about.items() if value != ""]


def html_page(figures: Figures) -> str:
    """The HTML page of all figures, without scripts or external resources."""
    parts, quality = [], quality_name(figures).capitalize()
    for number, (title, caption, draw) in enumerate(_PICTURES):
        svg = _picture_svg(draw, figures, f"p{number}")
        body = svg or f"<p>The rows have no labels, so there is no {quality_name(figures)} to show.</p>"
        parts.append(
            f"<figure><h2>{title.format(quality=quality)}</h2>{body}<figcaption>{caption}</figcaption></figure>"
        )
    about = figures["about"]
    intro = f"{about['cpu']}, {about['threads']} threads, {about['when']}. Reference: {about['reference']}."
    meanings = _html_list(legend(figures).items())
    listed = _html_list(conditions(figures))
    cold = _html_table(
        [["fresh process", "seconds to the first answer", "peak MB"], *_cold_start_rows(figures)]
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>What early exit saves</title>
<style>{page_style()}</style>
</head>
<body>
<main>
<h1>What early exit saves</h1>
<p>{escape(intro)}</p>
{_html_table([columns(figures), *candidate_rows(figures)])}
<details><summary>What the columns mean</summary><dl>{meanings}</dl></details>
<div class="pictures">{"".join(parts)}</div>
<h2>Cold start</h2>
{cold}
<h2>Measured on, and how</h2>
<dl>{listed}</dl>
</main>
</body>
</html>
"""


def page_style() -> str:
    """The CSS of a page of figures: the colours of the demo page, light and dark, and tables and pictures."""
    return page_colours() + _STYLE


def page_colours() -> str:
    """The custom properties that all pages share: the beginning of the demo page's style sheet."""
    return _DEMO_STYLE.read_text(encoding="utf-8").partition("\n* {")[0]


_GENERATION_NUMBERS = ("first_ms", "p50_ms", "p95_ms", "depth", "blocks_run")
_STYLE = """
:root { color-scheme: light dark }
* { box-sizing: border-box }
body { margin: 0; background: var(--back); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif }
main { max-width: 76rem; margin: 0 auto; padding: 1.5rem 1rem 3rem }
h1 { margin: 0; font-size: 1.5rem; line-height: 1.25; overflow-wrap: anywhere }
h2 { margin: 2rem 0 .5rem; font-size: 1rem; font-weight: 600; line-height: 1.25 }
p { margin: .25rem 0 1rem; overflow-wrap: anywhere }
p, li, summary, figcaption, dt { color: var(--soft) }
li, summary, figcaption, table, dl { font-size: .875rem }
.wide, figure { border: 1px solid var(--line); border-radius: .5rem; background: var(--card) }
.wide { overflow-x: auto }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap }
th, td { padding: .35rem .6rem; text-align: right; border-bottom: 1px solid var(--line) }
tbody tr:last-child td { border-bottom: 0 }
th { font-weight: 600; color: var(--soft) }
th:first-child, td:first-child { position: sticky; left: 0; text-align: left; background: var(--card) }
details { margin: .75rem 0 }
ul { padding-left: 1.25rem }
summary { cursor: pointer }
:focus-visible { outline: 3px solid var(--lit); outline-offset: 2px }
.pictures { display: grid; gap: 1rem; margin: 1rem 0;
            grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)) }
figure { min-width: 0; margin: 0; padding: .75rem 1rem }
figure h2 { margin: 0 0 .5rem }
svg { display: block; width: 100%; height: auto }
dl { display: grid; grid-template-columns: minmax(5rem, max-content) 1fr; gap: .2rem 1rem }
dd { margin: 0; min-width: 0; overflow-wrap: anywhere }
@media (max-width: 34rem) {
  table { font-size: .8125rem }
  figure { padding: .75rem .5rem }
  th, td { padding: .35rem .45rem }
  th:first-child, td:first-child { max-width: 9rem; white-space: normal }
}
"""


def _draw_accuracy(axes: Any, figures: Figures) -> bool:
    """Draw every candidate by mean time and quality; False without labels."""
    quality = quality_name(figures)
    known = [candidate for candidate in figures["candidates"] if candidate[quality] is not None]
    for candidate in known:
        look = {
            "color": _colour(figures, candidate),
            "label": _escape_name(candidate["name"]),
            "s": 45,
            "zorder": 3,
        }
        axes.scatter([candidate["mean_ms"]], [candidate[quality]], marker=_MARKERS[candidate["kind"]], **look)
    axes.set(xlabel="mean milliseconds, one by one", ylabel=f"{quality}, %")
    axes.set_xlim(left=0)
    return bool(known)


def _draw_exits(axes: Any, figures: Figures) -> bool:
    """Draw the number of rows at each exit for the candidates that exit early."""
    exiting = [
        candidate for candidate in figures["candidates"] if candidate["kind"] in ("walk", "random", "nested")
    ]
    exiting = exiting or figures["candidates"][:1]
    width = 0.8 / len(exiting)
    for number, candidate in enumerate(exiting):
        left = [k + 1 - 0.4 + (number + 0.5) * width for k in range(len(candidate["exits"]))]
        axes.bar(
            left,
            candidate["exits"],
            width,
            color=_colour(figures, candidate),
            label=_escape_name(candidate["name"]),
        )
    axes.set(xlabel="exit", ylabel="rows", xticks=range(1, len(exiting[0]["exits"]) + 1))
    return True


def _draw_segments(axes: Any, figures: Figures) -> bool:
    """Draw the milliseconds of the stem and of each segment."""
    names = ["stem", *(str(number) for number in range(1, len(figures["segments"])))]
    axes.bar(names, [segment["ms"] for segment in figures["segments"]], color=COLOURS[0])
    axes.set(xlabel="segment", ylabel="milliseconds")
    return True


def _draw_latency(axes: Any, figures: Figures) -> bool:
    """Draw the share of the rows answered within a time, up to 1.1 times the slowest p95."""
    for candidate in figures["candidates"]:
        look = {
            "color": _colour(figures, candidate),
            "label": _escape_name(candidate["name"]),
            "linewidth": 1.5,
        }
        axes.plot(
            candidate["percentiles_ms"], range(101), "-" if candidate["kind"] in _WALKS else "--", **look
        )
    axes.axvline(figures["about"]["budget_ms"], color=_INK, linewidth=0.8, linestyle=":")
    axes.set(xlabel="milliseconds", ylabel="rows answered, %")
    axes.set_xlim(0, 1.1 * max(candidate["p95_ms"] for candidate in figures["candidates"]))
    return True


_WALKS = ("walk", "full", "random")
_MARKERS = {"walk": "o", "full": "D", "random": "x", "monolith": "s", "nested": "^", "truncated": "v"}
_PICTURES: Sequence[tuple[str, str, Callable[[Any, Figures], bool]]] = (
    ("{quality} against time", "Up and to the left is better.", _draw_accuracy),
    ("Where rows leave", "Rows at each exit, mean of the rounds.", _draw_exits),
    ("Time per segment", "Median of rows that go to the last exit.", _draw_segments),
    (
        "How long rows take",
        "All rows and rounds, up to the slowest p95; walks are solid lines, the dotted line is the budget.",
        _draw_latency,
    ),
)


def _picture_svg(draw: Callable[[Any, Figures], bool], figures: Figures, prefix: str) -> str:
    """One picture as an SVG element in the page's colour of text; "" if there is nothing to draw."""
    matplotlib = _import_matplotlib("")
    ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    settings = {"svg.fonttype": "none", "svg.hashsalt": prefix, **dict.fromkeys(ink, _INK)}
    target = io.StringIO()
    with matplotlib.rc_context(settings):
        # So small that text can be read where a phone shows the picture.
        figure = _import_matplotlib("figure").Figure(figsize=(4.8, 3.6), layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.patch.set_visible(False)
        if not draw(axes, figures):
            return ""
        handles, names = axes.get_legend_handles_labels()
        if names:  # below the picture: inside it would cover lines
            look = {"frameon": False, "fontsize": 8.5, "labelcolor": _INK}
            figure.legend(handles, names, loc="outside lower center", ncols=2, **look)
        figure.savefig(target, format="svg", transparent=True)
    svg = re.sub(r"<metadata>.*?</metadata>", "", target.getvalue(), flags=re.DOTALL)
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    # Ids must be unique in a page, which has several pictures.
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)


def _import_matplotlib(part: str) -> Any:
    try:
        return import_module(f"matplotlib.{part}".rstrip("."))
    except ImportError as problem:
        raise EngineUnavailable(
            f"--report draws with matplotlib, which cannot be imported ({problem}); "
            "pip install 'offramp[bench]'"
        ) from problem


def _cpu_name() -> str:
    """The processor's name, if the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _cold_start_rows(figures: Figures) -> list[list[str]]:
    return [
        [start["name"], f"{start['seconds']:.2f}", _format_number(start["peak_bytes"] / 1e6 or None, ".0f")]
        for start in figures["cold_start"]
    ]


def _format_number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _colour(figures: Figures, candidate: Figures) -> str:
    """The colour of a candidate, the same in all pictures."""
    return COLOURS[[other["name"] for other in figures["candidates"]].index(candidate["name"]) % len(COLOURS)]


def _escape_name(text: str) -> str:
    """A name escaped for matplotlib, which reads $ as mathematics and hides names that begin with _."""
    return text.replace("$", r"\$").removeprefix("_")


def align_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a plain-text table, its first column aligned to the left, the others to the right."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _html_list(pairs: Iterable[tuple[str, str]]) -> str:
    return "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in pairs)


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    body = "".join(f"<tr>{''.join(f'<td>{escape(c)}</td>' for c in row)}</tr>" for row in rows[1:])
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
