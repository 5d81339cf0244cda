"""What exits on a frozen network read, computed once, so that an epoch of their training takes seconds."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from offramp.models.families.family import additive_mask
from offramp.models.network import EarlyExitNetwork
from offramp.training.batches import Encoded, sorted_batches
from offramp.training.loop import Run

FILE = "features.npy"


class Features(Protocol):
    """Features of rows of data at every exit but the last, and what the last exit answers.

    full_depth: logits of the last exit [rows, classes].
    """

    @property
    def full_depth(self) -> Tensor: ...

    def early_logits(self, network: EarlyExitNetwork, index: np.ndarray) -> Tensor:
        """Compute logits of the exits but the last [batch, exits - 1, classes] of the rows at `index`."""
        ...


@dataclass(frozen=True)
class PooledFeatures:
    """Pooled vectors [rows, exits - 1, hidden], for exits whose pooling has no weights of its own."""

    pooled: Tensor
    full_depth: Tensor

    def early_logits(self, network: EarlyExitNetwork, index: np.ndarray) -> Tensor:
        """Compute the logits of the rows at `index`, see Features."""
        return network.classify_all(self.pooled[torch.from_numpy(index)].to(_device(network)))


@dataclass(frozen=True)
class TokenFeatures:
    """Normed hidden states of all tokens, in a mapped file, for exits that pool by attention.

    tokens [tokens of all rows, exits - 1, hidden] float16; starts [rows + 1]: the first token of each row.
    """

    tokens: np.ndarray
    starts: np.ndarray
    full_depth: Tensor

    def early_logits(self, network: EarlyExitNetwork, index: np.ndarray) -> Tensor:
        """Compute the logits of the rows at `index`, see Features."""
        lengths = self.starts[index + 1] - self.starts[index]
        longest = int(lengths.max())
        states = np.zeros((len(index), longest, *self.tokens.shape[1:]), np.float16)
        for row, (number, length) in enumerate(zip(index, lengths, strict=True)):
            states[row, :length] = self.tokens[self.starts[number] : self.starts[number] + length]
        device = _device(network)
        hidden = torch.from_numpy(states).to(device).float()  # [batch, seq, exits - 1, hidden]
        real = torch.from_numpy(np.arange(longest) < lengths[:, None]).to(device)
        mask = additive_mask(real).squeeze(1)  # [batch, 1, seq]; all zeros where rows have one length
        pooled = [
            exit.attention(hidden[:, :, number], mask)  # type: ignore[operator]
            for number, exit in enumerate(list(network.exits)[:-1])
        ]
        return network.classify_all(torch.stack(pooled, 1))


def compute_features(run: Run[EarlyExitNetwork], rows: Encoded, *, batch_size: int = 64) -> Features:
    """Run the network once on every row at full depth, in evaluation mode and fp32.

    Hidden states of all tokens are kept in a file in the run's folder if the exits pool by attention; after a
    resume they are read from there.
    """
    network, rows = run.network, rows.plain
    if network.spec.pooling != "attention":
        pooled = run.compute_once("pooled", lambda: _run(run, rows, batch_size, None))
        exits, classes = len(network.spec.exits) - 1, len(network.spec.labels)
        early, last = pooled.split([exits * network.hidden_size, classes], dim=1)
        return PooledFeatures(early.view(len(rows), exits, network.hidden_size), last)
    file, starts = run.folder / FILE, np.concatenate([[0], rows.lengths.cumsum()])

    def compute() -> Tensor:
        shape = (int(starts[-1]), len(network.spec.exits) - 1, network.hidden_size)
        beside = file.with_suffix(".writing")
        tokens = np.lib.format.open_memmap(beside, "w+", np.float16, shape)
        full_depth = _run(run, rows, batch_size, (tokens, starts))
        tokens.flush()
        os.replace(beside, file)
        return full_depth

    full_depth = run.compute_once("full_depth", compute)
    return TokenFeatures(np.load(file, mmap_mode="r"), starts, full_depth)


def token_feature_bytes(network: EarlyExitNetwork, rows: Encoded) -> np.ndarray:
    """The bytes that the hidden states of each row take in the file of compute_features [rows]."""
    per_token = 2 * network.hidden_size * (len(network.spec.exits) - 1)
    return rows.lengths.astype(np.int64) * per_token


@torch.no_grad()
def _run(
    run: Run[EarlyExitNetwork],
    rows: Encoded,
    batch_size: int,
    file: tuple[np.ndarray, np.ndarray] | None,
) -> Tensor:
    """Run the network on all rows and give the logits of the last exit [rows, classes].

    file: tokens and starts, which receive the hidden states of every token at the exits but the last (see
    TokenFeatures); None: the result begins with the pooled vectors [rows, (exits - 1) * hidden + classes].
    """
    network = run.network
    was_training = network.training
    network.eval()
    device, kept = run.accelerator.device, list[Tensor]()
    batches = list(sorted_batches(rows.lengths, batch_size))
    for index in tqdm(batches, desc="features", unit="batch", file=sys.stderr, mininterval=1.0):
        inputs, _ = rows.batch(index, device)
        hidden, context = network.stem(inputs)
        vectors = []
        for block in range(network.block_count):
            hidden = network.run_block(block, hidden, context)
            if block + 1 not in network.spec.exits[:-1]:
                continue
            number = network.spec.exits.index(block + 1)
            if file is None:
                vectors.append(network.pooled(number, hidden, context))
            else:
                _keep_tokens(network, hidden, index, number, *file)
        last = len(network.spec.exits) - 1
        vectors.append(network.classify(last, network.pooled(last, hidden, context)))
        kept.append(torch.cat(vectors, 1).float().cpu())
    network.train(was_training)
    original = torch.from_numpy(np.argsort(np.concatenate(batches)))
    return torch.cat(kept)[original]


def _keep_tokens(
    network: EarlyExitNetwork,
    hidden: Tensor,
    index: np.ndarray,
    number: int,
    tokens: np.ndarray,
    starts: np.ndarray,
) -> None:
    """Write the normed hidden states of the rows at `index` at one exit; hidden [batch, seq, hidden]."""
    normed = hidden if network.norm is None else network.norm(hidden)
    largest = torch.finfo(torch.float16).max
    states = normed.clamp(-largest, largest).half().cpu().numpy()  # an outlier must not become infinite
    for row, state in zip(index, states, strict=True):
        tokens[starts[row] : starts[row + 1], number] = state[: starts[row + 1] - starts[row]]


def _device(network: EarlyExitNetwork) -> torch.device:
    return next(network.parameters()).device
