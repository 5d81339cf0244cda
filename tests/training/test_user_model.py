"""Fine-tuned models as people have them: read with the answers of transformers, or refused with the cure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from chat_folders import edit_json
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from offramp.models.tasks import EMBEDDING, REGRESSION
from offramp.training.cli import train
from offramp.training.options import BadModel
from offramp.training.user_model import load_user_model, own_task, sentence_pooling


def classifier(folder: Path, labels: tuple[str, ...] = ("bad", "good"), **facts: Any) -> str:
    """A folder of a classifier of transformers, with other facts in its config.json."""
    tiny.classifier_folder(folder, labels=labels)
    edit_json(folder / "config.json", **facts)
    return str(folder)


NAMES: dict[str, tuple[dict[str, Any], str]] = {
    "from 1": (
        {"1": "a", "2": "b", "3": "c"},
        r"id2label: the outputs \[1, 2, 3\] have names; number them from 0",
    ),
    "with a gap": ({"0": "a", "1": "b", "3": "c"}, r"id2label: the outputs \[0, 1, 3\] have names"),
    "twice": ({"0": "a", "1": "b", "2": "a"}, "id2label: output 2 has the name 'a' of another one"),
    "empty": ({"0": "a", "1": "", "2": "c"}, "id2label: output 1 has no name"),
    "of more outputs": (
        {str(n): str(n) for n in range(5)},
        r"classifier\.bias is \[3\] in the files, and \[5\]",
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_that_do_not_fit_the_outputs_are_refused(name: str, tmp_path: Path) -> None:
    labels, message = NAMES[name]
    model = classifier(tmp_path / "model", ("a", "b", "c"), id2label=labels, label2id=None)
    with pytest.raises(BadModel, match=message):
        load_user_model(model, 0)


def test_a_regression_of_several_values_is_refused(tmp_path: Path) -> None:
    model = classifier(tmp_path / "model", ("a", "b", "c"), problem_type="regression")
    with pytest.raises(BadModel, match="only one value for each row is supported"):
        load_user_model(model, 0, REGRESSION)


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "causal mask": ({"is_decoder": True}, r"config\.json\.is_decoder: tokens of this model read only those"),
    "kernel": ({"attn_implementation": "flash_attention_2"}, "supported are eager and sdpa; take it out"),
    "quantized": ({"quantization_config": {"quant_method": "gptq"}}, "as it was before it was quantized"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_with_other_answers_are_refused(name: str, tmp_path: Path) -> None:
    facts, message = SETTINGS[name]
    with pytest.raises(BadModel, match=message):
        load_user_model(classifier(tmp_path / "model", **facts), 0)


def test_feed_forward_layers_that_read_texts_in_parts_read_them_whole(tmp_path: Path) -> None:
    user = load_user_model(classifier(tmp_path / "model", chunk_size_feed_forward=4), 0)
    assert {getattr(part, "chunk_size_feed_forward", 0) for part in user.backbone.modules()} == {0}
    assert user.backbone.config.chunk_size_feed_forward == 0  # also in the checkpoint, which ee-split loads


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
@pytest.mark.parametrize("head", [True, False])
def test_weights_of_a_wrapped_model_are_named_with_the_cure(prefix: str, head: bool, tmp_path: Path) -> None:
    model = Path(classifier(tmp_path / "model")) if head else tiny.model_folder(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    save_file({prefix + name: value for name, value in weights.items()}, model / "model.safetensors")
    with pytest.raises(BadModel, match=rf"begin with '{prefix}'.*model\.{prefix}save_pretrained"):
        load_user_model(str(model), 0)


def test_a_folder_of_pickles_is_named_with_the_cure(tmp_path: Path) -> None:
    model = Path(classifier(tmp_path / "model"))
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    for name in ("optimizer.bin", "training_args.bin"):  # of transformers' Trainer, no weights
        (model / name).touch()
    with pytest.raises(BadModel, match=r"holds pytorch_model\.bin alone.*then save_pretrained\(FOLDER\)"):
        load_user_model(str(model), 0)
    (model / "pytorch_model.bin").unlink()
    with pytest.raises(BadModel, match="the folder holds no weights"):
        load_user_model(str(model), 0)


@pytest.mark.parametrize(
    ("content", "cure"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "run git lfs pull"),
        (b"\x02\0\0\0\0\0\0\0{", "copy or save the model again"),
    ],
    ids=["pointer", "cut"],
)
def test_a_file_of_weights_that_is_not_whole_is_named(content: bytes, cure: str, tmp_path: Path) -> None:
    model = Path(classifier(tmp_path / "model"))
    (model / "model.safetensors").write_bytes(content)
    with pytest.raises(BadModel, match=rf"model\.safetensors is not a complete safetensors file .*{cure}"):
        load_user_model(str(model), 0)


def test_only_files_that_are_read_are_checked(tmp_path: Path) -> None:
    model = Path(classifier(tmp_path / "model"))
    for name in ("adapter_old.safetensors", "model-00001-of-00002.safetensors"):
        (model / name).write_bytes(b"cut")
    assert load_user_model(str(model), 0).head is not None
    (model / "model.safetensors").unlink()
    with pytest.raises(BadModel, match=r"model-00001-of-00002\.safetensors is not a complete"):
        load_user_model(str(model), 0)


def test_a_folder_that_lacks_a_part_of_its_weights_is_not_asked_of_the_hub(tmp_path: Path) -> None:
    model = Path(classifier(tmp_path / "model"))
    (model / "model.safetensors").rename(model / "other.safetensors")
    with pytest.raises(BadModel, match=r"it cannot be loaded: .*model\.safetensors"):
        load_user_model(str(model), 0)


def test_a_folder_of_checkpoints_names_those_in_it(tmp_path: Path) -> None:
    classifier(tmp_path / "run" / "checkpoint-500")
    (tmp_path / "traffic.txt").write_text("a film\n" * 8)
    words = ["--model", str(tmp_path / "run"), "--data", str(tmp_path / "traffic.txt")]
    done = CliRunner().invoke(train, [*words, "--out", str(tmp_path / "ckpt")])
    assert done.exit_code == 2
    assert "no config.json with a model_type; name the one in it that is meant: checkpoint-500" in done.output


def test_a_model_that_cannot_be_read_has_no_task(tmp_path: Path) -> None:
    with pytest.raises(BadModel, match="neither a model folder here nor given by the hub"):
        own_task(str(tmp_path / "nowhere"))


def test_a_head_that_the_configuration_does_not_name_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load_user_model(classifier(tmp_path / "model", architectures=["MyClassifier"]), 0)
    assert "the files hold classifier.bias, a head that is not read: config.json.architectures is" in (
        capsys.readouterr().err
    )


def sentence_model(folder: Path, pooling: dict[str, Any], **files: dict[str, Any]) -> str:
    """A folder of sentence-transformers; files: contents of further files by their names without ending."""
    tiny.model_folder(folder)
    modules = [
        {"type": f"models.{kind}", "path": path} for kind, path in (("Transformer", ""), ("Pooling", "1"))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1").mkdir()
    (folder / "1" / "config.json").write_text(json.dumps(pooling))
    for name, facts in files.items():
        (folder / f"{name}.json").write_text(json.dumps(facts))
    return str(folder)


MEAN = {"pooling_mode_mean_tokens": True}


def test_two_poolings_side_by_side_are_refused(tmp_path: Path) -> None:
    model = sentence_model(tmp_path / "model", MEAN | {"pooling_mode_cls_token": True})
    with pytest.raises(
        BadModel, match=r"1/config\.json: pooling \['pooling_mode_cls_token', 'pooling_mode_mean"
    ):
        sentence_pooling(model)


@pytest.mark.parametrize(("mode", "reads"), [("mean", "mean"), ("cls", "first")])
def test_a_pooling_by_one_name_is_read(mode: str, reads: str, tmp_path: Path) -> None:
    model = sentence_model(tmp_path / "model", {"pooling_mode": mode, "include_prompt": True})
    assert sentence_pooling(model) == (reads, False)


def test_small_letters_that_the_tokenizer_does_not_make_are_refused(tmp_path: Path) -> None:
    model = sentence_model(tmp_path / "model", MEAN, sentence_bert_config={"do_lower_case": True})
    assert load_user_model(model, 0, EMBEDDING).head is not None  # the tokenizer makes them
    edit_json(Path(model) / "tokenizer.json", normalizer=None)
    with pytest.raises(BadModel, match=r"do_lower_case: its tokenizer keeps capital letters"):
        load_user_model(model, 0, EMBEDDING)


@pytest.mark.parametrize(
    ("file", "facts", "option"),
    [
        ("sentence_bert_config", {"max_seq_length": 16}, "--max-length 16 does the same"),
        (
            "config_sentence_transformers",
            {"prompts": {"query": "query: "}, "default_prompt_name": "query"},
            "--prefix 'query: ' does the same",
        ),
    ],
)
def test_what_sentence_transformers_does_to_a_text_is_reported_with_its_option(
    file: str, facts: dict[str, Any], option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence_pooling(sentence_model(tmp_path / "model", MEAN, **{file: facts}))
    assert option in capsys.readouterr().err


PROMPT = {"prompts": {"query": "query: ", "document": ""}, "default_prompt_name": "query"}


def test_a_prompt_that_the_mean_leaves_out_is_refused(tmp_path: Path) -> None:
    model = sentence_model(
        tmp_path / "model", MEAN | {"include_prompt": False}, config_sentence_transformers=PROMPT
    )
    with pytest.raises(BadModel, match=r"'query: ' .* leaves it out of the mean \(include_prompt: false"):
        sentence_pooling(model)
    edit_json(Path(model) / "config_sentence_transformers.json", default_prompt_name=None)
    assert sentence_pooling(model) == ("mean", False)


def test_the_first_token_reads_a_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pooling = {"pooling_mode_cls_token": True, "include_prompt": False}
    model = sentence_model(tmp_path / "model", pooling, config_sentence_transformers=PROMPT)
    assert sentence_pooling(model) == ("first", False)
    assert "--prefix 'query: ' does the same" in capsys.readouterr().err


def test_an_empty_prompt_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = PROMPT | {"default_prompt_name": "document"}
    sentence_pooling(sentence_model(tmp_path / "model", MEAN, config_sentence_transformers=facts))
    assert capsys.readouterr().err == ""
