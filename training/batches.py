"""Encoded rows and their batches: token ids once, padding as late as possible, lengths bucketed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from offramp.runtime.inputs.images import ImageInput
from offramp.training.checkpoint import Checkpoint, TextFacts
from offramp.training.pixels import encode_images
from offramp.training.rows import BadData, Rows

BUCKET = 50  # batches that are sorted by length together: enough to cut padding, few enough to stay shuffled


class Encoded(Protocol):
    """Rows as a recipe sees them, text or images."""

    def __len__(self) -> int: ...

    @property
    def label(self) -> np.ndarray:
        """Label numbers [rows] int64."""
        ...

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every row [rows]."""
        ...

    @property
    def plain(self) -> Encoded:
        """The same rows without augmentation, for measuring."""
        ...

    def take(self, index: np.ndarray) -> Encoded:
        """The rows at `index`, in that order."""
        ...

    def batch(
        self, index: Sequence[int] | np.ndarray, device: torch.device | str = "cpu"
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The stem's inputs and labels [batch] of the rows at `index`."""
        ...


@dataclass(frozen=True)
class EncodedText:
    """Rows as token ids, one list a row, cut to the longest input."""

    ids: list[list[int]]
    types: list[list[int]]
    label: np.ndarray  # [rows] int64
    pad_id: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every row [rows]."""
        return np.array([len(row) for row in self.ids])

    @property
    def plain(self) -> EncodedText:
        """Text is never augmented."""
        return self

    def take(self, index: np.ndarray) -> EncodedText:
        """The rows at `index`, in that order."""
        return EncodedText(
            [self.ids[i] for i in index], [self.types[i] for i in index], self.label[index], self.pad_id
        )

    def batch(
        self, index: Sequence[int] | np.ndarray, device: torch.device | str = "cpu"
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Padded inputs (each [batch, seq] int64) and labels [batch] of the rows at `index`."""
        longest = max(len(self.ids[i]) for i in index)
        shape = (len(index), longest)
        ids, types = np.full(shape, self.pad_id, np.int64), np.zeros(shape, np.int64)
        mask = np.zeros(shape, np.int64)
        for row, i in enumerate(index):
            length = len(self.ids[i])
            ids[row, :length], types[row, :length], mask[row, :length] = self.ids[i], self.types[i], 1
        arrays = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        inputs = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
        return inputs, torch.from_numpy(self.label[np.asarray(index)]).to(device)


def encode_for(checkpoint: Checkpoint, rows: Rows, augment: tuple[str, ...] = ()) -> Encoded:
    """Rows as the checkpoint's network reads them, text or images; augment: of images (see EncodedImages).

    Raises BadData where the rows are of the other kind, or an image cannot be read.
    """
    reads = checkpoint.input
    if (rows.images is not None) != isinstance(reads, ImageInput):
        kinds = ("images", "text") if rows.images is not None else ("text", "images")
        raise BadData(f"the data holds {kinds[0]}, the network reads {kinds[1]}; choose another of the two")
    if isinstance(reads, ImageInput):
        return encode_images(rows, reads, checkpoint.network.longest, augment=augment)
    return encode(rows, Tokenizer.from_file(str(checkpoint.tokenizer)), reads)


def encode(rows: Rows, tokenizer: Tokenizer, text: TextFacts) -> EncodedText:
    """Token ids by the very tokenizer.json that the bundle will carry."""
    tokenizer.no_padding()
    tokenizer.enable_truncation(text.longest)
    first = [text.prefix + line for line in rows.text]
    pairs: Any = first if rows.text_b is None else list(zip(first, rows.text_b, strict=True))
    encodings = tokenizer.encode_batch(pairs)
    return EncodedText([e.ids for e in encodings], [e.type_ids for e in encodings], rows.label, text.pad_id)


def shuffled_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Batches of row numbers for one epoch: shuffled, then sorted by length within buckets of BUCKET batches,
    batches shuffled again.

    A pure function of its arguments, so that a resumed run meets the same batches.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    batches: list[np.ndarray] = []
    for start in range(0, len(order), batch_size * BUCKET):
        chunk = order[start : start + batch_size * BUCKET]
        chunk = chunk[np.argsort(lengths[chunk], kind="stable")]
        batches += [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def sorted_batches(lengths: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """Batches of row numbers by length, for evaluation: the least padding, order restored by the caller."""
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
