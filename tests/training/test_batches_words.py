"""Rows whose words have labels, encoded: which tokens have one, and which; and the labels of other tasks."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from offramp.models import EarlyExitNetwork, NetworkSpec
from offramp.models.tasks import TOKENS
from offramp.runtime.inputs.images import ImageInput
from offramp.training.batches import (
    EncodedImages,
    EncodedText,
    EncodedTokens,
    encode_rows,
    encode_texts,
    encode_words,
)
from offramp.training.checkpoint import Checkpoint, TextFacts
from offramp.training.data import NO_LABEL, Rows, Word

NAMES = ("O", "B-X", "I-X", "KIND")
OUT, BEGIN, INNER, KIND = range(4)
FACTS = TextFacts("", 0, 64)
IMAGE = ImageInput(4, 4, (4, 4), "bicubic", "RGB", 1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def rows(*texts: tuple[str, list[tuple[str, int]]]) -> Rows:
    """Rows of text, each with the parts of it that have labels, in their order."""
    words = []
    for text, parts in texts:
        at, words_of_row = 0, list[Word]()
        for part, label in parts:
            at = text.index(part, at)
            words_of_row.append(Word(at, at + len(part), label))
            at += len(part)
        words.append(words_of_row)
    return Rows([text for text, _ in texts], None, np.full(len(texts), NO_LABEL), words=words)


def pieces(pre_tokenizer: pre_tokenizers.PreTokenizer, *tokens: str, model: str = "WordPiece") -> Tokenizer:
    """A tokenizer of these tokens, with special tokens around a text."""
    vocab = {token: number for number, token in enumerate(("[UNK]", "[CLS]", "[SEP]", *tokens))}
    if model == "WordPiece":
        tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    else:
        tokenizer = Tokenizer(models.Unigram([(token, -1.0) for token in vocab], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizer
    special = [("[CLS]", 1), ("[SEP]", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    return tokenizer


def encode(data: Rows, tokenizer: Tokenizer | None = None, facts: TextFacts = FACTS) -> EncodedTokens:
    return encode_words(data, tokenizer or tiny.tokenizer(), facts, NAMES)


FILMS = rows(
    ("the film was good", [("the", OUT), ("film", BEGIN), ("was", OUT), ("good", KIND)]),
    ("a plot", [("a", OUT), ("plot", NO_LABEL)]),
    ("very", [("very", BEGIN)]),
)


def test_each_word_has_the_label_of_its_first_token() -> None:
    encoded = encode(FILMS)
    assert encoded.label.dtype == np.int64 and encoded.starts.dtype == np.int64
    assert encoded.label.tolist() == [OUT, BEGIN, OUT, KIND, OUT, NO_LABEL, BEGIN]
    assert encoded.starts.tolist() == [0, 4, 6, 7] and len(encoded) == 3
    assert encoded.lengths.tolist() == [6, 4, 3] and encoded.plain is encoded


def test_a_batch_marks_the_tokens_that_its_labels_are_of() -> None:
    encoded = encode(FILMS)
    inputs, labels = encoded.batch([1, 0])
    assert {name: tensor.dtype for name, tensor in inputs.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "token_type_ids", "word_starts"), torch.int64
    )
    assert inputs["word_starts"].tolist() == [[0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 0]]
    assert labels.dtype == torch.int64 and labels.tolist() == [OUT, NO_LABEL, OUT, BEGIN, OUT, KIND]
    assert inputs["word_starts"].sum() == len(labels)


def test_taken_rows_keep_their_labels() -> None:
    taken = encode(FILMS).take(np.array([2, 0, 2]))
    assert taken.label.tolist() == [BEGIN, OUT, BEGIN, OUT, KIND, BEGIN]
    assert taken.starts.tolist() == [0, 1, 5, 6] and taken.lengths.tolist() == [3, 6, 3]
    assert taken.batch(np.array([1]))[1].tolist() == [OUT, BEGIN, OUT, KIND]


def test_no_rows_and_rows_without_words_have_no_labels() -> None:
    encoded = encode(rows(("good film", []), ("a plot", [("plot", BEGIN)])))
    assert encoded.label.tolist() == [NO_LABEL, NO_LABEL, NO_LABEL, BEGIN]
    none = encoded.take(np.array([], np.int64))
    assert len(none) == 0 and none.label.tolist() == [] and none.starts.tolist() == [0]


def test_pieces_of_a_word_have_no_labels_of_their_own() -> None:
    tokenizer = pieces(pre_tokenizers.Whitespace(), "un", "##happy", "film")
    encoded = encode(rows(("unhappy film", [("unhappy", BEGIN), ("film", OUT)])), tokenizer)
    inputs, labels = encoded.batch([0])
    assert inputs["word_starts"].tolist() == [[0, 1, 0, 1, 0]] and labels.tolist() == [BEGIN, OUT]


@pytest.mark.parametrize(("label", "further"), [(BEGIN, INNER), (INNER, INNER), (KIND, KIND), (OUT, OUT)])
def test_further_words_of_the_tokenizer_go_on_with_the_label(label: int, further: int) -> None:
    encoded = encode(rows(("was film.was.", [("was", OUT), ("film.was.", label)])))
    assert encoded.label.tolist() == [OUT, label, further, further, further]


def test_a_label_without_an_inner_form_stays() -> None:
    data = rows(("film was", [("film was", 1)]))
    assert encode_words(data, tiny.tokenizer(), FACTS, ("O", "B-X")).label.tolist() == [1, 1]


def test_what_an_entity_does_not_hold_is_outside_of_it() -> None:
    text = [("the ", OUT), ("film was", BEGIN), (". ", OUT), ("plot", BEGIN)]
    assert encode(rows(("the film was. plot", text))).label.tolist() == [OUT, BEGIN, INNER, OUT, BEGIN]


def test_a_blank_that_counts_as_part_of_a_word_is_left_out() -> None:
    tokenizer = pieces(pre_tokenizers.Metaspace(), "▁", "▁the", "▁film", "12", model="Unigram")
    data = rows(("the film 12", [("the", OUT), ("film", BEGIN), ("12", KIND)]))
    encoded = encode(data, tokenizer)
    assert encoded.label.tolist() == [OUT, BEGIN, KIND]
    assert encoded.batch([0])[0]["word_starts"].tolist() == [[0, 1, 1, 1, 0, 0]]


def test_a_prefix_has_no_labels() -> None:
    facts = TextFacts("the plot: ", 0, 64)
    encoded = encode(FILMS, facts=facts)
    assert encoded.label.tolist() == encode(FILMS).label.tolist()
    assert encoded.batch([2])[0]["word_starts"].tolist() == [[0, 0, 0, 0, 1, 0]]


def test_words_beyond_the_longest_input_have_no_labels(capsys: pytest.CaptureFixture[str]) -> None:
    encoded = encode(FILMS, facts=TextFacts("", 0, 4))
    assert encoded.label.tolist() == [OUT, BEGIN, OUT, NO_LABEL, BEGIN]
    assert encoded.starts.tolist() == [0, 2, 4, 5]
    (line,) = capsys.readouterr().err.splitlines()  # what is cut is not reported as lost, too
    assert line.startswith("1 of 3 texts are longer than 4 tokens")


def test_texts_that_are_cut_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    texts = Rows(["a good film", "film", "a film"], None, np.zeros(3, np.int64))
    assert [len(ids) for ids in encode_texts(texts, tiny.tokenizer(), TextFacts("", 0, 4)).ids] == [4, 3, 4]
    assert capsys.readouterr().err.startswith("1 of 3 texts are longer than 4 tokens, and their ends are not")


def test_a_label_that_begins_inside_a_word_is_reported() -> None:
    messages = io.StringIO()
    data = rows(("an unhappy film", [("happy", BEGIN), ("film", KIND)]), ("unhappy", [("happy", OUT)]))
    encoded = encode_words(data, tiny.tokenizer(), FACTS, NAMES, messages)
    assert encoded.label.tolist() == [NO_LABEL, NO_LABEL, KIND, NO_LABEL]
    assert messages.getvalue() == (
        "labels that are not learned, since no word of the tokenizer begins where they stand: 1, first "
        "'happy' in 'an unhappy film'\n"
    )


def token_network() -> EarlyExitNetwork:
    spec = NetworkSpec(NAMES, (1, 3), "none", None, task=TOKENS)
    return EarlyExitNetwork(tiny.backbone("bert"), spec).eval()


def test_rows_are_encoded_with_the_labels_of_the_network(tmp_path: Path) -> None:
    tiny.tokenizer().save(str(tmp_path / "tokenizer.json"))
    encoded = encode_rows(Checkpoint(token_network(), FACTS, tmp_path / "tokenizer.json"), FILMS)
    assert isinstance(encoded, EncodedTokens) and encoded.label.tolist() == encode(FILMS).label.tolist()


def test_a_network_gives_as_many_outputs_as_a_batch_has_labels() -> None:
    inputs, labels = encode(FILMS).batch([0, 1, 2])
    with torch.no_grad():
        outputs = token_network()(inputs)
    assert outputs.logits.shape == (len(labels), 2, len(NAMES))


LABELS = {
    "several": np.array([[0, 1], [-1, -1], [1, 1]], np.float32),
    "values": np.array([1.5, np.nan, -2], np.float32),
    "classes": np.array([1, -1, 0]),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_rows_keep_their_shape_and_type(kind: str) -> None:
    label = LABELS[kind]
    text = EncodedText([[2, 3], [2, 5, 3], [2, 3]], [[0] * 2, [0] * 3, [0] * 2], label, 0)
    images = EncodedImages(np.zeros((3, 4, 4, 3), np.uint8), label, IMAGE, 5)
    for encoded in (text, images):
        _, batch = encoded.take(np.array([2, 1, 0])).batch([0, 1])
        np.testing.assert_array_equal(batch.numpy(), label[[2, 1]])
        assert batch.numpy().dtype == label.dtype
