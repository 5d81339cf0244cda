"""Convert text to token ids with the bundle's tokenizer, and rows of ids to padded arrays."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from offramp.runtime.bundle.files import Bundle
from offramp.runtime.bundle.manifest import EMBEDDING, TOKENS, WORD_STARTS, ImageInput, TextInput
from offramp.runtime.errors import BadBundle, BadInput, ItemError
from offramp.runtime.forks import after_fork
from offramp.runtime.inputs.lines import is_unicode
from offramp.runtime.inputs.tokenizer_checks import LARGEST_FILE, check_tokenizer, tokenizer_reason
from offramp.runtime.inputs.words import Word, words_of

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

Item = object  # a text, a pair of texts, or an image (see RowSession); anything else becomes an ItemError
Text = str | tuple[str, str]
Ids = NDArray[np.int64]
# Batches are padded to multiples of this, so that rows of several batches are joined and buffers are reused.
LENGTH_STEP = 8
# Characters for each token of the longest input that are kept before tokenizing: a limit on memory for very
# long lines. Text that is cut here is marked as truncated.
CHARACTERS_PER_TOKEN = 64
LONG_TEXTS = ("cut", "windows")
_SINGLE_TEXTS = (TOKENS, EMBEDDING)  # tasks that have no pairs of texts
# Tokenizers that sessions of this process use, by hash of their file and settings.
_tokenizers: WeakValueDictionary[tuple[object, ...], Tokenizer] = WeakValueDictionary()
_tokenizers_lock = threading.Lock()
MAX_WINDOWS = 64  # of one text; what is longer is cut and marked as truncated


class AnyRow(Protocol):
    """One item in the form in which the stem can read it, text or image."""

    @property
    def length(self) -> int:
        """Number of tokens of the item."""
        ...

    @property
    def truncated(self) -> bool:
        """Whether the item was cut to the longest input of the network."""
        ...

    @property
    def rest(self) -> Sequence[AnyRow]:
        """Further windows of a long text, which are walked as rows of their own; usually empty."""
        ...


R = TypeVar("R", bound=AnyRow)


class Reader(Protocol[R]):
    """Converts items to rows, and rows to the stem's inputs."""

    def read(self, items: Sequence[Item]) -> list[R | ItemError]:
        """Convert each item to a row, or to an ItemError if it cannot be read."""
        ...

    def arrays(self, rows: Sequence[R], pad_alone: bool = False) -> dict[str, NDArray[Any]]:
        """Convert rows of this reader to the stem's inputs by name.

        pad_alone: pad a single row too, so that it can join rows of other batches.
        """
        ...

    def blank(self, rows: int, length: int) -> dict[str, NDArray[Any]]:
        """The stem's inputs for rows without content, of `length` tokens if the length is free."""
        ...


def open_reader(bundle: Bundle, long_texts: str = "cut") -> Reader[Any]:
    """Create the reader for the items of a bundle: texts or images.

    long_texts: what becomes of texts that are longer than the network reads, a name in LONG_TEXTS.
    """
    if isinstance(bundle.manifest.input, ImageInput):
        from offramp.runtime.inputs.images import ImageReader  # here: text does not need it

        return ImageReader(bundle)
    return TextReader(bundle, long_texts)


def items_to_rows(reader: Reader[R], items: Sequence[Item]) -> list[R]:
    """Convert all items to rows; raises BadInput, which names the first item that cannot be read."""
    rows: list[R] = []
    for row in reader.read(items):
        if isinstance(row, ItemError):
            raise BadInput(f"item {row.index}: {row.message}")
        rows.append(row)
    return rows


def open_tokenizer(bundle: Bundle, facts: TextInput, overlap: int | None = None) -> Tokenizer:
    """Open the bundle's tokenizer, without padding; raises BadBundle if it cannot be read.

    overlap: cut texts into windows of the longest input, which share this many tokens; None: do not cut.
    Sessions of one process that open the same file in the same way share the tokenizer: one of 30,000 entries
    takes 35 MB and some tenths of a second to read. Nobody changes its settings afterwards.
    """
    from tokenizers import Tokenizer  # here: `import offramp.runtime` stays light

    path, fact = bundle.folder / facts.tokenizer, bundle.manifest.files.get(facts.tokenizer)
    if fact is not None and fact.bytes > LARGEST_FILE:
        raise BadBundle(f"{path}: {fact.bytes} bytes; a tokenizer has at most {LARGEST_FILE}")
    vocab_size, longest = bundle.manifest.vocab_size, None if overlap is None else facts.longest
    try:
        data = bundle.read(facts.tokenizer)
        sha256 = hashlib.sha256(data).hexdigest() if fact is None else fact.sha256  # read() compared it
        key = sha256, vocab_size, longest, overlap
        with _tokenizers_lock:
            known = _tokenizers.get(key)
        if known is not None:
            return known
        text = data.decode("utf-8")
        check_tokenizer(text, vocab_size)
        tokenizer: Tokenizer = Tokenizer.from_str(text)
    except BadBundle:
        raise
    except ValueError as problem:  # of the check and of the encoding
        raise BadBundle(f"{path}: not a tokenizer that can be used: {problem}") from problem
    except BaseException as problem:
        reason = tokenizer_reason(problem)
        raise BadBundle(f"{path}: not a tokenizer that `tokenizers` reads: {reason}") from problem
    tokenizer.no_padding()
    if longest is None or overlap is None:
        tokenizer.no_truncation()
    else:
        tokenizer.enable_truncation(longest, stride=overlap)
    with _tokenizers_lock:
        return _tokenizers.setdefault(key, tokenizer)


def _forget_lock() -> None:
    global _tokenizers_lock
    _tokenizers_lock = threading.Lock()  # another thread may have held it when the process was forked


after_fork(_forget_lock)


def encode_prompt(tokenizer: Tokenizer, text: str, *, special_tokens: bool = True) -> list[int]:
    """Convert a prompt to token ids; raises BadInput if that is not possible."""
    if not is_unicode(text):
        raise BadInput(f"half of a surrogate pair, not Unicode text: {text!r:.60}")
    try:
        return list(tokenizer.encode(text, add_special_tokens=special_tokens).ids)
    except BaseException as problem:
        raise BadInput(f"the tokenizer fails at {text!r:.60}: {tokenizer_reason(problem)}") from problem


@dataclass(frozen=True)
class TextRow:
    """One text as token ids and token types; truncated: whether it was cut to the longest input.

    rest: further windows of a long text, see AnyRow. words, text: where words are labelled, those of this
    row, and the text in which their characters are counted; else empty.
    """

    ids: Sequence[int]
    types: Sequence[int]
    truncated: bool
    rest: tuple[TextRow, ...] = ()
    words: tuple[Word, ...] = ()
    text: str = ""

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.ids)


class TextReader:
    """Converts texts to the stem's inputs with the bundle's tokenizer; safe to call from several threads.

    long_texts: "cut" keeps the first tokens of a text that is longer than the network reads; "windows" reads
    all of it in windows of that length, each of which shares a quarter with the one before. Pairs have no
    windows: they become an ItemError. The prefix of the manifest stands in the first window alone. If the
    stem reads word_starts, rows have words. For tasks of single texts every pair becomes an ItemError.
    """

    def __init__(self, bundle: Bundle, long_texts: str = "cut") -> None:
        manifest = bundle.manifest
        if not isinstance(manifest.input, TextInput):
            raise BadBundle(f"{bundle.folder}: it reads images, not text")
        self._facts = manifest.input
        self._names = {tensor.name for tensor in manifest.stem.first_graph.inputs}
        self._finds_words = WORD_STARTS.name in self._names
        self._single_text = manifest.task if manifest.task in _SINGLE_TEXTS else ""
        unknown = self._names - {"input_ids", "attention_mask", "token_type_ids", WORD_STARTS.name}
        if unknown:
            raise BadBundle(f"{bundle.folder}: stem input {sorted(unknown)[0]!r} cannot be made from text")
        self._windows = long_texts == "windows"
        overlap = self._facts.longest // 4 if self._windows else 0
        self._tokenizer = open_tokenizer(bundle, self._facts, overlap)

    def read(self, items: Sequence[Item]) -> list[TextRow | ItemError]:
        """Convert texts and pairs to rows of ids, each at most the manifest's longest input; see Reader.read.

        The prefix is put before the first text of a pair, as in training.
        """
        longest = CHARACTERS_PER_TOKEN * self._facts.longest * (MAX_WINDOWS if self._windows else 1)
        rows: list[TextRow | ItemError | None] = [
            _problem_of(number, item, longest, self._single_text) for number, item in enumerate(items)
        ]
        numbers = [number for number, row in enumerate(rows) if row is None]
        prefix, cuts = self._facts.prefix, [_cut(cast(Text, items[number]), longest) for number in numbers]
        texts = [prefix + cut if isinstance(cut, str) else (prefix + cut[0], cut[1]) for cut in cuts]
        try:
            if len(texts) == 1:  # encode_batch would use another thread pool
                encodings: list[Encoding | str] = [self._encode(texts[0])]
            else:
                encodings = list(self._tokenizer.encode_batch(texts))
        except BaseException as problem:
            tokenizer_reason(problem)
            encodings = [self._encode_alone(text) for text in texts]  # one text must not cost the others
        for number, cut, encoding in zip(numbers, cuts, encodings, strict=True):
            if isinstance(encoding, str):
                rows[number] = ItemError(number, f"the tokenizer fails at {items[number]!r:.60}: {encoding}")
            elif not encoding.ids:
                message = f"the tokenizer finds no token in {items[number]!r:.60}"
                rows[number] = ItemError(number, message)
            elif self._windows and encoding.overflowing and not isinstance(cut, str):
                message = (
                    f"a pair of more than {self._facts.longest} tokens cannot be read in windows; cut it"
                )
                rows[number] = ItemError(number, message)
            elif self._windows:
                rest = [self._row(e, cut, False) for e in encoding.overflowing]
                truncated = cut != items[number] or len(rest) >= MAX_WINDOWS
                rows[number] = self._row(encoding, cut, truncated, tuple(rest[: MAX_WINDOWS - 1]))
            else:
                truncated = cut != items[number] or bool(encoding.overflowing)
                rows[number] = self._row(encoding, cut, truncated)
        return [row for row in rows if row is not None]

    def _encode(self, text: Text) -> Encoding:
        return self._tokenizer.encode(text) if isinstance(text, str) else self._tokenizer.encode(*text)

    def _encode_alone(self, text: Text) -> Encoding | str:
        """The encoding of one text, or why there is none."""
        try:
            return self._encode(text)
        except BaseException as problem:
            return tokenizer_reason(problem)

    def arrays(self, rows: Sequence[TextRow], pad_alone: bool = False) -> dict[str, Ids]:
        """Convert rows to the stem's inputs, int64 [batch, seq].

        Several rows are padded to a multiple of LENGTH_STEP; a single row only if pad_alone, see Reader.
        """
        if len(rows) == 1 and not pad_alone:
            ids = np.array([rows[0].ids], dtype=np.int64)  # [1, seq]
            types, mask = np.array([rows[0].types], dtype=np.int64), np.ones_like(ids)
        else:
            longest = max(len(row.ids) for row in rows)
            padded = -(-longest // LENGTH_STEP) * LENGTH_STEP
            shape = (len(rows), min(padded, max(self._facts.longest, longest)))
            ids = np.full(shape, self._facts.pad_id, dtype=np.int64)  # [batch, seq]
            types, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
            for number, row in enumerate(rows):
                length = len(row.ids)
                ids[number, :length], types[number, :length], mask[number, :length] = row.ids, row.types, 1
        return self._inputs(ids, mask, types, _starts(rows, ids) if self._finds_words else mask)

    def blank(self, rows: int, length: int) -> dict[str, Ids]:
        """The stem's inputs for rows of `length` padding tokens, int64 [rows, length].

        length: at most the longest input of the network is used.
        """
        shape = (rows, min(length, self._facts.longest))
        ids = np.full(shape, self._facts.pad_id, dtype=np.int64)
        return self._inputs(ids, np.ones_like(ids), np.zeros_like(ids), np.ones_like(ids))

    def _inputs(self, ids: Ids, mask: Ids, types: Ids, starts: Ids) -> dict[str, Ids]:
        arrays = {
            "input_ids": ids,
            "attention_mask": mask,
            "token_type_ids": types,
            WORD_STARTS.name: starts,
        }
        return {name: arrays[name] for name in self._names}

    def _row(
        self, encoding: Encoding, text: Text, truncated: bool, rest: tuple[TextRow, ...] = ()
    ) -> TextRow:
        if not self._finds_words:
            return TextRow(encoding.ids, encoding.type_ids, truncated, rest)
        assert isinstance(text, str)  # pairs are refused before
        words = tuple(words_of(encoding, text, len(self._facts.prefix)))
        return TextRow(encoding.ids, encoding.type_ids, truncated, rest, words, text)


def _starts(rows: Sequence[TextRow], ids: Ids) -> Ids:
    """1 at the tokens that begin a word, else 0, int64 [batch, seq]; ids: of the rows."""
    starts = np.zeros_like(ids)
    for number, row in enumerate(rows):
        starts[number, [word.token for word in row.words]] = 1
    return starts


def _cut(item: Text, longest: int) -> Text:
    """Cut each text of an item to `longest` characters."""
    return item[:longest] if isinstance(item, str) else (item[0][:longest], item[1][:longest])


def _problem_of(number: int, item: Item, longest: int, single_text: str) -> ItemError | None:
    """The error for an item that is no text; None for an item that is.

    single_text: the bundle's task if it has no pairs of texts.
    """
    is_pair = isinstance(item, tuple)
    parts = item if isinstance(item, tuple) else (item,)
    if len(parts) != 1 + is_pair or not all(isinstance(part, str) for part in parts):
        return ItemError(number, f"expected a string or a pair of strings, found {item!r:.60}")
    if is_pair and single_text:
        return ItemError(number, f"{single_text} reads one text, not a pair: {item!r:.60}")
    for part in parts:
        if not is_unicode(part[:longest]):
            return ItemError(number, f"half of a surrogate pair, not Unicode text: {part!r:.60}")
    return None
