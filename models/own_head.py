"""The trained head of a classification model, which becomes the last exit of its network as it is."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from offramp.models.exits import OwnPool
from offramp.models.families import family_of

if TYPE_CHECKING:  # a slow import, needed for annotations only
    from transformers import PreTrainedConfig, PreTrainedModel

OWN_HEAD_LAYERS = "layers."  # how names of its parameters begin, which no other exit's do


class NoOwnHead(ValueError):
    """Error for a model without a trained head that can become the last exit; the message says why."""


class OwnHead(nn.Module):
    """A model's own head as the last exit: the layers that transformers' classification model applies.

    reads: what it pools, see OwnPool. layers: linear layers, norms and activations in order; dropout is
    applied before the last one. It has no standardization, joins no ensemble, and shares no pooler.
    """

    attention = None  # own_pool takes its place
    decay = None

    def __init__(self, reads: str, layers: Sequence[nn.Module], dropout: float) -> None:
        super().__init__()
        self.own_pool = OwnPool(reads)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(layers)

    def forward(self, pooled: Tensor) -> Tensor:
        """Compute logits [batch, classes] from the pooled vector."""
        vector = pooled
        for number, layer in enumerate(self.layers, 1):
            vector = layer(self.dropout(vector) if number == len(self.layers) else vector)
        return vector

    def join(self, logits: Tensor, before: Tensor | None) -> Tensor:
        """The logits as they are: full depth gives the model's own answers, in an ensemble too."""
        return logits

    def folded(self) -> nn.Module:
        """The layers without dropout, the form for an exported graph."""
        return nn.Sequential(*self.layers)


def own_head_of(model: PreTrainedModel, dropout: float) -> OwnHead:
    """Take the head out of a classification model, with its weights; the modules are shared with the model.

    Raises NoOwnHead if the family's adapter describes no head, or the model has other layers.
    """
    describe = family_of(model.config.model_type).head
    layout = None if describe is None else describe(model.config)
    if layout is None:
        raise NoOwnHead(f"there is no description of the head of {type(model).__name__}")
    layers = []
    for layer in layout.layers:
        if isinstance(layer, str):
            path = layer.replace("backbone.", f"{model.base_model_prefix}.", 1)
            try:
                layer = model.get_submodule(path)
            except AttributeError as problem:
                raise NoOwnHead(f"{type(model).__name__} has no layer {path}") from problem
        layers.append(layer)
    return OwnHead(layout.reads, layers, dropout)


def empty_own_head(config: PreTrainedConfig, dropout: float) -> OwnHead:
    """A head of the right shapes, by a classification model's configuration; its weights are to be loaded."""
    config = copy.deepcopy(config)
    config.architectures = config.architectures or []  # transformers expects a list
    with torch.device("meta"):  # the backbone of this model is thrown away, so it takes no memory
        model = classification_class(config).from_config(config)
    return own_head_of(model, dropout).to_empty(device="cpu")


def classification_class(config: PreTrainedConfig) -> Any:
    """The auto class of transformers for classifiers of this configuration's kind of input."""
    from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

    vision = family_of(config.model_type).vision
    return AutoModelForSequenceClassification if vision is None else AutoModelForImageClassification


def names_own_head(config: PreTrainedConfig) -> bool:
    """Whether a model folder's configuration says that it holds a classification model."""
    known = classification_class(config)._model_mapping
    names = {kind.__name__ for kind in _as_tuple(known.get(type(config), ()))}
    return bool(names & set(getattr(config, "architectures", None) or ()))


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
