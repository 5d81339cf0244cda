"""One adapter a family: how transformers lays out the stem and the blocks of that family."""

from __future__ import annotations

from offramp.models.families import bert, distilbert, gpt2, llama, mpnet, roberta, vit
from offramp.models.families.decoder import DecoderFamily
from offramp.models.families.family import Family, UnsupportedFamily

# Keyed by the configuration's model_type, the one name that transformers itself dispatches on.
FAMILIES: dict[str, Family] = {
    "bert": bert.FAMILY,
    "electra": bert.ELECTRA,
    "roberta": roberta.FAMILY,
    "distilbert": distilbert.FAMILY,
    "mpnet": mpnet.FAMILY,
    "vit": vit.FAMILY,
    "deit": vit.DEIT,
    "dinov2": vit.FAMILY,
}

DECODERS: dict[str, DecoderFamily] = {
    "llama": llama.FAMILY,
    "mistral": llama.FAMILY,
    "qwen2": llama.FAMILY,
    "qwen3": llama.FAMILY,
    "gpt2": gpt2.FAMILY,
}


def supported_families() -> tuple[str, ...]:
    """Names of the families that have an adapter, as they stand in `model_type`."""
    return tuple(sorted(FAMILIES))


def family_of(model_type: str) -> Family:
    """The adapter for a configuration's `model_type`; raises UnsupportedFamily with the list of supported
    ones.
    """
    family = FAMILIES.get(model_type)
    if family is None:
        known = ", ".join(supported_families())
        raise UnsupportedFamily(f"no adapter for model type {model_type!r}; supported families: {known}")
    return family


def decoder_family_of(model_type: str) -> DecoderFamily:
    """The adapter for a decoder's `model_type`; raises UnsupportedFamily with the list of supported ones."""
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
