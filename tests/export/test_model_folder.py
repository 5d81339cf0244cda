"""Folders of which a bundle could not answer as transformers does are refused, or the user is told."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from chat_folders import edit_json
from click.testing import CliRunner
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
)

from offramp.export.cli import main as split
from offramp.export.decoder import open_decoder

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "decoders.md"
VISION = {"model_type": "siglip_vision_model", "image_size": 16, "patch_size": 8, "num_hidden_layers": 1}


def saved(model: Any, folder: Path) -> Path:
    """A folder as users save it; no token ends answers."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, None)
    model.save_pretrained(folder)
    tiny.hub_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tiny.decoder("qwen3"), tmp_path / "model")


def notes(folder: Path, capfd: pytest.CaptureFixture[str]) -> list[str]:
    """What open_decoder says of a folder."""
    capfd.readouterr()
    open_decoder(folder, portable=True)
    return [line for line in capfd.readouterr().err.splitlines() if line.startswith(f"{folder}: ")]


@pytest.mark.slow
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_a_setting_that_changes_greedy_answers_is_named(
    file: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if file == "config.json":
        (folder / "generation_config.json").unlink()
    neutral = {"no_repeat_ngram_size": 0, "num_beams": 1, "suppress_tokens": [], "do_sample": True}
    edit_json(folder / file, **neutral, guidance_scale=1.0, temperature=0.6, repetition_penalty=1.3)
    (note,) = notes(folder, capfd)
    assert f"{file} sets repetition_penalty 1.3, by which transformers.generate gives other answers" in note


@pytest.mark.slow
def test_the_cure_of_a_repetition_penalty_is_the_option_of_ee_run(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    edit_json(folder / "generation_config.json", repetition_penalty=1.3, suppress_tokens=[5])
    (note,) = notes(folder, capfd)
    assert "suppress_tokens [5]" in note and note.endswith("ee-run --repetition-penalty 1.3")


def test_a_generation_config_that_transformers_would_drop_is_refused(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": 3,')
    with pytest.raises(ValueError, match=r"generation_config\.json: no JSON: .*copy it again, or remove it"):
        open_decoder(folder)


def test_an_end_that_is_no_id_is_refused(folder: Path) -> None:
    edit_json(folder / "generation_config.json", eos_token_id=[3, "</s>"])
    with pytest.raises(ValueError, match=r"generation_config\.json\.eos_token_id: '</s>' is no id"):
        open_decoder(folder)


def test_a_window_that_only_the_cache_of_transformers_reads_is_refused(tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**tiny.DECODER_SIZES, sliding_window=5))
    folder = saved(model, tmp_path / "model")
    with pytest.raises(ValueError, match=r"sliding_window: block 1 of LlamaForCausalLM attends to 64 tokens"):
        open_decoder(folder)


@pytest.mark.parametrize(
    ("window", "message"),
    [(-1, "-1; expected 1 or more, or null"), ("9", "makes no cache for it: .*sliding_w")],
)
def test_a_window_that_no_cache_can_have_is_refused(window: Any, message: str, tmp_path: Path) -> None:
    folder = saved(LlamaForCausalLM(LlamaConfig(**tiny.DECODER_SIZES)), tmp_path / "model")
    edit_json(folder / "config.json", sliding_window=window)
    with pytest.raises(ValueError, match=message):
        open_decoder(folder)


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of Gemma 3 with its tower for images."""
    text = tiny.DECODER_SIZES | {"head_dim": 16, "sliding_window": 5}
    config = Gemma3Config(
        text_config=text,
        vision_config=VISION | {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2},
        mm_tokens_per_image=4,
        image_token_index=57,
        boi_token_index=58,
        eoi_token_index=59,
    )
    torch.manual_seed(0)
    return saved(Gemma3ForConditionalGeneration(config), tmp_path_factory.mktemp("seeing") / "model")


@pytest.mark.slow
def test_a_model_of_images_and_text_is_refused_with_the_part_that_can_be_split(seeing: Path) -> None:
    with pytest.raises(ValueError, match=r"'gemma3' is more .* \(gemma3_text\) alone .*docs/decoders\.md"):
        open_decoder(seeing)


@pytest.mark.slow
def test_the_language_model_that_the_document_saves_answers_as_the_whole_does(
    seeing: Path, tmp_path: Path
) -> None:
    (code,) = re.findall(
        r"```python\n([^`]*AutoModelForImageTextToText[^`]*)```", DOCUMENT.read_text("utf-8")
    )
    exec(code.replace('"model/"', repr(str(seeing))).replace('"text/"', repr(str(tmp_path / "text"))), {})
    ids = torch.tensor([[5, 9, 30]])
    models = (
        open_decoder(tmp_path / "text").network.model,
        AutoModelForImageTextToText.from_pretrained(seeing),
    )
    assert torch.equal(*(model.generate(ids, max_new_tokens=12, do_sample=False) for model in models))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("meta-llama/Llama-3.2-1B", "hf download meta-llama/Llama-3.2-1B --local-dir FOLDER"),
        ("model.gguf", "model.gguf: a file; give a folder that ee-train wrote"),
        ("empty", "empty: neither network.json nor config.json is in it; give a folder that ee-train wrote"),
    ],
)
def test_what_is_no_folder_of_a_model_is_refused_with_what_is(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "empty").mkdir()
    done = CliRunner().invoke(split, [name])
    assert done.exit_code == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_a_language_model_without_an_adapter_is_told_which_have_one(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(values | {"model_type": "qwen3_moe"}))
    with pytest.raises(
        ValueError, match=r"'qwen3_moe'; .*language models, for ee-split: gemma2, gemma3_text"
    ):
        open_decoder(folder)
