"""The parts of a decoder give the logits of transformers: at once, in pieces, and after any block."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, Qwen3Config

from offramp.models.decoder import DecoderNetwork, KeyValue
from offramp.models.families import UnsupportedFamily, decoder_family_of

CHANGING: dict[str, Any] = {  # rotations by the length of the text, of heads of 8 numbers
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
}


@pytest.fixture(params=sorted(tiny.DECODERS))
def model(request: pytest.FixtureRequest) -> Any:
    return tiny.decoder(request.param)


def empty_cache(network: DecoderNetwork, rows: int, places: int) -> tuple[list[KeyValue], torch.Tensor]:
    """A cache of `places` places, full of numbers that must not count, and past_valid."""
    ids, positions = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)
    hidden, context = network.stem(ids, positions, torch.zeros(1, 1))
    keys, values = network.cache_fill(0, hidden, context)
    kv_heads, size = keys.shape[1], values.shape[3]
    pairs = [
        (torch.full((rows, kv_heads, size, places), 9.0), torch.full((rows, kv_heads, places, size), 9.0))
        for _ in range(network.block_count)
    ]
    return pairs, torch.zeros(rows, places, dtype=torch.int64)


def append(
    network: DecoderNetwork, ids: torch.Tensor, cache: list[KeyValue], valid: torch.Tensor
) -> torch.Tensor:
    """Logits of ids that follow the tokens in the cache; their keys and values are added to it."""
    held, count = int(valid[0].sum()), ids.shape[1]
    positions = torch.arange(held, held + count).expand(len(ids), -1)
    hidden, context = network.stem(ids, positions, valid)
    for block, (keys, values) in enumerate(cache):
        hidden, (new_keys, new_values) = network.run_block(block, hidden, context, (keys, values))
        keys[..., held : held + count], values[:, :, held : held + count] = new_keys, new_values
    valid[:, held : held + count] = 1
    return network.head(hidden)


@torch.no_grad()
def test_a_prompt_at_once(model: Any) -> None:
    ids = torch.randint(3, 60, (2, 11))
    network = DecoderNetwork(model)
    torch.testing.assert_close(
        append(network, ids, *empty_cache(network, 2, 16)), model(ids).logits, atol=1e-4, rtol=1e-4
    )


@torch.no_grad()
@pytest.mark.parametrize("pieces", [(1,) * 12, (5, 1, 1, 5), (7, 4, 1)])
def test_in_any_pieces(model: Any, pieces: tuple[int, ...]) -> None:
    ids = torch.randint(3, 60, (2, 12))
    network = DecoderNetwork(model)
    cache, valid = empty_cache(network, 2, 20)
    logits = [append(network, piece, cache, valid) for piece in ids.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(logits, 1), model(ids).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_head_after_any_block_is_that_of_transformers(model: Any) -> None:
    ids = torch.randint(3, 60, (1, 6))
    network = DecoderNetwork(model)
    cache, valid = empty_cache(network, 1, 4)
    hidden, context = network.stem(ids, torch.arange(6)[None], valid)
    states = model(ids, output_hidden_states=True).hidden_states
    for block in range(network.block_count - 1):  # transformers' last state is normed
        hidden, _ = network.run_block(block, hidden, context, cache[block])
        torch.testing.assert_close(hidden, states[block + 1], atol=1e-4, rtol=1e-4)
        expected = model.lm_head(network.family.norm(model)(states[block + 1]))
        if softcap := getattr(model.config, "final_logit_softcapping", None):
            expected = softcap * torch.tanh(expected / softcap)
        torch.testing.assert_close(network.head(hidden), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["mistral", "phi3", "gemma2", "gemma3_text"])
def test_a_text_longer_than_the_window(family: str) -> None:
    model = tiny.decoder(family)
    ids, network = torch.randint(3, 60, (1, 60)), DecoderNetwork(model)
    cache, valid = empty_cache(network, 1, 64)
    logits = [append(network, piece, cache, valid) for piece in ids.split((45, 1, 1, 13), dim=1)]
    torch.testing.assert_close(torch.cat(logits, 1), model(ids).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_whole_texts_with_a_depth_for_every_token(model: Any) -> None:
    ids = torch.randint(3, 60, (2, 60))
    network = DecoderNetwork(model)
    torch.testing.assert_close(network.head(network(ids)[-1]), model(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_family_without_an_adapter_is_named() -> None:
    with pytest.raises(
        UnsupportedFamily, match="'bloom'; supported: gemma2, gemma3_text, gpt2, gpt_neox, llama,"
    ):
        decoder_family_of("bloom")


@pytest.mark.parametrize(
    ("name", "value"),
    [("scale_attn_by_inverse_layer_idx", True), ("scale_attn_weights", False), ("add_cross_attention", True)],
)
def test_another_form_of_gpt2_is_refused_with_the_field(name: str, value: bool) -> None:
    config = GPT2Config(n_embd=8, n_layer=1, n_head=1, **{name: value})
    with pytest.raises(UnsupportedFamily, match=f"config.json.{name}: {str(value).lower()}; only GPT-2 with"):
        DecoderNetwork(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize(
    ("kind", "cure"), [("dynamic", "'default' rotates in the same way"), ("longrope", "rotations are fixed")]
)
@pytest.mark.parametrize("make", [LlamaConfig, GPTNeoXConfig])
def test_rotations_that_change_with_the_length_are_refused_with_a_cure(
    make: Any, kind: str, cure: str
) -> None:
    config = make(**tiny.SIZES, rope_parameters=dict(CHANGING, rope_type=kind))
    with pytest.raises(UnsupportedFamily, match=f"rotations of type '{kind}' .*{cure}"):
        decoder_family_of(config.model_type).longest(config)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"rope_parameters": CHANGING | {"rope_type": "mrope"}},
            "rotations of type 'mrope' .*supported are def",
        ),
        (
            {"layer_types": ["full_attention", "chunked_attention", "full_attention"]},
            "types: 'chunked_attention'",
        ),
    ],
)
def test_rotations_and_attention_of_another_kind_are_refused(setting: dict[str, Any], message: str) -> None:
    config = Qwen3Config(**tiny.DECODER_SIZES)
    for name, value in setting.items():
        setattr(config, name, value)
    with pytest.raises(UnsupportedFamily, match=message):
        decoder_family_of("qwen3").longest(config)


@torch.no_grad()
def test_the_cure_of_dynamic_rotations_gives_the_same_logits() -> None:
    ids, logits = torch.randint(3, 60, (1, tiny.SIZES["max_position_embeddings"])), list[torch.Tensor]()
    for kind in ("dynamic", "default"):
        torch.manual_seed(0)
        config = LlamaConfig(**tiny.SIZES, rope_parameters=dict(CHANGING, rope_type=kind))
        model = AutoModelForCausalLM.from_config(config).eval()
        logits.append(model(ids).logits)
        if kind == "dynamic":
            with pytest.raises(UnsupportedFamily, match="'default' rotates in the same way: set that"):
                DecoderNetwork(model)
    torch.testing.assert_close(*logits)


@torch.no_grad()
def test_gemma3_caps_no_scores_of_attention_as_in_transformers() -> None:
    """Its configuration has attn_logit_softcapping, and its attention does not read it."""
    config = tiny.DECODERS["gemma3_text"]()
    config.attn_logit_softcapping, config.initializer_range = 0.5, 0.5
    torch.manual_seed(0)
    model, ids = AutoModelForCausalLM.from_config(config).eval(), torch.randint(3, 60, (1, 30))
    network = DecoderNetwork(model)
    torch.testing.assert_close(network.head(network(ids)[-1]), model(ids).logits, atol=1e-4, rtol=1e-4)
