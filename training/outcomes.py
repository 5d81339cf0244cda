"""What every exit says on the way through each precision, and after one change of it, simulated.

The walks of rule quee have one change of variant at most, so this table holds all of them: a walk can be
replayed from it exactly, without running the network again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

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
    """By [row, variant before, variant after, last exit before the change, exit]: where exit is beyond the
    change (or the variants are one and the same), seen [..., 3] are the statistics of its softmax and wrong
    says whether its label is; elsewhere both mean nothing.

    variants: names, the default first. lengths: tokens [rows].
    """

    variants: tuple[str, ...]
    seen: Floats
    wrong: Bools
    lengths: Numbers

    @property
    def exits(self) -> int:
        """How many exits there are."""
        return int(self.wrong.shape[-1])

    def __len__(self) -> int:
        return len(self.wrong)

    def take(self, rows: Numbers) -> Outcomes:
        """Those rows alone."""
        return Outcomes(self.variants, self.seen[rows], self.wrong[rows], self.lengths[rows])

    def only(self, variants: Sequence[str]) -> Outcomes:
        """Those variants alone, in that order."""
        numbers = [self.variants.index(name) for name in variants]
        grid = np.ix_(range(len(self)), numbers, numbers)
        return Outcomes(tuple(variants), self.seen[grid], self.wrong[grid], self.lengths)

    def straight(self) -> tuple[Floats, Bools]:
        """Statistics [rows, variants, exits, 3] and wrong [rows, variants, exits] without any change."""
        same = np.arange(len(self.variants))
        return self.seen[:, same, same, 0], self.wrong[:, same, same, 0]

    def paths(self, segment: int) -> Floats:
        """1 where leaving after `segment`, or a path from there, ends wrong [rows, variants, paths]; in the
        order of a forecast.
        """
        _, wrong = self.straight()
        ahead = self.wrong[:, :, :, segment, segment + 1 :]  # [rows, before, after, exits ahead]
        here = wrong[:, :, segment, None]  # [rows, variants, 1]
        return np.concatenate([here, ahead.reshape(*ahead.shape[:2], -1)], axis=2).astype(np.float32)


@torch.no_grad()
def collect_outcomes(
    network: EarlyExitNetwork, rows: Encoded, variants: Sequence[str], *, device: Any = "cpu", what: str = ""
) -> Outcomes:
    """Run every row in every variant, and on from each exit in every other; fp32 arithmetic, no dropout.

    Costs about V + V (V - 1) L / 2 walks at full depth for V variants and L exits. Rows of one length go
    together, so that nothing is padded and each is rounded as it would be alone.
    """
    network.eval()
    blocks = [in_precision(network.blocks, name).eval().to(device) for name in variants]
    exits, count = len(network.spec.exits), len(variants)
    shape = (len(rows), count, count, exits, exits)
    seen, wrong = np.zeros((*shape, STATISTICS), np.float32), np.zeros(shape, np.bool_)
    for index in tqdm(of_one_length(rows.lengths), desc=what, unit="batch", file=sys.stderr, mininterval=1.0):
        inputs, labels = rows.batch(index, device)
        hidden, context = network.stem(inputs)
        for before in range(count):
            at_exit = hidden
            for change in range(exits):
                at_exit, said = _segment(network, blocks[before], change, at_exit, context)
                found = _judge(said, labels)
                _put(seen, wrong, index, (before, before, slice(None), change), found)
                for after in (number for number in range(count) if number != before):
                    onward = at_exit
                    for exit_at in range(change + 1, exits):
                        onward, said = _segment(network, blocks[after], exit_at, onward, context)
                        _put(seen, wrong, index, (before, after, change, exit_at), _judge(said, labels))
    return Outcomes(tuple(variants), seen, wrong, rows.lengths)


def pack(outcomes: Outcomes) -> Tensor:
    """Statistics and wrong as one tensor [..., 4], which a run can remember."""
    return torch.from_numpy(np.concatenate([outcomes.seen, outcomes.wrong[..., None]], axis=-1))


def unpack(packed: Tensor, variants: Sequence[str], lengths: Numbers) -> Outcomes:
    """What pack() packed."""
    values = packed.numpy()
    return Outcomes(tuple(variants), values[..., :STATISTICS], values[..., STATISTICS] > 0.5, lengths)


def _segment(
    network: EarlyExitNetwork, blocks: Any, exit_index: int, hidden: Tensor, context: Any
) -> tuple[Tensor, Tensor]:
    """Blocks up to an exit, in the precision of `blocks`, and that exit's logits."""
    ends = (0, *network.spec.exits)
    for block in range(ends[exit_index], ends[exit_index + 1]):
        hidden = network.family.run_block(blocks[block], hidden, context)
    return hidden, network.classify(exit_index, network.pooled(hidden, context))


def _judge(logits: Tensor, labels: Tensor) -> tuple[Floats, Bools]:
    return softmax_statistics(logits).cpu().numpy(), (logits.argmax(-1) != labels).cpu().numpy()


def _put(seen: Floats, wrong: Bools, index: Numbers, place: tuple[Any, ...], found: tuple[Any, Any]) -> None:
    before, after, change, exit_at = place
    if isinstance(change, slice):  # no change: the same wherever it would have been
        seen[index, before, after, :, exit_at] = found[0][:, None]
        wrong[index, before, after, :, exit_at] = found[1][:, None]
    else:
        seen[index, before, after, change, exit_at], wrong[index, before, after, change, exit_at] = found


def of_one_length(lengths: Numbers) -> list[Numbers]:
    """Batches of row numbers, each of rows of one length: nothing has to be padded."""
    batches = []
    for length in np.unique(lengths):
        same = np.flatnonzero(lengths == length)
        batches += [same[start : start + BATCH] for start in range(0, len(same), BATCH)]
    return batches
