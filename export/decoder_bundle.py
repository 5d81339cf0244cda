"""From a causal language model of transformers to a bundle for text generation."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from offramp.export.bundle import finish, writing
from offramp.export.decoder import split_decoder
from offramp.export.describe import exported_with, stage_of
from offramp.export.precision import to_variant
from offramp.export.split import Segment
from offramp.export.to_onnx import to_onnx
from offramp.export.verify import file_name
from offramp.models.decoder import DecoderNetwork
from offramp.runtime.manifest import (
    FORMAT,
    GENERATION,
    DecoderFacts,
    Manifest,
    RuleSpec,
    TextInput,
)
from offramp.training.checkpoint import TOKENIZER


def write_decoder(
    model: Any,
    tokenizer: Path,
    out: Path,
    *,
    cuts: str | Sequence[int] = "each",
    variants: Sequence[str] = ("fp32",),
    overwrite: bool = False,
) -> Manifest:
    """Write the bundle of a model (what AutoModelForCausalLM gives) with its tokenizer.json; gives its
    manifest.

    cuts: blocks behind which segments end. Stem and head are fp32 in every variant. Raises UnsupportedFamily,
    BadTarget, ValueError for cuts.
    """
    network = DecoderNetwork(model.float())
    parts = split_decoder(network, cuts)
    with writing(out, overwrite=overwrite) as beside:
        for part in track(parts, "exporting", console=Console(stderr=True)):
            source = beside / file_name(part.name, "fp32")
            to_onnx(part, source)
            for name in variants[1:] if part.blocks else ():
                to_variant(name, source, beside / file_name(part.name, name))
        shutil.copyfile(tokenizer, beside / TOKENIZER)
        return finish(beside, describe(network, parts, variants))


def describe(network: DecoderNetwork, parts: Sequence[Segment], variants: Sequence[str]) -> Manifest:
    """The manifest, all but its files."""
    stem, *segments, head = parts
    config = network.model.generation_config
    stop = config.eos_token_id if config.eos_token_id is not None else ()
    stops = tuple(stop) if isinstance(stop, (list, tuple)) else (int(stop),)
    return Manifest(
        format=FORMAT,
        task=GENERATION,
        labels=(),
        input=TextInput(TOKENIZER, "", int(config.pad_token_id or 0), network.longest),
        hidden_size=network.hidden_size,
        vocab_size=network.vocab_size,
        blocks=network.block_count,
        stem=stage_of(stem, variants[:1]),
        segments=tuple(stage_of(part, variants) for part in segments),
        rule=RuleSpec("never", {}),
        points=(),
        files={},
        provenance={"backbone": network.model.config.model_type, "exported_with": exported_with()},
        decoder=DecoderFacts(stage_of(head, variants[:1]), stops),
    )
