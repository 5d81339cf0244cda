"""Hostile checkpoints, model folders and training data: none of their code runs, and errors name the file."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_house import name_of, rooms, sources, walked

from offramp.export.decoder import open_decoder
from offramp.models.decoder import DecoderNetwork
from offramp.models.families import UnsupportedFamily
from offramp.training.checkpoint import (
    BadCheckpoint,
    Checkpoint,
    TextFacts,
    load_checkpoint,
    load_exits,
    save_checkpoint,
    save_exits,
)
from offramp.training.data import BadData, Columns, load_data
from offramp.training.decoder import load_decoder
from offramp.training.options import BadModel
from offramp.training.user_input import read_tokenizer
from offramp.training.user_model import load_user_model, own_task, sentence_pooling

Json = dict[str, Any]
Change = Callable[[Path], object]
# Calls that can run code which comes with a model or a data set, by the name of the method.
CODE_CALLS = {"from_pretrained", "from_config", "load_dataset", "get_config_dict"}
CODE_READERS = ("pickle.load", "pickle.loads", "torch.load", "dill.load", "exec")
OTHER_CLASSES = {"nn.Embedding"}  # that have a method of such a name


def calls_in(file: Path, *names: str) -> list[ast.Call]:
    """The calls in a file whose text has one of these words; most files need not be parsed."""
    if not any(name in file.read_text("utf-8") for name in names):
        return []
    return [node for node in walked(file) if isinstance(node, ast.Call)]


def test_every_call_that_could_run_foreign_code_forbids_it() -> None:
    calls, wrong = 0, []
    for file in sources(*rooms()):
        for node in calls_in(file, *CODE_CALLS):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            if isinstance(node.func, ast.Name):
                name = node.func.id
            owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
            if name not in CODE_CALLS or owner in OTHER_CLASSES:
                continue
            calls += 1
            flags = [word for word in node.keywords if word.arg == "trust_remote_code"]
            if not flags or ast.unparse(flags[0].value) != "False":
                wrong.append(f"{name_of(file)}:{node.lineno} {ast.unparse(node)[:80]}")
    assert not wrong, "\n".join(wrong)
    assert calls > 20


@pytest.mark.slow
def test_no_room_reads_pickles_or_runs_text() -> None:
    wrong = [
        f"{name_of(file)}:{node.lineno} {ast.unparse(node)[:80]}"
        for file in sources(*rooms())
        for node in walked(file)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func)
        in {"pickle.load", "pickle.loads", "torch.load", "eval", "exec", "dill.load"}
    ]
    assert not wrong, "\n".join(wrong)


CODE = """
import pathlib
pathlib.Path({mark!r}).touch()
from transformers import BertConfig, BertModel, BertTokenizerFast
class Config(BertConfig):
    model_type = {kind!r}
class Model(BertModel):
    config_class = Config
class Tokenizer(BertTokenizerFast):
    pass
"""
MAPS = {
    "AutoConfig": "code.Config",
    "AutoModel": "code.Model",
    "AutoModelForSequenceClassification": "code.Model",
    "AutoModelForCausalLM": "code.Model",
}


def with_code(folder: Path, kind: str) -> Path:
    """Add code to a model folder, which makes a file `marked` if it is imported."""
    (folder / "code.py").write_text(CODE.format(mark=str(folder / "marked"), kind=kind))
    edit(folder / "config.json", lambda value: value.update(model_type=kind, auto_map=MAPS))
    tokenizer = {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": [None, "code.Tokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


def edit(file: Path, change: Callable[[Json], object]) -> None:
    value = json.loads(file.read_text("utf-8"))
    change(value)
    file.write_text(json.dumps(value))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder of a tiny BERT as transformers saves it."""
    folder = tmp_path / "model"
    tiny.backbone("bert").save_pretrained(folder)
    tiny.tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def test_model_with_code_of_its_own_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_code(model, "custom")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question on standard input"))
    with pytest.raises(
        BadModel, match=r"auto_map: model type 'custom' has code of its own, which is not run"
    ):
        load_user_model(str(model), 0)
    with pytest.raises(BadModel, match="which is not run"):
        load_decoder(str(model))
    with pytest.raises(ValueError, match="which is not run"):
        open_decoder(model)
    with pytest.raises(BadModel, match="which is not run"):
        own_task(str(model))
    with pytest.raises(BadModel, match="tokenizer"):
        read_tokenizer(str(model))
    assert not (model / "marked").exists()


def test_known_model_type_is_read_by_the_class_of_transformers(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_code(model, "bert")
    loaded = load_user_model(str(model), 0)
    assert (
        "its own code (auto_map) is not run; transformers' class for bert reads it" in capsys.readouterr().err
    )
    assert type(loaded.backbone).__module__.startswith("transformers.")
    assert not (model / "marked").exists()


@pytest.mark.slow
def test_command_asks_nothing_and_runs_nothing(model: Path, tmp_path: Path) -> None:
    with_code(model, "custom")
    (tmp_path / "train.jsonl").write_text('{"text": "good", "label": 1}\n{"text": "bad", "label": 0}\n')
    command = [sys.executable, "-c", "from offramp.training.cli import train; train()"]
    options = ["--model", str(model), "--data", str(tmp_path / "train.jsonl"), "--out", str(tmp_path / "out")]
    result = subprocess.run([*command, *options], input=b"y\ny\ny\n", capture_output=True, timeout=300)
    assert result.returncode == 2
    assert b"which is not run" in result.stderr and b"[y/N]" not in result.stdout + result.stderr
    assert b"which is not run" in result.stderr.splitlines()[-1] and b"Traceback" not in result.stderr
    assert not (model / "marked").exists()


class Harm:
    """A pickle that makes a file when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_weights_in_a_pickle_are_not_read(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Harm(model / "marked")))
    with pytest.raises(BadModel, match="safetensors"):
        load_user_model(str(model), 0)
    assert not (model / "marked").exists()


CONFIGS: dict[str, Json] = {
    "kernel of the hub": {"attn_implementation": "someone/kernel"},
    "kernels": {"use_kernels": True},
    "library of a quantization": {"quantization_config": {"quant_method": "gptq"}},
    "10^9 layers": {"num_hidden_layers": 10**9},
    "10^9 labels": {"num_labels": 10**9},
    "whole number of 30 digits": {"hidden_size": 10**30},
    "infinity": {"layer_norm_eps": float("inf")},
    "no heads": {"num_attention_heads": 0},
    "hidden size as a text": {"hidden_size": "32"},
    "hidden size of 0": {"hidden_size": 0},
    "hidden size that does not fit": {"hidden_size": 64},
    "activation that is none": {"hidden_act": "os.system"},
    "type of numbers that is none": {"dtype": "os.system"},
    "model type that is none": {"model_type": "os.system"},
    "model type that is a number": {"model_type": 5},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_hostile_configuration_of_a_model_is_refused(name: str, model: Path) -> None:
    edit(model / "config.json", lambda value: value.update(CONFIGS[name]))
    with pytest.raises(BadModel) as caught:
        load_user_model(str(model), 0)
    assert str(model) in str(caught.value) and len(str(caught.value).splitlines()) == 1


FILES: dict[str, tuple[str, bytes]] = {
    "configuration 10^5 deep": ("config.json", b"[" * 10**5),
    "configuration that is a list": ("config.json", b"[]"),
    "configuration that is empty": ("config.json", b""),
    "configuration that is not UTF-8": ("config.json", b"\xff"),
    "weights that are empty": ("model.safetensors", b""),
    "weights that are noise": ("model.safetensors", b"\xff" * 1000),
    "weights with a header of 2^63 bytes": ("model.safetensors", struct.pack("<Q", 2**63) + b"{}"),
}


@pytest.mark.parametrize("name", FILES)
def test_hostile_file_of_a_model_is_refused(name: str, model: Path) -> None:
    file, data = FILES[name]
    (model / file).write_bytes(data)
    with pytest.raises(BadModel) as caught:
        load_user_model(str(model), 0)
    assert str(model) in str(caught.value) and len(str(caught.value).splitlines()) == 1


POOLINGS: dict[str, str] = {
    "no JSON": "[",
    "10^5 deep": "[" * 10**5,
    "no list": '{"type": "x"}',
    "list of numbers": "[1]",
    "no type": "[{}]",
    "no pooling": '[{"type": "a.Transformer", "path": ""}]',
    "folder above": '[{"type": "a.Pooling", "path": "../.."}]',
    "folder of the system": '[{"type": "a.Pooling", "path": "/etc"}]',
    "folder that is not there": '[{"type": "a.Pooling", "path": "1_Pooling"}]',
    "module with code": '[{"type": "code.Model", "path": ""}]',
}


@pytest.mark.parametrize("name", POOLINGS)
def test_hostile_modules_of_sentence_transformers_are_refused(name: str, model: Path) -> None:
    (model / "modules.json").write_text(POOLINGS[name])
    with pytest.raises(BadModel, match=r"modules\.json"):
        sentence_pooling(str(model))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny BERT."""
    folder = tmp_path_factory.mktemp("saved")
    tiny.tokenizer().save(str(folder / "tokenizer.json"))
    network = tiny.network("bert")
    save_checkpoint(
        Checkpoint(network, TextFacts("", 0, 64), folder / "tokenizer.json", {"recipe": "joint"}),
        folder / "ckpt",
    )
    return folder / "ckpt"


def network_json(**facts: Any) -> Change:
    return lambda folder: edit(folder / "network.json", lambda value: value.update(facts))


def backbone(**facts: Any) -> Change:
    return lambda folder: edit(folder / "network.json", lambda value: value["backbone"].update(facts))


def parts(**facts: Any) -> Change:
    return lambda folder: edit(folder / "network.json", lambda value: value["network"].update(facts))


def text(**facts: Any) -> Change:
    return lambda folder: edit(folder / "network.json", lambda value: value["text"].update(facts))


def without(*path: str) -> Change:
    def change(folder: Path) -> None:
        def drop(value: Json) -> None:
            for name in path[:-1]:
                value = value[name]
            del value[path[-1]]

        edit(folder / "network.json", drop)

    return change


def file(name: str, data: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(data)


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def rewrite(folder: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / "weights.safetensors").items()}
        change(tensors)
        save_file(tensors, folder / "weights.safetensors")

    return rewrite


def header(edit_header: Callable[[Json], object]) -> Change:
    """A change of the header of the weights alone."""

    def rewrite(folder: Path) -> None:
        data = (folder / "weights.safetensors").read_bytes()
        size = int.from_bytes(data[:8], "little")
        value = json.loads(data[8 : 8 + size])
        edit_header(value)
        head = json.dumps(value).encode()
        (folder / "weights.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + data[8 + size :])

    return rewrite


def first(value: Json) -> Json:
    return next(facts for name, facts in value.items() if name != "__metadata__")  # type: ignore[no-any-return]


NETWORK, WEIGHTS, TOKENIZER = r"network\.json", r"weights\.safetensors", r"tokenizer\.json"
CHECKPOINTS: dict[str, tuple[Change, str]] = {
    "format 99": (network_json(format=99), rf"{NETWORK}: format: 99; this version reads format 1"),
    "no format": (without("format"), rf"{NETWORK}: format: None"),
    "unknown key": (network_json(code="x"), rf"{NETWORK}: expected backbone, network and text"),
    "no backbone": (without("backbone"), rf"{NETWORK}: expected backbone"),
    "no network": (without("network"), rf"{NETWORK}: expected backbone"),
    "no text": (without("text"), rf"{NETWORK}: expected backbone"),
    "backbone as a list": (network_json(backbone=[]), rf"{NETWORK}: backbone\.model_type"),
    "no model type": (without("backbone", "model_type"), rf"{NETWORK}: backbone\.model_type"),
    "model type that is none": (backbone(model_type="os.system"), "no adapter for model type 'os.system'"),
    "model type of a decoder": (backbone(model_type="gpt2"), NETWORK),
    "other family": (backbone(model_type="electra"), f"{WEIGHTS} does not fit|{NETWORK}"),
    "kernel of the hub": (backbone(_attn_implementation="a/kernel"), "would load other code"),
    "quantization": (backbone(quantization_config={"quant_method": "gptq"}), "would load other code"),
    "no heads": (backbone(num_attention_heads=0), rf"{NETWORK}: backbone and network: ZeroDivisionError"),
    "heads that do not divide": (backbone(num_attention_heads=5), rf"{NETWORK}: backbone and network"),
    "10^9 layers": (backbone(num_hidden_layers=10**9), r"backbone\.num_hidden_layers: 1000000000; at most"),
    "10^9 labels": (backbone(num_labels=10**9), r"backbone\.num_labels: 1000000000; at most"),
    "hidden size of 10^8": (backbone(hidden_size=10**8), WEIGHTS),
    "vocabulary of 10^9": (backbone(vocab_size=10**9), rf"{WEIGHTS} does not fit .*: backbone.*\[60, 32\]"),
    "10^9 positions": (backbone(max_position_embeddings=10**9), f"{WEIGHTS} does not fit|{NETWORK}"),
    "whole number of 400 digits": (backbone(hidden_size=10**400), r"backbone\.hidden_size: 1000"),
    "negative size": (backbone(intermediate_size=-1), rf"{NETWORK}: backbone and network"),
    "size as a text": (backbone(hidden_size="32"), f"{NETWORK}: backbone"),
    "activation that is none": (backbone(hidden_act="os.system"), f"{NETWORK}: backbone"),
    "labels as a text": (parts(labels="ab"), r"network\.labels: expected a list"),
    "no labels": (parts(labels=[]), f"{NETWORK}: "),
    "exits beyond": (parts(exits=[1, 2, 99]), f"{NETWORK}: backbone and network: ValueError"),
    "exits that fall": (parts(exits=[3, 1]), "exits must be ascending"),
    "exit as a text": (parts(exits=["3"]), r"network\.exits\[0\]: expected a whole number"),
    "policy that is none": (parts(policy="os.system"), "policy 'os.system'; choose one of"),
    "pooling that is none": (parts(pooling="os.system"), "pooling 'os.system'"),
    "head that is none": (parts(head="os.system"), "head 'os.system'"),
    "task that is none": (parts(task="os.system"), "task 'os.system'"),
    "unknown part": (parts(code="x"), r"network\.code: unknown key"),
    "dropout as a text": (parts(dropout="0.1"), r"network\.dropout: expected a number"),
    "dropout of 7": (parts(dropout=7.0), f"{NETWORK}: backbone and network: ValueError"),
    "no prefix": (without("text", "prefix"), r"text\.prefix: missing"),
    "padding beyond the vocabulary": (text(pad_id=10**30), r"text\.pad_id: |whole number"),
    "negative padding": (text(pad_id=-1), r"text\.pad_id: -1"),
    "longest input of 0": (text(longest=0), r"text\.longest: 0"),
    "longest input of 10^30": (text(longest=10**30), r"text\.longest: |whole number"),
    "network 10^5 deep": (
        file("network.json", b"[" * 10**5),
        f"{NETWORK}: not valid JSON: nested too deeply",
    ),
    "training 10^5 deep": (file("training.json", b'{"a":' * 10**5), "nested too deeply"),
    "network as a list": (file("network.json", b"[]"), "expected a JSON object"),
    "network of 5000 digits": (file("network.json", b"1" * 5000), f"{NETWORK}: not valid JSON"),
    "network that is not UTF-8": (file("network.json", b"\xff"), f"{NETWORK}: not valid JSON"),
    "weights that are empty": (file("weights.safetensors", b""), f"{WEIGHTS}: not safetensors"),
    "weights that are noise": (file("weights.safetensors", b"\xff" * 999), f"{WEIGHTS}: not safetensors"),
    "pickle for weights": (
        file("weights.safetensors", pickle.dumps({"a": 1})),
        f"{WEIGHTS}: not safetensors",
    ),
    "tensor that is missing": (
        weights(lambda t: t.pop(sorted(t)[0])),
        f"{WEIGHTS} .* is missing in the file",
    ),
    "tensor too many": (weights(lambda t: t.update(x=torch.zeros(1))), f"{WEIGHTS} .* missing"),
    "tensor of another shape": (
        weights(lambda t: t.update({sorted(t)[0]: torch.zeros(3)})),
        rf"{WEIGHTS} .* is \[3\] in the file",
    ),
    "tensor behind the end": (header(lambda v: first(v).update(data_offsets=[0, 2**40])), WEIGHTS),
    "tensor of 10^12 numbers": (header(lambda v: first(v).update(shape=[10**12])), WEIGHTS),
    "tensor of an unknown type": (header(lambda v: first(v).update(dtype="OBJECT")), WEIGHTS),
    "tokenizer that grows a text": (
        lambda folder: edit(
            folder / "tokenizer.json",
            lambda value: value.update(
                normalizer={"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10**6}
            ),
        ),
        f"{TOKENIZER}: not a tokenizer that can be used: .*times as long",
    ),
    "tokenizer with ids beyond": (
        lambda folder: edit(
            folder / "tokenizer.json", lambda value: value["model"]["vocab"].update(zzz=10**6)
        ),
        f"{TOKENIZER}: .* id 1000000 is beyond",
    ),
    "tokenizer that is noise": (file("tokenizer.json", b"\xff"), TOKENIZER),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_hostile_checkpoint_is_refused(name: str, saved: Path, tmp_path: Path) -> None:
    change, refusal = CHECKPOINTS[name]
    folder = shutil.copytree(saved, tmp_path / "ckpt")
    change(folder)
    with pytest.raises((BadCheckpoint, UnsupportedFamily), match=refusal) as caught:
        load_checkpoint(folder)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 900


@pytest.mark.parametrize(
    "file_name", ["weights.safetensors", "network.json", "training.json", "tokenizer.json"]
)
def test_cut_file_of_a_checkpoint_is_refused_or_whole(file_name: str, saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "ckpt")
    data = (folder / file_name).read_bytes()
    for length in sorted({0, 1, 7, 8, 9, len(data) // 3, len(data) // 2, len(data) - 2}):
        (folder / file_name).write_bytes(data[:length])
        with pytest.raises(BadCheckpoint):
            load_checkpoint(folder)


EXITS: dict[str, bytes | Callable[[dict[str, torch.Tensor]], object]] = {
    "noise": b"\xff" * 100,
    "nothing": b"",
    "name without a block": lambda t: t.update(exits=torch.zeros(1)),
    "block that is no number": lambda t: t.update({"exits.x.weight": torch.zeros(1)}),
    "block 10^9": lambda t: t.update({"exits.1000000000.weight": torch.zeros(1)}),
    "block 0": lambda t: t.update({"exits.0.weight": torch.zeros(1)}),
    "negative block": lambda t: t.update({"exits.-1.weight": torch.zeros(1)}),
    "part that is not known": lambda t: t.update({"code.1.weight": torch.zeros(1)}),
    "other shape": lambda t: t.update({"exits.1.weight": torch.zeros(1)}),
}


@pytest.mark.parametrize("name", EXITS)
def test_hostile_exits_of_a_language_model_are_refused(name: str, tmp_path: Path) -> None:
    network = DecoderNetwork(tiny.decoder("llama"))
    network.add_exits((1, 2))
    save_exits(network, tmp_path)
    exits = tmp_path / "exits.safetensors"
    change = EXITS[name]
    if isinstance(change, bytes):
        exits.write_bytes(change)
    else:
        tensors = {key: value.clone() for key, value in load_file(exits).items()}
        change(tensors)
        save_file(tensors, exits)
    with pytest.raises(BadCheckpoint, match=r"exits\.safetensors does not fit the model beside it"):
        load_exits(DecoderNetwork(tiny.decoder("llama")), tmp_path)


DATA: dict[str, tuple[str, bytes]] = {
    "lists 10^5 deep": ("a.jsonl", b'{"text": "x", "a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}\n"),
    "objects 10^5 deep": (
        "a.jsonl",
        b'{"text": "x", "a": ' + b'{"a":' * 10**5 + b"1" + b"}" * 10**5 + b"}\n",
    ),
    "lists 10^5 deep in one value": ("a.json", b"[\n" * 10**5 + b"]\n" * 10**5),
    "objects 10^5 deep without an end": ("a.json", b'{"text":\n' * 10**5),
    "whole number of 5000 digits": ("a.jsonl", b'{"text": "x", "label": 1' + b"0" * 5000 + b"}\n"),
    "half of a surrogate pair": ("a.jsonl", b'{"text": "\\ud800", "label": 0}\n{"text": "b", "label": 1}\n'),
    "bytes that are not UTF-8": ("a.jsonl", b'{"text": "\xff"}\n'),
    "archive": ("a.csv", b"PK\x03\x04" + bytes(100)),
    "gzip that is cut": ("a.jsonl.gz", b"\x1f\x8b\x08" + bytes(20)),
    "parquet that is noise": ("a.parquet", b"PAR1" + b"\xff" * 100 + b"PAR1"),
    "nothing": ("a.jsonl", b""),
}


@pytest.mark.parametrize("name", DATA)
def test_hostile_data_is_refused(name: str, tmp_path: Path) -> None:
    file_name, data = DATA[name]
    (tmp_path / file_name).write_bytes(data)
    with pytest.raises(BadData, match=file_name) as caught:
        load_data(str(tmp_path / file_name), Columns())
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.skipif(os.name != "posix", reason="pipes with names")
def test_pipe_for_data_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(BadData, match=r"a\.jsonl"):
        load_data(str(tmp_path / "a.jsonl"), Columns())
