"""Command ee-inspect: print what a bundle is, without running a graph.

\b
    ee-inspect bundle/            # task, labels, graphs, operating points with their guarantees, provenance
    ee-inspect bundle/ --json     # the same as one JSON object

Every file is compared with the manifest, and every graph is checked as before it is opened (SECURITY.md), so
that a bundle from others can be looked at first. Text of the bundle is printed with characters that would
control a terminal escaped. Exit codes: 0, or 2 if it is no bundle, or one that would be refused.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:  # imported when the command runs, so that --help is instant
    from offramp.runtime.bundle.files import Bundle
    from offramp.runtime.bundle.manifest import Segment

SHOWN = 8  # labels and operators of a line
NONE, NOT_VERIFIED, VALID = "none", "not verified", "valid"  # of a signature


def inspect(bundle: Bundle, signature: str) -> dict[str, Any]:
    """Facts of a bundle as values of JSON; reads and verifies every file.

    signature: NONE, NOT_VERIFIED or VALID. Raises BadBundle and BundleNotFound as Bundle.read does.
    """
    manifest = bundle.manifest
    graphs = [fact for segment in _segments(bundle) for fact in _graphs(bundle, segment)]
    for name in manifest.files.keys() - manifest.graph_files:
        bundle.read(name)
    return {
        "bundle": str(bundle.folder),
        "signature": signature,
        "task": manifest.task,
        "labels": list(manifest.labels),
        "input": dataclasses.asdict(manifest.input),
        "blocks": manifest.blocks,
        "hidden_size": manifest.hidden_size,
        "vocab_size": manifest.vocab_size,
        "variants": list(manifest.variants),
        "rule": dataclasses.asdict(manifest.rule),
        "graphs": graphs,
        "points": [dataclasses.asdict(point) for point in manifest.points],
        "files": {name: fact.bytes for name, fact in manifest.files.items()},
        "provenance": manifest.provenance,
    }


def report(facts: dict[str, Any]) -> str:
    """The facts of inspect() as text for a terminal."""
    labels = [*facts["labels"][:SHOWN], *([f"... {len(facts['labels'])} in all"] * _more(facts["labels"]))]
    size = f"{facts['blocks']} blocks, hidden size {facts['hidden_size']}"
    lines = [
        ("bundle", facts["bundle"]),
        ("signature", facts["signature"] + _SIGNATURES[facts["signature"]]),
        ("task", facts["task"]),
        ("labels", ", ".join(map(str, labels)) or "none"),
        ("input", _pairs(facts["input"])),
        ("network", f"{size}, vocabulary {facts['vocab_size']}" if facts["vocab_size"] else size),
        ("variants", ", ".join(facts["variants"]) + " (the first is the default)"),
        ("rule", _rule(facts["rule"])),
        ("files", f"{len(facts['files'])}, {sum(facts['files'].values()):,} bytes, as the manifest says"),
        *(("point", _point(point)) for point in facts["points"]),
        *((f"provenance {name}", _short(value)) for name, value in facts["provenance"].items()),
    ]
    width = min(24, max(len(_printable(name)) for name, _ in lines)) + 2
    text = [f"{_printable(name):{width}}{_printable(value)}" for name, value in lines]
    rows = [("segment", "blocks", "variant", "bytes", "nodes", "operators"), *map(_row, facts["graphs"])]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    table = [
        "  ".join([*(f"{cell:{size}}" for cell, size in zip(row, widths, strict=False)), row[5]])
        for row in rows
    ]
    return "\n".join([*text, "", *(line.rstrip() for line in table)])


_SIGNATURES = {NONE: "", NOT_VERIFIED: ": there is one; name its public key with --key", VALID: ""}


def _segments(bundle: Bundle) -> list[Segment]:
    manifest = bundle.manifest
    parts = [manifest.stem, *manifest.segments]
    if manifest.decoder is not None:
        decoder = manifest.decoder
        parts += [*decoder.cache_fills, decoder.head, *decoder.drafting]
    return parts


def _graphs(bundle: Bundle, segment: Segment) -> Iterator[dict[str, Any]]:
    for variant, last in segment.variants.items():
        for graph in last.graphs:
            facts = bundle.read_graph_facts(graph.file)
            yield {
                "segment": segment.name,
                "blocks": list(segment.blocks),
                "variant": variant,
                "file": graph.file,
                "bytes": bundle.manifest.files[graph.file].bytes,
                "weights": facts.weights,
                "nodes": facts.nodes,
                "opset": facts.opset,
                "producer": facts.producer,
                "operators": dict(facts.operators.most_common()),
            }


def _row(graph: dict[str, Any]) -> tuple[str, ...]:
    first, last = (graph["blocks"] or [0])[0], (graph["blocks"] or [0])[-1]
    blocks = "-" if not last else str(first) if first == last else f"{first}-{last}"
    operators = [f"{name} {count}" for name, count in list(graph["operators"].items())[:SHOWN]]
    operators += ["..."] * _more(graph["operators"])
    cells = (graph["segment"], blocks, graph["variant"], f"{graph['bytes']:,}", str(graph["nodes"]))
    return tuple(map(_printable, (*cells, ", ".join(operators))))


def _point(point: dict[str, Any]) -> str:
    where = (
        f"{point['name']}: {_rule(point['rule'])}, {point['variant']}, on {point['data']} {point['split']}"
    )
    guarantee = point["guarantee"]
    if guarantee is None:
        return f"{where}; measured, no guarantee: {_pairs(point['measured'])}"
    of = "" if guarantee["groups"] == "all" else f" of each {guarantee['groups']}"
    return (
        f"{where}; guaranteed: {guarantee['risk']}{of} at most {guarantee['limit']:g} with confidence "
        f"{guarantee['confidence']:g}, by {guarantee['rows']} rows; measured: {_pairs(point['measured'])}"
    )


def _rule(rule: dict[str, Any]) -> str:
    from offramp.runtime.bundle.manifest import RuleSpec

    known = RuleSpec(rule["name"], rule["parameters"], skipped=tuple(rule.get("skipped", ())))
    return known.text


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_short(value)}" for name, value in values.items())


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _more(values: Sequence[Any] | dict[str, Any]) -> bool:
    return len(values) > SHOWN


def _printable(text: str) -> str:
    """Text with control characters, such as those that move a terminal's cursor, as escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@click.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=click.Path(path_type=Path), default=Path("bundle/"))
@click.option("--key", type=click.Path(path_type=Path), help="Public key that must have signed the bundle.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(bundle: Path, key: Path | None, as_json: bool) -> None:
    """Command ee-inspect; its help is the docstring of this module."""
    from offramp.runtime.bundle.files import open_bundle, read_signature
    from offramp.runtime.errors import OfframpError
    from offramp.runtime.hub.resolve import resolve_bundle

    try:
        folder = Path(resolve_bundle(bundle, command=True))
        opened = open_bundle(folder, key)
        unverified = NONE if read_signature(folder) is None else NOT_VERIFIED
        facts = inspect(opened, unverified if key is None else VALID)
    except OfframpError as problem:
        click.echo(f"ee-inspect: {problem}", err=True)
        sys.exit(2)
    click.echo(json.dumps(facts, ensure_ascii=True) if as_json else report(facts))


if __name__ == "__main__":
    main()
