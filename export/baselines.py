"""A folder of single graphs that ee-bench measures a walk against: monolith, nested, truncated."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import track

from offramp.export.bundle import file_fact, writing
from offramp.export.monolith import monolith, truncated
from offramp.export.nested import nest
from offramp.export.precision import to_variant
from offramp.export.split import Segment
from offramp.export.to_onnx import to_onnx
from offramp.runtime.bundle.manifest import Manifest
from offramp.runtime.tuning.baselines import FILE_NAME, FORMAT, GraphFact, Rivals, read_rivals
from offramp.training.checkpoint import Checkpoint

MOST = 4  # truncated graphs when nobody says which


def write_rivals(
    checkpoint: Checkpoint,
    bundle: Path,
    manifest: Manifest,
    folder: Path,
    *,
    blocks: Sequence[int] | None = None,
    overwrite: bool = False,
    reduce_range: bool | None = None,
) -> None:
    """Write rivals.json and its graphs: the monolith in every variant of the bundle, its fp32 segments as one
    nested graph, and the network truncated after `blocks` (None: around the mean exits of the bundle's
    points).

    Whole or not at all: what ee-bench would refuse gets no name. Raises BadTarget where the folder cannot be
    had, ValueError for a block that ends no segment of the bundle.
    """
    network, exits = checkpoint.network.float(), ends(manifest)
    wanted = mean_exits(manifest) if blocks is None else list(dict.fromkeys(blocks))
    strange = [block for block in wanted if block not in exits]
    if strange:
        raise ValueError(f"the bundle has no exit after block {strange[0]}: its exits are after {exits}")
    cut = [truncated(network, block) for block in wanted]
    last = len(exits)
    with writing(folder, overwrite=overwrite, listing=FILE_NAME) as beside:
        facts = []

        def add(name: str, kind: str, variant: str, file: str, exit: int) -> None:
            facts.append(GraphFact(name, kind, variant, file, exit, **asdict(file_fact(beside / file))))

        whole: list[Segment] = [monolith(network), *cut]
        for part in track(whole, "exporting rivals", console=Console(stderr=True)):
            to_onnx(part, beside / f"{part.name}.onnx")
        add("monolith", "monolith", "fp32", "monolith.onnx", last)
        for variant in manifest.variants[1:]:
            file = f"monolith_{variant}.onnx"
            to_variant(variant, beside / "monolith.onnx", beside / file, reduce_range=reduce_range)
            add(f"monolith {variant}", "monolith", variant, file, last)
        if last > 1:
            stages = [
                stage.variants[manifest.variants[0]].file for stage in (manifest.stem, *manifest.segments)
            ]
            model = nest(bundle / stages[0], [bundle / file for file in stages[1:]])
            (beside / "nested.onnx").write_bytes(model.SerializeToString())
            add("nested if", "nested", "fp32", "nested.onnx", last)
        for block, part in zip(wanted, cut, strict=True):
            exit = exits.index(block) + 1
            add(f"first {block} blocks", "truncated", "fp32", f"{part.name}.onnx", exit)
        told = asdict(Rivals(FORMAT, manifest.labels, tuple(facts)))
        (beside / FILE_NAME).write_text(
            json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        read_rivals(beside, manifest)


def parse_blocks(wish: str, exits: Sequence[int], whose: str) -> list[int]:
    """Blocks to truncate after, from "3,4"; ValueError for what is no exit, saying whose exits they are."""
    try:
        found = [int(word) for word in wish.split(",")]
    except ValueError:
        found = []
    if not found or any(block not in exits for block in found):
        has = ", ".join(map(str, exits))
        raise ValueError(f"{wish}: expected blocks such as 3,4; {whose} has exits after {has}")
    return found


def ends(manifest: Manifest) -> list[int]:
    """Blocks that end a segment: those with an exit in the bundle."""
    return [stage.blocks[-1] for stage in manifest.segments]


def mean_exits(manifest: Manifest) -> list[int]:
    """Blocks with an exit on both sides of the mean exit of each point, the shallowest MOST; the middle exit
    where there are no points. Never the last, which is the monolith's: of a single exit nothing is cut off.
    """
    exits = ends(manifest)
    found: set[int] = set()
    for point in manifest.points:
        mean = point.measured.get("mean_exit", math.nan)
        if mean < exits[-1]:
            found |= {max((e for e in exits if e <= mean), default=exits[0])}
            found |= {min((e for e in exits if e >= mean), default=exits[-1])}
    found.discard(exits[-1])
    early = exits[:-1]
    return sorted(found)[:MOST] or early[len(early) // 2 :][:1]


__all__ = ["FILE_NAME", "mean_exits", "parse_blocks", "write_rivals"]
