"""The trained heads of the families' classification models, each as the last exit: the same logits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import tiny_families
import torch

from offramp.models import EarlyExitNetwork, NetworkSpec, family_of
from offramp.models.own_head import NoOwnHead, classification_class, own_head_of

LABELS = ("negative", "neutral", "positive")
TOWERS = (
    "clip_vision_model",
    "siglip_vision_model",
)  # transformers has no classification model of these alone
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "modernbert, mean": ("modernbert", {"classifier_pooling": "mean"}),
    "eurobert, first": ("eurobert", {"classifier_pooling": "bos"}),
    "eurobert, mean": ("eurobert", {"classifier_pooling": "mean"}),
    "deberta-v2, tanh": ("deberta-v2", {"pooler_hidden_act": "tanh"}),
}
NAMES = [
    *(
        name
        for name in sorted(tiny_families.TEXT | tiny_families.IMAGES)
        if name not in (*TOWERS, "eurobert")
    ),
    *tiny_families.IMAGE_FORMS,
    *HEADS,
]


def classification_model(name: str) -> Any:
    base, settings = HEADS.get(name, (name, {}))
    config = tiny_families.config(base, **settings)
    config.architectures, config.id2label = [], dict(enumerate(LABELS))
    torch.manual_seed(0)
    return tiny_families.lively(classification_class(config).from_config(config)).eval()


@pytest.mark.parametrize("name", NAMES)
def test_the_last_exit_gives_the_logits_of_the_classification_model(name: str) -> None:
    model = classification_model(name)
    family = family_of(model.config.model_type)
    inputs = tiny.pixel_values()
    known = inputs
    if family.vision is None:
        inputs = tiny_families.text_inputs(model.config.model_type)
        known = {key: inputs[key] for key in ("attention_mask", *family.inputs)}
    spec = NetworkSpec(LABELS, (1, 2, 3), own_head=True)
    with torch.no_grad():
        expected = model(**known).logits
        network = EarlyExitNetwork(copy.deepcopy(model.base_model), spec, own_head_of(model, 0.1)).eval()
        logits = network(inputs).logits[:, -1]
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)


def test_a_head_that_classifies_every_token_is_none() -> None:
    assert tiny_families.config("eurobert").classifier_pooling == "late"
    with pytest.raises(NoOwnHead, match="EuroBertForSequenceClassification"):
        own_head_of(classification_model("eurobert"), 0.1)


@pytest.mark.parametrize("name", TOWERS)
def test_a_vision_tower_has_no_head(name: str) -> None:
    assert family_of(name).head is None
