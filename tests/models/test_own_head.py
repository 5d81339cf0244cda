"""A model's own head as the last exit: the logits of transformers' classification model, kept bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

from offramp.models import EarlyExitNetwork, NetworkSpec
from offramp.models.own_head import (
    NoOwnHead,
    classification_class,
    empty_own_head,
    names_own_head,
    own_head_of,
)

LABELS = ("negative", "neutral", "positive")
CONFIGS = tiny.CONFIGS | tiny.VISION


def classification_model(family: str) -> Any:
    """A random classification model of transformers; no bias is 0: a missing one changes the output."""
    torch.manual_seed(0)
    config = CONFIGS[family]()
    config.architectures = []
    config.id2label = dict(enumerate(LABELS))
    model = classification_class(config).from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def network_of(model: Any, pooling: str = "mean") -> EarlyExitNetwork:
    head = own_head_of(model, 0.1)
    spec = NetworkSpec(LABELS, (1, 2, 3), pooling=pooling, own_head=True)
    return EarlyExitNetwork(model.base_model, spec, head).eval()


def inputs_of(family: str) -> dict[str, torch.Tensor]:
    if family in tiny.VISION:
        return {"pixel_values": torch.randn(2, 3, 16, 16)}
    ids = torch.tensor([[2, 5, 14, 3, 4], [2, 9, 3, 1, 1]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


@pytest.mark.parametrize("pooling", ["mean", "cls", "attention"])
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_the_last_exit_gives_the_logits_of_the_classification_model(family: str, pooling: str) -> None:
    model, inputs = classification_model(family), inputs_of(family)
    known = {
        name: inputs[name] for name in inputs if name != "token_type_ids" or family in ("bert", "electra")
    }
    with torch.no_grad():
        expected = model(**known).logits
        outputs = network_of(model, pooling)(inputs)
    torch.testing.assert_close(outputs.logits[:, -1], expected, atol=2e-5, rtol=1e-5)
    assert outputs.pooled.shape == (2, 3, 32)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_an_empty_head_takes_the_weights_of_a_checkpoint(family: str) -> None:
    model = classification_model(family)
    head = own_head_of(model, 0.1)
    again = empty_own_head(model.config, 0.1)
    again.load_state_dict(head.state_dict())
    vector = torch.randn(2, 64 if family == "dinov2" else 32)
    torch.testing.assert_close(again.eval()(vector), head.eval()(vector))


def test_a_configuration_names_its_classification_model() -> None:
    model = classification_model("bert")
    model.config.architectures = ["BertForSequenceClassification"]
    assert names_own_head(model.config)
    model.config.architectures = ["BertModel"]
    assert not names_own_head(model.config)


def test_a_classification_model_with_other_layers_is_refused() -> None:
    model = classification_model("bert")
    del model.classifier
    with pytest.raises(NoOwnHead, match="BertForSequenceClassification has no layer classifier"):
        own_head_of(model, 0.1)
