"""Build the manifest of a split network: segments, rule, operating points, and provenance."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

from offramp.export.segments import Exportable, Segment, SplitNetwork, files_of, variants_of
from offramp.runtime.bundle import manifest
from offramp.runtime.bundle.manifest import DecoderFacts, Manifest, Variant
from offramp.runtime.bundle.row_samples import ROWS_SAMPLE

FROM_TRAINING = ("recipe", "settings", "data", "seed", "dev", ROWS_SAMPLE)  # of training.json into provenance
PACKAGES = ("offramp", "torch", "transformers", "onnx", "onnxscript", "onnxruntime")


def build_manifest(
    source: Exportable,
    split: SplitNetwork,
    variants: Sequence[str],
    export_facts: Mapping[str, object] | None = None,
) -> Manifest:
    """Build the manifest of a split network, without its list of files.

    export_facts: further JSON values that provenance records about this export.
    """
    network, facts = source.network, source.facts(split, variants)
    return Manifest(
        format=manifest.FORMAT,
        task=facts.task,
        labels=facts.labels,
        input=facts.input,
        hidden_size=network.hidden_size,
        vocab_size=network.vocab_size,
        blocks=network.block_count,
        stem=_entry(split.stem, variants),
        segments=tuple(_entry(segment, variants) for segment in split.segments),
        rule=facts.rule,
        points=facts.points,
        files={},
        provenance={
            **{key: facts.training[key] for key in FROM_TRAINING if key in facts.training},
            **facts.provenance,
            "exported_with": exported_with(),
            **(export_facts or {}),
        },
        costs=facts.costs,
        decoder=_decoder_facts(split, variants, facts.stop_ids),
        thresholds=facts.thresholds,
    )


def _decoder_facts(
    split: SplitNetwork, variants: Sequence[str], stop_ids: tuple[int, ...]
) -> DecoderFacts | None:
    if split.head is None:
        return None
    return DecoderFacts(
        _entry(split.head, variants),
        stop_ids,
        tuple(_entry(segment, variants) for segment in split.cache_fills),
        None if split.draft is None else _entry(split.draft, variants),
        cache=split.cache,
        rotations=dict(split.rotations),
        windows=split.windows,
        draft_block=None if split.draft_block is None else _entry(split.draft_block, variants),
    )


def _entry(segment: Segment, variants: Sequence[str]) -> manifest.Segment:
    """A segment's entry in a manifest, with a file for each variant in which it is written."""
    graphs = {name: _variant(segment, name, variants) for name in variants_of(segment, variants)}
    return manifest.Segment(segment.name, segment.blocks, segment.macs, graphs)


def _variant(segment: Segment, name: str, variants: Sequence[str]) -> Variant:
    files = files_of(segment, name, variants)
    *before, last = [Variant(file, graph.inputs, graph.outputs) for graph, file in files]
    return replace(last, before=tuple(before))


def exported_with() -> dict[str, str | None]:
    """Versions of Python and of the packages that write graphs; None for a package that is not installed."""
    return {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout, or another build of the package
        return None
