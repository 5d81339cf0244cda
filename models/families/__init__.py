"""Families: one adapter each, which describes how transformers lays out the stem and the blocks."""

from __future__ import annotations

from offramp.models.families import bert, gpt2, llama, vit
from offramp.models.families.decoder import DecoderFamily
from offramp.models.families.family import Family, UnsupportedFamily

# By the configuration's model_type, the name that transformers itself dispatches on.
FAMILIES: dict[str, Family] = {
    "bert": bert.BERT,
    "electra": bert.ELECTRA,
    "roberta": bert.ROBERTA,
    "distilbert": bert.DISTILBERT,
    "mpnet": bert.MPNET,
    "vit": vit.VIT,
    "deit": vit.DEIT,
    "dinov2": vit.VIT,
}

DECODERS: dict[str, DecoderFamily] = {
    "llama": llama.FAMILY,
    "mistral": llama.FAMILY,
    "qwen2": llama.FAMILY,
    "qwen3": llama.FAMILY,
    "gpt2": gpt2.FAMILY,
}


def supported_families() -> tuple[str, ...]:
    """The `model_type` of every family of encoders that has an adapter."""
    return tuple(sorted(FAMILIES))


def family_of(model_type: str) -> Family:
    """The adapter of an encoder's `model_type`; raises UnsupportedFamily with the list of supported ones."""
    family = FAMILIES.get(model_type)
    if family is None:
        known = ", ".join(supported_families())
        raise UnsupportedFamily(f"no adapter for model type {model_type!r}; supported families: {known}")
    return family


def decoder_family_of(model_type: str) -> DecoderFamily:
    """The adapter of a decoder's `model_type`; raises UnsupportedFamily with the list of supported ones."""
    family = DECODERS.get(model_type)
    if family is None:
        raise UnsupportedFamily(
            f"no adapter for decoders of type {model_type!r}; supported: {', '.join(sorted(DECODERS))}"
        )
    return family


__all__ = [
    "DECODERS",
    "FAMILIES",
    "DecoderFamily",
    "Family",
    "UnsupportedFamily",
    "decoder_family_of",
    "family_of",
    "supported_families",
]
