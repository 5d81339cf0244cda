"""What exits on a frozen network read, computed once, so that an epoch of their training takes seconds."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from offramp.models.families.family import additive_mask
from offramp.models.network import EarlyExitNetwork
from offramp.runtime.progress import track
from offramp.training.batches import Encoded, EncodedTokens, sorted_batches
from offramp.training.collect import label_numbers
from offramp.training.loop import Run

FILE = "features.npy"
ON_DISK = ("attention", "none")  # poolings of exits that read hidden states of tokens


class Features(Protocol):
    """Features of rows of data at every exit but the last, and what the last exit answers.

    full_depth: what the last exit gives [rows, outputs], or for each word where exits read each token.
    """

    @property
    def full_depth(self) -> Tensor: ...

    def early_logits(self, network: EarlyExitNetwork, index: np.ndarray) -> Tensor:
        """Compute what the exits but the last give for the rows at `index` [batch, exits - 1, outputs].

        Where exits read each token, all words of these rows stand in place of the rows.
        """
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
class WordFeatures:
    """Normed hidden states of all words, in a mapped file, for exits that read each token.

    words [words of all rows, exits - 1, hidden] float16: of the tokens that begin one; starts [rows + 1]: the
    first word of each row.
    """

    words: np.ndarray
    starts: np.ndarray
    full_depth: Tensor

    def early_logits(self, network: EarlyExitNetwork, index: np.ndarray) -> Tensor:
        """Compute the logits of the words of the rows at `index`, see Features."""
        states = np.concatenate([self.words[self.starts[row] : self.starts[row + 1]] for row in index])
        return network.classify_all(torch.from_numpy(states).to(_device(network)).float())


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

    Hidden states of all tokens are kept in a file in the run's folder if the exits pool by attention, those
    of all words if they read each token; after a resume they are read from there.
    """
    network, rows = run.network, rows.plain
    if network.spec.pooling not in ON_DISK:
        pooled = run.compute_once("pooled", lambda: _run(run, rows, batch_size, None))
        exits = len(network.spec.exits) - 1
        early, last = pooled.split([exits * network.hidden_size, network.outputs], dim=1)
        return PooledFeatures(early.view(len(rows), exits, network.hidden_size), last)
    file, starts = run.folder / FILE, np.concatenate([[0], _kept_states(rows).cumsum()])

    def compute() -> Tensor:
        shape = (int(starts[-1]), len(network.spec.exits) - 1, network.hidden_size)
        beside = file.with_suffix(".writing")
        tokens = np.lib.format.open_memmap(beside, "w+", np.float16, shape)
        full_depth = _run(run, rows, batch_size, (tokens, starts))
        tokens.flush()
        os.replace(beside, file)
        return full_depth

    full_depth = run.compute_once("full_depth", compute)
    kind = WordFeatures if network.task.per_token else TokenFeatures
    return kind(np.load(file, mmap_mode="r"), starts, full_depth)


def feature_bytes(network: EarlyExitNetwork, rows: Encoded) -> np.ndarray:
    """The bytes that the hidden states of each row take in the file of compute_features [rows]."""
    if network.spec.pooling not in ON_DISK:
        return np.zeros(len(rows), np.int64)
    return _kept_states(rows) * (2 * network.hidden_size * (len(network.spec.exits) - 1))


def _kept_states(rows: Encoded) -> np.ndarray:
    """How many hidden states of each row are kept at an exit [rows]: of its tokens, or of its words."""
    if isinstance(rows, EncodedTokens):
        return np.diff(rows.starts)
    return rows.lengths.astype(np.int64)


@torch.no_grad()
def _run(
    run: Run[EarlyExitNetwork],
    rows: Encoded,
    batch_size: int,
    file: tuple[np.ndarray, np.ndarray] | None,
) -> Tensor:
    """Run the network on all rows and give what the last exit gives [rows, outputs], or for each word.

    file: tokens and starts, which receive the hidden states of every token (of every word, see WordFeatures)
    at the exits but the last; None: the result begins with the pooled vectors [rows, (exits - 1) * hidden +
    outputs].
    """
    network = run.network
    was_training = network.training
    network.eval()
    device, kept = run.accelerator.device, list[Tensor]()
    batches = list(sorted_batches(rows.lengths, batch_size))
    for index in track(batches, "features", unit="batch"):
        inputs, _ = rows.batch(index, device)
        hidden, context = network.stem(inputs)
        begins_word = inputs["word_starts"].bool() if network.task.per_token else None
        vectors = []
        for block in range(network.block_count):
            hidden = network.run_block(block, hidden, context)
            if block + 1 not in network.spec.exits[:-1]:
                continue
            number = network.spec.exits.index(block + 1)
            if file is None:
                vectors.append(network.pooled(number, hidden, context))
            else:
                _keep_tokens(network, hidden, index, number, *file, begins_word)
        last = len(network.spec.exits) - 1
        pooled = network.pooled(last, hidden, context)
        vectors.append(network.classify(last, pooled if begins_word is None else pooled[begins_word]))
        kept.append(torch.cat(vectors, 1).float().cpu())
    network.train(was_training)
    numbers = np.concatenate([label_numbers(rows, index) for index in batches])
    return torch.cat(kept)[torch.from_numpy(np.argsort(numbers))]


def _keep_tokens(
    network: EarlyExitNetwork,
    hidden: Tensor,
    index: np.ndarray,
    number: int,
    tokens: np.ndarray,
    starts: np.ndarray,
    begins_word: Tensor | None,
) -> None:
    """Write the normed hidden states of the rows at `index` at one exit; hidden [batch, seq, hidden].

    begins_word [batch, seq]: the tokens that are kept; None for all.
    """
    normed = hidden if network.norm is None else network.norm(hidden)
    largest = torch.finfo(torch.float16).max
    states = normed.clamp(-largest, largest).half().cpu().numpy()  # an outlier must not become infinite
    chosen = None if begins_word is None else begins_word.cpu().numpy()
    for place, row in enumerate(index):
        kept = states[place] if chosen is None else states[place][chosen[place]]
        tokens[starts[row] : starts[row + 1], number] = kept[: starts[row + 1] - starts[row]]


def _device(network: EarlyExitNetwork) -> torch.device:
    return next(network.parameters()).device
