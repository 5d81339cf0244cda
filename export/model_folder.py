"""What of a language model's folder ee-run does not do as transformers does: refused, or told the user."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from offramp.models.families import DECODERS
from offramp.runtime.inputs.tokenizer_checks import LARGEST_FILE, check_tokenizer, tokenizer_reason

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from offramp.models.decoder import DecoderNetwork

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
# Settings by which transformers.generate chooses other tokens than the most probable ones, or other ends,
# and the values that change nothing, besides none, 0 and what is empty. Sampling is off without a temperature
# in both, and the ids of ends are in the bundle.
_CHANGING: Mapping[str, object] = {
    "repetition_penalty": 1,
    "encoder_repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "sequence_bias": None,
    "exponential_decay_length_penalty": None,
    "stop_strings": None,
    "num_beams": 1,
    "penalty_alpha": 0,
    "guidance_scale": 1,
    "dola_layers": None,
    "constraints": None,
    "force_words_ids": None,
    "watermarking_config": None,
}


def require_text_model(folder: Path) -> None:
    """Raise ValueError for a model that contains a language model, such as one that reads images, too."""
    values = _read_object(folder / CONFIG)
    kind, text = values.get("model_type"), values.get("text_config")
    inner = text.get("model_type") if isinstance(text, dict) else None
    if kind not in DECODERS and inner in DECODERS:
        raise ValueError(
            f"config.json.model_type: {kind!r:.40} is more than a language model; save its language model "
            f"({inner}) alone and split that: docs/decoders.md shows how"
        )


def require_generation_config(folder: Path) -> None:
    """Raise ValueError for a generation_config.json that transformers would not read, without a word."""
    file = folder / GENERATION_CONFIG
    if not file.is_file():
        return
    try:
        values = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise ValueError(
            f"{file.name}: no JSON: {problem}; copy it again, or remove it: answers end as config.json says "
            "then"
        ) from problem
    if not isinstance(values, dict):
        raise ValueError(f"{file.name}: expected an object, found {type(values).__name__}")
    ends = values.get("eos_token_id")
    for end in ends if isinstance(ends, list) else [ends]:
        if end is not None and (not isinstance(end, int) or isinstance(end, bool)):
            raise ValueError(f"{file.name}.eos_token_id: {end!r:.40} is no id of a token; give whole numbers")


def generation_notes(folder: Path, settings: GenerationConfig) -> tuple[str, ...]:
    """A note on settings that change what transformers.generate answers, and that a bundle does not keep."""
    values = {name: getattr(settings, name, None) for name in _CHANGING}
    changing = {name: value for name, value in values.items() if value and value != _CHANGING[name]}
    if not changing:
        return ()
    file = GENERATION_CONFIG if (folder / GENERATION_CONFIG).is_file() else CONFIG
    listed = ", ".join(f"{name} {value!r:.40}" for name, value in changing.items())
    note = (
        f"{file} sets {listed}, by which transformers.generate gives other answers; a bundle does not keep "
        "that, and ee-run answers without it"
    )
    if (penalty := changing.get("repetition_penalty")) is not None:
        note += f"; for the penalty give ee-run --repetition-penalty {penalty}"
    return (note,)


def refuse_short_cache(network: DecoderNetwork) -> None:
    """Raise ValueError if the cache of transformers.generate forgets tokens to which a block attends.

    Its cache keeps the sliding_window of the configuration for every family, also where blocks do not read
    it. Its forward pass and its generate then give different tokens. Also raised for a window that no
    cache can have.
    """
    from transformers import DynamicCache

    try:
        caches = DynamicCache(config=network.model.config).layers
    except Exception as problem:  # transformers checks little
        raise ValueError(
            f"config.json: transformers makes no cache for it: {type(problem).__name__}: {problem}; see "
            "sliding_window and layer_types"
        ) from problem
    for number, (block, cache) in enumerate(zip(network.blocks, caches, strict=False), 1):
        kept = getattr(cache, "sliding_window", None)
        if kept is not None and int(kept) < 1:
            raise ValueError(f"config.json.sliding_window: {kept}; expected 1 or more, or null for no window")
        seen = network.whole_attention(block).window or network.longest
        if kept is not None and int(kept) < seen:
            raise ValueError(
                f"config.json.sliding_window: block {number} of {type(network.model).__name__} attends to "
                f"{seen} tokens, but the cache of transformers.generate keeps {int(kept)} of them; take "
                "sliding_window, and layer_types if it is there, out of config.json"
            )


@dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer.json as a bundle holds it: opened, and its contents.

    left_out: texts of the added tokens that it has no longer, see read_tokenizer. notes: lines for the user
    about them.
    """

    tokenizer: Tokenizer
    content: bytes
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read_tokenizer(file: Path, vocab_size: int) -> TokenizerFile:
    """Open a tokenizer.json that ee-run can read, too; raises ValueError for others.

    vocab_size: rows of the network's embeddings. Added tokens without a row are left out, so that a text
    with one is read as other text is. Transformers fails at such a text; folders have these tokens where a
    padding token was added and the embeddings were not resized, or where the model was a part of a larger
    one.
    """
    try:
        text = file.read_text("utf-8")
        if len(text.encode("utf-8")) > LARGEST_FILE:
            raise ValueError(f"more than {LARGEST_FILE} bytes")
        text, left_out = _without_rowless(text, vocab_size)
        check_tokenizer(text, vocab_size)
        tokenizer: Tokenizer = Tokenizer.from_str(text)
    except BaseException as problem:  # a panic of the library is no Exception
        raise ValueError(
            f"{file.name}: no tokenizer that ee-run reads: {tokenizer_reason(problem)}"
        ) from problem
    tokenizer.no_padding()
    tokenizer.no_truncation()
    notes: tuple[str, ...] = ()
    if left_out:
        names = f"{left_out[0]!r:.40}" + (f" and {len(left_out) - 1} more" if len(left_out) > 1 else "")
        notes = (
            f"{file.name}: the network has {vocab_size} embeddings and none for the added token {names}; the "
            "bundle leaves it out and reads it in a text as plain letters, where transformers fails",
        )
    return TokenizerFile(tokenizer, text.encode("utf-8"), left_out, notes)


def _without_rowless(text: str, vocab_size: int) -> tuple[str, tuple[str, ...]]:
    """A tokenizer.json without added tokens beyond the embeddings, and their texts; others as they are."""
    try:
        value = json.loads(text)
        rowless = [token for token in value["added_tokens"] if token["id"] >= vocab_size]
        left_out = tuple(str(token["content"]) for token in rowless)
    except (ValueError, KeyError, TypeError, RecursionError):
        return text, ()  # for check_tokenizer, which names the field
    if not rowless:
        return text, ()
    value["added_tokens"] = [token for token in value["added_tokens"] if token not in rowless]
    return json.dumps(value, ensure_ascii=False), left_out


def _read_object(file: Path) -> Mapping[str, Any]:
    """The object of a JSON file; an empty one if there is none, which later readers name."""
    try:
        values = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
