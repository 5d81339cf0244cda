"""benchmarks/retrieval.py: neighbours, recall, and the settings that are compared."""

from __future__ import annotations

import numpy as np

from offramp.benchmarks.retrieval import NEAREST, Embedded, measure, nearest, recall
from offramp.runtime.rules.sweep import ExitMacs

EXITS = 3


def embedded(rows: int, noise: tuple[float, float, float], seed: int) -> Embedded:
    """Embeddings of four labels, each exit with its own noise around the embedding of the last."""
    drawn = np.random.default_rng(seed)
    labels = drawn.integers(0, 4, rows)
    last = np.eye(8, dtype=np.float32)[labels] + 0.3 * drawn.normal(size=(rows, 8)).astype(np.float32)
    each = [last + amount * drawn.normal(size=last.shape).astype(np.float32) for amount in noise]
    embeddings = np.stack(each, 1)
    embeddings /= np.linalg.norm(embeddings, axis=-1, keepdims=True)
    to_exit = np.tile(np.array([1.0, 2.0, 3.0]), (rows, 1))
    return Embedded(embeddings, labels, ExitMacs(to_exit, to_exit[:, -1], np.array([1, 2, 3])))


def test_the_nearest_texts_have_the_largest_products() -> None:
    corpus = np.eye(20, dtype=np.float32)
    query = np.arange(20, dtype=np.float32)[None]
    assert sorted(nearest(query, corpus)[0].tolist()) == list(range(20 - NEAREST, 20))


def test_recall_is_the_share_of_right_neighbours() -> None:
    assert recall(np.arange(10)[None], np.arange(5, 15)[None]) == 50


def test_full_depth_and_an_exit_like_it_find_all_neighbours() -> None:
    corpus, dev, test = (embedded(rows, (1.0, 0.0, 0.0), seed) for seed, rows in enumerate((200, 60, 40)))
    lines = {line["setting"]: line for line in measure(corpus, dev, test)}
    assert lines["full depth"]["recall"] == lines["exit 2"]["recall_both"] == 100
    assert lines["full depth"]["saved"] == 0 and lines["exit 2"]["saved"] == 33.33
    assert lines["exit 1"]["recall"] < 80


def test_settings_save_what_was_asked_for_on_dev() -> None:
    corpus, dev, test = (embedded(rows, (0.5, 0.2, 0.0), seed) for seed, rows in enumerate((200, 200, 200)))
    saved = {line["setting"]: line["saved"] for line in measure(corpus, dev, test)}
    assert saved["settled, saves 30 on dev"] > 25
