"""How far the probabilities of the answers given can be trusted: calibration error and conformal sets.

Everything starts from logits: taking a softmax of what is a softmax already makes any network look uncertain.
Temperatures and quantiles are fitted on dev, figures are of the rows that they are applied to.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from offramp.runtime.rules import softmax

Floats = NDArray[np.floating]
Ids = NDArray[np.int64]

BINS = 15
COVERAGE = 0.95
_RANGE = np.log([0.01, 100.0])  # of temperatures


def answers(logits: Floats, exits: Ids) -> Floats:
    """Logits [rows, classes] of the exits at which rows left: logits [rows, exits, classes], exits [rows]."""
    picked: Floats = logits[np.arange(len(exits)), exits]
    return picked


def calibration_error(logits: Floats, labels: Ids, bins: int = BINS) -> float:
    """Expected calibration error in 0..1: rows are sorted by the probability of their answer into `bins` bins
    of equal mass, and |accuracy - confidence| is averaged over bins, weighted by their rows.

    logits [rows, classes], labels [rows].
    """
    probabilities = softmax(logits.astype(np.float32))
    return binned_error(probabilities.max(-1).astype(float), logits.argmax(-1) == labels, bins)


def binned_error(confidence: Floats, right: NDArray[np.bool_], bins: int = BINS) -> float:
    """The same from the probabilities of the answers themselves: confidence [rows], right [rows]."""
    order = np.argsort(confidence, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    gaps = [abs(right[part].mean() - confidence[part].mean()) * len(part) for part in parts]
    return float(np.sum(gaps) / len(right))


def negative_log_likelihood(logits: Floats, labels: Ids, temperature: float = 1.0) -> float:
    """Mean of -log P(label) at a temperature: logits [rows, classes], labels [rows]."""
    scaled = logits.astype(float) / temperature
    top = scaled.max(-1, keepdims=True)
    total = np.log(np.exp(scaled - top).sum(-1)) + top[:, 0]
    return float((total - scaled[np.arange(len(labels)), labels]).mean())


def fit_temperature(logits: Floats, labels: Ids, steps: int = 60) -> float:
    """The temperature from 0.01 to 100 with the least negative log-likelihood: logits [rows, classes].

    Golden-section search over its logarithm: the likelihood has one peak in 1 / temperature. Rows that are
    all right would call for a temperature of zero and get the least one.
    """
    low, high = float(_RANGE[0]), float(_RANGE[1])
    share = (5**0.5 - 1) / 2
    for _ in range(steps):
        left, right = high - share * (high - low), low + share * (high - low)
        lower = negative_log_likelihood(logits, labels, float(np.exp(left)))
        if lower <= negative_log_likelihood(logits, labels, float(np.exp(right))):
            high = right
        else:
            low = left
    return float(np.exp((low + high) / 2))


def fit_temperatures(logits: Floats, labels: Ids) -> Floats:
    """One temperature an exit [exits]: logits [rows, exits, classes] and labels [rows] of dev."""
    return np.array([fit_temperature(logits[:, at], labels) for at in range(logits.shape[1])])


def conformal_quantile(logits: Floats, labels: Ids, coverage: float = COVERAGE) -> float:
    """Split conformal: up to which score 1 - P labels must be let in for a set to hold the label of a new row
    with probability `coverage`; infinite where dev is too small to promise that.

    The ceil((rows + 1) * coverage)-th smallest score of the labels: logits [rows, classes], labels [rows].
    """
    rows = len(labels)
    scores = 1.0 - softmax(logits.astype(np.float32))[np.arange(rows), labels]
    rank = int(np.ceil((rows + 1) * coverage - 1e-9))
    return float("inf") if rank > rows else float(np.sort(scores)[rank - 1])


def conformal_sets(logits: Floats, quantile: float) -> NDArray[np.bool_]:
    """Which labels are in each row's set [rows, classes]: those with 1 - P <= quantile; logits likewise."""
    inside: NDArray[np.bool_] = 1.0 - softmax(logits.astype(np.float32)) <= quantile
    return inside


def trust(
    dev: Floats, dev_exits: Ids, dev_labels: Ids, test: Floats, test_exits: Ids, test_labels: Ids
) -> dict[str, float]:
    """Of the answers that a rule gives: calibration error, raw and at the temperatures of dev, and mean size
    and coverage of the conformal sets; errors and coverage in percent.

    dev, test: logits [rows, exits, classes]; exits [rows] (0-based) at which the rule lets rows leave. One
    temperature an exit, fitted on all rows of dev, and one quantile, fitted on the answers given on dev.
    """
    temperatures = fit_temperatures(dev, dev_labels)[None, :, None]
    warm, given = answers(dev / temperatures, dev_exits), answers(test / temperatures, test_exits)
    sets = conformal_sets(given, conformal_quantile(warm, dev_labels))
    return {
        "ece_raw": 100 * calibration_error(answers(test, test_exits), test_labels),
        "ece": 100 * calibration_error(given, test_labels),
        "set_size": float(sets.sum(1).mean()),
        "coverage": 100 * float(sets[np.arange(len(test_labels)), test_labels].mean()),
    }
