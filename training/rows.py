"""What a split is: rows of text, or of images that are not decoded yet, with the numbers of their labels."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


class BadData(ValueError):
    """Data that cannot be used; the message names the file, the row and the cure."""


@dataclass(frozen=True)
class Columns:
    """Names of the columns that are read; text_b may be absent, image is read where there is no text."""

    text: str = "text"
    text_b: str = "text_b"
    label: str = "label"
    image: str = "image"


@dataclass(frozen=True)
class Pictures:
    """Images as the bytes or the paths of their files; places: file and row of each, for messages."""

    files: list[bytes | Path]
    places: list[str]

    def take(self, index: np.ndarray) -> Pictures:
        """The images at `index`, in that order."""
        return Pictures([self.files[i] for i in index], [self.places[i] for i in index])


@dataclass(frozen=True)
class Rows:
    """One split as plain lists; label is an index into the labels of the data.

    images: in place of the texts, which then are empty lists.
    """

    text: list[str]
    text_b: list[str] | None
    label: np.ndarray  # [rows] int64
    images: Pictures | None = field(default=None)

    def __len__(self) -> int:
        return len(self.label)

    def take(self, index: np.ndarray) -> Rows:
        """The rows at `index`, in that order."""
        if self.images is not None:
            return Rows([], None, self.label[index], self.images.take(index))
        text_b = None if self.text_b is None else [self.text_b[i] for i in index]
        return Rows([self.text[i] for i in index], text_b, self.label[index])
