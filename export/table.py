"""What ee-split prints when it is done: every stage with its size, its cost and how far it is from torch."""

from __future__ import annotations

from offramp.export.verify import Report
from offramp.runtime.bundle.manifest import Manifest

TOKENS = 32  # the length of text at which the closing table counts


def closing_table(manifest: Manifest, report: Report) -> str:
    """One line a graph: blocks, MACs, bytes of each variant, distance from torch, labels kept."""
    variants = manifest.variants
    (hidden,) = (t for t in manifest.stem.variants[variants[0]].outputs if t.name == "hidden")
    tokens = hidden.shape[1] if isinstance(hidden.shape[1], int) else TOKENS  # of an image there is no choice
    head = ["segment", "blocks", f"MACs at {tokens}", *(f"{name} bytes" for name in variants), "max abs diff"]
    rows = [head + [f"{name} labels kept" for name in variants[1:]]]
    kept = {(said.segment, said.variant): f"{100 * said.agreement:.1f} %" for said in report.precisions}
    for stage in (manifest.stem, *manifest.segments):
        blocks = "-".join(map(str, sorted({*stage.blocks[:1], *stage.blocks[-1:]})))
        files = [stage.variants[name].file if name in stage.variants else None for name in variants]
        sizes = [f"{manifest.files[file].bytes:,}" if file else "" for file in files]
        row = [stage.name, blocks, f"{stage.macs.of(tokens):,.0f}", *sizes, f"{report.worst(stage.name):.1e}"]
        rows.append(row + [kept.get((stage.name, name), "") for name in variants[1:]])
    return _aligned(rows)


def decoder_table(manifest: Manifest) -> str:
    """One line a graph: blocks, MACs a token, bytes of each variant."""
    variants, facts = manifest.variants, manifest.decoder
    assert facts is not None
    heads = [facts.head] if facts.draft is None else [facts.head, facts.draft]
    rows = [["graph", "blocks", "MACs a token", *(f"{name} bytes" for name in variants)]]
    for stage in (manifest.stem, *manifest.segments, *facts.cache_fills, *heads):
        blocks = "-".join(map(str, sorted({*stage.blocks[:1], *stage.blocks[-1:]})))
        files = [stage.variants[name].file if name in stage.variants else None for name in variants]
        sizes = [f"{manifest.files[file].bytes:,}" if file else "" for file in files]
        rows.append([stage.name, blocks, f"{stage.macs.token:,.0f}", *sizes])
    return _aligned(rows)


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join(line) for line in lines)
