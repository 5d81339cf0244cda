"""Configurations and weights of transformers from a folder, the hub or a checkpoint.

No field of a configuration chooses code, and no weight of a loaded model is one that transformers made up.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, PreTrainedConfig

from offramp.models.families import DECODERS, FAMILIES, family_of

if TYPE_CHECKING:  # a slow import, needed for annotations only
    from transformers import PreTrainedModel

ADAPTER = "adapter_config.json"  # of peft
# Weights of a backbone that may be missing or left over: poolers, which are learned anew here, tokens for
# masking in pretraining, and buffers that older versions of transformers saved.
_NOT_USED = re.compile(r"pooler|mask_token|masked_bias$|position_ids$|relative_position_index$")
# Fields of a configuration that name code: of a file of the folder or the hub, or of another library.
ATTENTIONS = {"attn_implementation", "_attn_implementation", "experts_implementation"}
OWN_ATTENTIONS = ("eager", "sdpa")  # of transformers itself, for any mask
QUANTIZED = "quantization_config"
CODE_FIELDS = {*ATTENTIONS, QUANTIZED, "use_kernels", "kernel_config"}
# Its own code, which is never run: an adapter reads transformers' own class of the model type.
IGNORED_FIELDS = {"auto_map", "custom_pipelines", "trust_remote_code", "name_or_path", "_name_or_path"}
OTHER_WEIGHTS = ("pytorch_model*.bin", "tf_model*.h5", "flax_model*.msgpack")
LFS_POINTER = b"version https://git-lfs"
SAVE_AGAIN = "save the whole model again with save_pretrained"
LIMITS = {"layer": 1000, "num_labels": 2**20, "block": 2**20, "expert": 2**16}  # by a part of a field's name


def load_pretrained_config(model: str | Path) -> PreTrainedConfig:
    """Read the configuration of a model of a supported family, a hub name or a folder.

    Raises OSError if there is none, ValueError for a folder with an adapter instead of a model, and the
    errors of check_config. Code that comes with the model (auto_map) is never run: transformers' own class
    reads a model type that has one, and others are refused.
    """
    refuse_adapter(model)
    try:
        values: Any
        values, _ = PreTrainedConfig.get_config_dict(str(model), trust_remote_code=False)
    except OSError:
        raise
    except Exception as problem:  # such as RecursionError for JSON that is nested deeply
        raise ValueError(f"config.json: {type(problem).__name__}: {first_line(problem)}") from problem
    if not isinstance(values, dict):
        raise ValueError(f"config.json: expected an object, found {type(values).__name__}")
    if not values and Path(model).is_dir():
        raise ValueError(_no_config(Path(model)))
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


def _no_config(folder: Path) -> str:
    """Why a folder is no model's, and which folders in it may be."""
    files = [file for file in sorted(folder.glob("*/config.json")) if file.is_file()]
    inner = [file.parent.name for file in files if b'"model_type"' in file.read_bytes()]
    hint = f"; name the one in it that is meant: {', '.join(inner[:5])}" if inner else ""
    return f"the folder has no config.json with a model_type{hint}"


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
            cure = "give the model as it was before it was quantized" if name == QUANTIZED else "take it out"
            raise ValueError(f"{where}.{name}: {str(value)[:60]!r} would load other code; {cure}")
        if name.endswith("attn_implementation") and value not in (None, *OWN_ATTENTIONS):
            known = " and ".join(OWN_ATTENTIONS)
            raise ValueError(f"{where}.{name}: {str(value)[:60]!r}; supported are {known}; take it out")
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


def refuse_adapter(folder: str | Path) -> None:
    """Raise ValueError if a folder holds an adapter of peft (LoRA), a change of a model and no model."""
    if (Path(folder) / ADAPTER).is_file():
        raise ValueError(
            f"{ADAPTER}: the folder holds an adapter (LoRA), no whole model; merge it into its model first: "
            "load both with peft, then model.merge_and_unload().save_pretrained(FOLDER)"
        )


def require_causal_lm(config: PreTrainedConfig) -> None:
    """Raise ValueError if a configuration of a decoder's family names another model than a language model.

    Its weights might be complete all the same: a head that shares the embeddings is in no file.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    right = str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type])
    named = [str(name) for name in getattr(config, "architectures", None) or ()]
    if named and right.casefold() not in (name.casefold() for name in named):
        raise ValueError(
            f"config.json.architectures: {named[0][:60]} is no causal language model; expected {right}. Give "
            f"the folder of the language model itself, saved by {right}.save_pretrained"
        )


def load_weights(kind: Any, model: str | Path, *, base: bool = False) -> PreTrainedModel:
    """Load a model in float32 with a class of transformers, from safetensors, and check that it is complete.

    kind: the class, such as AutoModelForCausalLM. base: whether it is a backbone, whose file may hold weights
    of a head, too. Raises ValueError, which names the weight, and what transformers raises.
    """
    loaded, report = read_weights(kind, model)
    check_weights(loaded, report["missing_keys"], report["unexpected_keys"], base=base)
    return loaded


def read_weights(kind: Any, model: str | Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a model as load_weights does; gives transformers' report of names instead of checking them.

    Raises ValueError for a folder without safetensors, and for a weight of another shape than config.json
    says.
    """
    import torch

    folder = Path(model)
    whole = folder / "model.safetensors"  # transformers reads parts only where it is missing
    for file in [whole] if whole.is_file() else sorted(folder.glob("model-*.safetensors")):
        _check_safetensors(file)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        others = sorted(file.name for pattern in OTHER_WEIGHTS for file in folder.glob(pattern))
        instead = f"{others[0]} alone, which is not read" if others else "no weights"
        raise ValueError(
            f"the folder holds {instead}; weights are read from safetensors: load the model with "
            "transformers, then save_pretrained(FOLDER)"
        )
    result: tuple[PreTrainedModel, dict[str, Any]] = kind.from_pretrained(
        model,
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # transformers' own error does not name the weight
        trust_remote_code=False,
        use_safetensors=True,
    )
    for key, held, expected in sorted(result[1]["mismatched_keys"]):
        raise ValueError(
            f"{key} is {list(held)} in the files, and {list(expected)} by config.json: they are not of one "
            "model; save the whole model again with save_pretrained"
        )
    return result


def _check_safetensors(file: Path) -> None:
    """Raise ValueError, which names the file, if the file is no safetensors file or is cut off."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt"):
            return
    except SafetensorError as problem:
        with file.open("rb") as stream:
            pointer = stream.read(len(LFS_POINTER)) == LFS_POINTER
        cure = "it is a pointer of Git LFS: run git lfs pull" if pointer else "copy or save the model again"
        raise ValueError(
            f"{file.name} is not a complete safetensors file ({first_line(problem)}); {cure}"
        ) from problem


def check_weights(
    model: PreTrainedModel, missing: Collection[str], unexpected: Collection[str], *, base: bool = False
) -> None:
    """Raise ValueError if weights of a model were missing in its files, or the files hold others that matter.

    missing: these have random values. unexpected: names in the files that the model does not have; those of
    a backbone matter, and without `base` all of them do. base: see load_weights.
    """
    name, cure = type(model).__name__, wrapper_of(missing, unexpected) or SAVE_AGAIN
    if lost := sorted(key for key in missing if not (base and _NOT_USED.search(key))):
        raise ValueError(
            f"the files have no {lost[0]}{_more(lost)}, which {name} needs and transformers would fill with "
            f"random values; {cure}"
        )
    prefix = f"{model.base_model_prefix}."
    parts = {key.removeprefix(prefix).partition(".")[0] for key in model.state_dict()}
    left = sorted(key for key in unexpected if not _NOT_USED.search(key))
    if base:
        left = [key for key in left if key.removeprefix(prefix).partition(".")[0] in parts]
    if left:
        raise ValueError(
            f"the files hold {left[0]}{_more(left)}, which {name} with this config.json does not have: they "
            f"are not of one model; {cure}"
        )


def wrapper_of(missing: Collection[str], unexpected: Collection[str]) -> str:
    """The cure if all names in the files have a prefix, as those of a model in a wrapper; else empty.

    missing, unexpected: see check_weights.
    """
    if not missing:
        return ""
    names, lost = set(unexpected), next(iter(missing))  # each missing name has the prefix, so one gives it
    for prefix in sorted((key.removesuffix(lost) for key in names if key.endswith(f".{lost}")), key=len):
        if {prefix + name for name in missing} <= names:
            return (
                f"their names begin with {prefix!r}, as those of a model in a wrapper: save the model inside "
                f"it, such as model.{prefix}save_pretrained(FOLDER)"
            )
    return ""


def _more(names: Collection[str]) -> str:
    return f" and {len(names) - 1} other weights" if len(names) > 1 else ""


def first_line(problem: BaseException) -> str:
    """The first line of an error, or its type if it has no message."""
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0][:300]
