"""From a causal language model of transformers to a bundle for text generation."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from offramp.export.bundle import finish, writing
from offramp.export.decoder import DRAFT, DecoderParts, split_decoder
from offramp.export.decoder_verify import verify_decoder
from offramp.export.describe import exported_with, stage_of
from offramp.export.precision import WEIGHTS_ALONE, to_variant, weights_alone
from offramp.export.split import Segment
from offramp.export.to_onnx import to_onnx
from offramp.export.verify import file_name
from offramp.models.decoder import DecoderNetwork
from offramp.models.families import decoder_family_of
from offramp.runtime.bundle.manifest import (
    FORMAT,
    GATE,
    GENERATION,
    DecoderFacts,
    Manifest,
    RuleSpec,
    Stage,
    TextInput,
)
from offramp.runtime.inputs.chat import TEMPLATE
from offramp.training.checkpoint import TOKENIZER, TRAINING, load_exits, read_json


def read_folder(folder: Path) -> tuple[DecoderNetwork, dict[str, Any]]:
    """The network of a folder that transformers loads, with the exits that ee-train left there, and what
    training.json holds, if anything.

    Raises ValueError, or what transformers raises, for a folder that is no such thing or lacks a
    tokenizer.json; UnsupportedFamily; BadCheckpoint.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (folder / TOKENIZER).is_file():
        raise ValueError(f"it has no {TOKENIZER}: save it with a fast tokenizer of transformers")
    decoder_family_of(AutoConfig.from_pretrained(folder).model_type)  # before weights are read
    network = DecoderNetwork(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    load_exits(network, folder)
    return network, read_json(folder / TRAINING) if (folder / TRAINING).is_file() else {}


def write_decoder(
    network: DecoderNetwork,
    folder: Path,
    out: Path,
    *,
    cuts: str | Sequence[int] = "each",
    variants: Sequence[str] = ("fp32",),
    training: Mapping[str, Any] | None = None,
    draft: int = DRAFT,
    overwrite: bool = False,
) -> Manifest:
    """Write the bundle of a network with the tokenizer.json of a folder, and its chat template if it has one;
    gives the bundle's manifest.

    cuts: blocks behind which segments end. training: what training.json holds. draft: see split_decoder. The
    stem is fp32 in every variant. Raises UnsupportedFamily, BadTarget, ValueError for cuts, and NotVerified.
    """
    network.float()
    parts = split_decoder(network, cuts, draft)
    with writing(out, overwrite=overwrite) as beside:
        for part in track(list(parts), "exporting", console=Console(stderr=True)):
            write_part(part, beside, variants)
        shutil.copyfile(folder / TOKENIZER, beside / TOKENIZER)
        if (folder / TEMPLATE).is_file():
            shutil.copyfile(folder / TEMPLATE, beside / TEMPLATE)
        manifest = finish(beside, describe(network, parts, variants, training or {}))
        verify_decoder(network, beside)
        return manifest


def write_part(part: Segment, folder: Path, variants: Sequence[str]) -> None:
    """Write one part's graphs, in all variants that it has."""
    source = folder / file_name(part.name, "fp32")
    to_onnx(part, source)
    for name in variants_of(part, variants)[1:]:
        target = folder / file_name(part.name, name)
        if name in WEIGHTS_ALONE:
            weights_alone(name, source, target)
        else:
            to_variant(name, source, target)


def variants_of(part: Segment, variants: Sequence[str]) -> list[str]:
    """Variants that a part is written in: looking ids up has one, and a head is not halved."""
    if part.name == "stem":
        return list(variants[:1])
    return [name for name in variants if part.blocks or name != "fp16"]


def describe(
    network: DecoderNetwork, parts: DecoderParts, variants: Sequence[str], training: Mapping[str, Any]
) -> Manifest:
    """The manifest, all but its files."""
    config = network.model.generation_config
    stop = config.eos_token_id if config.eos_token_id is not None else ()
    stops = tuple(stop) if isinstance(stop, (list, tuple)) else (int(stop),)

    def stage(part: Segment) -> Stage:
        return stage_of(part, variants_of(part, variants))

    told = {key: training[key] for key in ("recipe", "settings", "data", "seed", "dev") if key in training}
    return Manifest(
        format=FORMAT,
        task=GENERATION,
        labels=(),
        input=TextInput(TOKENIZER, "", int(config.pad_token_id or 0), network.longest),
        hidden_size=network.hidden_size,
        vocab_size=network.vocab_size,
        blocks=network.block_count,
        stem=stage(parts.stem),
        segments=tuple(stage(part) for part in parts.segments),
        rule=_rule(parts, str(training.get("recipe", ""))),
        points=(),
        files={},
        provenance=told | {"backbone": network.model.config.model_type, "exported_with": exported_with()},
        decoder=DecoderFacts(
            stage(parts.head),
            stops,
            tuple(stage(part) for part in parts.fills),
            None if parts.draft is None else stage(parts.draft),
        ),
    )


def _rule(parts: DecoderParts, recipe: str) -> RuleSpec:
    """What decides when the caller wishes nothing: what the training was for."""
    if len(parts.segments) > 1:
        if any(tensor.name == GATE for tensor in parts.segments[0].outputs):
            return RuleSpec("gate", {"threshold": 0.5})
        if recipe == "layerskip":
            return RuleSpec("speculative", {})
    return RuleSpec("never", {})
