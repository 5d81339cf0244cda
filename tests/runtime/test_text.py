"""Text into ids and arrays, by the tiny classifier's tokenizer."""

import dataclasses
import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_bundles import CLASSIFIER, GENERATOR
from tokenizers import Tokenizer

from offramp.runtime.bundle.files import Bundle, open_bundle
from offramp.runtime.errors import BadBundle, BadInput, ItemError
from offramp.runtime.inputs.text import (
    LENGTH_STEP,
    TextReader,
    TextRow,
    items_to_rows,
    open_reader,
    open_tokenizer,
)


def bundle_with(**facts: object) -> Bundle:
    bundle = open_bundle(CLASSIFIER)
    text = dataclasses.replace(bundle.manifest.input, **facts)
    return Bundle(CLASSIFIER, dataclasses.replace(bundle.manifest, input=text))


@pytest.fixture(scope="module")
def reader() -> TextReader:
    return TextReader(open_bundle(CLASSIFIER))


def read(reader: TextReader, *items: object) -> list[TextRow]:
    return items_to_rows(reader, items)


def test_arrays_of_one_row_are_not_padded(reader: TextReader) -> None:
    rows = read(reader, "good film")
    arrays = reader.arrays(rows)
    assert arrays["input_ids"].tolist() == [list(rows[0].ids)]
    assert arrays["attention_mask"].all()
    assert all(array.dtype == np.int64 for array in arrays.values())


def test_arrays_of_several_rows_are_padded_to_a_multiple(reader: TextReader) -> None:
    rows = read(reader, "good", "the film was very good and not bad at all")
    arrays = reader.arrays(rows)
    assert arrays["input_ids"].shape[1] % LENGTH_STEP == 0
    for number, row in enumerate(rows):
        length = len(row.ids)
        assert arrays["input_ids"][number, :length].tolist() == list(row.ids)
        assert arrays["attention_mask"][number].tolist() == [1] * length + [0] * (
            arrays["input_ids"].shape[1] - length
        )


def test_padding_ends_at_the_longest_input() -> None:
    reader = TextReader(bundle_with(longest=13))
    assert reader.arrays(read(reader, "good " * 40, "bad"))["input_ids"].shape == (2, 13)


def test_padding_id_is_that_of_the_manifest() -> None:
    reader = TextReader(bundle_with(pad_id=7))
    arrays = reader.arrays(read(reader, "good", "the film was very good"))
    assert set(arrays["input_ids"][arrays["attention_mask"] == 0].tolist()) == {7}


def test_items_are_read_together_as_one_by_one(reader: TextReader) -> None:
    items = ["good film", ("bad", "the plot"), "naïve ünknown"]
    assert reader.read(items) == [row for item in items for row in reader.read([item])]


def test_arrays_are_the_inputs_of_the_stem(reader: TextReader) -> None:
    names = {tensor.name for tensor in open_bundle(CLASSIFIER).manifest.stem.variants["fp32"].inputs}
    assert set(reader.arrays(read(reader, "good"))) == names


def test_blank_rows_have_the_form_of_real_rows(reader: TextReader) -> None:
    real, blank = reader.arrays(read(reader, "good film")), reader.blank(3, 5)
    assert {name: array.dtype for name, array in blank.items()} == {n: a.dtype for n, a in real.items()}
    assert all(array.shape == (3, 5) for array in blank.values()) and blank["attention_mask"].all()
    longest = open_bundle(CLASSIFIER).manifest.input.longest
    assert reader.blank(1, 10_000)["input_ids"].shape == (1, longest)


def test_prefix_goes_before_the_first_text_of_a_pair() -> None:
    plain, prefixed = TextReader(open_bundle(CLASSIFIER)), TextReader(bundle_with(prefix="very "))
    assert prefixed.read(["good", ("good", "bad")]) == plain.read(["very good", ("very good", "bad")])


def test_long_text_is_truncated_and_marked(reader: TextReader) -> None:
    longest = open_bundle(CLASSIFIER).manifest.input.longest
    short, long, pair = read(reader, "good", "good " * 500, ("good " * 500, "bad " * 500))
    assert not short.truncated and long.truncated and pair.truncated
    assert len(long.ids) == len(pair.ids) == longest


def test_very_long_text_is_cut_before_tokenizing(reader: TextReader) -> None:
    (row,) = read(reader, "good" + " " * 10_000_000)
    assert row.truncated and row.ids == read(reader, "good")[0].ids


@pytest.mark.parametrize(
    "item", [3, None, b"good", ("a", 3), ("a",), (), ("a", "b", "c"), ["a", "b"], "half \ud83d"]
)
def test_other_objects_become_item_errors(reader: TextReader, item: object) -> None:
    good, error, pair = reader.read(["good", item, ("good", "bad")])
    assert isinstance(good, TextRow) and isinstance(pair, TextRow)
    assert isinstance(error, ItemError) and error.index == 1
    assert "expected a string or a pair" in error.message or "surrogate" in error.message
    with pytest.raises(BadInput, match="item 1: "):
        read(reader, "good", item)


def test_empty_text_has_tokens(reader: TextReader) -> None:
    assert len(read(reader, "")[0].ids) >= 1


def test_tokenizer_larger_than_the_embeddings_is_refused() -> None:
    bundle = open_bundle(CLASSIFIER)
    with pytest.raises(BadBundle, match=r"tokenizer\.json: .* beyond the network's 3 embeddings"):
        TextReader(Bundle(CLASSIFIER, dataclasses.replace(bundle.manifest, vocab_size=3)))


def test_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(CLASSIFIER, tmp_path / "bundle"))
    (folder / "tokenizer.json").write_bytes(b"{}")
    manifest = open_bundle(folder).manifest
    fact = dataclasses.replace(
        manifest.files["tokenizer.json"], sha256=hashlib.sha256(b"{}").hexdigest(), bytes=2
    )
    files = {**manifest.files, "tokenizer.json": fact}
    with pytest.raises(BadBundle, match=r"tokenizer\.json: not a tokenizer"):
        TextReader(Bundle(folder, dataclasses.replace(manifest, files=files)))


def test_text_without_a_token_is_an_item_error() -> None:
    reader = TextReader(open_bundle(CLASSIFIER))
    reader._tokenizer = Tokenizer.from_str(reader._tokenizer.to_str())  # sessions share the other one
    reader._tokenizer.post_processor = None  # the tiny bundle's adds special tokens to everything
    reader._tokenizer.normalizer = None
    row, error = reader.read(["good", ""])
    assert isinstance(row, TextRow)
    assert error == ItemError(1, "the tokenizer finds no token in ''")


def test_reader_of_a_bundle_follows_its_input() -> None:
    assert isinstance(open_reader(open_bundle(CLASSIFIER)), TextReader)
    with pytest.raises(BadBundle, match="stem input 'past_valid' cannot be made from text"):
        open_reader(open_bundle(GENERATOR))


def test_open_tokenizer_neither_pads_nor_truncates() -> None:
    bundle = open_bundle(CLASSIFIER)
    tokenizer = open_tokenizer(bundle, bundle.manifest.input)
    short, long = tokenizer.encode_batch(["good", "good " * 500])
    assert len(short.ids) < 10 and len(long.ids) > 500


def test_sessions_of_one_file_share_the_tokenizer() -> None:
    bundle = open_bundle(CLASSIFIER)
    assert TextReader(bundle)._tokenizer is TextReader(bundle)._tokenizer


def test_readers_that_cut_texts_in_other_ways_have_their_own_tokenizers() -> None:
    bundle = open_bundle(CLASSIFIER)
    text = "good " * 500
    cut, windows = TextReader(bundle), TextReader(bundle, "windows")
    (row,), (first,) = cut.read([text]), windows.read([text])
    assert isinstance(row, TextRow) and isinstance(first, TextRow)
    assert row.truncated and not row.rest and len(first.rest) > 1
