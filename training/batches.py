"""Encoded rows and their batches: text as token ids, images as pixels, batches of similar length.

Text is tokenized once and padded as late as possible; images are decoded once and kept as uint8.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TextIO

import numpy as np
import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from offramp.runtime.inputs.images import BadInput, ImageInput, normalize_pixels, picture_pixels
from offramp.runtime.inputs.words import Word as TokenizerWord
from offramp.runtime.inputs.words import words_of
from offramp.runtime.progress import note, track
from offramp.runtime.rules.entities import OUTSIDE, inner_labels, word_labels
from offramp.training.checkpoint import Checkpoint, TextFacts
from offramp.training.data import NO_LABEL, BadData, Rows, Word

BUCKET = 50  # batches sorted by length together: enough to avoid padding, few enough for a random order
AUGMENTATIONS = ("flip", "crop")
IN_MEMORY = 4 * 2**30  # bytes of pixels; larger arrays are mapped to a temporary file
MAX_SHIFT = 8  # a crop is moved by at most 1 / MAX_SHIFT of the side


class Encoded(Protocol):
    """Rows of text or images that are encoded for a network, as recipes read them."""

    def __len__(self) -> int: ...

    @property
    def label(self) -> np.ndarray:
        """Labels as in data.Rows, the first axis of which is [rows]; of words see EncodedTokens."""
        ...

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every row [rows]."""
        ...

    @property
    def plain(self) -> Encoded:
        """The same rows without augmentation, for evaluation."""
        ...

    def take(self, index: np.ndarray) -> Encoded:
        """The rows at `index`, in that order."""
        ...

    def batch(
        self, index: Sequence[int] | np.ndarray, device: torch.device | str = "cpu"
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The stem's inputs and labels [batch, ...] of the rows at `index`."""
        ...


@dataclass(frozen=True)
class EncodedText:
    """Rows of text as token ids, one list for each row, truncated to the longest input.

    label: see data.Rows.
    """

    ids: list[list[int]]
    types: list[list[int]]
    label: np.ndarray  # [rows] int64, of other tasks [rows] or [rows, labels] float32
    pad_id: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every row [rows]."""
        return np.array([len(row) for row in self.ids])

    @property
    def plain(self) -> EncodedText:
        """The same rows: text is never augmented."""
        return self

    def take(self, index: np.ndarray) -> EncodedText:
        """The rows at `index`, in that order."""
        return EncodedText(
            [self.ids[i] for i in index], [self.types[i] for i in index], self.label[index], self.pad_id
        )

    def batch(
        self, index: Sequence[int] | np.ndarray, device: torch.device | str = "cpu"
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Padded inputs (each [batch, seq] int64) and labels [batch, ...] of the rows at `index`."""
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


@dataclass(frozen=True)
class EncodedTokens:
    """Rows of text as token ids whose words have labels: one for each token that begins a word.

    tokens: the places of these tokens in each row, ascending. label: of all of them, row by row, or NO_LABEL.
    """

    text: EncodedText
    tokens: list[list[int]]
    label: np.ndarray  # [words] int64

    def __len__(self) -> int:
        return len(self.text)

    @cached_property
    def starts(self) -> np.ndarray:
        """Where the labels of each row begin in `label`, and the number of labels [rows + 1] int64."""
        return np.concatenate([[0], np.cumsum([len(row) for row in self.tokens], dtype=np.int64)])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every row [rows]."""
        return self.text.lengths

    @property
    def plain(self) -> EncodedTokens:
        """The same rows: text is never augmented."""
        return self

    def take(self, index: np.ndarray) -> EncodedTokens:
        """The rows at `index`, in that order."""
        return EncodedTokens(
            self.text.take(index), [self.tokens[i] for i in index], self.label[self._words(index)]
        )

    def batch(
        self, index: Sequence[int] | np.ndarray, device: torch.device | str = "cpu"
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Padded inputs (each [batch, seq] int64) and labels of the words of the rows at `index`, row by row.

        The input word_starts is 1 at each token that has a label here [words], else 0.
        """
        inputs, _ = self.text.batch(index, device)
        word_starts = np.zeros(inputs["input_ids"].shape, np.int64)
        for row, i in enumerate(index):
            word_starts[row, self.tokens[i]] = 1
        labels = self.label[self._words(index)]
        return inputs | {"word_starts": torch.from_numpy(word_starts).to(device)}, torch.from_numpy(
            labels
        ).to(device)

    def _words(self, index: Sequence[int] | np.ndarray) -> np.ndarray:
        """Where the labels of these rows stand in `label`."""
        empty = np.empty(0, np.int64)
        return np.concatenate([empty, *(np.arange(self.starts[i], self.starts[i + 1]) for i in index)])


@dataclass(frozen=True)
class EncodedImages:
    """Rows of images as pixels uint8 [rows, height, width, 3], each `tokens` tokens long.

    label: see data.Rows. augment: augmentations of the batches, from AUGMENTATIONS, drawn from torch's
    generator, whose state a resumed run restores.
    """

    pixels: np.ndarray
    label: np.ndarray  # [rows] int64, of other tasks [rows] or [rows, labels] float32
    image: ImageInput
    tokens: int
    augment: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every row [rows]."""
        return np.full(len(self), self.tokens)

    @property
    def plain(self) -> EncodedImages:
        """The same rows without augmentation, for evaluation."""
        return EncodedImages(self.pixels, self.label, self.image, self.tokens)

    def take(self, index: np.ndarray) -> EncodedImages:
        """The rows at `index`, in that order."""
        return EncodedImages(self.pixels[index], self.label[index], self.image, self.tokens, self.augment)

    def batch(
        self, index: Sequence[int] | np.ndarray, device: torch.device | str = "cpu"
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs pixel_values float32 [batch, 3, height, width] and labels [batch, ...] of the rows."""
        rows = np.asarray(index)
        images = self.pixels[rows]
        if "crop" in self.augment:
            images = random_crops(images)
        if "flip" in self.augment:
            flip = torch.rand(len(images)).numpy() < 0.5
            images = np.where(flip[:, None, None, None], images[:, :, ::-1], images)
        values = torch.from_numpy(normalize_pixels(images, self.image)).to(device)
        return {"pixel_values": values}, torch.from_numpy(self.label[rows]).to(device)


def encode_rows(checkpoint: Checkpoint, rows: Rows, augment: tuple[str, ...] = ()) -> Encoded:
    """Encode rows of text or images for a checkpoint's network.

    augment: augmentations of images (see EncodedImages). Raises BadData if the rows are of the other kind, or
    an image cannot be read.
    """
    network_input = checkpoint.input
    if (rows.images is not None) != isinstance(network_input, ImageInput):
        kinds = ("images", "text") if rows.images is not None else ("text", "images")
        raise BadData(f"the data holds {kinds[0]}, the network reads {kinds[1]}; choose another of the two")
    if isinstance(network_input, ImageInput):
        return encode_images(rows, network_input, checkpoint.network.longest, augment=augment)
    tokenizer = Tokenizer.from_file(str(checkpoint.tokenizer))
    if rows.words is not None:
        return encode_words(rows, tokenizer, network_input, checkpoint.network.spec.labels)
    return encode_texts(rows, tokenizer, network_input)


def encode_texts(rows: Rows, tokenizer: Tokenizer, text: TextFacts) -> EncodedText:
    """Encode rows of text as token ids by a tokenizer, whose tokenizer.json the bundle will contain."""
    encodings = _encodings(rows, tokenizer, text)
    return EncodedText([e.ids for e in encodings], [e.type_ids for e in encodings], rows.label, text.pad_id)


def encode_words(
    rows: Rows, tokenizer: Tokenizer, text: TextFacts, labels: Sequence[str], messages: TextIO | None = None
) -> EncodedTokens:
    """Encode rows of text as encode_texts does, with a label for each token that begins a word.

    A token has the label of the data's word that it stands in; later ones of that word the label that goes on
    with it. labels: their names. A line in `messages` (None: stderr) reports labels that no token has.
    """
    assert rows.words is not None
    encodings, inner = _encodings(rows, tokenizer, text), inner_labels(labels)
    tokens, numbers, lost = list[list[int]](), list[int](), list[str]()
    for encoding, line, words in zip(encodings, rows.text, rows.words, strict=True):
        begun = words_of(encoding, line, len(text.prefix))
        tokens.append([word.token for word in begun])
        numbers += word_labels([word.start for word in begun], words, inner)
        named = [word for word in words if word.label != NO_LABEL and labels[word.label] != OUTSIDE]
        lost += _without_token(named, begun, line)
    if lost:
        print(
            "labels that are not learned, since no word of the tokenizer begins where they stand: "
            f"{len(lost)}, first {lost[0]}",
            file=messages or sys.stderr,
        )
    ids, types = [e.ids for e in encodings], [e.type_ids for e in encodings]
    return EncodedTokens(
        EncodedText(ids, types, rows.label, text.pad_id), tokens, np.array(numbers, np.int64)
    )


def _without_token(words: Sequence[Word], begun: Sequence[TokenizerWord], text: str) -> list[str]:
    """Words of the data that the network reads and in which no word of the tokenizer begins, for messages."""
    starts = np.array([word.start for word in begun])
    end = max((word.end for word in begun), default=0)
    lost = []
    for word in words:
        first = np.searchsorted(starts, word.start)
        if word.end <= end and (first == len(starts) or starts[first] >= word.end):
            lost.append(
                f"{text[word.start : word.end]!r:.40} in {text[max(word.start - 20, 0) : word.end + 20]!r}"
            )
    return lost


def _encodings(rows: Rows, tokenizer: Tokenizer, text: TextFacts) -> list[Encoding]:
    """The texts of rows, or pairs of them, as the tokenizer reads them; a line on stderr counts those cut."""
    tokenizer.no_padding()
    tokenizer.enable_truncation(text.longest)
    first = [text.prefix + line for line in rows.text]
    pairs: Any = first if rows.text_b is None else list(zip(first, rows.text_b, strict=True))
    encodings: list[Encoding] = tokenizer.encode_batch(pairs)
    if cut := sum(1 for encoding in encodings if encoding.overflowing):
        note(
            f"{cut} of {len(rows)} texts are longer than {text.longest} tokens, and their ends are not read; "
            "--max-length of ee-train sets this limit"
        )
    return encodings


def encode_images(
    rows: Rows, image: ImageInput, tokens: int, *, augment: tuple[str, ...] = (), description: str = "images"
) -> EncodedImages:
    """Decode every image once to the size that the network reads.

    tokens: of each image. description: of the progress bar. Raises BadData naming file and row of an image
    that cannot be read.
    """
    assert rows.images is not None
    shape = (len(rows), image.height, image.width, 3)
    size = int(np.prod(shape, dtype=np.int64))
    decoded: Any
    if size > IN_MEMORY:
        with tempfile.TemporaryFile() as file:  # the memory map keeps the file alive
            decoded = np.memmap(file, np.uint8, "w+", shape=shape)
    else:
        decoded = np.empty(shape, np.uint8)
    files = track(rows.images.files, description, unit="image")
    for row, image_file in enumerate(files):
        try:
            decoded[row] = picture_pixels(image_file, image)
        except BadInput as problem:
            raise BadData(f"{rows.images.places[row]}: {problem}; repair it or take it out") from problem
    return EncodedImages(decoded, rows.label, image, tokens, augment)


def random_crops(images: np.ndarray) -> np.ndarray:
    """Move each image [rows, height, width, 3] by up to 1 / MAX_SHIFT of its sides; gaps are mirrored."""
    rows, height, width, _ = images.shape
    max_shifts = height // MAX_SHIFT, width // MAX_SHIFT
    padding = ((0, 0), (max_shifts[0], max_shifts[0]), (max_shifts[1], max_shifts[1]), (0, 0))
    padded = np.pad(images, padding, mode="reflect")
    crops = np.empty_like(images)
    corners = [torch.randint(0, 2 * shift + 1, (rows,)).tolist() for shift in max_shifts]
    for row, (top, left) in enumerate(zip(*corners, strict=True)):
        crops[row] = padded[row, top : top + height, left : left + width]
    return crops


def parse_augment(option: str) -> tuple[str, ...]:
    """The augmentations of --augment, which is "none" or a list such as "flip,crop".

    Raises ValueError that lists the known ones.
    """
    words = tuple(word.strip() for word in option.split(",") if word.strip() not in ("", "none"))
    unknown = [word for word in words if word not in AUGMENTATIONS]
    if unknown:
        raise ValueError(f"{unknown[0]!r}: say none, or some of {', '.join(AUGMENTATIONS)}")
    return tuple(dict.fromkeys(words))


def shuffled_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Random batches of row numbers for one epoch, each of rows of similar length.

    Rows are shuffled, then sorted by length within buckets of BUCKET batches, then batches are shuffled. This
    is a pure function of its arguments, so that a resumed run gets the same batches.
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
    """Batches of row numbers sorted by length, for evaluation with the least padding.

    The caller restores the order of the rows.
    """
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
