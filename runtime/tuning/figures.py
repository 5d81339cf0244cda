"""Figures of ee-bench, computed from the timings of a candidate and those of the reference.

Shares are 0..1, the quality of answers is in percent, and other units are part of the names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from offramp.runtime.decoding import Token
from offramp.runtime.tuning.right_answers import AnswerReader, Answers
from offramp.runtime.tuning.timing import AnswerTimings, Ids, RowTimings, Seconds, time_ratio

# Positions in an answer, from 1, at which a line of the depth histogram begins.
POSITIONS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def row_figures(timings: RowTimings, reference: RowTimings, macs: Seconds, budget: float) -> dict[str, Any]:
    """Compute times, exits and shares of a candidate that answers rows, beside the reference.

    macs [rows, exits]: multiply-accumulates of each row up to each exit. budget: seconds that an answer may
    take. The shares of time and of multiply-accumulates are over all rows and rounds together: a median over
    rows would hide either the rows that left early or those that went deep.
    """
    rounds = len(timings.seconds)
    ratio, ratio_p5, ratio_p95 = time_ratio(timings.seconds, reference.seconds)
    times = 1e3 * np.percentile(timings.seconds, range(101))
    counts = np.bincount(timings.exits.ravel() - 1, minlength=macs.shape[1]) / rounds
    share = macs_share(timings.exits, macs)
    time_share = float(timings.seconds.sum() / reference.seconds.sum())
    return {
        "p50_ms": round_figure(times[50]),
        "p95_ms": round_figure(times[95]),
        "p99_ms": round_figure(times[99]),
        "mean_ms": round_figure(1e3 * timings.seconds.mean()),
        "percentiles_ms": [round_figure(value) for value in times],
        "ratio": round_figure(ratio),
        "ratio_p5": round_figure(ratio_p5),
        "ratio_p95": round_figure(ratio_p95),
        "mean_exit": round_figure(timings.exits.mean()),
        "exits": [round_figure(value) for value in counts],
        "goodput": round_figure((timings.seconds <= budget).mean()),
        "time_share": round_figure(time_share),
        "macs_share": round_figure(share),
        "realised": realised_saving(time_share, share),
    }


def macs_share(exits: Ids, macs: Seconds) -> float:
    """The share of full depth's multiply-accumulates that rows with these exits need, in 0..1.

    exits [rounds, rows], 1-based. macs [rows, exits]: multiply-accumulates of each row up to each exit.
    """
    full = float(len(exits) * macs[:, -1].sum()) or 1.0  # a manifest without MACs: no share is saved
    return 1 - float((macs[:, -1] - macs[np.arange(len(macs)), exits - 1]).sum()) / full


def realised_saving(time_share: float, share: float) -> float | None:
    """The share of the time saved, divided by the share of the multiply-accumulates saved.

    time_share, share: what is spent of each, 0..1. None if under 1 % of the multiply-accumulates is saved:
    the quotient would be noise.
    """
    return round_figure((1 - time_share) / (1 - share)) if share < 0.99 else None


def answer_quality(reader: AnswerReader, timings: RowTimings, wanted: Answers | None) -> float | None:
    """The quality of a candidate's answers in percent over rows and rounds; None without right answers.

    wanted: the right answers [rows].
    """
    if wanted is None:
        return None
    answers = [[answer] for answer in timings.answers.ravel()]
    return round_figure(reader.quality(answers, list(wanted) * len(timings.answers)).each[0])


def answer_figures(timings: AnswerTimings, full: AnswerTimings) -> dict[str, Any]:
    """Compute times and depths of a candidate that generates text, beside the answers of full depth.

    Figures of the tokens after the first are None if no answer has any.
    """
    steps = np.concatenate([np.diff(stamps) for stamps in timings.stamps]) * 1e3
    later = [token for tokens in timings.tokens for token in tokens[1:]]
    same = [
        [token.id for token in tokens] == [token.id for token in full_tokens]
        for tokens, full_tokens in zip(timings.tokens, full.tokens, strict=True)
    ]
    # Answers of one token have no time after it, and so neither a rate nor a ratio.
    timed = np.array([len(tokens) > 1 for tokens in timings.tokens])
    ratio, ratio_p5, ratio_p95 = (
        (round(x, 4) for x in time_ratio(timings.after_first[timed], full.after_first[timed]))
        if timed.any()
        else (None, None, None)
    )
    tokens_per_s = round(len(later) / max(1e-9, float(timings.after_first.sum())), 3) if later else None
    return {
        "tokens_per_s": tokens_per_s,
        "ratio": ratio,
        "ratio_p5": ratio_p5,
        "ratio_p95": ratio_p95,
        "first_ms": round(1e3 * float(np.median([stamps[0] for stamps in timings.stamps])), 3),
        "p50_ms": round(float(np.percentile(steps, 50)), 3) if len(steps) else None,
        "p95_ms": round(float(np.percentile(steps, 95)), 3) if len(steps) else None,
        "depth": round(float(np.mean([token.depth for token in later])), 3) if later else None,
        "blocks_run": round(float(np.mean([token.blocks_run for token in later])), 3) if later else None,
        "same": round(float(np.mean(same)), 4),
        "by_position": depths_by_position(timings.tokens),
    }


def depths_by_position(answers: Sequence[Sequence[Token]]) -> list[dict[str, Any]]:
    """Histograms of the depth in blocks at which tokens were predicted, by ranges of their position.

    answers: the tokens of each answer. Ranges begin at POSITIONS.
    """
    lines = []
    for first, end in zip(POSITIONS, (*POSITIONS[1:], 1 << 30), strict=True):
        depths = [token.depth for tokens in answers for token in tokens[first - 1 : end - 1]]
        if depths:
            values, counts = np.unique(depths, return_counts=True)
            by_depth = {int(depth): int(count) for depth, count in zip(values, counts, strict=True)}
            lines.append({"from": first, "mean": round(float(np.mean(depths)), 3), "tokens": by_depth})
    return lines


def round_figure(value: float) -> float:
    """Round a number to six significant digits, since more would be noise."""
    return float(f"{float(value):.6g}")
