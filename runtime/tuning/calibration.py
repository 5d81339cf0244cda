"""Calibration of the answers' probabilities: calibration error, temperatures, conformal sets.

All functions take logits, not probabilities: a second softmax would flatten them. Temperatures and quantiles
are fitted on dev; figures are for the rows to which they are applied. Sets of a walk's answers are those of
JEI-DNN (arXiv 2310.09163): a quantile for each exit, or one for all.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from offramp.runtime.bundle.manifest import Calibration
from offramp.runtime.rules import softmax

Floats = NDArray[np.floating]
Ids = NDArray[np.int64]

BINS = 15
COVERAGE = 0.95
ROUNDING = 1e-5  # that a score of the same row may differ by, walked alone or with other rows
FEW_ROWS = 20  # at most so many answers of an exit have no quantile of their own
_LOG_TEMPERATURES = np.log([0.01, 100.0])  # least and greatest


def answer_logits(logits: Floats, exits: Ids) -> Floats:
    """Select each row's logits at its exit [rows, classes]: logits [rows, exits, classes], exits [rows]
    0-based.
    """
    selected: Floats = logits[np.arange(len(exits)), exits]
    return selected


def calibration_error(logits: Floats, labels: Ids, bins: int = BINS) -> float:
    """Expected calibration error in 0..1.

    Rows are sorted by the probability of their answer into `bins` bins of equal mass, and |accuracy -
    confidence| is averaged over bins, weighted by their rows. logits [rows, classes], labels [rows].
    """
    probabilities = softmax(logits.astype(np.float32))
    return binned_error(probabilities.max(-1).astype(float), logits.argmax(-1) == labels, bins)


def binned_error(confidence: Floats, right: NDArray[np.bool_], bins: int = BINS) -> float:
    """Expected calibration error in 0..1 from answers' probabilities: confidence [rows], right [rows]."""
    order = np.argsort(confidence, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    gaps = [abs(right[part].mean() - confidence[part].mean()) * len(part) for part in parts]
    return float(np.sum(gaps) / len(right))


def negative_log_likelihood(logits: Floats, labels: Ids, temperature: float = 1.0) -> float:
    """Mean of -log P(label) in nats at a temperature: logits [rows, classes], labels [rows]."""
    scaled = logits.astype(float) / temperature
    top = scaled.max(-1, keepdims=True)
    log_sum = np.log(np.exp(scaled - top).sum(-1)) + top[:, 0]
    return float((log_sum - scaled[np.arange(len(labels)), labels]).mean())


def fit_temperature(logits: Floats, labels: Ids, steps: int = 60) -> float:
    """The temperature from 0.01 to 100 with the least negative log-likelihood: logits [rows, classes].

    Golden-section search over its logarithm: the likelihood has one peak in 1 / temperature. If all rows are
    right, the best temperature would be zero, and the result is the lowest one of the range.
    """
    low, high = float(_LOG_TEMPERATURES[0]), float(_LOG_TEMPERATURES[1])
    share = (5**0.5 - 1) / 2
    for _ in range(steps):
        left, right = high - share * (high - low), low + share * (high - low)
        left_loss = negative_log_likelihood(logits, labels, float(np.exp(left)))
        if left_loss <= negative_log_likelihood(logits, labels, float(np.exp(right))):
            high = right
        else:
            low = left
    return float(np.exp((low + high) / 2))


def fit_temperatures(logits: Floats, labels: Ids) -> Floats:
    """Fit one temperature for each exit [exits]: logits [rows, exits, classes] and labels [rows] of dev."""
    return np.array([fit_temperature(logits[:, index], labels) for index in range(logits.shape[1])])


def stable_temperatures(logits: Floats, labels: Ids) -> tuple[float, ...]:
    """A temperature for each exit, as fit_temperatures, but 1 for an exit that answers every row right.

    The likelihood of such an exit rises towards a temperature of 0, at which it would be certain of anything.
    """
    wrong = (logits.argmax(-1) != labels[:, None]).any(0)
    fitted = (fit_temperature(logits[:, exit], labels) if wrong[exit] else 1.0 for exit in range(len(wrong)))
    return tuple(round(temperature, 4) for temperature in fitted)


def conformal_quantile(logits: Floats, labels: Ids, coverage: float = COVERAGE) -> float:
    """The greatest score 1 - P of labels in a conformal set, for sets that contain a new row's label with
    probability `coverage`.

    Split conformal prediction: it is the ceil((rows + 1) * coverage)-th smallest score of the true labels,
    and infinite if there are too few rows. logits [rows, classes] and labels [rows] of dev.
    """
    rows = len(labels)
    scores = 1.0 - softmax(logits.astype(np.float32))[np.arange(rows), labels]
    rank = int(np.ceil((rows + 1) * coverage - 1e-9))
    return float("inf") if rank > rows else float(np.sort(scores)[rank - 1])


def conformal_sets(logits: Floats, quantile: float | Floats) -> NDArray[np.bool_]:
    """Which labels are in each row's conformal set [rows, classes]: those with 1 - P <= quantile.

    logits [rows, classes]. quantile: one number, or one for each row [rows].
    """
    limits = np.asarray(quantile)[..., None]
    inside: NDArray[np.bool_] = 1.0 - softmax(logits.astype(np.float32)) <= limits
    return inside


def exit_quantiles(logits: Floats, exits: Ids, labels: Ids, coverage: float = COVERAGE) -> Floats:
    """The conformal quantile of the answers of each exit [exits].

    It is computed on the rows that leave there, or on all rows where they are FEW_ROWS or fewer. logits
    [rows, exits, classes], exits [rows] 0-based, labels [rows] of dev.
    """
    quantiles = []
    for index in range(logits.shape[1]):
        at_exit = exits == index
        rows = at_exit if at_exit.sum() > FEW_ROWS else np.ones_like(at_exit)
        quantiles.append(conformal_quantile(logits[rows, index], labels[rows], coverage))
    return np.array(quantiles)


def measure_calibration(
    logits: Floats, exits: Ids, labels: Ids, coverage: float, temperatures: Floats | None = None
) -> Calibration:
    """Measure quantiles of a walk's answers: logits [rows, exits, classes], exits [rows].

    temperatures [exits]: None to fit them on the rows, too. An infinite quantile, of too few rows, is stored
    as 1: such a set holds every label. Quantiles are raised by ROUNDING: a quantile is the score of a row of
    these, and the same text may come again, many times.
    """
    temperatures = fit_temperatures(logits, labels) if temperatures is None else temperatures
    scaled = logits / temperatures.astype(np.float32)[None, :, None]  # as a session divides them
    each = np.minimum(exit_quantiles(scaled, exits, labels, coverage) + ROUNDING, 1.0)
    every = min(conformal_quantile(answer_logits(scaled, exits), labels, coverage) + ROUNDING, 1.0)
    return Calibration(coverage, tuple(temperatures.tolist()), tuple(each.tolist()), every)


def calibration_figures(
    dev: Floats, dev_exits: Ids, dev_labels: Ids, test: Floats, test_exits: Ids, test_labels: Ids
) -> dict[str, float]:
    """Figures of the calibration of a rule's answers on test: calibration errors and conformal sets.

    Calibration error raw and at the temperatures of dev, mean size of the sets raw and at the temperatures,
    and their coverage; errors and coverage in percent. dev, test: logits [rows, exits, classes]; exits [rows]
    (0-based) that the rule chooses. There is one temperature for each exit, fitted on all rows
    of dev. Quantiles are fitted on the answers on dev: one, and for the figures *_per_exit one for each exit.
    """
    temperatures = fit_temperatures(dev, dev_labels)[None, :, None]
    dev_answers = answer_logits(dev / temperatures, dev_exits)
    test_answers = answer_logits(test / temperatures, test_exits)
    sets = conformal_sets(test_answers, conformal_quantile(dev_answers, dev_labels))
    raw_answers = answer_logits(test, test_exits)
    raw_sets = conformal_sets(raw_answers, conformal_quantile(answer_logits(dev, dev_exits), dev_labels))
    quantiles = exit_quantiles(dev / temperatures, dev_exits, dev_labels)
    exit_sets = conformal_sets(test_answers, quantiles[test_exits])
    rows = np.arange(len(test_labels))
    return {
        "ece_raw": 100 * calibration_error(raw_answers, test_labels),
        "ece": 100 * calibration_error(test_answers, test_labels),
        "set_size_raw": float(raw_sets.sum(1).mean()),
        "set_size": float(sets.sum(1).mean()),
        "coverage": 100 * float(sets[rows, test_labels].mean()),
        "set_size_per_exit": float(exit_sets.sum(1).mean()),
        "coverage_per_exit": 100 * float(exit_sets[rows, test_labels].mean()),
    }


def score_figures(logits: Floats, exits: Ids, labels: Ids) -> dict[str, float]:
    """Calibration error (percent) and mean size of label sets, raw and at temperatures, of a walk's answers.

    Each half of the rows is measured at temperatures and quantiles that the other half gives, and the two are
    averaged by their rows, since figures of the fitted rows themselves would flatter. logits [rows, exits,
    classes], exits and labels [rows]. Empty for fewer than 2 rows.
    """
    if len(labels) < 2:
        return {}
    order = np.random.default_rng(0).permutation(len(labels))  # files are often sorted by label
    halves = np.array_split(order, 2)
    figures = [
        calibration_figures(
            *(logits[other], exits[other], labels[other]), *(logits[half], exits[half], labels[half])
        )
        for half, other in (halves, halves[::-1])
    ]
    weights = [len(half) / len(labels) for half in halves]
    return {
        name: round(sum(w * each[name] for w, each in zip(weights, figures, strict=True)), 3)
        for name in ("ece_raw", "ece", "set_size_raw", "set_size")
    }
