"""Tiny models and data of the tasks beside classification, learnable in seconds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tiny
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from offramp.models.network import EarlyExitNetwork, NetworkSpec
from offramp.models.own_head import OwnHead
from offramp.models.tasks import EMBEDDING, MULTI_LABEL, REGRESSION, TASKS, TOKENS

NAMES = (MULTI_LABEL, TOKENS, REGRESSION, EMBEDDING)
LABELS = {
    MULTI_LABEL: ("film", "good", "plot"),
    TOKENS: ("O", "B-bad", "B-good"),
    REGRESSION: (),
    EMBEDDING: (),
}


def network(task: str, family: str = "bert", blocks: int = 3, **changes: Any) -> EarlyExitNetwork:
    """A tiny network of the task with an exit after every block, random everywhere."""
    pooling = "none" if TASKS[task].per_token else "attention"
    facts: dict[str, Any] = {"pooling": pooling, "head": "mlp", "task": task, "own_head": task == EMBEDDING}
    spec = NetworkSpec(LABELS[task], tuple(range(1, blocks + 1)), **facts | changes)
    head = OwnHead("mean", (), 0.1) if task == EMBEDDING else None
    network = EarlyExitNetwork(tiny.backbone(family, blocks=blocks), spec, head).eval()
    for exit_head in network.exits:
        if exit_head.attention is not None:
            torch.nn.init.normal_(exit_head.attention.query.weight)  # type: ignore[union-attr, operator]
    return network


def rows(task: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Sentences whose answers depend on single words."""
    generator = torch.Generator().manual_seed(seed)

    def pick(words: Sequence[str]) -> str:
        return words[int(torch.randint(len(words), (1,), generator=generator))]

    sentences = []
    for number in range(count):
        words = [
            pick(["the", "a", "film", "plot", "is", *tiny.GOOD, *tiny.BAD]) for _ in range(2 + number % 6)
        ]
        sentences.append(_row(task, words))
    return sentences


def _row(task: str, words: list[str]) -> dict[str, Any]:
    kinds = ["B-good" if word in tiny.GOOD else "B-bad" if word in tiny.BAD else "O" for word in words]
    if task == TOKENS:
        return {"tokens": words, "tags": kinds}
    text = " ".join(words)
    if task == MULTI_LABEL:
        given = {"good": "B-good" in kinds, "film": "film" in words, "plot": "plot" in words}
        return {"text": text, "labels": [name for name, is_given in given.items() if is_given]}
    if task == REGRESSION:
        return {"text": text, "label": 2.5 + 10 * (kinds.count("B-good") - kinds.count("B-bad"))}
    return {"text": text}


def data_folder(folder: Path, task: str, train: int = 96, dev: int = 48, test: int = 48) -> Path:
    """train, dev and test JSON lines."""
    for seed, (split, count) in enumerate({"train": train, "dev": dev, "test": test}.items()):
        tiny.write_rows(folder, *rows(task, count, seed), split=split)
    return folder


def model_folder(folder: Path, task: str, family: str = "bert", blocks: int = 3) -> Path:
    """A folder of transformers' model of the task with its tokenizer; its weights are random, and none is 0.

    For embeddings it is a folder of sentence-transformers.
    """
    tiny.model_folder(folder, family, blocks)
    if task == EMBEDDING:
        modules = [
            {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for number, (path, kind) in enumerate(
                [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
            )
        ]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling").mkdir()
        modes = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes))
        return folder
    torch.manual_seed(0)
    config = tiny.text_config(family, blocks)
    labels = LABELS[task] or ("LABEL_0",)
    config.id2label, config.label2id = dict(enumerate(labels)), {name: n for n, name in enumerate(labels)}
    if task == MULTI_LABEL:
        config.problem_type = "multi_label_classification"
    kind = AutoModelForTokenClassification if task == TOKENS else AutoModelForSequenceClassification
    model = kind.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder
