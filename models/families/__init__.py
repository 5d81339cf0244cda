"""One adapter a family: how transformers lays out the stem and the blocks of that family."""

from __future__ import annotations

from offramp.models.families import bert, distilbert, mpnet, roberta, vit
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


__all__ = ["FAMILIES", "Family", "UnsupportedFamily", "family_of", "supported_families"]
