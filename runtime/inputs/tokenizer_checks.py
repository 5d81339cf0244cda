"""Check a tokenizer.json before it is used: ids, how far it lengthens a text, and how long it searches one.

A tokenizer is a small program: rules that replace characters, regular expressions that split a text. The
library `tokenizers` runs what the file says, without a limit of its own on the size of a text; a search with
a regular expression ends after ten million steps backwards, and then with an error.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

LARGEST_FILE = 128 * 2**20  # bytes; those of vocabularies of 256,000 tokens have some 35 MB
MAX_GROWTH = 512  # times as many bytes as the text has
MAX_NESTED = 20  # sequences in sequences
MAX_PARTS = 100  # of a sequence, and of a template
MAX_WORD = 1000  # characters of a word that WordPiece searches: its time grows with their square
MAX_PATTERN = 10_000  # characters of a regular expression
MAX_REPEATS = 2  # repeats without an end on one way through a regular expression
MAX_COUNT = 1000  # of a repeat {n,m}
_FEW = 16  # a repeat of at most so many counts as one that ends

Part = Mapping[str, Any]
Kinds = Mapping[str, Callable[[str, Part], float]]


def check_tokenizer(text: str, vocab_size: int) -> None:
    """Raise ValueError, which names the field, for a tokenizer that would do harm or does not fit.

    vocab_size: rows of the network's embeddings; every id has to be below.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    _expect(isinstance(value, dict), "the file", "an object", value)
    growth = 1.0
    for name, parts in (("normalizer", _TEXT_PARTS), ("pre_tokenizer", _TEXT_PARTS)):
        growth *= _growth(name, value.get(name), parts)
    for name, grows in (
        ("normalizer and pre_tokenizer", growth),
        ("decoder", _growth("decoder", value.get("decoder"), _DECODERS)),
    ):
        if grows > MAX_GROWTH:
            raise ValueError(f"{name}: they make a text up to {grows:.0f} times as long, over {MAX_GROWTH}")
    _check_template("post_processor", value.get("post_processor"), vocab_size)
    _check_model(value.get("model"), vocab_size)
    for number, token in enumerate(value.get("added_tokens") or ()):
        _expect(isinstance(token, dict), f"added_tokens[{number}]", "an object", token)
        _check_id(f"added_tokens[{number}].id", token.get("id"), vocab_size)


def tokenizer_reason(problem: BaseException) -> str:
    """The reason of an error of `tokenizers` in one line; raises the error again if it is another one.

    The library raises bare Exception, and for a panic of its Rust code an error that is no Exception.
    """
    if not isinstance(problem, Exception) and type(problem).__name__ != "PanicException":
        raise problem
    return (" ".join(str(problem).split()) or type(problem).__name__)[:300]


def check_pattern(pattern: str) -> None:
    """Raise ValueError for a regular expression whose search can take time without a bound.

    The time of a search backwards grows exponentially where a group is repeated that can be matched in
    several ways, as (a|a)*, (a+)+ and what refers to groups. So a group may be repeated only if it has one
    way, of a fixed length; a single character may be; and one way through the expression has at most
    MAX_REPEATS repeats without an end.
    """
    if len(pattern) > MAX_PATTERN:
        raise ValueError(f"{len(pattern)} characters, over {MAX_PATTERN}")
    _Pattern(pattern).check()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("an object has the same key twice")
    return value


def _expect(right: bool, where: str, expected: str, value: object) -> None:
    if not right:
        raise ValueError(f"{where}: expected {expected}, found {str(value)[:40]!r}")


def _growth(where: str, part: Any, known: Kinds, depth: int = 0) -> float:
    """How many times as long a text can become by one part, in bytes; 1 for none."""
    if part is None:
        return 1.0
    _expect(isinstance(part, dict), where, "an object", part)
    kind = part.get("type")
    if kind == "Sequence":
        lists = [value for key, value in part.items() if key != "type"]
        _expect(len(lists) == 1 and isinstance(lists[0], list), where, "one list of parts", part)
        if depth >= MAX_NESTED or len(lists[0]) > MAX_PARTS:
            raise ValueError(f"{where}: more than {MAX_PARTS} parts, or nested more than {MAX_NESTED} deep")
        grows = [_growth(f"{where}[{n}]", item, known, depth + 1) for n, item in enumerate(lists[0])]
        # A text in one form of Unicode does not grow again by another.
        forms = [g for g, item in zip(grows, lists[0], strict=True) if item.get("type") in _FORMS]
        rest = [g for g, item in zip(grows, lists[0], strict=True) if item.get("type") not in _FORMS]
        return max(forms, default=1.0) * math.prod(rest)
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(f"{where}.type: {str(kind)[:40]!r} is not known; known: {', '.join(known)}")
    return known[kind](where, part)


def _constant(factor: float) -> Callable[[str, Part], float]:
    return lambda where, part: factor


def _split(where: str, part: Part) -> float:
    _pattern_of(where, part)
    return 1.0


def _replace(where: str, part: Part) -> float:
    """Each occurrence of the pattern becomes the content; a regular expression may match a single byte."""
    content, shortest = part.get("content"), _pattern_of(where, part)
    _expect(isinstance(content, str), f"{where}.content", "a string", content)
    return max(1.0, len(str(content).encode("utf-8", "surrogatepass")) / max(1, shortest))


def _pattern_of(where: str, part: Part) -> int:
    """The fewest bytes that a pattern of a part matches, after a check of the pattern."""
    pattern = part.get("pattern")
    _expect(isinstance(pattern, dict) and len(pattern) == 1, f"{where}.pattern", "String or Regex", pattern)
    ((kind, text),) = pattern.items()  # type: ignore[union-attr]
    _expect(kind in ("String", "Regex") and isinstance(text, str), f"{where}.pattern", "a string", text)
    if kind == "String":
        return len(text.encode("utf-8", "surrogatepass"))
    try:
        check_pattern(text)
    except ValueError as problem:
        raise ValueError(f"{where}.pattern: {problem}: {text[:60]!r}") from problem
    return 1


def _prepend(where: str, part: Part) -> float:
    _expect(isinstance(part.get("prepend"), str), f"{where}.prepend", "a string", part.get("prepend"))
    return 1.0 + len(str(part["prepend"]).encode("utf-8", "surrogatepass"))


def _precompiled(where: str, part: Part) -> float:
    """The longest text of the map of SentencePiece, into which one character may be turned.

    The map is the size of its trie, the trie, and texts that end with a zero byte.
    """
    try:
        data = base64.b64decode(part["precompiled_charsmap"] or "", validate=True)
    except (KeyError, TypeError, ValueError, binascii.Error) as problem:
        raise ValueError(f"{where}.precompiled_charsmap: not base64") from problem
    if not data:
        return 1.0
    trie = int.from_bytes(data[:4], "little")
    if len(data) < 4 + trie or trie % 4:
        raise ValueError(f"{where}.precompiled_charsmap: {len(data)} bytes with a trie of {trie}")
    return max(1.0, *map(len, data[4 + trie :].split(b"\0")))


# By type, how many times as many bytes a text can have after it. Forms of Unicode: the 3 bytes of U+FDFA
# become 33; a blank is put on both sides of a Chinese character.
_FORMS: Kinds = {
    "BertNormalizer": _constant(12),
    "NFC": _constant(3),
    "NFD": _constant(4),
    "NFKC": _constant(12),
    "NFKD": _constant(12),
    "Nmt": _constant(1),
    "Lowercase": _constant(3),
    "StripAccents": _constant(1),
    "Precompiled": _precompiled,
}
_TEXT_PARTS: Kinds = {
    **_FORMS,
    "Strip": _constant(1),
    "Replace": _replace,
    "Prepend": _prepend,
    "ByteLevel": _constant(2),
    "Metaspace": _constant(4),
    "BertPreTokenizer": _constant(1),
    "CharDelimiterSplit": _constant(1),
    "Digits": _constant(1),
    "FixedLength": _constant(1),
    "Punctuation": _constant(1),
    "Split": _split,
    "UnicodeScripts": _constant(1),
    "Whitespace": _constant(1),
    "WhitespaceSplit": _constant(1),
}
_DECODERS: Kinds = {
    "Replace": _replace,
    "BPEDecoder": _constant(1),
    "ByteFallback": _constant(3),
    "ByteLevel": _constant(3),
    "CTC": _constant(1),
    "Fuse": _constant(1),
    "Metaspace": _constant(1),
    "Strip": _constant(1),
    "WordPiece": _constant(2),
}


def _check_template(where: str, part: Any, vocab_size: int, depth: int = 0) -> None:
    """Check the special tokens that are put around a text: their number, and their ids."""
    if part is None:
        return
    _expect(isinstance(part, dict), where, "an object", part)
    parts = part.get("processors", [])
    _expect(isinstance(parts, list) and len(parts) <= MAX_PARTS, f"{where}.processors", "a list", parts)
    if depth >= MAX_NESTED:
        raise ValueError(f"{where}: nested more than {MAX_NESTED} deep")
    for number, inner in enumerate(parts):
        _check_template(f"{where}[{number}]", inner, vocab_size, depth + 1)
    for name in ("single", "pair"):
        pieces = part.get(name, [])
        if not isinstance(pieces, list) or len(pieces) > MAX_PARTS:
            raise ValueError(f"{where}.{name}: expected a list of at most {MAX_PARTS}")
    specials = part.get("special_tokens", {})
    _expect(isinstance(specials, dict), f"{where}.special_tokens", "an object", specials)
    for name, token in specials.items():
        ids = token.get("ids") if isinstance(token, dict) else None
        if not isinstance(ids, list) or len(ids) > MAX_PARTS:
            raise ValueError(f"{where}.special_tokens[{name[:40]!r}].ids: expected at most {MAX_PARTS}")
        for id in ids:
            _check_id(f"{where}.special_tokens[{name[:40]!r}].ids", id, vocab_size)
    for name in ("sep", "cls"):
        if isinstance(part.get(name), list) and len(part[name]) == 2:
            _check_id(f"{where}.{name}", part[name][1], vocab_size)


def _check_model(model: Any, vocab_size: int) -> None:
    _expect(isinstance(model, dict), "model", "an object", model)
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        for id in (max(vocab.values(), key=_number), min(vocab.values(), key=_number)) if vocab else ():
            _check_id("model.vocab", id, vocab_size)
    elif isinstance(vocab, list):  # the place in the list is the id
        _check_id("model.vocab", len(vocab) - 1 if vocab else 0, vocab_size)
    else:
        _expect(False, "model.vocab", "an object or a list", vocab)
    if model.get("dropout"):
        raise ValueError("model.dropout: answers would depend on chance; take it out")
    if _number(model.get("max_input_chars_per_word", 0)) > MAX_WORD:
        raise ValueError(f"model.max_input_chars_per_word: at most {MAX_WORD}")


def _number(value: Any) -> float:
    """A number to compare ids by; anything else is beyond every vocabulary."""
    return value if isinstance(value, int) else math.inf


def _check_id(where: str, id: Any, vocab_size: int) -> None:
    if not isinstance(id, int) or isinstance(id, bool) or not 0 <= id < vocab_size:
        raise ValueError(f"{where}: id {str(id)[:40]} is beyond the network's {vocab_size} embeddings")


class _Pattern:
    """A reader of one regular expression in Oniguruma's syntax."""

    def __init__(self, text: str) -> None:
        self._text, self._place, self._depth = text, 0, 0

    def check(self) -> None:
        self._alternatives()
        if self._place < len(self._text):
            raise ValueError("a closing parenthesis without its opening one")

    def _alternatives(self) -> tuple[int, int | None]:
        """Read to the end of the group.

        Gives the most repeats without an end on one way through it, and how many characters it matches: None
        if that is not always the same number, or if there are several ways.
        """
        self._depth += 1
        if self._depth > MAX_NESTED:
            raise ValueError(f"groups are nested more than {MAX_NESTED} deep")
        largest = repeats = 0
        length: int | None = 0
        while self._place < len(self._text) and self._text[self._place] != ")":
            if self._text[self._place] == "|":
                self._place, repeats, length = self._place + 1, 0, None
                continue
            more, characters = self._piece()
            repeats += more
            length = None if length is None or characters is None else length + characters
            largest = max(largest, repeats)
            if largest > MAX_REPEATS:
                raise ValueError(f"more than {MAX_REPEATS} repeats without an end, one behind the other")
        self._depth -= 1
        return largest, length

    def _piece(self) -> tuple[int, int | None]:
        """Read one character, set or group with its repeat; gives what _alternatives gives."""
        start = self._text[self._place]
        inside, length = 0, int(start not in "^$")
        group_length: int | None = length
        if start == "(":
            inside, group_length = self._group()
        elif start == "[":
            self._set()
        elif start == "\\":
            self._escape()
        elif start in "*+?":
            raise ValueError("a repeat of a repeat, or of nothing")
        else:
            self._place += 1
        least, largest = self._repeat()
        if start == "(" and largest > 1 and not 0 < (group_length or 0) <= _FEW:
            raise ValueError("it repeats a group that can match in several ways")
        fixed = group_length is not None and least == largest
        return inside + (largest > max(_FEW, least)), int(group_length * largest) if fixed else None  # type: ignore[operator]

    def _group(self) -> tuple[int, int | None]:
        kind = _GROUP.match(self._text, self._place)
        if kind is None:
            raise ValueError("a kind of group that is not known")
        self._place = kind.end()
        if kind[0].endswith(")"):  # options from here on
            return 0, 0
        repeats, length = self._alternatives()
        if self._place >= len(self._text):
            raise ValueError("a group without its closing parenthesis")
        self._place += 1
        return repeats, 0 if _LOOKS.fullmatch(kind[0]) else length

    def _set(self) -> None:
        """Read [...], in which sets may stand and a bracket right behind the opening one is a character."""
        depth, first = 0, True
        while self._place < len(self._text):
            character = self._text[self._place]
            if character == "\\":
                self._place += 2
                first = False
                continue
            self._place += 1
            if character == "[":
                depth, first = depth + 1, True
                continue
            if character == "]" and not first:
                depth -= 1
                if not depth:
                    return
            first = first and character == "^"
        raise ValueError("a set without its closing bracket")

    def _escape(self) -> None:
        match = _ESCAPE.match(self._text, self._place)
        if match is None:
            raise ValueError("a reference to a group, or an unfinished escape")
        self._place = match.end()

    def _repeat(self) -> tuple[float, float]:
        """Read the repeat behind a piece: the least and the greatest count."""
        match = _REPEAT.match(self._text, self._place)
        if match is None:
            return 1, 1
        self._place = match.end()
        if _REPEAT.match(self._text, self._place):
            raise ValueError("a repeat of a repeat, or of nothing")
        counts, mark = match[1], match[1][0]
        if mark in "*+?":
            return {"*": (0, math.inf), "+": (1, math.inf), "?": (0, 1)}[mark]
        low, comma, high = counts[1:-1].partition(",")
        least = int(low or 0)
        largest: float = least if not comma else int(high) if high else math.inf
        if MAX_COUNT < largest < math.inf or least > MAX_COUNT:
            raise ValueError(f"a count over {MAX_COUNT}")
        return least, math.inf if match[2] == "+" else largest  # {n,m}+ repeats the repeat


_GROUP = re.compile(r"\((?:\?(?:[imx-]+\)|[imx-]*:|=|!|>|<=|<!|<[A-Za-z_]\w*>)|(?!\?))")
_LOOKS = re.compile(r"\(\?<?[=!]")  # ahead or back: it matches no character
_ESCAPE = re.compile(
    r"\\(?:[pP]\{\^?[\w -]+\}|x\{[0-9A-Fa-f]+\}|u[0-9A-Fa-f]{4}|[^0-9kgKRXpPO]|0)", re.DOTALL
)
_REPEAT = re.compile(r"(\*|\+|\?|\{\d{1,9}(?:,\d{0,9})?\}|\{,\d{1,9}\})([?+]?)")
