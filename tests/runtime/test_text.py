"""Text into ids and arrays, by the tiny bundle's tokenizer."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from offramp.runtime.bundle.files import Bundle, open_bundle
from offramp.runtime.errors import BadBundle, BadInput
from offramp.runtime.inputs.text import LENGTH_STEP, Encoder

TINY = Path(__file__).parents[1] / "data" / "tiny_bundle"


def bundle_with(**facts: object) -> Bundle:
    bundle = open_bundle(TINY)
    text = dataclasses.replace(bundle.manifest.input, **facts)
    return Bundle(TINY, dataclasses.replace(bundle.manifest, input=text))


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(open_bundle(TINY))


def test_one_row_is_not_padded(encoder: Encoder) -> None:
    rows = encoder(["good film"])
    arrays = encoder.arrays(rows)
    assert arrays["input_ids"].tolist() == [list(rows[0].ids)]
    assert arrays["attention_mask"].all()
    assert all(array.dtype == np.int64 for array in arrays.values())


def test_several_rows_are_padded_to_a_multiple(encoder: Encoder) -> None:
    rows = encoder(["good", "the film was very good and not bad at all"])
    arrays = encoder.arrays(rows)
    assert arrays["input_ids"].shape[1] % LENGTH_STEP == 0
    for at, row in enumerate(rows):
        length = len(row.ids)
        assert arrays["input_ids"][at, :length].tolist() == list(row.ids)
        assert arrays["attention_mask"][at].tolist() == [1] * length + [0] * (
            arrays["input_ids"].shape[1] - length
        )


def test_padding_never_goes_beyond_the_longest_input() -> None:
    encoder = Encoder(bundle_with(longest=13))
    assert encoder.arrays(encoder(["good " * 40, "bad"]))["input_ids"].shape == (2, 13)


def test_padding_is_the_manifests() -> None:
    encoder = Encoder(bundle_with(pad_id=7))
    arrays = encoder.arrays(encoder(["good", "the film was very good"]))
    assert set(arrays["input_ids"][arrays["attention_mask"] == 0].tolist()) == {7}


def test_a_batch_encodes_as_its_rows_do(encoder: Encoder) -> None:
    items = ["good film", ("bad", "the plot"), "naïve ünknown"]
    assert encoder(items) == [encoder([item])[0] for item in items]


def test_only_the_inputs_that_the_stem_has(encoder: Encoder) -> None:
    names = {tensor.name for tensor in open_bundle(TINY).manifest.stem.variants["fp32"].inputs}
    assert set(encoder.arrays(encoder(["good"]))) == names


def test_blank_rows_have_the_shapes_of_real_ones(encoder: Encoder) -> None:
    real, blank = encoder.arrays(encoder(["good film"])), encoder.blank(3, 5)
    assert {name: array.dtype for name, array in blank.items()} == {n: a.dtype for n, a in real.items()}
    assert all(array.shape == (3, 5) for array in blank.values()) and blank["attention_mask"].all()
    longest = open_bundle(TINY).manifest.input.longest
    assert encoder.blank(1, 10_000)["input_ids"].shape == (1, longest)


def test_the_prefix_goes_before_the_first_text_alone() -> None:
    plain, prefixed = Encoder(open_bundle(TINY)), Encoder(bundle_with(prefix="very "))
    assert prefixed(["good", ("good", "bad")]) == plain(["very good", ("very good", "bad")])


def test_long_text_is_cut_and_said_to_be(encoder: Encoder) -> None:
    longest = open_bundle(TINY).manifest.input.longest
    short, long, pair = encoder(["good", "good " * 500, ("good " * 500, "bad " * 500)])
    assert not short.truncated and long.truncated and pair.truncated
    assert len(long.ids) == len(pair.ids) == longest


def test_text_beyond_all_measure_is_cut_before_tokenizing(encoder: Encoder) -> None:
    (row,) = encoder(["good" + " " * 10_000_000])
    assert row.truncated and row.ids == encoder(["good"])[0].ids


@pytest.mark.parametrize("item", [3, None, b"good", ("a", 3), ("a", "b", "c"), ["a", "b"], "half \ud83d"])
def test_what_is_no_text(encoder: Encoder, item: object) -> None:
    with pytest.raises(BadInput, match="item 1: "):
        encoder(["good", item])  # type: ignore[list-item]


def test_empty_text_is_text(encoder: Encoder) -> None:
    assert len(encoder([""])[0].ids) >= 1


def test_a_tokenizer_larger_than_the_embeddings_is_refused() -> None:
    bundle = open_bundle(TINY)
    with pytest.raises(BadBundle, match=r"tokenizer\.json: .* the network has embeddings for 3"):
        Encoder(Bundle(TINY, dataclasses.replace(bundle.manifest, vocab_size=3)))


def test_a_tokenizer_that_is_none(tmp_path: Path) -> None:
    import hashlib

    folder = Path(shutil.copytree(TINY, tmp_path / "bundle"))
    (folder / "tokenizer.json").write_bytes(b"{}")
    manifest = open_bundle(folder).manifest
    fact = dataclasses.replace(
        manifest.files["tokenizer.json"], sha256=hashlib.sha256(b"{}").hexdigest(), bytes=2
    )
    files = {**manifest.files, "tokenizer.json": fact}
    with pytest.raises(BadBundle, match=r"tokenizer\.json: not a tokenizer"):
        Encoder(Bundle(folder, dataclasses.replace(manifest, files=files)))
