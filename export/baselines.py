"""Write a folder of single graphs that ee-bench compares a walk with: monolith, nested, truncated."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from offramp.export.bundle import file_fact, replace_folder
from offramp.export.classifier import ExportableClassifier, truncate
from offramp.export.monolith import join_segments, whole_network
from offramp.export.nested import can_nest, nest_segments
from offramp.export.options import ExportOptions
from offramp.export.precision import write_variant
from offramp.export.to_onnx import to_onnx
from offramp.runtime.bundle.manifest import Manifest
from offramp.runtime.progress import track
from offramp.runtime.tuning.baselines import FILE_NAME, FORMAT, Baselines, GraphFact, read_baselines

MAX_TRUNCATED = 4  # truncated graphs where the caller names no blocks


def write_baselines(
    source: ExportableClassifier,
    bundle: Path,
    manifest: Manifest,
    folder: Path,
    options: ExportOptions,
    *,
    blocks: Sequence[int] | None = None,
) -> None:
    """Write a folder of baselines: baselines.json and the graphs that it lists.

    The graphs are the monolith in every variant of the bundle, the fp32 segments as one nested graph, and the
    network truncated after `blocks` (None: around the mean exits of the bundle's points). The folder is
    written completely or not at all: it is checked as ee-bench checks it before it gets its name. Raises
    BadTarget where the folder cannot be used, ValueError for a block that ends no segment of the bundle.
    """
    network, exits = source.network.float(), exit_blocks(manifest)
    chosen = blocks_around_mean_exits(manifest) if blocks is None else list(dict.fromkeys(blocks))
    unknown = [block for block in chosen if block not in exits]
    if unknown:
        raise ValueError(f"the bundle has no exit after block {unknown[0]}: its exits are after {exits}")
    cut = [join_segments(truncate(network, block), f"truncated_{block:02}") for block in chosen]
    last = len(exits)
    with replace_folder(folder, overwrite=options.overwrite, listing=FILE_NAME) as beside:
        facts = []

        def add(name: str, kind: str, variant: str, file: str, exit: int) -> None:
            facts.append(GraphFact(name, kind, variant, file, exit, **asdict(file_fact(beside / file))))

        for segment in track([whole_network(source), *cut], "exporting baselines", unit="graph"):
            to_onnx(segment, beside / f"{segment.name}.onnx")
        add("monolith", "monolith", "fp32", "monolith.onnx", last)
        for variant in manifest.variants[1:]:
            file = f"monolith_{variant}.onnx"
            graph, reduced = beside / "monolith.onnx", options.reduce_range
            write_variant(variant, graph, beside / file, reduce_range=reduced, baseline=True)
            add(f"monolith {variant}", "monolith", variant, file, last)
        if can_nest(manifest):
            first = manifest.variants[0]
            parts = [segment.variants[first].graphs for segment in manifest.segments]
            files = [[bundle / graph.file for graph in graphs] for graphs in parts]
            model = nest_segments(bundle / manifest.stem.variants[first].file, files)
            (beside / "nested.onnx").write_bytes(model.SerializeToString())
            add("nested if", "nested", "fp32", "nested.onnx", last)
        for block, segment in zip(chosen, cut, strict=True):
            exit = exits.index(block) + 1
            add(f"first {block} blocks", "truncated", "fp32", f"{segment.name}.onnx", exit)
        listing = asdict(Baselines(FORMAT, manifest.labels, tuple(facts)))
        text = json.dumps(listing, indent=1, ensure_ascii=False) + "\n"
        (beside / FILE_NAME).write_text(text, encoding="utf-8")
        read_baselines(beside, manifest)


def exit_blocks(manifest: Manifest) -> list[int]:
    """Blocks (1-based) after which the bundle has an exit: the last block of each segment."""
    return [segment.blocks[-1] for segment in manifest.segments]


def blocks_around_mean_exits(manifest: Manifest) -> list[int]:
    """Blocks (1-based) with an exit just below and just above the mean exit of each operating point.

    At most MAX_TRUNCATED blocks, the shallowest; the middle exit if there are no points. The last exit is
    left out, as the monolith has it.
    """
    exits = exit_blocks(manifest)
    around: set[int] = set()
    for point in manifest.points:
        mean = point.measured.get("mean_exit", math.nan)
        if mean < exits[-1]:
            around |= {max((exit for exit in exits if exit <= mean), default=exits[0])}
            around |= {min((exit for exit in exits if exit >= mean), default=exits[-1])}
    around.discard(exits[-1])
    early = exits[:-1]
    return sorted(around)[:MAX_TRUNCATED] or early[len(early) // 2 :][:1]
