"""The Memorized Layer: how many exits an instance needs (ConsistentEE, section "Memorized Layer")."""

from __future__ import annotations

from torch import Tensor


def memorized_layer(logits: Tensor, labels: Tensor) -> Tensor:
    """Smallest exit from which on every exit is right, 1-based [rows]; the last exit where the last one is
    wrong.

    logits [rows, exits, classes] in evaluation mode, labels [rows].
    """
    right = logits.argmax(-1) == labels[:, None]  # [rows, exits]
    # Right from here to the end: a running product from the last exit backwards.
    steady = right.long().flip(1).cumprod(1).sum(1)  # [rows] how many exits at the end are all right
    return (right.shape[1] - steady + 1).clamp(max=right.shape[1])


def easiness(logits: Tensor, labels: Tensor) -> Tensor:
    """1 - m / L [rows]: the share of the depth penalty that an instance pays; 0 for the hardest."""
    exits = logits.shape[1]
    return 1.0 - memorized_layer(logits, labels).float() / exits
