"""The words of a text among its tokens: which tokens begin one, and the characters of each word.

Training also uses this file, so that labels of words stand at the same tokens as in a bundle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tokenizers import Encoding


class Word(NamedTuple):
    """One word of a text: its number in the text, its first token, and its characters, the end exclusive.

    number: from 0; the same in every window of the text. start, end: without white space around the word, of
    the text without its prefix. Equal if the word is white space alone.
    """

    number: int
    token: int
    start: int
    end: int


def word_starts(encoding: Encoding, prefix: int = 0) -> list[int]:
    """1 for each token that begins a word, else 0; special tokens begin none.

    prefix: characters before the text (or the first of a pair) that are not the caller's; tokens that end in
    them begin no word.
    """
    starts, before = list[int](), None
    for word in _word_of_tokens(encoding, prefix):
        starts.append(int(word is not None and word != before))
        before = word
    return starts


def words_of(encoding: Encoding, text: str, prefix: int = 0) -> list[Word]:
    """The words of a single text in their order, one for each token that word_starts marks.

    text: the caller's, of which the encoding holds all or a window. prefix: see word_starts.
    """
    words, before, offsets = list[Word](), None, encoding.offsets
    for token, word in enumerate(_word_of_tokens(encoding, prefix)):
        if word is not None:
            start, end = offsets[token]
            if word == before:
                words[-1] = words[-1]._replace(end=max(words[-1].end, end - prefix))
            else:
                words.append(Word(word[1], token, max(start - prefix, 0), end - prefix))
        before = word
    return [_without_blanks(word, text) for word in words]


def _word_of_tokens(encoding: Encoding, prefix: int) -> list[tuple[int | None, int] | None]:
    """For each token the number of its text and that of its word; None if it belongs to no word.

    Words are counted anew in the second text of a pair.
    """
    words = zip(encoding.sequence_ids, encoding.word_ids, strict=True)
    tokens = [None if word is None else (text, word) for text, word in words]
    if prefix:
        for token, (word, (_, end)) in enumerate(zip(tokens, encoding.offsets, strict=True)):
            if word is not None and word[0] == 0 and end <= prefix:
                tokens[token] = None
    return tokens


def _without_blanks(word: Word, text: str) -> Word:
    """The word without white space: some tokenizers count the blank before a word as its first character."""
    characters = text[word.start : word.end]
    if characters and not characters[0].isspace() and not characters[-1].isspace():
        return word  # most words
    if not characters.strip():
        return word._replace(end=word.start)
    start = word.start + len(characters) - len(characters.lstrip())
    return word._replace(start=start, end=start + len(characters.strip()))
