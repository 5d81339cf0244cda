"""The Memorized Layer, against its definition read aloud."""

from __future__ import annotations

import torch

from offramp.training.hardness import easiness, memorized_layer


def _logits(right: list[list[int]]) -> torch.Tensor:
    chosen = torch.tensor(right)  # 1 where the exit picks label 1, the true one
    return torch.nn.functional.one_hot(chosen, 2).float()


def test_memorized_layer() -> None:
    logits = _logits([[1, 1, 1, 1], [0, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 1], [1, 1, 1, 0], [0, 0, 0, 0]])
    labels = torch.ones(6, dtype=torch.long)
    assert memorized_layer(logits, labels).tolist() == [1, 2, 3, 4, 4, 4]


def test_easiness_is_zero_for_the_hardest() -> None:
    logits = _logits([[1, 1, 1, 1], [0, 0, 0, 0]])
    assert easiness(logits, torch.ones(2, dtype=torch.long)).tolist() == [0.75, 0.0]
