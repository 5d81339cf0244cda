"""Tiny random twins of the families that tiny.py lacks: configurations of 3 blocks of width 32."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import tiny
import torch
from transformers import AutoConfig, AutoModel

from offramp.models import EarlyExitNetwork, NetworkSpec

Make = Callable[..., Any]
MARKS = {"bos_token_id": 2, "eos_token_id": 3}  # where the usual ids are beyond a vocabulary of 60
DISTANCES = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}


def config_of(model_type: str, sizes: dict[str, Any], settings: dict[str, Any], **more: Any) -> Any:
    return AutoConfig.for_model(model_type, **sizes | settings | more)


def makers(sizes: dict[str, Any], settings: dict[str, dict[str, Any]]) -> dict[str, Make]:
    return {name: partial(config_of, name, sizes, setting) for name, setting in settings.items()}


# Lengths beyond the window, the buckets and half of the distances occur in the tests.
TEXT: dict[str, Make] = makers(
    tiny.SIZES | {"pad_token_id": 0},
    {
        "albert": {"embedding_size": 16, "num_hidden_groups": 2},
        "camembert": {"pad_token_id": 1},
        "data2vec-text": {"pad_token_id": 1},
        "deberta": DISTANCES | {"max_relative_positions": 6},
        "deberta-v2": DISTANCES
        | {"position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True},
        "ernie": {"use_task_id": True},
        "eurobert": {"num_key_value_heads": 2, "mask_token_id": 4} | MARKS,
        "jina_embeddings_v3": {"type_vocab_size": 1},
        "megatron-bert": {},
        "modernbert": {
            "local_attention": 4,
            "global_attn_every_n_layers": 2,
            "cls_token_id": 2,
            "sep_token_id": 3,
        }
        | MARKS,
        "nomic_bert": {"head_dim": 16},
        "rembert": {"input_embedding_size": 16} | MARKS,
        "roberta-prelayernorm": {"pad_token_id": 1},
        "xlm-roberta": {"pad_token_id": 1},
        "xlm-roberta-xl": {"pad_token_id": 1},
    },
)
IMAGES: dict[str, Make] = makers(
    tiny.IMAGES | {"intermediate_size": 64},
    {
        "beit": {"use_relative_position_bias": True, "layer_scale_init_value": 0.5},
        "clip_vision_model": {},
        "dinov2_with_registers": {"mlp_ratio": 2, "layerscale_value": 0.5, "num_register_tokens": 3},
        "siglip_vision_model": {"vision_use_head": False},
        "vit_msn": {},
    },
)
# Other forms of families that have them, by a name of the tests.
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "albert, one group of two layers": ("albert", {"num_hidden_groups": 1, "inner_group_num": 2}),
    "deberta without distances": ("deberta", {"relative_attention": False, "position_biased_input": True}),
    "deberta, one product": ("deberta", {"pos_att_type": ["c2p"], "embedding_size": 16}),
    "deberta-v2, own projections": ("deberta-v2", {"share_att_key": False, "position_buckets": -1}),
    "deberta-v2, token types": ("deberta-v2", {"type_vocab_size": 2, "pos_att_type": ["p2c"]}),
    "deberta-v2, convolution": ("deberta-v2", {"conv_kernel_size": 3, "conv_act": "gelu"}),
    "modernbert, global alone": ("modernbert", {"global_attn_every_n_layers": 1}),
}
IMAGE_FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "beit, one bias for all blocks": (
        "beit",
        {
            "use_relative_position_bias": False,
            "use_shared_relative_position_bias": True,
            "use_absolute_position_embeddings": True,
            "use_mean_pooling": False,
        },
    ),
}


def lively(module: Any, amount: float = 0.1, seed: int = 3) -> Any:
    """Change every weight: fresh tokens, biases and norms are zeros and ones, which hide what is left out."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += amount * torch.randn(parameter.shape, generator=generator)
    return module


def config(name: str, **more: Any) -> Any:
    """The configuration of a twin, by a model type or a name in FORMS or IMAGE_FORMS."""
    model_type, settings = (FORMS | IMAGE_FORMS).get(name, (name, {}))
    known = TEXT | IMAGES
    if model_type in known:
        return known[model_type](**settings | more)
    return (tiny.CONFIGS | tiny.VISION)[model_type](**more)


def backbone(name: str, **more: Any) -> Any:
    """A base model of transformers with random weights, in evaluation mode."""
    torch.manual_seed(0)
    return lively(AutoModel.from_config(config(name, **more))).eval()


def as_network(base: Any, pooling: str = "mean", policy: str | None = None) -> EarlyExitNetwork:
    """A network with an exit after every block of a base model."""
    exits = tuple(range(1, base.config.num_hidden_layers + 1))
    return EarlyExitNetwork(base, NetworkSpec(("negative", "positive"), exits, pooling, policy)).eval()


def network(name: str, pooling: str = "mean", policy: str | None = None, **more: Any) -> EarlyExitNetwork:
    """A network with an exit after every block; settings of the configuration as in config()."""
    return as_network(backbone(name, **more), pooling, policy)


def text_inputs(name: str, rows: int = 2, length: int = 19) -> dict[str, torch.Tensor]:
    """Random ids as the stem takes them; the second row ends with padding."""
    torch.manual_seed(1)
    ids = torch.randint(5, 60, (rows, length))
    mask = torch.ones_like(ids)
    mask[1:, length - 3 :] = 0
    ids[mask == 0] = config(name).pad_token_id
    types = (torch.arange(length) > 3).long().expand(rows, length)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
