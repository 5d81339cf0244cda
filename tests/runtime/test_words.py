"""Words of a text among its tokens, for several kinds of tokenizers."""

from __future__ import annotations

import pytest
from tiny_bundles import TOKENS
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.inputs.text import open_tokenizer
from offramp.runtime.inputs.words import word_starts, words_of


@pytest.fixture(scope="module")
def pieces() -> Tokenizer:
    """Cuts words into pieces; [CLS] a [SEP] b [SEP]."""
    bundle = open_bundle(TOKENS)
    return open_tokenizer(bundle, bundle.manifest.input)  # type: ignore[arg-type]


def sentencepiece(pre_tokenizer: pre_tokenizers.PreTokenizer) -> Tokenizer:
    """A tokenizer of characters that counts a blank as part of the word after it, as SentencePiece does."""
    scores = [("<unk>", -20.0), ("<s>", 0.0), ("▁par", -2.0), ("is", -2.0), *((c, -9.0) for c in "▁aprs.")]
    tokenizer = Tokenizer(models.Unigram(scores, 0))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def test_pieces_and_special_tokens_begin_no_word(pieces: Tokenizer) -> None:
    encoding = pieces.encode("films warmly.")
    assert encoding.tokens == ["[CLS]", "film", "##s", "warm", "##ly", ".", "[SEP]"]
    assert word_starts(encoding) == [0, 1, 0, 1, 0, 1, 0]


def test_the_second_text_of_a_pair_begins_with_a_word() -> None:
    encoding = sentencepiece(pre_tokenizers.Metaspace()).encode("a", "a")
    assert encoding.tokens == ["<s>", "▁", "a", "▁", "a"] and encoding.word_ids == [None, 0, 0, 0, 0]
    assert word_starts(encoding) == [0, 1, 0, 1, 0]


def test_padding_begins_no_word(pieces: Tokenizer) -> None:
    encoding = pieces.encode("film")
    encoding.pad(6)
    assert word_starts(encoding) == [0, 1, 0, 0, 0, 0]


def test_a_word_has_the_characters_of_all_of_its_tokens(pieces: Tokenizer) -> None:
    text = "  films\tWarmly."
    words = words_of(pieces.encode(text), text)
    assert [(word.number, word.token, text[word.start : word.end]) for word in words] == [
        (0, 1, "films"),
        (1, 3, "Warmly"),
        (2, 5, "."),
    ]


def test_words_are_those_that_word_starts_marks(pieces: Tokenizer) -> None:
    text = "ann, paris films [SEP] film"
    encoding = pieces.encode(text)
    starts = word_starts(encoding)
    assert [word.token for word in words_of(encoding, text)] == [
        at for at, is_start in enumerate(starts) if is_start
    ]


def test_a_prefix_has_no_words(pieces: Tokenizer) -> None:
    text, prefix = "films", "the plot: "
    encoding = pieces.encode(prefix + text)
    assert word_starts(encoding, len(prefix)) == [0, 0, 0, 0, 1, 0, 0]
    assert [(word.start, word.end) for word in words_of(encoding, text, len(prefix))] == [(0, 5)]


def test_a_word_that_begins_in_the_prefix_begins_with_the_text(pieces: Tokenizer) -> None:
    encoding = pieces.encode("films")
    assert word_starts(encoding, len("film")) == [0, 0, 1, 0]
    assert [(word.token, word.start, word.end) for word in words_of(encoding, "s", len("film"))] == [
        (2, 0, 1)
    ]


def test_the_blank_before_a_word_is_not_of_the_word() -> None:
    text = "paris  a paris"
    encoding = sentencepiece(pre_tokenizers.Metaspace()).encode(text)
    assert (5, 6) in encoding.offsets, "a token of the first blank alone"
    words = [text[word.start : word.end] for word in words_of(encoding, text)]
    assert words == ["paris", "", "a", "paris"], "the blank alone is a word without characters"


def test_words_of_tokens_that_share_characters() -> None:
    text = " a  paris"
    sequence = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    encoding = sentencepiece(sequence).encode(text)
    assert encoding.tokens[1:3] == ["▁", "a"] and encoding.offsets[1] == encoding.offsets[2]
    assert [text[word.start : word.end] for word in words_of(encoding, text)] == ["a", "paris"]


def test_a_window_keeps_the_numbers_of_its_words(pieces: Tokenizer) -> None:
    text = "ann films warmly paris good"
    pieces.enable_truncation(6, stride=1)
    try:
        encoding = pieces.encode(text)
    finally:
        pieces.no_truncation()
    windows = [words_of(part, text) for part in (encoding, *encoding.overflowing)]
    assert [[(word.number, text[word.start : word.end]) for word in words] for words in windows] == [
        [(0, "ann"), (1, "films"), (2, "warm")],
        [(2, "warmly"), (3, "paris"), (4, "good")],
    ]
