"""Run a network over rows once, in evaluation mode, and keep what every exit said."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from offramp.models.network import EarlyExitNetwork
from offramp.training.batches import Encoded, sorted_batches


@dataclass(frozen=True)
class Collected:
    """Row by row: logits [rows, exits, classes], pooled [rows, exits, hidden], gates [rows, exits - 1] or
    None, labels and tokens [rows].
    """

    logits: torch.Tensor
    pooled: torch.Tensor
    gates: torch.Tensor | None
    labels: torch.Tensor
    lengths: np.ndarray


@torch.no_grad()
def collect(
    network: EarlyExitNetwork,
    rows: Encoded,
    *,
    batch_size: int = 64,
    device: Any = "cpu",
    what: str = "reading",
) -> Collected:
    """Every exit on every row, in the order of the rows, fp32, no dropout, no augmentation."""
    training = network.training
    network.eval()
    rows = rows.plain
    order, parts = [], []
    batches = list(sorted_batches(rows.lengths, batch_size))
    for index in tqdm(batches, desc=what, unit="batch", file=sys.stderr, mininterval=1.0):
        inputs, _ = rows.batch(index, device)
        out = network(inputs)
        parts.append(
            (
                out.logits.float().cpu(),
                out.pooled.float().cpu(),
                None if out.gate_logits is None else out.gate_logits.float().cpu(),
            )
        )
        order.append(index)
    network.train(training)
    back = torch.from_numpy(np.argsort(np.concatenate(order)))
    logits, pooled = torch.cat([p[0] for p in parts])[back], torch.cat([p[1] for p in parts])[back]
    gates = torch.cat([p[2] for p in parts if p[2] is not None])[back] if parts[0][2] is not None else None
    return Collected(logits, pooled, gates, torch.from_numpy(rows.label), rows.lengths)
