"""What torch said, as the table that rules are swept over, and the controls that no rule can be."""

from __future__ import annotations

import numpy as np

from offramp.models.macs import exit_macs, segment_macs, stem_macs
from offramp.models.network import EarlyExitNetwork
from offramp.runtime.rules import RuleSpec
from offramp.runtime.rules.sweep import ExitMacs, ExitTable, Point
from offramp.training.collect import Collected


def table_of(seen: Collected) -> ExitTable:
    """Collected tensors as the rules read them; the last exit has no gate, everybody left leaves there."""
    gates = None
    if seen.gates is not None:
        opened = seen.gates.sigmoid().numpy()
        gates = np.concatenate([opened, np.ones_like(opened[:, :1])], axis=1)
    return ExitTable(seen.logits.numpy(), gates, seen.labels.numpy())


def costs_of(network: EarlyExitNetwork, lengths: np.ndarray) -> ExitMacs:
    """Multiply-accumulates to every exit for rows of these lengths [rows] in tokens."""
    tokens = lengths.astype(np.float64)
    segments = segment_macs(network)
    each = np.stack([cost.token * tokens + cost.pair * tokens**2 + cost.row for cost in segments], 1)
    stem = stem_macs(network)
    to_exit = (stem.token * tokens + stem.row)[:, None] + each.cumsum(1)  # [rows, exits]
    heads = [exit_macs(network, index) for index in range(len(segments) - 1)]
    spared = np.sum([head.token * tokens + head.row for head in heads], axis=0)  # [rows]
    return ExitMacs(to_exit, to_exit[:, -1] - spared, np.array(network.spec.exits))


def random_control(point_exits: np.ndarray, table: ExitTable) -> float:
    """Expected accuracy in percent of leaving at random with the same histogram of exits, computed
    exactly.
    """
    share = np.bincount(point_exits, minlength=table.logits.shape[1]) / len(point_exits)
    return 100 * float(share @ table.right.mean(0))


def oracle(table: ExitTable, costs: ExitMacs) -> Point:
    """Leave at the first exit that is right; the last exit where none is: the bound for any rule on these
    exits.
    """
    right = table.right
    exits = np.where(right.any(1), right.argmax(1), right.shape[1] - 1)
    return costs.point(RuleSpec("oracle", {}), exits, table)
