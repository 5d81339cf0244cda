"""Tiny random twins of real transformers models: 3 blocks, width 32, a vocabulary of 60 or images of 16."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DeiTConfig,
    Dinov2Config,
    DistilBertConfig,
    ElectraConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MPNetConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    SmolLM3Config,
    ViTConfig,
)

from offramp.models import EarlyExitNetwork, NetworkSpec
from offramp.models.decoder import DecoderNetwork

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 70,
}
CONFIGS: dict[str, Any] = {
    "bert": lambda: BertConfig(**SIZES),
    "electra": lambda: ElectraConfig(embedding_size=16, **SIZES),
    "roberta": lambda: RobertaConfig(pad_token_id=1, **SIZES),
    "mpnet": lambda: MPNetConfig(pad_token_id=1, **SIZES),
    "distilbert": lambda: DistilBertConfig(
        vocab_size=60, dim=32, n_layers=3, n_heads=4, hidden_dim=64, max_position_embeddings=70
    ),
}
IMAGES: dict[str, Any] = {
    **{name: SIZES[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
    "image_size": 16,
    "patch_size": 4,
}
VISION: dict[str, Any] = {
    "vit": lambda **more: ViTConfig(intermediate_size=64, **IMAGES | more),
    "deit": lambda **more: DeiTConfig(intermediate_size=64, **IMAGES | more),
    "dinov2": lambda **more: Dinov2Config(mlp_ratio=2, layerscale_value=0.5, **IMAGES | more),
}
# Grouped, single and whole heads of keys and values; a window; biases; normed queries; heads beyond hidden.
DECODER_SIZES: dict[str, Any] = SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 64}
DECODERS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**DECODER_SIZES, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**DECODER_SIZES | {"num_key_value_heads": 1}, sliding_window=40),
    "qwen2": lambda: Qwen2Config(**DECODER_SIZES | {"num_key_value_heads": 4}),
    "qwen3": lambda: Qwen3Config(**DECODER_SIZES, head_dim=16),
    "gpt2": lambda: GPT2Config(vocab_size=60, n_embd=32, n_layer=3, n_head=4, n_positions=64),
    "smollm3": lambda: SmolLM3Config(**DECODER_SIZES, no_rope_layers=[1, 0, 1], pad_token_id=0),
    "phi3": lambda: Phi3Config(**DECODER_SIZES, sliding_window=9, pad_token_id=0),
    "olmo2": lambda: Olmo2Config(**DECODER_SIZES),
    "gemma2": lambda: Gemma2Config(
        **DECODER_SIZES, head_dim=16, sliding_window=5, query_pre_attn_scalar=12, attn_logit_softcapping=2.0
    ),
    "gemma3_text": lambda: Gemma3TextConfig(
        **DECODER_SIZES,
        head_dim=16,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gpt_neox": lambda: GPTNeoXConfig(
        **{name: size for name, size in DECODER_SIZES.items() if name != "num_key_value_heads"},
        rope_parameters={"rope_theta": 10000.0, "partial_rotary_factor": 0.5, "rope_type": "default"},
    ),
}
# Families of the export tests.
EXPORTED = [*sorted(CONFIGS), "dinov2"]  # ViT and DeiT are exported in test_images_journey
GOOD, BAD = ["good", "fine", "lovely", "warm", "bright"], ["bad", "poor", "awful", "cold", "dull"]
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    *GOOD,
    *BAD,
    *["the", "a", "film", "plot", "scene", "was", "is", "and", "very", "quite", "not", "at", "all"],
]


def with_slow(families: Sequence[str], *first: str) -> list[Any]:
    """Parameters of a test: these families always, the others where slow tests are asked for, as in CI."""
    return [f if f in first else pytest.param(f, marks=pytest.mark.slow) for f in families]


def text_config(family: str, blocks: int = 3) -> Any:
    """The configuration of an encoder of texts with so many blocks; each block costs seconds of an export."""
    config = CONFIGS[family]()
    config.num_hidden_layers = blocks  # of DistilBERT, too: its own name for it is an alias
    return config


def backbone(family: str, seed: int = 0, blocks: int | None = None) -> Any:
    """A random transformers base model of the family, in evaluation mode."""
    torch.manual_seed(seed)
    config = (CONFIGS | VISION)[family]() if blocks is None else text_config(family, blocks)
    return AutoModel.from_config(config).eval()


def wide_config(family: str) -> Any:
    """The configuration of a decoder with heads that the attention of ONNX Runtime can rotate, 16 numbers."""
    config = DECODERS[family]()
    if family == "gpt_neox":  # it rotates half of a head
        config.hidden_size, config.num_attention_heads = 64, 2
    elif family == "gpt2":
        config.n_head = 2
    else:
        config.head_dim = 16
    return config


def decoder(family: str, seed: int = 0, *, wide: bool = False, blocks: int | None = None) -> Any:
    """A random causal language model; no bias is 0 and no norm is 1: a missing one changes the output.

    wide: see wide_config. Heads of the others have 8 numbers, but for Qwen3 and Gemma. blocks: 3 unless
    given, of a family whose blocks are all of one kind.
    """
    torch.manual_seed(seed)
    config = wide_config(family) if wide else DECODERS[family]()
    if blocks is not None:
        config.num_hidden_layers = blocks
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def network(
    family: str = "bert",
    *,
    pooling: str = "mean",
    policy: str | None = "both",
    head: str = "linear",
    ensemble: bool = False,
    seed: int = 0,
) -> EarlyExitNetwork:
    """A tiny network with an exit after every block, random everywhere."""
    spec = NetworkSpec(("negative", "positive"), (1, 2, 3), pooling, policy, head=head, ensemble=ensemble)
    network = EarlyExitNetwork(backbone(family, seed), spec).eval()
    for exit_head in network.exits:
        if exit_head.attention is not None:
            torch.nn.init.normal_(exit_head.attention.query.weight)  # type: ignore[union-attr, operator]
    return network


def inputs(family: str = "bert", rows: int = 2, length: int = 7) -> dict[str, torch.Tensor]:
    """Random ids with the second row padded, as the stem takes them."""
    torch.manual_seed(1)
    pad = CONFIGS[family]().pad_token_id
    ids = torch.randint(5, 60, (rows, length))
    mask = torch.ones_like(ids)
    mask[1:, length - 3 :] = 0
    ids[mask == 0] = pad
    types = (torch.arange(length) > 3).long().expand(rows, length)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def pixel_values(rows: int = 2, size: int = 16) -> dict[str, torch.Tensor]:
    """Random images as the stem takes them."""
    torch.manual_seed(1)
    return {"pixel_values": torch.randn(rows, 3, size, size)}


def tokenizer() -> Tokenizer:
    """A word-level tokenizer over WORDS, with BERT's [CLS] a [SEP] b [SEP]."""
    word_tokenizer = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    word_tokenizer.normalizer = normalizers.Lowercase()
    word_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    word_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return word_tokenizer


def model_folder(folder: Path, family: str = "bert", blocks: int | None = None) -> Path:
    """A folder that from_pretrained loads: tiny random weights and the word-level tokenizer."""
    backbone(family, blocks=blocks).save_pretrained(folder)
    tokenizer().save(str(folder / "tokenizer.json"))
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    return folder


def classifier_folder(
    folder: Path,
    family: str = "bert",
    labels: tuple[str, ...] = ("negative", "positive"),
    steps: int = 0,
    blocks: int = 3,
) -> Path:
    """A folder of transformers' classification model with its tokenizer.

    steps: of a training on the tiny rows by plain torch; without any, weights are random, and none is 0.
    """
    model_folder(folder, family, blocks)
    torch.manual_seed(0)
    config = text_config(family, blocks)
    config.id2label, config.label2id = dict(enumerate(labels)), {name: n for n, name in enumerate(labels)}
    model = AutoModelForSequenceClassification.from_config(config)
    if not steps:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    reader = tokenizer()
    reader.enable_padding()
    encoded = reader.encode_batch([row["text"] for row in rows(64)])
    ids, mask = (torch.tensor([getattr(e, name) for e in encoded]) for name in ("ids", "attention_mask"))
    truth = torch.tensor([row["label"] for row in rows(64)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        model(input_ids=ids, attention_mask=mask, labels=truth).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    return folder


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Sentences whose label depends on one word: learnable in seconds."""
    generator = torch.Generator().manual_seed(seed)

    def pick(words: list[str]) -> str:
        return words[int(torch.randint(len(words), (1,), generator=generator))]

    sentences = []
    for number in range(count):
        label = number % 2
        filler = [
            pick(["the", "a", "film", "plot", "scene", "very", "quite", "is"]) for _ in range(1 + number % 7)
        ]
        sentences.append({"text": " ".join([*filler, pick(GOOD if label else BAD)]), "label": label})
    return sentences


def data_folder(folder: Path, train: int = 64, dev: int = 32, test: int = 32) -> Path:
    """train, dev and test JSON lines."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (split, count) in enumerate({"train": train, "dev": dev, "test": test}.items()):
        lines = (json.dumps(row) + "\n" for row in rows(count, seed))
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return folder


def image(label: int, seed: int = 0, size: tuple[int, int] = (16, 16)) -> np.ndarray:
    """uint8 [height, width, 3]: noise that is reddish for label 0 and bluish for label 1."""
    drawn = np.random.default_rng([seed, label]).integers(0, 120, (*size, 3))
    drawn[..., 2 * label] += 100
    return drawn.astype(np.uint8)


def png(label: int, seed: int = 0, size: tuple[int, int] = (16, 16)) -> bytes:
    """The same as the bytes of a file."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(image(label, seed, size)).save(out, "PNG")
    return out.getvalue()


def image_model_folder(folder: Path, family: str = "vit", blocks: int = 2) -> Path:
    """A folder that from_pretrained loads: tiny random weights and a preprocessor that cuts 16 out of 18."""
    torch.manual_seed(0)
    AutoModel.from_config(VISION[family](num_hidden_layers=blocks)).save_pretrained(folder)
    facts = {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 18},
        "crop_size": {"height": 16, "width": 16},
        "resample": 3,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.3, 0.4],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(facts))
    return folder


def image_folder(folder: Path, train: int = 48, dev: int = 24, test: int = 24) -> Path:
    """train, dev and test folders of class folders "blue" and "red"."""
    for part, (split, count) in enumerate({"train": train, "dev": dev, "test": test}.items()):
        for number in range(count):
            label = number % 2
            place = folder / split / ("blue" if label else "red")
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number:03}.png").write_bytes(png(label, 1000 * part + number))
    return folder


@torch.no_grad()
def greedy(network: DecoderNetwork, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """The `count` likeliest tokens after each prompt at full depth, one after another, without a cache."""
    answers: dict[int, list[int]] = {}  # by the number of the prompt; those of one length run together
    for length in {len(prompt) for prompt in prompts}:
        numbers = [number for number, prompt in enumerate(prompts) if len(prompt) == length]
        ids = torch.tensor([list(prompts[number]) for number in numbers])
        for _ in range(count):
            last_state = network(ids)[-1][:, -1]
            ids = torch.cat([ids, network.head(last_state).argmax(-1, keepdim=True)], dim=1)
        answers |= dict(zip(numbers, ids[:, length:].tolist(), strict=True))
    return [answers[number] for number in range(len(prompts))]


def hub_tokenizer() -> PreTrainedTokenizerFast:
    """The word-level tokenizer as transformers has it; [SEP] ends texts."""
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer(), eos_token="[SEP]", pad_token="[PAD]")


def write_rows(folder: Path, *rows: Any, split: str = "train") -> str:
    """A split as JSON lines in a folder, whose name is returned."""
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return str(folder)
