"""Tables of language models for readme.py, from what the benchmarks of decoders left in results/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from offramp.benchmarks.compare_all import grid

RESULTS = Path(__file__).resolve().parent / "results"
NAME = "smollm2"


def read(kind: str) -> dict[str, Any] | None:
    """A result file, or None where it was not made."""
    file = RESULTS / f"{kind}_{NAME}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def measured_on(found: dict[str, Any]) -> str:
    """On what machine, when."""
    about = found["machine"]
    return f"{about['cpu']}, {about['when'][:10]}"


def segments(kind: str = "decoders") -> list[str]:
    """Full depth in segments against the one graph, by fineness; decoders_alone: the cut of auto."""
    found = read(kind)
    if found is None:
        return []
    alone = ", no other cuts beside" * (kind == "decoders_alone")
    title = f"**{found['model']} at full depth{alone}**, {found['prompts']} prompts, "
    title += f"{found['tokens']} tokens each"
    cuts = len(found["auto"]["cuts"])
    rows = []
    for variant, contenders in found["contenders"].items():
        held = found["held_to_transformers"] if variant == "fp32" else found["prompts"]
        for name, row in contenders.items():
            shown = f"--segments auto ({cuts})" if name == "auto" else name.replace("_", " ")
            ratio = f"{row['ratio']:.3f}" + (f" ± {row['error']:.3f}" if name != "one graph" else "")
            figures = [row["tokens_per_s"], ratio, row["first_ms"]]
            rows.append([variant, shown, *figures, f"{row['same']} of {held}"])
    said = "same text (fp32: as transformers, others: as one graph)"
    head = ("precision", "", "tokens/s", "x one graph", "ms to the first token", said)
    return [f"{title} ({measured_on(found)})", "", *grid(head, rows)]


def rivals() -> list[str]:
    """Beside onnxruntime-genai and llama.cpp."""
    found = read("decoders_rivals")
    if found is None:
        return []
    title = f"**{found['model']} beside others at full depth**, {found['prompts']} prompts, "
    title += f"{found['tokens']} tokens each"
    rows = []
    for variant, contenders in found["contenders"].items():
        for name, row in contenders.items():
            ratio = f"{row['ratio']:.2f}" + (f" ± {row['error']:.2f}" if name != "offramp" else "")
            rows.append([variant, name, row["tokens_per_s"], ratio, row["first_ms"]])
    head = ("precision", "", "tokens/s", "x offramp", "ms to the first token")
    return [f"{title} ({measured_on(found)})", "", *grid(head, rows)]


def profile() -> list[str]:
    """Where a token's time goes, beside onnxruntime-genai."""
    found = read("decoder_profile")
    if found is None:
        return []
    rows = []
    for precision, kinds in found["profiles"].items():
        for kind, row in kinds.items():
            name = {"ours": "one graph", "genai": "onnxruntime-genai"}[kind]
            figures = [f"{row[key]:.1f}" for key in ("weights", "other", "between")]
            rows.append([precision, name, row["operators"], *figures])
    title = (
        f"**Where a token's time goes**, by ONNX Runtime's profiler, which slows both ({measured_on(found)})"
    )
    head = ("precision", "", "operators", "ms in products with weights", "in other operators", "between them")
    return [title, "", *grid(head, rows)]


def memory() -> list[str]:
    """Resident set beside the one graph's."""
    found = read("decoders_memory")
    if found is None:
        return []
    title = f"**Resident set at {found['context']} tokens of context** ({measured_on(found)})"
    rows = [
        [name, row["resident_mb"], f"{row['ratio']:.2f}", row["peak_mb"], f"{row['peak_ratio']:.2f}"]
        for name, row in found["contenders"].items()
    ]
    head = ("", "MB", "x one graph", "peak MB", "x one graph")
    return [title, "", *grid(head, rows)]


def lossless() -> list[str]:
    """Drafts against the full depth, by bundle and way."""
    found = read("lossless")
    if found is None:
        return []
    title = (
        f"**Lossless drafts**, {found['variant']}, {found['count']} prompts, {found['tokens']} tokens each"
    )
    rows = []
    for bundle, one in found["bundles"].items():
        for way, row in one["ways"].items():
            if way == "full":
                continue
            shown = way if way == "speculative" else "exit {}, {} drafts".format(*way.split(","))
            accepted = ", ".join(f"exit {e}: {share:.0%}" for e, share in row["accepted"].items())
            same = f"{row['same']} of {found['count']}"
            rows.append([bundle, shown, same, f"{row['speed']:.2f}", f"{row['speed_median']:.2f}", accepted])
    head = ("bundle", "way", "as full depth", "x full depth", "median", "accepted")
    return [f"{title} ({measured_on(found)})", "", *grid(head, rows)]


def needs() -> list[str]:
    """What drafts would have to be accepted at for 1.2, by bundle."""
    found = read("draft_costs")
    if found is None:
        return []
    rows = []
    for bundle, one in found["bundles"].items():
        cuts = one["cuts"]
        for row in one["needs"]:
            if row["exit"] > 3:
                continue
            share = "not reached" if row["accepted"] is None else f"{row['accepted']:.0%}"
            exit = f"{row['exit']} (block {cuts[row['exit'] - 1]})"
            rows.append([bundle, exit, row["drafts"], share, f"{row['speed_at_most']:.2f}"])
    title = f"**Share of drafts that must be right for {found['wished']} x full depth**, by what runs take"
    title += f" ({measured_on(found)})"
    head = ("bundle", "exit", "drafts", "accepted", "x full depth if all are")
    return [title, "", *grid(head, rows)]


def caches() -> list[str]:
    """Deferred and propagated caches."""
    found = read("decoder_cache")
    if found is None:
        return []
    title = f"**Caches of tokens that left early**, {found['count']} texts read as they stand, "
    title += f"rule {found['rule']}"
    rows = []
    for name, row in found["ways"].items():
        apart = "" if row["deep_diff"] is None else f"{row['deep_diff']:.1g}"
        figures = [f"{row[key]:.2f}" for key in ("perplexity", "depth", "ran", "time")]
        rows.append([name, *figures, row["deep"], apart])
    head = (
        "cache, threshold",
        "perplexity",
        "depth",
        "blocks run",
        "x time of full",
        "deep tokens",
        "their logits off by",
    )
    return [f"{title} ({measured_on(found)})", "", *grid(head, rows)]


def depth() -> list[str]:
    """Quality against depth, every method: a table a model and task."""
    lines: list[str] = []
    sizes = {"wikitext": "{tokens} tokens of wikitext", "samsum": "{prompts} dialogues of samsum"}
    for file in sorted(RESULTS.glob(f"depth_*_{NAME}.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        for task, ways in found["tasks"].items():
            title = f"**Quality against depth**, {found['model']} ({found['blocks']} blocks), test: "
            title += sizes[task].format(**found)
            unit, quality = ("nats", "perplexity") if task == "wikitext" else ("points", "ROUGE-L")
            head = ("", "depth", "cost", quality, f"± {unit}, against full")
            keys = ("depth", "cost", "quality", "se")
            rows = [
                [name, *(f"{way[key]:.2f}" if key in way else "" for key in keys)]
                for name, way in ways.items()
            ]
            lines += [title, "", *grid(head, rows)]
    return lines


def short() -> list[str]:
    """For the README."""
    return [*lossless(), *rivals()]


def all_tables() -> list[str]:
    """For docs/measured.md."""
    parts = (
        *(segments(), segments("decoders_alone"), rivals(), profile(), memory()),
        *(lossless(), needs(), caches(), depth()),
    )
    return [line for part in parts for line in part]
