"""Outputs of every exit on every row, and the tables, costs and operating points computed from them."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from offramp.models.macs import exit_macs, segment_macs, stem_macs
from offramp.models.network import EarlyExitNetwork
from offramp.runtime.rules import RuleSpec
from offramp.runtime.rules.sweep import ExitMacs, ExitTable, MeasuredPoint, choose_points, full_depth_point
from offramp.training.batches import Encoded, sorted_batches
from offramp.training.data import NO_LABEL
from offramp.training.loop import Run


@dataclass(frozen=True)
class Collected:
    """The outputs of every exit on every row, with labels and lengths in tokens [rows].

    logits [rows, exits, classes], pooled [rows, exits, hidden], gate_logits [rows, exits - 1] or None.
    """

    logits: torch.Tensor
    pooled: torch.Tensor
    gate_logits: torch.Tensor | None
    labels: torch.Tensor
    lengths: np.ndarray


@torch.no_grad()
def collect(
    network: EarlyExitNetwork,
    rows: Encoded,
    *,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    description: str = "reading",
) -> Collected:
    """Run every exit on every row, in evaluation mode, fp32, without augmentation; the order of rows is kept.

    description: of the progress bar.
    """
    was_training = network.training
    network.eval()
    rows = rows.plain
    order, logits, pooled, gate_logits = [], [], [], []
    batches = list(sorted_batches(rows.lengths, batch_size))
    for index in tqdm(batches, desc=description, unit="batch", file=sys.stderr, mininterval=1.0):
        inputs, _ = rows.batch(index, device)
        outputs = network(inputs)
        logits.append(outputs.logits.float().cpu())
        pooled.append(outputs.pooled.float().cpu())
        if outputs.gate_logits is not None:
            gate_logits.append(outputs.gate_logits.float().cpu())
        order.append(index)
    network.train(was_training)
    original = torch.from_numpy(np.argsort(np.concatenate(order)))
    return Collected(
        torch.cat(logits)[original],
        torch.cat(pooled)[original],
        torch.cat(gate_logits)[original] if gate_logits else None,
        torch.from_numpy(rows.label),
        rows.lengths,
    )


def exit_table(collected: Collected) -> ExitTable:
    """The collected outputs as a table that exit rules read; the gate of the last exit is 1."""
    gates = None
    if collected.gate_logits is not None:
        early_gates = collected.gate_logits.sigmoid().numpy()
        gates = np.concatenate([early_gates, np.ones_like(early_gates[:, :1])], axis=1)
    return ExitTable(collected.logits.numpy(), gates, collected.labels.numpy())


def exit_costs(network: EarlyExitNetwork, lengths: np.ndarray) -> ExitMacs:
    """The multiply-accumulates up to every exit, for rows of these lengths [rows] in tokens."""
    tokens = lengths.astype(np.float64)
    segments = segment_macs(network)
    each = np.stack([macs.token * tokens + macs.pair * tokens**2 + macs.row for macs in segments], 1)
    stem = stem_macs(network)
    to_exit = (stem.token * tokens + stem.row)[:, None] + each.cumsum(1)  # [rows, exits]
    early_exits = [exit_macs(network, index) for index in range(len(segments) - 1)]
    early = np.sum([macs.token * tokens + macs.row for macs in early_exits], axis=0)  # [rows]
    return ExitMacs(to_exit, to_exit[:, -1] - early, np.array(network.spec.exits))


def random_exit_accuracy(exits: np.ndarray, table: ExitTable) -> float:
    """Expected accuracy in percent of rows that exit at random with the histogram of `exits` [rows].

    It is computed exactly, without drawing.
    """
    shares = np.bincount(exits, minlength=table.logits.shape[1]) / len(exits)
    return 100 * float(shares @ table.right.mean(0))


def oracle_point(table: ExitTable, costs: ExitMacs) -> MeasuredPoint:
    """The figures of exiting at the first right exit, or at the last if none is right: the bound for any
    rule.
    """
    right = table.right
    exits = np.where(right.any(1), right.argmax(1), right.shape[1] - 1)
    return costs.point(RuleSpec("oracle", {}), exits, table)


def operating_points(
    run: Run[EarlyExitNetwork], dev: Encoded, rule: str, *, agreement: bool = False
) -> dict[str, Any]:
    """Choose operating points on dev; gives them and figures of the network on dev for training.json.

    rule: the exit rule of the recipe, a name in offramp.runtime.rules.sweep.SWEPT. agreement: choose by the
    share of rows that answer as full depth does, for which dev needs no labels.
    """
    collected = collect(run.network, dev, device=run.accelerator.device, description="dev")
    table, costs = exit_table(collected), exit_costs(run.network, collected.lengths)
    labelled = bool((table.labels != NO_LABEL).all())
    figures: dict[str, Any] = {}
    if labelled:
        figures["exit_accuracy"] = _percent(table.right)
        figures["full_depth"] = full_depth_point(table, costs).accuracy
    name = "accuracy"
    if agreement:
        name, table = "agreement", dataclasses.replace(table, labels=table.logits[:, -1].argmax(-1))
        figures["exit_agreement"] = _percent(table.right)
    points = choose_points(rule, table, costs)
    return {
        "rule": rule,
        "dev": figures | {"rows": len(table.labels)},
        "operating_points": [_point_as_json(key, point, name) for key, point in points.items()],
    }


def _percent(right: np.ndarray) -> list[float]:
    """The share of right rows at each exit, percent; right [rows, exits]."""
    return [round(100 * float(share), 2) for share in right.mean(0)]


def _point_as_json(name: str, point: MeasuredPoint, quality: str) -> dict[str, Any]:
    """A point as training.json states it; quality: the name of the figure that it was chosen by."""
    parameters = {key: float(value) for key, value in point.rule.parameters.items()}
    return {
        "name": name,
        "rule": {"name": point.rule.name, "parameters": parameters},
        "variant": "fp32",
        "data": "",
        "split": "dev",
        "measured": point.figures(quality),
    }
