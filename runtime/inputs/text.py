"""Text into ids: the bundle's own tokenizer, then rows padded to arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from offramp.runtime.bundle.files import Bundle
from offramp.runtime.bundle.manifest import ImageInput, TextInput
from offramp.runtime.errors import BadBundle, BadInput
from offramp.runtime.inputs.images import ImageEncoder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Item = str | tuple[str, str]  # of an image bundle: its path; Session says what else an image may be
Ids = NDArray[np.int64]
# Batches are padded to multiples of this, so that rows of several batches meet and buffers are used again.
LENGTH_STEP = 8
# Characters a token kept before tokenizing: a bound on memory for absurd lines; text that is cut so is
# flagged as truncated.
_CHARACTERS = 64


class AnyRow(Protocol):
    """One item as the stem wants it, text or image."""

    @property
    def length(self) -> int:
        """Tokens."""
        ...

    @property
    def truncated(self) -> bool: ...


class Reader(Protocol):
    """What makes rows of items, and the stem's inputs of rows: Encoder, ImageEncoder."""

    def __call__(self, items: Sequence[Any]) -> Sequence[AnyRow]:
        """One row an item; BadInput naming "item N" for what cannot be read."""
        ...

    def arrays(self, rows: Sequence[Any]) -> dict[str, NDArray[Any]]:
        """The stem's inputs for its own rows."""
        ...

    def blank(self, rows: int, length: int) -> dict[str, NDArray[Any]]:
        """The stem's inputs for rows without a meaning, of `length` tokens where that is free."""
        ...


@dataclass(frozen=True)
class Row:
    """One text as ids and token types; truncated: not all of it fitted into the longest input."""

    ids: Sequence[int]
    types: Sequence[int]
    truncated: bool

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.ids)


def reader_of(bundle: Bundle) -> Reader:
    """What makes rows of the items that the bundle reads."""
    return ImageEncoder(bundle) if isinstance(bundle.manifest.input, ImageInput) else Encoder(bundle)


class Encoder:
    """The tokenizer with the manifest's prefix and longest input; safe to call from several threads."""

    def __init__(self, bundle: Bundle) -> None:
        from tokenizers import Tokenizer  # here: `import offramp.runtime` stays light

        manifest = bundle.manifest
        if not isinstance(manifest.input, TextInput):
            raise BadBundle(f"{bundle.folder}: it reads images, not text")
        self._facts = manifest.input
        self._names = {tensor.name for tensor in next(iter(manifest.stem.variants.values())).inputs}
        unknown = self._names - {"input_ids", "attention_mask", "token_type_ids"}
        if unknown:
            raise BadBundle(f"{bundle.folder}: stem input {sorted(unknown)[0]!r} cannot be made from text")
        path = bundle.folder / self._facts.tokenizer
        data = bundle.read(self._facts.tokenizer)
        try:
            self._tokenizer: Tokenizer = Tokenizer.from_str(data.decode("utf-8"))
        except Exception as problem:  # tokenizers raises bare Exception
            raise BadBundle(f"{path}: not a tokenizer that `tokenizers` reads: {problem}") from problem
        size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        if size > manifest.vocab_size:
            raise BadBundle(f"{path}: {size} tokens, the network has embeddings for {manifest.vocab_size}")
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(self._facts.longest)

    def __call__(self, items: Sequence[Item]) -> list[Row]:
        """Rows of ids, at most the manifest's longest each; the prefix goes before the first text of a pair,
        as in training.

        Raises BadInput for what is not text. The number of the item in `items` is in the message.
        """
        texts = [self._text(number, item) for number, item in enumerate(items)]
        cuts = [text != item for text, item in zip(texts, items, strict=True)]
        prefixed = [
            self._facts.prefix + t if isinstance(t, str) else (self._facts.prefix + t[0], t[1]) for t in texts
        ]
        if len(prefixed) == 1:  # encode_batch wakes a thread pool of its own
            one = prefixed[0]
            encodings = [
                self._tokenizer.encode(one) if isinstance(one, str) else self._tokenizer.encode(*one)
            ]
        else:
            encodings = self._tokenizer.encode_batch(prefixed)
        rows = []
        for number, (encoding, cut) in enumerate(zip(encodings, cuts, strict=True)):
            ids = encoding.ids
            if not ids:
                raise BadInput(f"item {number}: the tokenizer finds no token in {items[number]!r:.60}")
            rows.append(Row(ids, encoding.type_ids, cut or bool(encoding.overflowing)))
        return rows

    def arrays(self, rows: Sequence[Row]) -> dict[str, Ids]:
        """The stem's inputs, int64 [batch, seq]: padded to multiples of LENGTH_STEP; a single row is not."""
        if len(rows) == 1:
            ids = np.array([rows[0].ids], dtype=np.int64)  # [1, seq]
            types, mask = np.array([rows[0].types], dtype=np.int64), np.ones_like(ids)
        else:
            longest = max(len(row.ids) for row in rows)
            shape = (
                len(rows),
                min(-(-longest // LENGTH_STEP) * LENGTH_STEP, max(self._facts.longest, longest)),
            )
            ids = np.full(shape, self._facts.pad_id, dtype=np.int64)  # [batch, seq]
            types, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
            for at, row in enumerate(rows):
                length = len(row.ids)
                ids[at, :length], types[at, :length], mask[at, :length] = row.ids, row.types, 1
        found = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        return {name: found[name] for name in self._names}

    def blank(self, rows: int, length: int) -> dict[str, Ids]:
        """The stem's inputs for rows of `length` tokens without a meaning, int64 [rows, length].

        length: cut to the longest that the network reads.
        """
        shape = (rows, min(length, self._facts.longest))
        ids = np.full(shape, self._facts.pad_id, dtype=np.int64)
        found = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "token_type_ids": np.zeros_like(ids),
        }
        return {name: found[name] for name in self._names}

    def _text(self, number: int, item: Item) -> Item:
        parts = item if isinstance(item, tuple) else (item,)
        if len(parts) not in (1, 2) or not all(isinstance(part, str) for part in parts):
            raise BadInput(f"item {number}: expected a string or a pair of strings, found {item!r:.60}")
        most = _CHARACTERS * self._facts.longest
        for part in parts:
            try:
                part[:most].encode("utf-8")
            except UnicodeEncodeError:
                raise BadInput(
                    f"item {number}: half of a surrogate pair, not Unicode text: {part!r:.60}"
                ) from None
        return item[:most] if isinstance(item, str) else (item[0][:most], item[1][:most])
