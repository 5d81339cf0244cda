"""Simulated outcomes of all paths: each exit in each precision, and after changes of precision.

The table has a column for every walk that rule quee can take (walk_tree.py). Each can be replayed exactly
from it, without running the network again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from offramp.models.families.family import Context
from offramp.models.forecasts import COMPACT, STATISTICS, softmax_statistics
from offramp.models.network import EarlyExitNetwork
from offramp.models.precision import in_precision
from offramp.runtime.progress import track
from offramp.training.batches import Encoded
from offramp.training.walk_tree import Numbers, WalkTree, grow_tree

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
BATCH = 64


@dataclass(frozen=True)
class Outcomes:
    """The outcomes of all walks through variants and exits for each row.

    variants: names, the default first. tree: the walks. inputs [rows, nodes, 3 or more]: what a forecast
    reads after the walk: the statistics of the exit's softmax, then compact features of its pooled vector if
    they were collected (see models.forecasts). wrong [rows, nodes]: whether the exit there predicts a wrong
    label. lengths: tokens [rows].
    """

    variants: tuple[str, ...]
    tree: WalkTree
    inputs: Floats
    wrong: Bools
    lengths: Numbers

    @property
    def exits(self) -> int:
        """The number of exits."""
        return self.tree.segments

    def __len__(self) -> int:
        return len(self.wrong)

    def take(self, rows: Numbers) -> Outcomes:
        """The outcomes of the rows with these numbers, in that order."""
        return Outcomes(self.variants, self.tree, self.inputs[rows], self.wrong[rows], self.lengths[rows])

    def select_variants(self, variants: Sequence[str]) -> Outcomes:
        """The outcomes restricted to these variants, in that order."""
        tree, nodes = self.tree.select_variants([self.variants.index(name) for name in variants])
        return Outcomes(tuple(variants), tree, self.inputs[:, nodes], self.wrong[:, nodes], self.lengths)

    def select_inputs(self, kind: str) -> Outcomes:
        """The outcomes with the inputs of one kind of forecast alone, a name in models.forecasts.INPUTS."""
        columns = {"statistics": slice(STATISTICS), "features": slice(STATISTICS, None), "both": slice(None)}
        return replace(self, inputs=self.inputs[..., columns[kind]])

    def without_change(self) -> tuple[Floats, Bools]:
        """Inputs [rows, variants, exits, 3 or more] and wrong [rows, variants, exits] of straight walks."""
        nodes = self.tree.straight
        return self.inputs[:, nodes], self.wrong[:, nodes]

    def path_errors(self, segment: int) -> Floats:
        """Errors, 1 for wrong, of exiting after `segment` and of every path onwards [rows, variants, paths].

        They are those of rows that have not changed their variant; the paths are in the order of a forecast.
        Paths that no walk takes count as wrong.
        """
        nodes = self.tree.straight[:, segment]  # [variants]
        ahead = self.tree.paths_from(nodes)  # [variants, variants, exits ahead]
        onward = np.where(ahead < 0, True, self.wrong[:, ahead])
        exit_errors = self.wrong[:, nodes, None]  # [rows, variants, 1]
        return np.concatenate([exit_errors, onward.reshape(*onward.shape[:2], -1)], axis=2).astype(np.float32)

    def errors_from(self, rows: Numbers, nodes: Numbers) -> Floats:
        """The errors of exiting and of every path onwards for rows after a walk [rows, paths].

        nodes [rows]: the walk of each, all of one segment.
        """
        ahead = self.tree.paths_from(nodes)  # [rows, variants, exits ahead]
        onward = np.where(ahead < 0, True, self.wrong[rows[:, None, None], ahead])
        exit_errors = self.wrong[rows, nodes][:, None]
        return np.concatenate([exit_errors, onward.reshape(len(rows), -1)], axis=1).astype(np.float32)


@torch.no_grad()
def collect_outcomes(
    network: EarlyExitNetwork,
    rows: Encoded,
    variants: Sequence[str],
    tree: WalkTree | None = None,
    compress: Sequence[nn.Linear] | None = None,
    *,
    device: torch.device | str = "cpu",
    description: str = "",
) -> Outcomes:
    """Run every row along every walk of a tree.

    tree: None for one change to any variant. compress: for each exit but the last, the layer that computes
    compact features; None for those of the network's forecasts, empty for none. Arithmetic is in fp32,
    without dropout. It costs as many segments as the tree has nodes. Rows of one length are batched together,
    so nothing is padded and each is rounded as in a batch of 1.
    """
    network.eval()
    blocks = [in_precision(network.blocks, name).eval().to(device) for name in variants]
    if tree is None:
        tree = grow_tree(len(variants), len(network.spec.exits), 1, increase=True)
    if compress is None:
        compress = [forecast.compress for forecast in network.forecasts if forecast.compress is not None]  # type: ignore[misc]
    columns = STATISTICS + (COMPACT if compress else 0)
    inputs = np.zeros((len(rows), len(tree), columns), np.float32)
    wrong = np.zeros((len(rows), len(tree)), np.bool_)
    batches = equal_length_batches(rows.lengths)
    for index in track(batches, description, unit="batch"):
        batch, labels = rows.batch(index, device)
        hidden, context = network.stem(batch)
        # Depth first, so that few hidden states are held at a time.
        waiting: list[tuple[int, Tensor, Tensor | None]] = [
            (node, hidden, None) for node in range(len(variants))
        ]
        while waiting:
            node, before, earlier_logits = waiting.pop()
            segment = int(tree.segment[node])
            after, pooled = _run_segment(network, blocks[tree.variant[node]], segment, before, context)
            logits = network.classify(segment, pooled, earlier_logits)
            wrong[index, node] = (logits.argmax(-1) != labels).cpu().numpy()
            inputs[index, node, :STATISTICS] = softmax_statistics(logits).cpu().numpy()
            if segment < len(compress):
                inputs[index, node, STATISTICS:] = compress[segment](pooled).cpu().numpy()
            waiting += [(child, after, logits) for child in tree.child[node].tolist() if child >= 0]
    return Outcomes(tuple(variants), tree, inputs, wrong, rows.lengths)


def pack_outcomes(outcomes: Outcomes) -> Tensor:
    """Pack inputs and wrong into one tensor [rows, nodes, inputs + 1], which a run can store."""
    return torch.from_numpy(np.concatenate([outcomes.inputs, outcomes.wrong[..., None]], axis=-1))


def unpack_outcomes(packed: Tensor, variants: Sequence[str], tree: WalkTree, lengths: Numbers) -> Outcomes:
    """Restore outcomes from a tensor of pack_outcomes(), with their variants, tree and lengths [rows]."""
    values = packed.numpy()
    return Outcomes(tuple(variants), tree, values[..., :-1], values[..., -1] > 0.5, lengths)


def fit_compression(pooled: Tensor) -> Tensor:
    """Fit a linear layer from pooled vectors [rows, hidden] to compact features of unit variance.

    They are the first principal components of the standardized vectors; labels are not read. Returns weight
    and bias side by side [COMPACT, hidden + 1]; components beyond the number of rows are zero.
    """
    mean, spread = pooled.mean(0), pooled.std(0, correction=0) + 1e-6
    standardized = (pooled - mean) / spread
    _, values, directions = torch.linalg.svd(standardized.double(), full_matrices=False)
    count = min(COMPACT, int((values > 1e-6 * values.max()).sum()))
    axes = directions[:count] * (len(pooled) ** 0.5 / values[:count, None])
    # The sign of a direction is arbitrary: the greatest weight is positive.
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    weight = pooled.new_zeros(COMPACT, pooled.shape[1])
    weight[:count] = axes.float() / spread
    return torch.cat([weight, -(weight @ mean)[:, None]], dim=1)


def compression_layers(fitted: Tensor) -> list[nn.Linear]:
    """The layers that fit_compression() describes; fitted [exits, COMPACT, hidden + 1]."""
    layers = []
    for values in fitted:
        layer = nn.Linear(values.shape[1] - 1, COMPACT)
        with torch.no_grad():
            layer.weight.copy_(values[:, :-1])
            layer.bias.copy_(values[:, -1])
        layers.append(layer.requires_grad_(requires_grad=False))
    return layers


def _run_segment(
    network: EarlyExitNetwork, blocks: nn.ModuleList, exit_index: int, hidden: Tensor, context: Context
) -> tuple[Tensor, Tensor]:
    """Run the blocks of one segment in the precision of `blocks`; gives hidden after it and the vector that
    its exit reads.
    """
    ends = (0, *network.spec.exits)
    for block in range(ends[exit_index], ends[exit_index + 1]):
        hidden = network.family.run_block(blocks[block], hidden, context)
    return hidden, network.pooled(exit_index, hidden, context)


def equal_length_batches(lengths: Numbers) -> list[Numbers]:
    """Batches of row numbers, each of rows of equal length, so that nothing is padded."""
    batches = []
    for length in np.unique(lengths):
        same = np.flatnonzero(lengths == length)
        batches += [same[start : start + BATCH] for start in range(0, len(same), BATCH)]
    return batches
