"""Simulated outcomes of all paths: each exit in each precision, and after one change of precision.

A walk of rule quee changes the variant at most once, so this table contains all walks. Each can be replayed
exactly from it, without running the network again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from offramp.models.families.family import Context
from offramp.models.forecasts import STATISTICS, softmax_statistics
from offramp.models.network import EarlyExitNetwork
from offramp.models.precision import in_precision
from offramp.training.batches import Encoded

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
Numbers = NDArray[np.int64]
BATCH = 64


@dataclass(frozen=True)
class Outcomes:
    """The outcomes of all paths through variants and exits for each row.

    Axes: [row, variant before, variant after, last exit before the change, exit]. statistics [..., 3]: of the
    exit's softmax (see models.forecasts). wrong: whether the exit predicts a wrong label. Both are defined
    for exits after the change, and if the two variants are the same. variants: names, the default first.
    lengths: tokens [rows].
    """

    variants: tuple[str, ...]
    statistics: Floats
    wrong: Bools
    lengths: Numbers

    @property
    def exits(self) -> int:
        """The number of exits."""
        return int(self.wrong.shape[-1])

    def __len__(self) -> int:
        return len(self.wrong)

    def take(self, rows: Numbers) -> Outcomes:
        """The outcomes of the rows with these numbers, in that order."""
        return Outcomes(self.variants, self.statistics[rows], self.wrong[rows], self.lengths[rows])

    def select_variants(self, variants: Sequence[str]) -> Outcomes:
        """The outcomes restricted to these variants, in that order."""
        numbers = [self.variants.index(name) for name in variants]
        grid = np.ix_(range(len(self)), numbers, numbers)
        return Outcomes(tuple(variants), self.statistics[grid], self.wrong[grid], self.lengths)

    def without_change(self) -> tuple[Floats, Bools]:
        """Statistics [rows, variants, exits, 3] and wrong [rows, variants, exits] of paths in one variant."""
        same = np.arange(len(self.variants))
        return self.statistics[:, same, same, 0], self.wrong[:, same, same, 0]

    def path_errors(self, segment: int) -> Floats:
        """Errors, 1 for wrong, of exiting after `segment` and of every path onwards [rows, variants, paths].

        The paths are in the order of a forecast.
        """
        _, wrong = self.without_change()
        ahead = self.wrong[:, :, :, segment, segment + 1 :]  # [rows, before, after, exits ahead]
        here = wrong[:, :, segment, None]  # [rows, variants, 1]
        return np.concatenate([here, ahead.reshape(*ahead.shape[:2], -1)], axis=2).astype(np.float32)


@torch.no_grad()
def collect_outcomes(
    network: EarlyExitNetwork,
    rows: Encoded,
    variants: Sequence[str],
    *,
    device: torch.device | str = "cpu",
    description: str = "",
) -> Outcomes:
    """Run every row in every variant, and from each exit onwards in every other variant.

    Arithmetic is in fp32, without dropout. It costs about V + V (V - 1) L / 2 walks at full depth for V
    variants and L exits. Rows of one length are batched together, so nothing is padded and each is rounded as
    in a batch of 1.
    """
    network.eval()
    blocks = [in_precision(network.blocks, name).eval().to(device) for name in variants]
    exits, count = len(network.spec.exits), len(variants)
    shape = (len(rows), count, count, exits, exits)
    statistics, wrong = np.zeros((*shape, STATISTICS), np.float32), np.zeros(shape, np.bool_)
    batches = equal_length_batches(rows.lengths)
    for index in tqdm(batches, desc=description, unit="batch", file=sys.stderr, mininterval=1.0):
        inputs, labels = rows.batch(index, device)
        hidden, context = network.stem(inputs)
        for before in range(count):
            at_change = hidden
            for change in range(exits):
                at_change, logits = _run_segment(network, blocks[before], change, at_change, context)
                row_statistics, row_wrong = _outcome(logits, labels)
                # Without a change of variant the value is the same for every place of the change.
                statistics[index, before, before, :, change] = row_statistics[:, None]
                wrong[index, before, before, :, change] = row_wrong[:, None]
                for after in (number for number in range(count) if number != before):
                    onward = at_change
                    for exit_index in range(change + 1, exits):
                        onward, logits = _run_segment(network, blocks[after], exit_index, onward, context)
                        place = (index, before, after, change, exit_index)
                        statistics[place], wrong[place] = _outcome(logits, labels)
    return Outcomes(tuple(variants), statistics, wrong, rows.lengths)


def pack_outcomes(outcomes: Outcomes) -> Tensor:
    """Pack statistics and wrong into one tensor [..., 4], which a run can store."""
    return torch.from_numpy(np.concatenate([outcomes.statistics, outcomes.wrong[..., None]], axis=-1))


def unpack_outcomes(packed: Tensor, variants: Sequence[str], lengths: Numbers) -> Outcomes:
    """Restore outcomes from a tensor of pack_outcomes(), with their variants and lengths [rows]."""
    values = packed.numpy()
    return Outcomes(tuple(variants), values[..., :STATISTICS], values[..., STATISTICS] > 0.5, lengths)


def _run_segment(
    network: EarlyExitNetwork, blocks: nn.ModuleList, exit_index: int, hidden: Tensor, context: Context
) -> tuple[Tensor, Tensor]:
    """Run the blocks of one segment in the precision of `blocks`; gives hidden after it and its exit's
    logits.
    """
    ends = (0, *network.spec.exits)
    for block in range(ends[exit_index], ends[exit_index + 1]):
        hidden = network.family.run_block(blocks[block], hidden, context)
    return hidden, network.classify(exit_index, network.pooled(exit_index, hidden, context))


def _outcome(logits: Tensor, labels: Tensor) -> tuple[Floats, Bools]:
    """Statistics [batch, 3] of logits [batch, classes], and whether their label is wrong [batch]."""
    return softmax_statistics(logits).cpu().numpy(), (logits.argmax(-1) != labels).cpu().numpy()


def equal_length_batches(lengths: Numbers) -> list[Numbers]:
    """Batches of row numbers, each of rows of equal length, so that nothing is padded."""
    batches = []
    for length in np.unique(lengths):
        same = np.flatnonzero(lengths == length)
        batches += [same[start : start + BATCH] for start in range(0, len(same), BATCH)]
    return batches
