"""Tables for the terminal, and the one that ee-split prints last."""

from __future__ import annotations

from collections.abc import Sequence

from offramp.export.verify import PrecisionLoss, VerificationReport
from offramp.runtime.bundle.manifest import Manifest

TOKENS = 32  # the length of text at which the closing table counts a classifier's MACs


def _loss_cell(loss: PrecisionLoss) -> str:
    return f"{loss.difference:.3g}" if loss.agreement is None else f"{100 * loss.agreement:.1f} %"


def closing_table(manifest: Manifest, report: VerificationReport) -> str:
    """The table that ee-split prints last, one line for each segment.

    Columns: blocks, MACs, bytes of each variant, largest difference from torch and, except for decoders, the
    share of labels that each variant keeps or, without labels, the largest change of a number. A graph that
    several segments run counts with the first of them.
    """
    variants = manifest.variants
    tokens = _tokens(manifest)
    segments = [manifest.stem, *manifest.segments]
    head = ["segment", "blocks", f"MACs at {tokens}"]
    losses = {(loss.segment, loss.variant): _loss_cell(loss) for loss in report.losses}
    loss_name = "change" if any(loss.agreement is None for loss in report.losses) else "labels kept"
    kept = variants[1:]
    if (decoder := manifest.decoder) is not None:
        segments += [*decoder.cache_fills, decoder.head, *decoder.drafting]
        head[2], kept = "MACs a token", ()
    rows = [
        [*head, *(f"{name} bytes" for name in variants), "max abs diff", *(f"{n} {loss_name}" for n in kept)]
    ]
    counted: dict[str, set[str]] = {name: set() for name in variants}  # files by variant
    for segment in segments:
        blocks = "-".join(map(str, sorted({*segment.blocks[:1], *segment.blocks[-1:]})))
        sizes = []
        for name in variants:
            graphs = segment.variants[name].graphs if name in segment.variants else ()
            files = {graph.file for graph in graphs} - counted[name]
            counted[name] |= files
            sizes.append(f"{sum(manifest.files[file].bytes for file in files):,}" if graphs else "")
        macs = segment.macs.of(tokens) if decoder is None else segment.macs.token
        row = [segment.name, blocks, f"{macs:,.0f}", *sizes, f"{report.worst(segment.name):.1e}"]
        rows.append(row + [losses.get((segment.name, name), "") for name in kept])
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Format rows of cells as lines of text, each column as wide as its widest cell."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join(line) for line in lines)


def _tokens(manifest: Manifest) -> int:
    """Number of tokens at which MACs are counted; an image has a fixed number."""
    outputs = manifest.stem.variants[manifest.variants[0]].outputs
    (length,) = (tensor.shape[1] for tensor in outputs if tensor.name == "hidden")
    return length if isinstance(length, int) else TOKENS
