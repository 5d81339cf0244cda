"""Qualities of answers, against values of scikit-learn 1.9, scipy 1.17 and seqeval 1.2.2."""

from __future__ import annotations

import numpy as np
import pytest

from offramp.runtime.rules.quality import (
    AGREEMENT,
    DISAGREEMENTS,
    embedding_quality,
    given_labels,
    label_quality,
    mean_ranks,
    multi_label_quality,
    share_interval,
    sigmoid,
    token_quality,
    value_quality,
)

TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


def test_the_share_of_right_labels() -> None:
    quality = label_quality(np.array([[0, 1], [1, 1], [0, 0], [1, 0]]), np.array([1, 1, 0, 0]))
    assert quality.each.tolist() == [50, 100]
    assert quality.score(np.array([1, 0, 0, 0])) == 75 and quality.name == "accuracy"


def test_f1_of_labels_is_counted_over_all_rows() -> None:
    wanted = np.array([[1, 0, 1], [0, 0, 0], [1, 1, 0], [0, 1, 1]], bool)
    given = np.array([[1, 1, 1], [0, 1, 0], [1, 0, 0], [0, 1, 0]], bool)
    answers = np.stack([np.where(given, 2.0, -2.0), np.where(wanted, 2.0, -2.0)], 1)
    quality = multi_label_quality(answers, wanted, (0.5, 0.5, 0.5))
    assert quality.each == pytest.approx([66.66666666666666, 100])  # f1_score(average="micro")
    assert quality.score(np.array([1, 0, 0, 0])) == pytest.approx(200 * 4 / (5 + 6))
    assert quality.name == "f1" and quality.shape == (4, 2)


def test_nothing_wanted_and_nothing_given_is_right() -> None:
    answers = np.array([[[-1.0], [3.0]]])
    assert multi_label_quality(answers, np.array([[False]]), (0.5,)).each.tolist() == [100, 0]


def test_labels_count_from_their_thresholds() -> None:
    logits = np.array([0.0, 0.0, 1.4, -200.0], np.float32)
    assert given_labels(logits, (0.5, 0.51, 0.8, 0.1)).tolist() == [True, False, True, False]
    assert sigmoid(np.array([-1000.0, 0.0, 1000.0])).tolist() == [0, 0.5, 1]


def test_f1_of_entities_is_that_of_seqeval() -> None:
    wanted = ["4321100", "004", "342343322414", "3", "014203340"]
    given = ["0321100", "002", "142343322014", "3", "014403320"]
    numbers = [
        np.array([[int(digit) for digit in row] for row in pair]) for pair in zip(given, wanted, strict=True)
    ]
    quality = token_quality(numbers, [row[1] for row in numbers], TAGS)
    assert quality.each == pytest.approx([68.29268292682926, 100])


def test_words_without_a_label_are_left_out() -> None:
    numbers = [np.array([[1, 3, 2]])]
    assert token_quality(numbers, [np.array([1, -1, 2])], TAGS).each[0] == 100
    assert token_quality(numbers, [np.array([1, 0, 2])], TAGS).each[0] < 100


def test_the_correlation_of_numbers_is_spearmans() -> None:
    values, wanted = np.array([1.0, 2, 2, 5, 3, 2, 7]), np.array([1, 3, 2, 2, 4, 4, 6.5])
    quality = value_quality(np.stack([values, wanted], 1)[..., None], wanted)
    assert quality.each == pytest.approx([62.27523687795278, 100])  # spearmanr
    assert quality.name == "spearman"


def test_equal_values_share_their_ranks() -> None:
    assert mean_ranks(np.array([5.0, 1, 5, 0, 5])).tolist() == [4, 2, 4, 1, 4]


def test_equal_values_order_nothing() -> None:
    constant, different = np.ones((3, 1)), np.arange(3.0)
    assert value_quality(constant, different).each[0] == 0
    assert value_quality(constant, np.full(3, 2.0)).each[0] == 100


def test_embeddings_are_compared_by_their_angle() -> None:
    answers = np.array([[[2.0, 0], [0, 1]], [[1, 1], [0, 3]]])
    quality = embedding_quality(answers, np.array([[1.0, 0], [0, 1]]))
    assert quality.each == pytest.approx([100 * (1 + 0.5**0.5) / 2, 50])
    assert quality.score(np.array([0, 1])) == pytest.approx(100) and quality.name == "cosine"


def test_a_quality_by_full_depth_is_an_agreement() -> None:
    answers = np.array([[[0.2], [0.1]], [[0.3], [0.4]]])
    quality = value_quality(answers, answers[:, -1, 0], name=AGREEMENT)
    assert quality.name == "agreement" and quality.each[-1] == 100


def test_the_interval_of_a_share_is_wilsons() -> None:
    # by Wilson's formula at z = 1.959964, computed apart
    assert share_interval(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-5)
    assert share_interval(0, 10) == pytest.approx((0.0, 0.2775328), abs=1e-5)
    quality = label_quality(np.array([[0], [1]]), np.array([0, 0]))
    assert quality.interval(np.array([0, 0])) == pytest.approx(
        [100 * share for share in share_interval(1, 2)]
    )
    assert value_quality(np.zeros((2, 1)), np.zeros(2)).interval(np.array([0, 0])) is None


@pytest.mark.parametrize(
    ("kind", "answer", "full", "loss"),
    [
        ("classification", 1, 1, 0),
        ("classification", 1, 2, 1),
        ("multi-label-classification", [True, False], [True, False], 0),
        ("multi-label-classification", [True, False], [True, True], 1),
        ("token-classification", [0, 1, 2, 2], [0, 1, 2, 0], 0.25),
        ("token-classification", [], [], 0),
        ("sentence-embedding", [2.0, 0.0], [1.0, 0.0], 0),
        ("sentence-embedding", [0.6, 0.8], [1.0, 0.0], 0.4),
        ("sentence-embedding", [-1.0, 0.0], [1.0, 0.0], 1),
    ],
)
def test_how_much_an_answer_differs_from_full_depth(
    kind: str, answer: object, full: object, loss: float
) -> None:
    assert DISAGREEMENTS[kind](np.array(answer), np.array(full)) == pytest.approx(loss)
