"""Tables of tasks beside classification, thresholds, and the start of exits, from collected outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_tasks
import torch

from offramp.models.exits import Exit
from offramp.models.network import NetworkSpec
from offramp.models.tasks import EMBEDDING, MULTI_LABEL, REGRESSION, SURE, TOKENS
from offramp.training.batches import EncodedText
from offramp.training.collect import Collected, exit_table, fit_thresholds, label_logits, start_exits
from offramp.training.loop import Run


def collected(spec: NetworkSpec, given: torch.Tensor, labels: torch.Tensor, **more: np.ndarray) -> Collected:
    return Collected(
        given, torch.zeros(*given.shape[:2], 4), None, labels, np.ones(len(given)), **more, spec=spec
    )


def test_several_labels_are_counted_and_read_by_the_least_certain() -> None:
    spec = NetworkSpec(("a", "b"), (1, 2), task=MULTI_LABEL)
    given = torch.tensor([[[3.0, -1.0], [3.0, 2.0]], [[-4.0, -0.5], [-4.0, -5.0]]])  # [rows, exits, labels]
    table = exit_table(collected(spec, given, torch.tensor([[1.0, 1.0], [0.0, 0.0]])))
    np.testing.assert_allclose(table.logits[..., 0], [[1.0, 2.0], [0.5, 4.0]])
    assert table.measure.name == "f1"
    np.testing.assert_allclose(table.measure.each, [200 / 3, 100])


def test_words_are_grouped_by_rows_and_an_empty_row_is_sure() -> None:
    spec = NetworkSpec(("O", "B-x"), (1, 2), "none", task=TOKENS)
    given = torch.tensor([[[2.0, 0.0], [2.0, 0.0]], [[0.0, 1.0], [0.0, 3.0]]])  # two words of row 0
    starts = np.array([0, 2, 2])
    table = exit_table(collected(spec, given, torch.tensor([0, 1]), starts=starts))
    np.testing.assert_allclose(table.logits[..., 0], [[1.0, 2.0], [SURE, SURE]])
    assert table.measure.each.tolist() == [100, 100]


def test_numbers_settle_and_are_ranked() -> None:
    spec = NetworkSpec((), (1, 2), task=REGRESSION)
    given = torch.tensor([[[3.0], [1.0]], [[2.0], [2.0]], [[1.0], [3.0]]])
    table = exit_table(collected(spec, given, torch.tensor([1.0, 2.0, 3.0])))
    np.testing.assert_allclose(table.measure.each, [-100, 100])
    assert table.answers is not None and table.answers.shape == (3, 2, 1)
    assert (
        exit_table(collected(spec, given, torch.tensor([9.0, 9, 9])), agreement=True).measure.each[1] == 100
    )


def test_embeddings_are_measured_by_full_depth() -> None:
    spec = NetworkSpec((), (1, 2), task=EMBEDDING, own_head=True)
    given = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]])
    table = exit_table(collected(spec, given, torch.tensor([-1, -1])))
    assert table.measure.name == "agreement"
    np.testing.assert_allclose(table.measure.each, [50, 100], atol=1e-5)


def test_label_frequencies_are_logits_and_no_label_is_impossible() -> None:
    labels = np.array([[1.0, 0.0], [1.0, 0.0], [-1.0, -1.0]])
    torch.testing.assert_close(
        label_logits(labels).sigmoid(), torch.tensor([[0.75, 0.25]]), check_dtype=False
    )


@pytest.mark.parametrize("own_head", [False, True])
def test_exits_of_several_labels_start_from_their_frequencies(tmp_path: Path, own_head: bool) -> None:
    network = tiny_tasks.network(MULTI_LABEL)
    if own_head:
        network.exits[-1] = torch.nn.Identity()  # stands for a head that is no Exit
    start_exits(Run(network, tmp_path, seed=0), torch.tensor([[-1.0, 0.0, 2.0]]))
    for exit_head in network.exits:
        if isinstance(exit_head, Exit):
            torch.testing.assert_close(exit_head.classify.bias, torch.tensor([-1.0, 0.0, 2.0]))


def test_a_resumed_run_keeps_its_biases(tmp_path: Path) -> None:
    network = tiny_tasks.network(MULTI_LABEL)
    run = Run(network, tmp_path, seed=0)
    run.position = {"phase": 0, "step": 3}
    before = network.exits[0].classify.bias.clone()  # type: ignore[union-attr, operator]
    start_exits(run, torch.tensor([[-1.0, 0.0, 2.0]]))
    assert network.exits[0].classify.bias.equal(before)  # type: ignore[union-attr, arg-type]


def test_thresholds_are_those_with_the_best_f1_on_dev(tmp_path: Path) -> None:
    network = tiny_tasks.network(MULTI_LABEL)
    dev = EncodedText([[2, 17, 3]] * 8, [[0, 0, 0]] * 8, np.zeros((8, 3), np.float32), 0)
    dev.label[:6, 0] = 1
    with torch.no_grad():
        for exit_head in network.exits:
            exit_head.classify.weight.zero_()  # type: ignore[union-attr, operator]
            exit_head.classify.bias.copy_(torch.tensor([-1.0, -3.0, -3.0]))  # type: ignore[union-attr, operator]
    fit_thresholds(Run(network, tmp_path, seed=0), dev)
    assert network.spec.thresholds == (0.25, 0.5, 0.5)  # a probability of 0.27 counts as given
