"""Families: one adapter each, which describes how transformers lays out the stem and the blocks."""

from __future__ import annotations

from offramp.models.families import albert, beit, bert, deberta, gpt2, gpt_neox, llama, rotary, towers, vit
from offramp.models.families.decoder import DecoderFamily
from offramp.models.families.family import Family, UnsupportedFamily

# By the configuration's model_type, the name that transformers itself dispatches on.
FAMILIES: dict[str, Family] = {
    "bert": bert.BERT,
    "electra": bert.ELECTRA,
    "ernie": bert.BERT,
    "megatron-bert": bert.MEGATRON,
    "roberta": bert.ROBERTA,
    "camembert": bert.ROBERTA,
    "data2vec-text": bert.ROBERTA,
    "xlm-roberta": bert.ROBERTA,
    "xlm-roberta-xl": bert.XLM_ROBERTA_XL,
    "roberta-prelayernorm": bert.ROBERTA_PRENORM,
    "distilbert": bert.DISTILBERT,
    "mpnet": bert.MPNET,
    "albert": albert.ALBERT,
    "rembert": albert.REMBERT,
    "deberta": deberta.DEBERTA,
    "deberta-v2": deberta.DEBERTA_V2,
    "modernbert": rotary.MODERNBERT,
    "nomic_bert": rotary.NOMIC_BERT,
    "eurobert": rotary.EUROBERT,
    "jina_embeddings_v3": rotary.JINA,
    "vit": vit.VIT,
    "vit_msn": vit.VIT,
    "deit": vit.DEIT,
    "dinov2": vit.DINOV2,
    "dinov2_with_registers": vit.DINOV2,
    "beit": beit.BEIT,
    "siglip_vision_model": towers.SIGLIP,
    "clip_vision_model": towers.CLIP,
}

DECODERS: dict[str, DecoderFamily] = {
    "llama": llama.LLAMA,
    "mistral": llama.MISTRAL,
    "qwen2": llama.LLAMA,
    "qwen3": llama.QWEN3,
    "smollm3": llama.LLAMA,
    "phi3": llama.PHI3,
    "olmo2": llama.OLMO2,
    "gemma2": llama.GEMMA2,
    "gemma3_text": llama.GEMMA3,
    "gpt2": gpt2.GPT2,
    "gpt_neox": gpt_neox.GPT_NEOX,
}


def supported_families() -> tuple[str, ...]:
    """The `model_type` of every family of encoders that has an adapter."""
    return tuple(sorted(FAMILIES))


def family_of(model_type: str) -> Family:
    """The adapter of an encoder's `model_type`; raises UnsupportedFamily with the lists of supported ones."""
    family = FAMILIES.get(model_type)
    if family is None:
        known, decoders = ", ".join(supported_families()), ", ".join(sorted(DECODERS))
        raise UnsupportedFamily(
            f"no adapter for model type {model_type!r}; supported families: {known}; language models, for "
            f"ee-split: {decoders}; docs/add-a-family.md shows how to add one"
        )
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
