"""Outputs of every exit on every row, and the tables, costs and operating points computed from them."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from offramp.models.exits import Exit
from offramp.models.macs import exit_macs, segment_macs, stem_macs
from offramp.models.network import EarlyExitNetwork, NetworkSpec
from offramp.models.tasks import (
    CLASSIFICATION,
    EMBEDDING,
    MULTI_LABEL,
    REGRESSION,
    SURE,
    TOKENS,
    certainty_logits,
    certainty_of_labels,
    threshold_logits,
    top_margin,
)
from offramp.runtime.progress import track
from offramp.runtime.rules import RuleSpec
from offramp.runtime.rules.quality import (
    AGREEMENT,
    Quality,
    embedding_quality,
    given_labels,
    multi_label_quality,
    token_quality,
    value_quality,
)
from offramp.runtime.rules.sweep import ExitMacs, ExitTable, MeasuredPoint, choose_points, full_depth_point
from offramp.training.batches import Encoded, EncodedTokens, sorted_batches
from offramp.training.data import NO_LABEL, has_label
from offramp.training.loop import Run

# The name of a task's quality by labels.
QUALITY = {
    CLASSIFICATION: "accuracy",
    MULTI_LABEL: "f1",
    TOKENS: "f1",
    REGRESSION: "spearman",
    EMBEDDING: AGREEMENT,
}
THRESHOLDS = tuple(number / 20 for number in range(2, 19))  # 0.1 to 0.9, that are tried for each label


@dataclass(frozen=True)
class Collected:
    """The outputs of every exit on every row, with labels and lengths in tokens [rows].

    logits [rows, exits, classes]: what the exits give, pooled [rows, exits, hidden], gate_logits [rows, exits
    - 1] or None. Where exits read each token, all words stand in place of the rows of these and of labels;
    starts [rows + 1]: the first word of each row, else None. spec: that of the network, None for
    classification.
    """

    logits: torch.Tensor
    pooled: torch.Tensor
    gate_logits: torch.Tensor | None
    labels: torch.Tensor
    lengths: np.ndarray
    starts: np.ndarray | None = None
    spec: NetworkSpec | None = None


def label_numbers(rows: Encoded, index: np.ndarray) -> np.ndarray:
    """Where labels of the rows at `index` stand in rows.label: there, or at the numbers of their words."""
    if not isinstance(rows, EncodedTokens):
        return index
    starts = rows.starts
    return np.concatenate([np.arange(starts[row], starts[row + 1]) for row in index])


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
    for index in track(batches, description, unit="batch"):
        inputs, _ = rows.batch(index, device)
        outputs = network(inputs)
        logits.append(outputs.logits.float().cpu())
        pooled.append(outputs.pooled.float().cpu())
        if outputs.gate_logits is not None:
            gate_logits.append(outputs.gate_logits.float().cpu())
        order.append(label_numbers(rows, index))
    network.train(was_training)
    original = torch.from_numpy(np.argsort(np.concatenate(order)))
    return Collected(
        torch.cat(logits)[original],
        torch.cat(pooled)[original],
        torch.cat(gate_logits)[original] if gate_logits else None,
        torch.from_numpy(rows.label),
        rows.lengths,
        rows.starts if isinstance(rows, EncodedTokens) else None,
        network.spec,
    )


def exit_table(collected: Collected, *, agreement: bool = False) -> ExitTable:
    """The collected outputs as a table that exit rules read; the gate of the last exit is 1.

    agreement: the right answers are those of full depth instead of the labels.
    """
    gates = None
    if collected.gate_logits is not None:
        early_gates = collected.gate_logits.sigmoid().numpy()
        gates = np.concatenate([early_gates, np.ones_like(early_gates[:, :1])], axis=1)
    given, labels = collected.logits.numpy(), collected.labels.numpy()
    spec = collected.spec
    if spec is None or spec.task == CLASSIFICATION:
        return ExitTable(given, gates, given[:, -1].argmax(-1) if agreement else labels)
    return _TABLES[spec.task](collected, spec, given, labels, agreement)


def _labels_table(
    collected: Collected, spec: NetworkSpec, given: np.ndarray, labels: np.ndarray, agreement: bool
) -> ExitTable:
    thresholds = spec.thresholds or (0.5,) * len(spec.labels)
    certainty = certainty_of_labels(collected.logits, None, threshold_logits(spec.thresholds))
    wanted = given_labels(given[:, -1], thresholds) if agreement else labels > 0
    names = {"name": AGREEMENT} if agreement else {}
    quality = multi_label_quality(given, wanted, thresholds, **names)
    return _table(certainty_logits(certainty).numpy(), quality)


def _words_table(
    collected: Collected, spec: NetworkSpec, given: np.ndarray, labels: np.ndarray, agreement: bool
) -> ExitTable:
    starts = collected.starts
    assert starts is not None
    row_of_word = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    margins = top_margin(collected.logits).numpy()  # [words, exits]
    certainty = np.full((len(starts) - 1, given.shape[1]), SURE, np.float32)
    np.minimum.at(certainty, row_of_word, margins)
    numbers = given.argmax(-1)  # [words, exits]
    wanted = numbers[:, -1] if agreement else labels
    pieces = list(itertools.pairwise(starts))
    names = {"name": AGREEMENT} if agreement else {}
    quality = token_quality(
        [numbers[start:end].T for start, end in pieces],
        [wanted[start:end] for start, end in pieces],
        spec.labels,
        **names,
    )
    return _table(certainty_logits(torch.from_numpy(certainty)).numpy(), quality)


def _values_table(
    collected: Collected, spec: NetworkSpec, given: np.ndarray, labels: np.ndarray, agreement: bool
) -> ExitTable:
    wanted = given[:, -1, 0] if agreement else labels
    names = {"name": AGREEMENT} if agreement else {}
    return _table(given[..., :0], value_quality(given, wanted, **names), given)


def _embeddings_table(
    collected: Collected, spec: NetworkSpec, given: np.ndarray, labels: np.ndarray, agreement: bool
) -> ExitTable:
    return _table(given[..., :0], embedding_quality(given, given[:, -1], name=AGREEMENT), given)


def _table(logits: np.ndarray, quality: Quality, answers: np.ndarray | None = None) -> ExitTable:
    """A table of a task without one label a row; logits: those that rules read."""
    return ExitTable(logits, None, np.full(len(logits), NO_LABEL), answers, quality)


_TABLES = {
    MULTI_LABEL: _labels_table,
    TOKENS: _words_table,
    REGRESSION: _values_table,
    EMBEDDING: _embeddings_table,
}


def default_rule(network: EarlyExitNetwork) -> str:
    """The rule of recipes without a policy: by probability, or for numbers by their change."""
    return "max_probability" if network.task.least_labels else "settled"


def fit_thresholds(run: Run[EarlyExitNetwork], dev: Encoded) -> None:
    """Choose each label's threshold on dev, by the F1 of the last exit, where rows have several labels.

    Of equally good thresholds the one next to a half is taken.
    """
    network = run.network
    if network.spec.task != MULTI_LABEL or not has_label(dev.label).all():
        return

    def last_logits() -> torch.Tensor:
        collected = collect(network, dev, device=run.accelerator.device, description="thresholds")
        return collected.logits[:, -1]

    logits = run.compute_once("dev_logits", last_logits).numpy()
    tries = sorted(THRESHOLDS, key=lambda threshold: (abs(threshold - 0.5), threshold))
    given = np.stack([given_labels(logits, [threshold]) for threshold in tries])  # [tries, rows, labels]
    wanted = dev.label > 0
    hits = (given & wanted).sum(1)
    f1 = 2 * hits / np.maximum(1, given.sum(1) + wanted.sum(0))
    thresholds = tuple(tries[number] for number in f1.argmax(0))
    network.spec = dataclasses.replace(network.spec, thresholds=thresholds)


@torch.no_grad()
def start_exits(run: Run[EarlyExitNetwork], answers: torch.Tensor) -> None:
    """Start the exits of a new run from the mean answer: of several labels, and of values.

    answers: logits of labels [rows, labels], or values [rows], NaN for none. The exits of a regression learn
    values of mean 0 and spread 1. The biases of several labels, most of which are rare, begin at their mean
    logits: from 0 the deep exits of a network learned nothing (docs/log.md, 2026-11-29). A model's own head
    stays.
    """
    network = run.network
    if network.value_mean is not None and network.value_spread is not None:
        known = answers[~answers.isnan()]
        network.value_mean.copy_(known.mean())
        network.value_spread.copy_(known.std(correction=0).clamp(min=1e-6))
    elif network.spec.task == MULTI_LABEL and run.position == {"phase": 0, "step": 0}:
        for exit_head in network.exits:
            if isinstance(exit_head, Exit):
                exit_head.classify.bias.copy_(answers.float().mean(0))


def label_logits(labels: np.ndarray) -> torch.Tensor:
    """The logits of the frequencies of several labels [1, labels]; labels [rows, labels], -1 for none."""
    known = labels[has_label(labels)]
    share = torch.from_numpy((known.sum(0) + 1) / (len(known) + 2))  # no label is impossible
    return share.logit()[None]


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
    return float(shares @ table.measure.each)


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
    table, costs = exit_table(collected, agreement=agreement), exit_costs(run.network, collected.lengths)
    figures: dict[str, Any] = {}
    if is_labelled(collected):
        by_labels = exit_table(collected)
        figures[f"exit_{by_labels.measure.name}"] = _rounded(by_labels.measure.each)
        figures["full_depth"] = full_depth_point(by_labels, costs).accuracy
    name = AGREEMENT if agreement else table.measure.name
    if name == AGREEMENT:
        figures["exit_agreement"] = _rounded(table.measure.each)
    points = choose_points(rule, table, costs)
    return {
        "rule": rule,
        "dev": figures | {"rows": len(collected.lengths)},
        "operating_points": [_point_as_json(key, point, name) for key, point in points.items()],
    }


def is_labelled(collected: Collected) -> bool:
    """Whether all rows have a label or, where words have labels, any word has one."""
    known = has_label(collected.labels.numpy())
    return bool(known.any() if collected.starts is not None else known.all())


def _rounded(percents: np.ndarray) -> list[float]:
    return [round(float(percent), 2) for percent in percents]


def _point_as_json(name: str, point: MeasuredPoint, quality: str) -> dict[str, Any]:
    """A point as training.json states it; quality: the name of the figure that it was chosen by."""
    parameters = {key: float(value) for key, value in point.rule.parameters.items()}
    return {
        "name": name,
        "rule": {"name": point.rule.name, "parameters": parameters},
        "variant": "fp32",
        "data": "",
        "split": "dev",
        "measured": point.stated_figures(quality),
    }
