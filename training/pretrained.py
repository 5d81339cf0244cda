"""Configurations of transformers from a folder, the hub or a checkpoint: no field of them chooses code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from offramp.models.families import DECODERS, FAMILIES, family_of

# Fields of a configuration that name code: of a file of the folder or the hub, or of another library.
ATTENTIONS = {"attn_implementation", "_attn_implementation", "experts_implementation"}
CODE_FIELDS = {*ATTENTIONS, "quantization_config", "use_kernels", "kernel_config"}
# Its own code, which is never run: an adapter reads transformers' own class of the model type.
IGNORED_FIELDS = {"auto_map", "custom_pipelines", "trust_remote_code", "name_or_path", "_name_or_path"}
LIMITS = {"layer": 1000, "num_labels": 2**20, "block": 2**20, "expert": 2**16}  # by a part of a field's name


def load_pretrained_config(model: str | Path) -> PreTrainedConfig:
    """Read the configuration of a model of a supported family, a hub name or a folder.

    Raises OSError if there is none, and the errors of check_config. Code that comes with the model (auto_map)
    is never run: transformers' own class reads a model type that has one, and others are refused.
    """
    try:
        values: Any
        values, _ = PreTrainedConfig.get_config_dict(str(model), trust_remote_code=False)
    except OSError:
        raise
    except Exception as problem:  # such as RecursionError for JSON that is nested deeply
        raise ValueError(f"config.json: {type(problem).__name__}: {first_line(problem)}") from problem
    if not isinstance(values, dict):
        raise ValueError(f"config.json: expected an object, found {type(values).__name__}")
    kind = values.get("model_type")
    if "auto_map" in values and kind not in FAMILIES and kind not in DECODERS:
        raise ValueError(
            f"config.json.auto_map: model type {str(kind)[:40]!r} has code of its own, which is not run"
        )
    check_config(values, "config.json")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(str(model), trust_remote_code=False)
        return config
    except OSError:
        raise
    except Exception as problem:  # transformers checks little, so nearly anything can be raised
        raise ValueError(f"config.json: {type(problem).__name__}: {first_line(problem)}") from problem


def check_config(values: Any, where: str) -> PreTrainedConfig:
    """Build a backbone's configuration from JSON of a file, with transformers' own class for its model type.

    where: its name in messages. Raises ValueError, which names the field: for a model type without an
    adapter, so that a name in a file never chooses other code; for fields that would load code or another
    library; for numbers that no model has.
    """
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise ValueError(f"{where}.model_type: expected an object with the name of a model type")
    model_type = values["model_type"]
    if model_type not in FAMILIES and model_type not in DECODERS:
        family_of(model_type)  # raises the error that lists those that have one
    for name in CODE_FIELDS & values.keys():
        value = values[name]
        if value is not None and (name not in ATTENTIONS or "/" in str(value)):
            raise ValueError(f"{where}.{name}: {str(value)[:60]!r} would load other code; take it out")
    _check_numbers(values, where)
    try:
        config: PreTrainedConfig = AutoConfig.for_model(
            **{name: value for name, value in values.items() if name not in IGNORED_FIELDS}
        )
        return config
    except Exception as problem:  # transformers checks little, so nearly anything can be raised
        raise ValueError(f"{where}: {type(problem).__name__}: {first_line(problem)}") from problem


def _check_numbers(value: Any, where: str, depth: int = 0) -> None:
    """Refuse numbers beyond those of any model; classes of transformers make lists as long as they say."""
    if depth > 20:
        raise ValueError(f"{where}: nested more than 20 deep")
    if isinstance(value, dict):
        for name, inner in value.items():
            limit = next((bound for part, bound in LIMITS.items() if part in name), 2**31)
            if isinstance(inner, (int, float)) and not abs(inner) <= limit:
                raise ValueError(f"{where}.{name}: {str(inner)[:40]}; at most {limit}")
            _check_numbers(inner, f"{where}.{name}", depth + 1)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            _check_numbers(inner, f"{where}[{number}]", depth + 1)


def first_line(problem: BaseException) -> str:
    """The first line of an error, or its type if it has no message."""
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0][:300]
