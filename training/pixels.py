"""Images decoded once and kept as uint8; batches of them, with flips and shifted crops where asked for."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from offramp.runtime.inputs.images import BadInput, ImageInput, normalized, pixels
from offramp.training.rows import BadData, Rows

AUGMENTATIONS = ("flip", "crop")
IN_MEMORY = 4 * 2**30  # bytes of pixels; more goes into a temporary file that the system pages in
SHIFT = 8  # a crop is moved by at most this part of the side


@dataclass(frozen=True)
class EncodedImages:
    """Rows as pixels uint8 [rows, height, width, 3], all of them `tokens` tokens long.

    augment: what is done to the batches, out of AUGMENTATIONS, drawn from torch's own generator, whose state
    a resumed run goes on from.
    """

    pixels: np.ndarray
    label: np.ndarray  # [rows] int64
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
        """The same rows as they are, for measuring."""
        return EncodedImages(self.pixels, self.label, self.image, self.tokens)

    def take(self, index: np.ndarray) -> EncodedImages:
        """The rows at `index`, in that order."""
        return EncodedImages(self.pixels[index], self.label[index], self.image, self.tokens, self.augment)

    def batch(
        self, index: Sequence[int] | np.ndarray, device: torch.device | str = "cpu"
    ) -> tuple[dict[str, Tensor], Tensor]:
        """pixel_values float32 [batch, 3, height, width] and labels [batch] of the rows at `index`."""
        chosen = np.asarray(index)
        found = self.pixels[chosen]
        if "crop" in self.augment:
            found = shifted(found)
        if "flip" in self.augment:
            turn = torch.rand(len(found)).numpy() < 0.5
            found = np.where(turn[:, None, None, None], found[:, :, ::-1], found)
        values = torch.from_numpy(normalized(found, self.image)).to(device)
        return {"pixel_values": values}, torch.from_numpy(self.label[chosen]).to(device)


def encode_images(
    rows: Rows, image: ImageInput, tokens: int, *, augment: tuple[str, ...] = (), what: str = "images"
) -> EncodedImages:
    """Decode every image once; raises BadData naming file and row of one that cannot be read."""
    assert rows.images is not None
    shape = (len(rows), image.height, image.width, 3)
    size = int(np.prod(shape, dtype=np.int64))
    kept: Any
    if size > IN_MEMORY:
        with tempfile.TemporaryFile() as file:  # the map keeps it until nobody needs it
            kept = np.memmap(file, np.uint8, "w+", shape=shape)
    else:
        kept = np.empty(shape, np.uint8)
    files = tqdm(rows.images.files, desc=what, unit="image", file=sys.stderr, mininterval=1.0)
    for row, file in enumerate(files):
        try:
            kept[row] = pixels(file, image)
        except BadInput as problem:
            raise BadData(f"{rows.images.places[row]}: {problem}; repair it or take it out") from problem
    return EncodedImages(kept, rows.label, image, tokens, augment)


def shifted(found: np.ndarray) -> np.ndarray:
    """Each image moved by up to 1 / SHIFT of its sides, its mirror image where nothing is left of it."""
    rows, height, width, _ = found.shape
    most = height // SHIFT, width // SHIFT
    padding = ((0, 0), (most[0], most[0]), (most[1], most[1]), (0, 0))
    padded = np.pad(found, padding, mode="reflect")
    made = np.empty_like(found)
    corners = [torch.randint(0, 2 * side + 1, (rows,)).tolist() for side in most]
    for row, (top, left) in enumerate(zip(*corners, strict=True)):
        made[row] = padded[row, top : top + height, left : left + width]
    return made


def parse_augment(wish: str) -> tuple[str, ...]:
    """Augmentations from "none" or words such as "flip,crop"; ValueError listing the known ones."""
    words = tuple(word.strip() for word in wish.split(",") if word.strip() not in ("", "none"))
    unknown = [word for word in words if word not in AUGMENTATIONS]
    if unknown:
        raise ValueError(f"{unknown[0]!r}: say none, or some of {', '.join(AUGMENTATIONS)}")
    return tuple(dict.fromkeys(words))
