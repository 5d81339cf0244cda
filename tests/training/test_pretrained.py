"""Folders whose weights are not all of one model of the right kind are refused, not filled at random."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from chat_folders import edit_json
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig

from offramp.export.cli import main as split
from offramp.export.decoder import open_decoder, stop_ids
from offramp.runtime.inputs.tokenizer_checks import check_tokenizer
from offramp.training.decoder import load_decoder
from offramp.training.options import BadModel
from offramp.training.user_model import load_user_model

Weights = dict[str, torch.Tensor]


def language_model(folder: Path, family: str = "qwen3", **generation: Any) -> Path:
    """A language model as transformers saves it; qwen3 has a head of its own, llama shares its embeddings."""
    model = tiny.decoder(family)
    for name, value in {
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **generation,
    }.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(folder)
    tiny.hub_tokenizer().save_pretrained(folder)
    return folder


def edit_weights(folder: Path, change: Callable[[Weights], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.slow
def test_whole_language_model_is_opened(tmp_path: Path) -> None:
    for family in ("qwen3", "llama", "gpt2"):  # those of llama and gpt2 share the head with the embeddings
        folder = language_model(tmp_path / family, family)
        assert open_decoder(folder).network.block_count == 3
        assert load_decoder(str(folder))[0].block_count == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("lm_head.weight"), "the files have no lm_head.weight, which Qwen3ForCausalLM needs"),
        (lambda w: w.pop("model.norm.weight"), "the files have no model.norm.weight"),
        (
            lambda w: [w.pop(name) for name in list(w) if ".layers.2." in name],
            r"no model.layers.2.input_layernorm.weight and \d+ other weights",
        ),
        (
            lambda w: w.update({f"model.layers.3.{n}": torch.ones(2) for n in "ab"}),
            "the files hold model.layers.3.a and 1 other weights, which Qwen3ForCausalLM with this config",
        ),
        (lambda w: w.update(score=torch.ones(2, 32)), "the files hold score, which"),
        (
            lambda w: w.update({"lm_head.weight": torch.ones(60, 16)}),
            r"lm_head.weight is \[60, 16\] in the files, and \[60, 32\] by config.json",
        ),
    ],
    ids=["head", "norm", "block", "fourth block", "classifier", "sizes"],
)
def test_weights_that_are_missing_or_left_over_are_named(
    change: Callable[[Weights], object], message: str, tmp_path: Path
) -> None:
    folder = language_model(tmp_path / "model")
    edit_weights(folder, change)
    with pytest.raises(ValueError, match=message):
        open_decoder(folder)
    with pytest.raises(BadModel, match=message):
        load_decoder(str(folder))


def test_classifier_is_no_language_model_even_if_its_head_needs_no_weights(tmp_path: Path) -> None:
    config = LlamaConfig(**tiny.DECODER_SIZES, tie_word_embeddings=True, pad_token_id=0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tiny.hub_tokenizer().save_pretrained(tmp_path)
    message = r"LlamaForSequenceClassification is no causal language model; expected LlamaForCausalLM"
    with pytest.raises(ValueError, match=message):
        open_decoder(tmp_path)
    with pytest.raises(BadModel, match=message):
        load_decoder(str(tmp_path))
    edit_json(tmp_path / "config.json", architectures=None)
    with pytest.raises(ValueError, match=r"the files hold score\.weight"):
        open_decoder(tmp_path)


def test_language_model_is_no_encoder(tmp_path: Path) -> None:
    folder = language_model(tmp_path / "model")
    with pytest.raises(BadModel, match=r"a qwen3 model is a language model, and this recipe is for encoders"):
        load_user_model(str(folder), 0)


def test_adapter_is_refused_with_the_way_to_merge_it(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "somewhere"}))
    message = r"the folder holds an adapter \(LoRA\), no whole model; merge it into its model first"
    with pytest.raises(BadModel, match=message):
        load_decoder(str(tmp_path))
    with pytest.raises(BadModel, match=message):
        load_user_model(str(tmp_path), 0)
    for has_config in (False, True):
        if has_config:
            language_model(tmp_path)
        result = CliRunner().invoke(split, [str(tmp_path), "--out", str(tmp_path / "bundle")])
        assert result.exit_code == 2 and "merge_and_unload" in result.stderr, result.stderr
        assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.pop("bert.encoder.layer.1.output.dense.weight"),
            "no bert.encoder.layer.1.output.dense.weight",
        ),
        (
            lambda w: w.update({"bert.encoder.layer.3.a": torch.ones(2)}),
            "the files hold bert.encoder.layer.3.a",
        ),
    ],
    ids=["missing", "left over"],
)
def test_classifier_with_another_backbone_than_its_configuration_is_refused(
    change: Callable[[Weights], object], message: str, tmp_path: Path
) -> None:
    folder = tiny.classifier_folder(tmp_path / "model")
    assert load_user_model(str(folder), 0).head is not None
    edit_weights(folder, change)
    with pytest.raises(BadModel, match=message):
        load_user_model(str(folder), 0)


def test_backbone_without_its_weights_is_refused(tmp_path: Path) -> None:
    folder = tiny.model_folder(tmp_path / "model")
    edit_weights(folder, lambda w: [w.pop(name) for name in list(w) if name.startswith("pooler")])
    load_user_model(str(folder), 0)  # poolers are learned anew
    edit_weights(folder, lambda w: [w.pop(name) for name in list(w) if name.startswith("encoder.layer.1.")])
    with pytest.raises(BadModel, match=r"the files have no encoder\.layer\.1\..* and \d+ other weights"):
        load_user_model(str(folder), 0)


@pytest.mark.parametrize("place", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("several", [False, True])
def test_answers_end_where_those_of_transformers_do(place: str, several: bool, tmp_path: Path) -> None:
    folder = language_model(tmp_path / "model")
    prompt = torch.tensor([[5, 9, 30]])
    answer = (
        open_decoder(folder).network.model.generate(prompt, max_new_tokens=9, do_sample=False)[0, 3:].tolist()
    )
    end = answer[4]
    ends = [59, end] if several else end
    if place == "config.json":
        (folder / "generation_config.json").unlink()
    edit_json(folder / place, eos_token_id=ends)
    network = open_decoder(folder).network
    stopped = network.model.generate(prompt, max_new_tokens=9, do_sample=False)[0, 3:].tolist()
    assert stopped == answer[: answer.index(end) + 1] and len(stopped) < 9
    assert stop_ids(network) == ((59, end) if several else (end,))


def test_ends_and_padding_outside_the_vocabulary_are_none(tmp_path: Path) -> None:
    """As for transformers, which never meets them: a configuration of -1, or of another vocabulary."""
    folder = language_model(tmp_path / "model")
    edit_json(folder / "generation_config.json", eos_token_id=[60, -1, 3], pad_token_id=-1)
    source = open_decoder(folder)
    facts = source.facts(source.split("2"), ("fp32",))
    assert facts.stop_ids == (3,) and facts.input.pad_id == 0  # type: ignore[union-attr]
    assert facts.provenance["special_tokens"] == {"eos_token": "[SEP]", "pad_token": "[PAD]"}


def test_tokenizer_that_ee_run_refuses_is_refused_before_the_weights_are_read(tmp_path: Path) -> None:
    folder = language_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    value = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    value["model"]["vocab"]["beyond"] = 60
    (folder / "tokenizer.json").write_text(json.dumps(value))
    with pytest.raises(
        ValueError, match=r"tokenizer.json: no tokenizer that ee-run reads: .*id 60 is beyond"
    ):
        open_decoder(folder)


def test_an_added_token_without_an_embedding_is_left_out_of_the_bundle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the image token of Gemma 3 of 1B, or a padding token for which nobody resized the embeddings."""
    folder = language_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<{number}>" for number in range(len(tokenizer), 60)])
    tokenizer.save_pretrained(folder)
    before = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert before.token_to_id("<59>") == 59
    tokenizer.add_special_tokens({"pad_token": "<pad 60>"})
    tokenizer.save_pretrained(folder)
    content = open_decoder(folder).files["tokenizer.json"]
    assert "none for the added token '<pad 60>'; the bundle leaves it out" in capsys.readouterr().err
    assert isinstance(content, bytes)
    check_tokenizer(content.decode("utf-8"), 60)
    read = Tokenizer.from_str(content.decode("utf-8"))
    for text in ("wafer [SEP] a <59>", "a <pad 60> b"):
        assert read.encode(text).ids == before.encode(text).ids
