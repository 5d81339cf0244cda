"""Write the tables of README.md and of pages in docs/ from the result files of the benchmarks.

    python benchmarks/figures.py            # make bench ends with it; make figures

Each file holds two marks; only the text between them is written: one table of five rows in README.md, the
tables of all benchmarks in docs/measured.md, those of risk.py in docs/operating-points.md, of fleet.py in
docs/fleet.md and of serving.py in docs/serving.md. Every table of times names the machine and the date of its
measurement.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from offramp.benchmarks.compare.frontiers import HEADLINE
from offramp.benchmarks.compare.pages import (
    markdown_table,
    read_comparisons,
    read_result_file,
    read_results,
    summary_table,
)
from offramp.benchmarks.fleet_pages import fleet_tables
from offramp.benchmarks.int8 import int8_tables
from offramp.benchmarks.risk import risk_tables
from offramp.benchmarks.serving_pages import serving_tables
from offramp.runtime.rules.speculative import source_name

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- figures: make figures -->", "<!-- end of figures -->"
ALONE, WITH = "walk / one graph, last exit alone", "walk / one graph with all exits"
LOOP = "bare loop / one graph, last exit alone"
# Rows of one data set that the tables show, in this order; all of them are in the JSON.
SUMMARY_POINTS = ("walk dev-1.0", "walk int8-dev-1.0")
GRAPHS = ("monolith", "monolith int8", "walk full depth", "nested if", "random exits")
DECODER = "SmolLM2-135M"
LOOKUPS = ("beginnings", "summaries", "edits")  # results of drafts by lookup, by the kind of the text


def read_result(name: str) -> dict[str, Any] | None:
    """The content of the result file NAME.json, or None if there is no such file."""
    file = RESULTS / f"{name}.json"
    return read_result_file(file) if file.is_file() else None


def read_decoder(kind: str) -> dict[str, Any] | None:
    """The content of the result file KIND_smollm2.json of the decoder benchmarks, or None."""
    return read_result(f"{kind}_smollm2")


def machine_text(about: dict[str, Any]) -> str:
    """The machine, its threads and the date of a measurement, as text for a table's title."""
    threads = f", {about['threads']} threads" if "threads" in about else ""
    ort = f", onnxruntime {about['onnxruntime']}" if "onnxruntime" in about else ""
    return f"{about['cpu']}{threads}{ort}, {about['when'][:10]}"


def two_decimals(value: float | None) -> str:
    """A number with two decimals, or a dash for None."""
    return "-" if value is None else f"{value:.2f}"


def rows_to_show(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of an early-exit result that the table shows.

    They are the walks at their points, the single graphs, random exits, and the most accurate truncated graph
    that is not slower than the first walk.
    """
    walks = [row for row in rows if row["kind"] == "walk"]
    static = [row for row in rows if row["kind"] == "truncated"]
    fast = [row for row in static if row["mean_ms"] <= 1.05 * walks[0]["mean_ms"]]
    best = max(fast, key=lambda row: row["accuracy"], default=None)
    rows_by_name = {row["name"]: row for row in rows}
    graphs = [rows_by_name[name] for name in GRAPHS if name in rows_by_name]
    return [*walks, *graphs, *([best] if best else [])]


def early_exit_tables() -> list[str]:
    """Markdown lines of one table for each checkpoint that early_exit.py measured."""
    head = ("", "accuracy %", "mean exit", "ms", "x fp32", "x int8", "x static", "realised", "in bulk")
    columns = (
        *("accuracy", "mean_exit", "mean_ms", "times_fp32_monolith", "times_int8_monolith"),
        *("times_static", "realised", "realised_in_bulk"),
    )
    lines: list[str] = []
    for result in read_results("early_exit"):
        about, rows = result["about"], []
        for row in rows_to_show(result["rows"]):
            variant = "" if row["variant"] in row["name"] else f" ({row['variant']})"
            rows.append([row["name"] + variant, *(two_decimals(row[name]) for name in columns)])
        where = f"{about['rows']} rows of test; {machine_text(about)}"
        lines += [f"**{about['model']} on {about['data']}** ({where})", "", *markdown_table(head, rows)]
    return lines


def early_exit_summary_table() -> list[str]:
    """Markdown lines of a table of the points dev-1.0, one row for each checkpoint and precision."""
    head = ("", "full depth %", "early exit %", "mean exit", "x fp32", "x int8", "x static", "realised")
    columns = ("accuracy", "mean_exit", "times_fp32_monolith", "times_int8_monolith", "times_static")
    rows: list[list[str]] = []
    about: dict[str, Any] = {}
    for result in read_results("early_exit"):
        about = result["about"]
        rows_by_name = {row["name"]: row for row in result["rows"]}
        for name in SUMMARY_POINTS:
            row = rows_by_name[name]
            realised = row["realised"] if row["variant"] == "fp32" else None
            cells = [f"{about['model']} on {about['data']}, {row['variant']}"]
            cells += [two_decimals(rows_by_name["walk full depth"]["accuracy"])]
            rows.append([*cells, *(two_decimals(row[column]) for column in columns), two_decimals(realised)])
    if not rows:
        return []
    title = "**Early exit against the same network as one graph**, point dev-1.0, batch 1"
    return [f"{title} ({machine_text(about)})", "", *markdown_table(head, rows)]


def attach_tables() -> list[str]:
    """One table for each attach_DATA.json: exits on a fine-tuned model, by the agreement asked for on dev."""
    lines = []
    for file in sorted(RESULTS.glob("attach_*.json")):
        result = read_result_file(file)
        rows = []
        for method in result["methods"]:
            for point in method["points"]:
                test = point["test"]
                rows.append(
                    [
                        method["name"],
                        f"{100 - point['loss']:g}",
                        f"{method['full_depth']:.2f}",
                        f"{test['accuracy']:.2f}",
                        f"{test['accuracy'] - result['user_model']:+.2f}",
                        f"{test['agreement']:.2f}",
                        f"{test['macs_saved']:.1f}",
                    ]
                )
        head = [
            "exits",
            "agree on dev, %",
            "full depth",
            "accuracy",
            "less the model as given",
            "agree",
            "MACs saved",
        ]
        title = f"**{result['data']}**, test, model as given {result['user_model']:.2f} % ({file.name})"
        lines += [title, "", f"    python {result['command']}", "", *markdown_table(head, rows)]
        if (same := result.get("bundle")) is not None:
            lines += [
                f"Bundle at full depth against the model in transformers, {same['rows']} rows of test: "
                f"largest difference of logits {same['largest_difference']:.1e}, labels equal in "
                f"{same['labels_equal']:.2f} %.",
                "",
            ]
    if lines:
        text = (
            "Exits of recipe `attach` learned from texts without labels, and points were "
            "chosen on dev by agreement with full depth; accuracy and agreement are of test, percent."
        )
        lines = ["**Exits on a fine-tuned model**", "", text, "", *lines]
    return lines


def attach_times_table() -> list[str]:
    """Times of attached exits beside the user's own model as one graph, from ms_attached_DATA.json."""
    head = ("data", "rows", "point", "accuracy", "less the model as given", "mean exit", "x fp32", "x int8")
    rows, about = [], None
    for file in sorted(RESULTS.glob("ms_attached_*.json")):
        result = read_result_file(file)
        about = result["about"]
        named = {candidate["name"]: candidate for candidate in result["candidates"]}
        given, small = named["monolith"], named["monolith int8"]
        for walk in (
            c for c in result["candidates"] if c["kind"] == "walk" and c["name"] != "walk full depth"
        ):
            rows.append(
                [
                    *(
                        about["data"].partition("/")[0],
                        str(about["rows"]),
                        walk["name"].removeprefix("walk "),
                    ),
                    f"{walk['accuracy']:.2f}",
                    f"{walk['accuracy'] - given['accuracy']:+.2f}",
                    f"{walk['mean_exit']:.2f}",
                    f"{given['mean_ms'] / walk['mean_ms']:.2f}",
                    f"{small['mean_ms'] / walk['mean_ms']:.2f}",
                ]
            )
    if about is None:
        return []
    title = f"**Attached exits beside the model as one graph**, batch 1 ({machine_text(about)})"
    text = (
        "Points were chosen on labelled dev; x: time of the model as one graph, in fp32 and in int8 with one "
        "scale, over the walk's. Made by ee-split --baselines --dev and ee-bench --rows 600."
    )
    return [title, "", text, "", *markdown_table(head, rows)]


def task_tables() -> list[str]:
    """One table for each task_DATA.json: what ee-bench measured of a bundle of a task beside one label."""
    lines: list[str] = []
    for file in sorted(RESULTS.glob("task_*.json")):
        result = read_result_file(file)
        bench = result["bench"]
        about, candidates = bench["about"], bench["candidates"]
        quality, times = about["quality"], {c["name"]: c["mean_ms"] for c in candidates}
        rows = [
            [
                c["name"] if c["variant"] in ("fp32", c["name"][-4:]) else f"{c['name']} ({c['variant']})",
                two_decimals(c[quality]),
                f"{c['mean_exit']:.2f}",
                f"{100 * (1 - c['macs_share']):.1f}",
                f"{c['mean_ms']:.2f}",
                *(f"{times[graph] / c['mean_ms']:.2f}" if graph in times else "" for graph in GRAPHS[:2]),
            ]
            for c in candidates
        ]
        head = ("", f"{quality} %", "mean exit", "MACs saved", "ms", "x fp32", "x int8")
        title = f"**{file.stem}** ({about['rows']} rows of test; {machine_text(about)})"
        commands = [f"    {command}" for command in result["commands"]]
        lines += [title, "", *commands, "", *markdown_table(head, rows)]
    return ["**Tasks beside one label**, by `ee-bench` at batch 1", "", *lines] if lines else []


def retrieval_tables() -> list[str]:
    """One table for each retrieval_DATA.json: neighbours that early embeddings find."""
    lines: list[str] = []
    for file in sorted(RESULTS.glob("retrieval_*.json")):
        result = read_result_file(file)
        names = [name for name in result["settings"][0] if name != "setting"]
        rows = [[row["setting"], *(f"{row[name]:.1f}" for name in names)] for row in result["settings"]]
        title = f"**Retrieval, {file.stem}**: {result['queries']} queries, {result['corpus']} texts, percent"
        head = ("", *(name.replace("_", " ") for name in names))
        lines += [title, "", f"    python {result['command']}", "", *markdown_table(head, rows)]
    return lines


def recipe_table() -> list[str]:
    """Markdown lines of the table that compares all methods over all data sets; empty with fewer than two."""
    results = read_comparisons().get("", [])
    table = summary_table(results)
    if not table:
        return []
    title = (
        f"**Which recipe**: accuracy on test less that of {results[0]['reference']}, mean between "
        f"{HEADLINE} % of multiply-accumulates saved (`docs/comparison.md`)"
    )
    return [title, "", *table]


def overhead_table() -> list[str]:
    """Markdown lines of the table of full walks against one graph, with the bare loop as a lower bound."""
    result = read_result("overhead")
    if result is None:
        return []
    names = ("walk / no exits", "floor / no exits", "walk / same exits", "walk / nested if")
    rows = []
    for row in result["rows"]:
        same = f"{row[WITH][0]:.3f}" if WITH in row else ""
        nested = row.get("walk / nested if, by exit", [])
        span = f"{min(nested):.3f} to {max(nested):.3f}" if nested else ""
        name = f"{row['network']} {row['variant']}"
        rows.append([name, row["length"], f"{row[ALONE][0]:.3f}", f"{row[LOOP][0]:.3f}", same, span])
    title = f"**A full walk over the time of one graph**, batch 1 ({machine_text(result['machine'])})"
    return [title, "", *markdown_table(("network", "tokens", *names), rows)]


def bulk_table() -> list[str]:
    """Markdown lines of the table of rows per second in bulk, compared with the monolith's."""
    rows = []
    about: dict[str, Any] = {}
    for file in sorted(RESULTS.glob("bulk_*.json")):
        result = read_result_file(file)
        about, name = result["machine"], file.stem.removeprefix("bulk_")
        rows += [[f"{name} {row['variant']}", row["rows_per_second"], row["ratio"]] for row in result["rows"]]
    if not rows:
        return []
    title = f"**In bulk at full depth**, batches of 32, every exit computed ({machine_text(about)})"
    return [title, "", *markdown_table(("", "rows/s", "x rows/s of the monolith"), rows)]


def cold_start_table() -> list[str]:
    """Markdown lines of the table of processes that start, read one line of input and end."""
    result = read_result("cold")
    if result is None:
        return []
    title = f"**A fresh process on one line**, {result['bundle']} ({machine_text(result['machine'])})"
    rows = [[row["command"], row["seconds"], row["ratio"], row["peak_mb"]] for row in result["rows"]]
    return [title, "", *markdown_table(("", "seconds", "x ten-line script", "peak MB"), rows)]


def decoder_segments_table(kind: str = "decoders") -> list[str]:
    """Markdown lines of the table of a decoder at full depth, by number of segments, against its monolith.

    kind: "decoders", or "decoders_alone" for the cut of auto without other cuts in the process.
    """
    result = read_decoder(kind)
    if result is None:
        return []
    alone = ", without other cuts beside" * (kind == "decoders_alone")
    title = f"**{DECODER} at full depth{alone}**, {result['prompts']} prompts, "
    title += f"{result['tokens']} tokens each"
    cuts = len(result["auto"]["cuts"])
    rows = []
    for variant, candidates in result["candidates"].items():
        held = result["held_to_transformers"] if variant == "fp32" else result["prompts"]
        for name, row in candidates.items():
            label = f"--segments auto ({cuts})" if name == "auto" else name.replace("_", " ")
            ratio = f"{row['ratio']:.3f}" + (f" ± {row['error']:.3f}" if name != "monolith" else "")
            figures = [row["tokens_per_s"], ratio, row["first_ms"]]
            rows.append([variant, label, *figures, f"{row['same']} of {held}"])
    same = "same text (fp32: as transformers, others: as the monolith)"
    head = ("precision", "", "tokens/s", "x monolith", "ms to the first token", same)
    return [f"{title} ({machine_text(result['machine'])})", "", *markdown_table(head, rows)]


def decoder_baselines_table() -> list[str]:
    """Markdown lines of the table of a decoder beside onnxruntime-genai and llama.cpp."""
    result = read_decoder("decoders_baselines")
    if result is None:
        return []
    title = f"**{DECODER} beside baselines at full depth**, {result['prompts']} prompts, "
    title += f"{result['tokens']} tokens each"
    rows = []
    for variant, candidates in result["candidates"].items():
        for name, row in candidates.items():
            ratio = f"{row['ratio']:.2f}" + (f" ± {row['error']:.2f}" if name != "offramp" else "")
            rows.append([variant, name, row["tokens_per_s"], ratio, row["first_ms"]])
    head = ("precision", "", "tokens/s", "x offramp", "ms to the first token")
    return [f"{title} ({machine_text(result['machine'])})", "", *markdown_table(head, rows)]


def decoder_memory_table() -> list[str]:
    """Markdown lines of the table of a decoder's resident set beside its monolith's."""
    result = read_decoder("decoders_memory")
    if result is None:
        return []
    title = f"**Resident set at {result['context']} tokens of context** ({machine_text(result['machine'])})"
    rows = [
        [
            name,
            row["resident_mb"],
            two_decimals(row["ratio"]),
            row["peak_mb"],
            two_decimals(row["peak_ratio"]),
        ]
        for name, row in result["candidates"].items()
    ]
    return [title, "", *markdown_table(("", "MB", "x monolith", "peak MB", "x monolith"), rows)]


def lossless_table() -> list[str]:
    """Markdown lines of the table of lossless drafts against full depth, by bundle and rule."""
    result = read_decoder("lossless")
    if result is None:
        return []
    title = f"**Lossless drafts**, {result['variant']}, {result['count']} prompts, "
    title += f"{result['tokens']} tokens each"
    rows = []
    for bundle, figures in result["bundles"].items():
        for rule, row in figures["rules"].items():
            if rule == "full":
                continue
            label = rule if rule == "speculative" else "exit {}, {} drafts".format(*rule.split(","))
            accepted = ", ".join(f"{source_name(e)}: {share:.0%}" for e, share in row["accepted"].items())
            same = f"{row['same']} of {result['count']}"
            rows.append(
                [bundle, label, same, two_decimals(row["speed"]), two_decimals(row["speed_median"]), accepted]
            )
    head = ("bundle", "rule", "as full depth", "x full depth", "median", "accepted")
    return [f"{title} ({machine_text(result['machine'])})", "", *markdown_table(head, rows)]


def headline_table() -> list[str]:
    """Markdown lines of the README's table of five results, losses among them.

    Rows whose result file is missing are left out.
    """
    head = ("offramp", "compared with", "result", "quality", "source")
    rows = [*_classifier_headline_rows(), *_decoder_headline_rows()]
    return markdown_table(head, rows)


def _classifier_headline_rows() -> list[list[str]]:
    rows = []
    if (result := read_result("early_exit_e5_sst2")) is not None:
        rows_by_name = {row["name"]: row for row in result["rows"]}
        fp32, int8 = (rows_by_name[name] for name in SUMMARY_POINTS)
        speed = f"{two_decimals(fp32['times_fp32_monolith'])} x as fast in fp32, "
        speed += f"{two_decimals(int8['times_int8_monolith'])} x in int8"
        quality = ", ".join(
            f"{two_decimals(row['accuracy'])} % instead of "
            f"{two_decimals(rows_by_name[graph]['accuracy'])} %{precision}"
            for row, graph, precision in ((fp32, "monolith", " (fp32)"), (int8, "monolith int8", " (int8)"))
        )
        case = "early exit, e5-small on sst2, point dev-1.0, batch 1"
        rows.append([case, "the same network as one graph", speed, quality, "early_exit_e5_sst2.json"])
    if (result := read_result("overhead")) is not None:
        ratios = {
            row["length"]: row[ALONE][0]
            for row in result["rows"]
            if (row["network"], row["variant"]) == ("12x384", "fp32")
        }
        slower = f"**slower**: {two_decimals(ratios[16])} x its time at 16 tokens, "
        slower += f"{two_decimals(ratios[128])} x at 128"
        case = "all 12 blocks with an exit after each, 12 x 384, fp32, batch 1"
        rows.append([case, "one graph without exits", slower, "the same answers", "overhead.json"])
    return rows


def _decoder_headline_rows() -> list[list[str]]:
    rows = []
    lookups = {kind: result for kind in LOOKUPS if (result := read_decoder(f"lossless_{kind}")) is not None}
    if lookups:
        drafted = {k: next(iter(r["bundles"].values()))["rules"]["speculative"] for k, r in lookups.items()}
        speed = ", ".join(f"{two_decimals(row['speed'])} x on {kind}" for kind, row in drafted.items())
        asked, same = (sum(r["count"] for r in lookups.values()), sum(r["same"] for r in drafted.values()))
        case, texts = f"{DECODER}, speculative, fp32", f"the same text, {same} of {asked} prompts"
        rows.append([case, "its own full depth", speed, texts, "lossless_*_smollm2.json"])
    if (result := read_decoder("decoders_baselines")) is not None:
        for name in ("onnxruntime-genai", "llama.cpp"):
            ratios = {variant: row[name]["ratio"] for variant, row in result["candidates"].items()}
            parts = ", ".join(
                f"{two_decimals(ratio)} x {'our tokens/s ' * (variant == 'fp32')}in {variant}"
                for variant, ratio in ratios.items()
            )
            slower = f"{'**slower**: ' * (max(ratios.values()) > 1)}{name} has {parts}"
            case, source = f"{DECODER}, full depth", "decoders_baselines_smollm2.json"
            rows.append([case, name, slower, "both decode greedily", source])
    return rows


def measured_tables() -> list[str]:
    """Markdown lines of all tables of docs/measured.md."""
    parts = (
        *(
            early_exit_summary_table(),
            early_exit_tables(),
            recipe_table(),
            overhead_table(),
            bulk_table(),
            cold_start_table(),
        ),
        *(
            decoder_segments_table(),
            decoder_segments_table("decoders_alone"),
            decoder_baselines_table(),
            decoder_memory_table(),
        ),
        lossless_table(),
        attach_tables(),
        attach_times_table(),
        task_tables(),
        retrieval_tables(),
        int8_tables(),
    )
    return [line for part in parts for line in part]


def split_at_marks(text: str) -> tuple[str, str, str]:
    """Split a text into the parts before, between and after the marks; ValueError if a mark is missing."""
    before, begin, rest = text.partition(BEGIN)
    inside, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the marks {BEGIN} and {END} are missing")
    return before, inside.strip("\n"), after


DOCUMENTS = {
    ROOT / "README.md": headline_table,
    ROOT / "docs" / "measured.md": measured_tables,
    ROOT / "docs" / "operating-points.md": risk_tables,
    ROOT / "docs" / "fleet.md": fleet_tables,
    ROOT / "docs" / "serving.md": serving_tables,
}


@click.command(help=__doc__)
def main() -> None:
    """Write the tables into the documents."""
    for file, make_tables in DOCUMENTS.items():
        try:
            before, _, after = split_at_marks(file.read_text(encoding="utf-8"))
        except ValueError as problem:
            raise click.ClickException(f"{file.name}: {problem}") from None
        lines = "\n".join(make_tables()).strip("\n")
        file.write_text(f"{before}{BEGIN}\n\n{lines}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
