"""A bundle is opened as ee-run opens it before it gets its name, and what is not expected of it is said."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_folders import BARE, CHATML, FORMS, TOKENS, chat_folder, edit_json, text_tokenizer
from click.testing import CliRunner, Result
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from offramp.export import bundle
from offramp.export.cli import main
from offramp.export.segments import Segment
from offramp.runtime import load_generator

pytestmark = pytest.mark.slow

SIZES: dict[str, int] = {
    "vocab_size": text_tokenizer().get_vocab_size(),
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
}
END = TOKENS.index("<|im_end|>")
MESSAGES = [{"role": "user", "content": "How was the film?"}]


def model_folder(folder: Path, template: Any, tokens: dict[str, str], **generation: Any) -> Path:
    """A language model of one block with a chat template; the same weights each time."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))  # type: ignore[arg-type]
    model.generation_config.bos_token_id = model.generation_config.eos_token_id = None
    for name, value in generation.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(folder)
    return chat_folder(folder, template, tokens)


def run(model: Path, out: Path) -> Result:
    words = [str(model), "--out", str(out), "--variants", "fp32", "--segments", "1"]
    return CliRunner().invoke(main, words)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Result]:
    """A model with everything in its place, its bundle, and what ee-split wrote."""
    folder = tmp_path_factory.mktemp("first")
    model = model_folder(folder / "model", *FORMS["llama3"], eos_token_id=TOKENS.index("<|eot|>"))
    return model, folder / "bundle", run(model, folder / "bundle")


@pytest.fixture
def copied(first: tuple[Path, Path, Result], monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter is replaced by a copy of the same network's graphs."""

    def copy(segment: Segment, path: Path) -> None:
        shutil.copyfile(first[1] / f"{segment.name}.onnx", path)

    monkeypatch.setattr(bundle, "to_onnx", copy)


def test_a_bundle_has_the_chat_of_its_model(first: tuple[Path, Path, Result]) -> None:
    model, folder, result = first
    assert result.exit_code == 0, result.output
    right = AutoTokenizer.from_pretrained(model).apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_dict=False
    )
    with load_generator(folder) as session:
        assert session.encode_prompt(MESSAGES) == right
        assert session.stop_ids == {TOKENS.index("<|eot|>")}
    assert right[0] == TOKENS.index("<|begin|>")
    assert f"{folder}: " not in result.stderr  # no note


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        (None, ["no token ends an answer", "ends turns with '<|im_end|>', at which answers do not end"]),
        ([5], [f"add its id {END} to eos_token_id in generation_config.json"]),
        ([5, END], []),
    ],
    ids=["none", "another", "right"],
)
def test_turns_that_do_not_end_answers_are_said(
    copied: None, ends: Any, expected: list[str], tmp_path: Path
) -> None:
    model = model_folder(tmp_path / "model", CHATML, {"eos_token": "<|im_end|>"}, eos_token_id=ends)
    result = run(model, tmp_path / "bundle")
    assert result.exit_code == 0, result.output
    notes = [line for line in result.stderr.splitlines() if line.startswith(str(tmp_path / "bundle"))]
    assert len(notes) == len(expected)
    assert all(part in note for part, note in zip(expected, notes, strict=True))


@pytest.mark.parametrize("name", ["default", "tool_use"])
def test_template_that_ee_run_cannot_compile_is_no_bundle(copied: None, name: str, tmp_path: Path) -> None:
    model = model_folder(tmp_path / "model", {"default": BARE, name: "{% for %}"}, {})
    result = run(model, tmp_path / "bundle")
    assert result.exit_code == 1 and "not a chat template: " in result.stderr
    assert "no bundle was written" in result.stderr and not (tmp_path / "bundle").exists()


def test_template_of_known_name_is_written_and_listed(copied: None, tmp_path: Path) -> None:
    model = model_folder(tmp_path / "model", {"default": BARE, "tool_use": CHATML}, {})
    assert run(model, tmp_path / "bundle").exit_code == 0
    with load_generator(tmp_path / "bundle") as session:
        assert session.templates == ("default", "tool_use")
        assert "chat_template_tool_use.jinja" in session.manifest.files
        tools = {"tools": [{"name": "t"}]}
        with_tools = session.encode_prompt(MESSAGES, template_arguments=tools)
        assert (
            with_tools
            == session.encode_prompt(MESSAGES, template="tool_use")
            != session.encode_prompt(MESSAGES)
        )


def test_graph_that_ee_run_refuses_is_no_bundle(
    first: tuple[Path, Path, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph of the head computes the same with an input of another name."""
    import onnx

    graph = onnx.load(first[1] / "head.onnx")
    (read,) = graph.graph.input

    def copy(segment: Segment, path: Path) -> None:
        shutil.copyfile(first[1] / f"{segment.name}.onnx", path)
        if segment.name == "head":
            onnx.save(graph, path)

    for node in graph.graph.node:
        node.input[:] = ["other" if name == read.name else name for name in node.input]
    read.name = "other"
    monkeypatch.setattr(bundle, "to_onnx", copy)
    monkeypatch.setattr(bundle, "verify", lambda *_: type("Report", (), {"require_good": lambda _: None})())
    result = run(first[0], tmp_path / "bundle")
    assert result.exit_code == 1 and "inputs ['other'], the manifest has ['hidden']" in result.stderr
    assert not (tmp_path / "bundle").exists()


def test_adapter_of_a_family_that_differs_from_transformers_is_found(
    copied: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits are compared with those of transformers itself, not of the adapter."""
    model = model_folder(tmp_path / "model", BARE, {})
    forward = LlamaForCausalLM.forward

    def scaled(self: Any, *args: Any, **options: Any) -> Any:
        output = forward(self, *args, **options)
        output.logits = output.logits * 1.5
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", scaled)
    result = run(model, tmp_path / "bundle")
    assert result.exit_code == 1 and "head, tensor logits" in result.stderr


def test_no_end_is_named_for_a_model_without_template(copied: None, tmp_path: Path) -> None:
    model = model_folder(tmp_path / "model", None, {})
    edit_json(model / "generation_config.json", eos_token_id=END)
    result = run(model, tmp_path / "bundle")
    assert result.exit_code == 0 and str(tmp_path / "bundle:") not in result.stderr
