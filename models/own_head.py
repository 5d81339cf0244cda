"""The trained head of a classification model, which becomes the last exit of its network as it is."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from offramp.models.exits import OwnPool
from offramp.models.families import family_of
from offramp.models.families.family import HeadLayout
from offramp.models.tasks import CLASSIFICATION, MULTI_LABEL, REGRESSION, TOKENS

if TYPE_CHECKING:  # a slow import, needed for annotations only
    from transformers import PreTrainedConfig, PreTrainedModel

OWN_HEAD_LAYERS = "layers."  # how names of its parameters begin, which no other exit's do


class NoOwnHead(ValueError):
    """Error for a model without a trained head that can become the last exit; the message says why."""


class OwnHead(nn.Module):
    """A model's own head as the last exit: the layers that transformers' classification model applies.

    reads: what it pools, see OwnPool. layers: linear layers, norms and activations in order; dropout is
    applied before the last one. prefix: tokens before the patches. The head has no standardization, joins no
    ensemble, and shares no pooler.
    """

    attention = None  # own_pool takes its place
    decay = None

    def __init__(self, reads: str, layers: Sequence[nn.Module], dropout: float, prefix: int = 1) -> None:
        super().__init__()
        self.own_pool = OwnPool(reads, prefix)
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


def own_head_of(model: PreTrainedModel, dropout: float, *, per_token: bool = False) -> OwnHead:
    """Take the head out of a classification model, with its weights; the modules are shared with the model.

    per_token: whether the model classifies each token. Raises NoOwnHead if the family's adapter describes no
    head, or the model has other layers.
    """
    layout = _layout(model.config, per_token)
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
    return OwnHead(layout.reads, layers, dropout, layout.prefix)


def _layout(config: PreTrainedConfig, per_token: bool) -> HeadLayout | None:
    family = family_of(config.model_type)
    if per_token:
        return family.token_head(config)
    return None if family.head is None else family.head(config)


def empty_own_head(config: PreTrainedConfig, dropout: float, *, per_token: bool = False) -> OwnHead:
    """A head of the right shapes, by a classification model's configuration; its weights are to be loaded."""
    config = copy.deepcopy(config)
    config.architectures = config.architectures or []  # transformers expects a list
    with torch.device("meta"):  # the backbone of this model is thrown away, so it takes no memory
        model = classification_class(config, per_token=per_token).from_config(config, trust_remote_code=False)
    return own_head_of(model, dropout, per_token=per_token).to_empty(device="cpu")


def classification_class(config: PreTrainedConfig, *, per_token: bool = False) -> Any:
    """The auto class of transformers for classifiers of this configuration's kind of input, or of tokens."""
    import transformers

    if per_token:
        return transformers.AutoModelForTokenClassification
    if family_of(config.model_type).vision is None:
        return transformers.AutoModelForSequenceClassification
    return transformers.AutoModelForImageClassification


def names_own_head(config: PreTrainedConfig) -> bool:
    """Whether a model folder's configuration says that it holds a classification model."""
    return task_of_head(config) is not None


def task_of_head(config: PreTrainedConfig) -> str | None:
    """The task of the trained head that a model folder holds by its configuration; None if it holds none.

    One label without a problem_type is a regression, as transformers trains it.
    """
    if _names(config, classification_class(config, per_token=True)):
        return TOKENS
    if not _names(config, classification_class(config)):
        return None
    kind = getattr(config, "problem_type", None)
    if kind == "multi_label_classification":
        return MULTI_LABEL
    return REGRESSION if kind == "regression" or config.num_labels == 1 else CLASSIFICATION


def _names(config: PreTrainedConfig, auto_class: Any) -> bool:
    """Whether `architectures` names one of the auto class's models of this configuration."""
    known = auto_class._model_mapping
    names = {kind.__name__ for kind in _as_tuple(known.get(type(config), ()))}
    return bool(names & set(getattr(config, "architectures", None) or ()))


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
