"""Weights that protobuf cannot hold are in a file beside their graph, listed and verified."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from offramp.export import bundle as export_bundle
from offramp.export.bundle import write_bundle, write_manifest
from offramp.export.decoder import ExportableDecoder
from offramp.export.options import ExportOptions
from offramp.export.to_onnx import to_onnx
from offramp.models.decoder import DecoderNetwork
from offramp.runtime import BadBundle, load_generator
from offramp.runtime.bundle.files import open_bundle

pytestmark = pytest.mark.slow

LARGEST = 10_000  # bytes; the real limit is that of protobuf, 2 GiB
VOCABULARY, WIDTH = 200, 32  # embeddings of 25,600 bytes
PROMPT = [5, 9, 30, 12]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A language model of one block, and its bundle in fp32 and int8, exported with a limit of 10 kB."""
    import tiny

    folder = tmp_path_factory.mktemp("large")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    tiny.tokenizer().save(str(folder / "tokenizer.json"))
    source = ExportableDecoder(DecoderNetwork(model), folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_bundle, "to_onnx", partial(to_onnx, largest=LARGEST))
        write_bundle(source, source.split("1"), folder / "bundle", ExportOptions(("fp32", "int8")))
    return model, folder / "bundle"


def test_large_graphs_have_a_file_of_weights_that_the_manifest_lists(large: tuple[Any, Path]) -> None:
    bundle = open_bundle(large[1])
    files = bundle.manifest.files
    assert {"stem.onnx.data", "head.onnx.data"} <= files.keys()
    assert files["stem.onnx.data"].bytes >= 4 * VOCABULARY * WIDTH > files["stem.onnx"].bytes
    bundle.verify()
    facts = bundle.read_graph_facts("stem.onnx")
    assert facts.weights >= 4 * VOCABULARY * WIDTH
    assert onnx.load(large[1] / "stem.onnx", load_external_data=False).graph.initializer[0].name


@pytest.mark.parametrize("variant", ["fp32", "int8"])
def test_its_answers_are_those_of_transformers(large: tuple[Any, Path], variant: str) -> None:
    model, folder = large
    right = model.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False)[0, len(PROMPT) :]
    with load_generator(folder, variant=variant, rule="never") as session:
        tokens = [token.id for token in session.tokens(PROMPT, 12)]
    assert len(tokens) == 12 and (variant == "int8" or tokens == right.tolist())


@pytest.fixture
def copy(large: tuple[Any, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(large[1], tmp_path / "bundle"))


def test_weights_that_changed_are_not_read(copy: Path) -> None:
    data = bytearray((copy / "head.onnx.data").read_bytes())
    data[100] ^= 1
    (copy / "head.onnx.data").write_bytes(data)
    with pytest.raises(BadBundle, match=r"head.onnx.data: sha256"):
        load_generator(copy)


def test_the_file_on_the_disk_is_never_opened_by_the_engine(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets verified bytes: other files of these names in the current folder have no effect."""
    with load_generator(copy, rule="never") as session:
        right = [token.id for token in session.tokens(PROMPT, 5)]
    elsewhere = copy.parent / "elsewhere"
    elsewhere.mkdir()
    for name in ("stem.onnx.data", "head.onnx.data"):
        (elsewhere / name).write_bytes(bytes((copy / name).stat().st_size))
    monkeypatch.chdir(elsewhere)
    with load_generator(copy, rule="never", share=False) as session:
        assert [token.id for token in session.tokens(PROMPT, 5)] == right


def entries(**values: str) -> Callable[[Any], None]:
    """A change of where a graph says that its first outside tensor is; "" takes an entry out."""

    def change(model: Any) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
        known = {entry.key: entry.value for entry in tensor.external_data} | values
        del tensor.external_data[:]
        for key, value in known.items():
            if value:
                tensor.external_data.add(key=key, value=value)

    return change


def both(model: Any) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    tensor.raw_data = bytes(4)


def twice(model: Any) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    tensor.external_data.add(key="offset", value="4")


def other_type(model: Any) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    tensor.data_type = onnx.TensorProto.UINT4


def fewer_numbers(model: Any) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    tensor.dims[0] -= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (entries(location="head.onnx.data"), "head.onnx.data' .*stem.onnx.data alone is allowed"),
        (entries(location="../stem.onnx.data"), "stem.onnx.data alone is allowed"),
        (entries(location="/etc/passwd"), "stem.onnx.data alone is allowed"),
        (entries(location=""), "stem.onnx.data alone is allowed"),
        (entries(offset="4"), "its sizes need|which has"),
        (entries(offset="-4"), "offset or length of its external data is no number"),
        (entries(offset="9" * 30), "offset or length of its external data is no number"),
        (entries(length="4"), "its sizes need"),
        (entries(length=""), "offset or length of its external data is no number"),
        (entries(checksum="0"), "external data: entry 'checksum' is not known"),
        (both, "its numbers belong into the graph alone"),
        (twice, "entry 'offset' is not known, or there twice"),
        (fewer_numbers, "its sizes need"),
        (other_type, "data type 21 belong into the graph"),
    ],
    ids=[
        *("another file", "upwards", "absolute", "no name", "beyond", "negative", "huge", "too short"),
        *("no length", "other entry", "both", "twice", "fewer numbers", "type"),
    ],
)
def test_place_of_weights_that_is_not_in_their_file_is_refused(
    copy: Path, change: Callable[[Any], None], message: str
) -> None:
    model = onnx.load(copy / "stem.onnx", load_external_data=False)
    change(model)
    (copy / "stem.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(BadBundle, match=message):
        write_manifest(copy, open_bundle(copy).manifest)
    with pytest.raises(BadBundle, match=message):
        load_generator(copy)


def test_weights_without_their_file_are_refused(copy: Path) -> None:
    (copy / "stem.onnx.data").unlink()
    manifest = open_bundle(copy).manifest
    with pytest.raises(BadBundle, match=r"external data\), and the manifest lists no file of weights"):
        write_manifest(copy, dataclasses.replace(manifest, files={}))
