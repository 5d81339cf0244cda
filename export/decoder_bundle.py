"""From a causal language model of transformers to a bundle for text generation."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
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
from offramp.models.families import decoder_family_of
from offramp.runtime.manifest import (
    FORMAT,
    GENERATION,
    DecoderFacts,
    Manifest,
    RuleSpec,
    TextInput,
)
from offramp.training.checkpoint import TOKENIZER


def split_folder(
    folder: Path, out: Path, *, cuts: str, variants: Sequence[str], overwrite: bool = False
) -> Manifest:
    """write_decoder for a folder that transformers loads, with a tokenizer.json in it.

    Raises ValueError, or what transformers raises, for a folder that is no such thing; and as write_decoder.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (tokenizer := folder / TOKENIZER).is_file():
        raise ValueError(f"it has no {TOKENIZER}: save it with a fast tokenizer of transformers")
    decoder_family_of(AutoConfig.from_pretrained(folder).model_type)  # before weights are read
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return write_decoder(model, tokenizer, out, cuts=cuts, variants=variants, overwrite=overwrite)


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
