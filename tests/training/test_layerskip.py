"""layerskip: blocks drop out by depth, exits learn what the last block says, and ee-train writes a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from offramp.export.cli import main as split
from offramp.models.decoder import DecoderNetwork
from offramp.runtime.bundle.files import open_bundle
from offramp.training.allocator import keep_large_blocks
from offramp.training.checkpoint import BadCheckpoint, load_exits, save_exits
from offramp.training.cli import train
from offramp.training.decoders import load_decoder
from offramp.training.loop import Run
from offramp.training.prepare import BadModel
from offramp.training.recipes import layerskip
from offramp.training.recipes.layerskip import LayerSkip, drops, enabled
from offramp.training.rows import BadData
from offramp.training.texts import IGNORED, Texts, load_texts

SENTENCES = ["the film was good and warm", "a bad scene is not very good at all", "the plot is quite dull"]


def test_deep_blocks_drop_out_more() -> None:
    torch.manual_seed(0)
    hidden, passed = torch.zeros(4000, 3, 1), []
    for _ in range(2):
        decide = drops(4000, 5, 0.4, torch.device("cpu"))
        shares = [decide(block, hidden) for block in range(5)]
        passed.append([0.0 if share is None else 1 - float(share[:, 0].mean()) for share in shares])
        for share in shares[1:]:
            assert share is not None and (share[:, :1] == share).all()  # a row as a whole
    wanted = [0.4 * (2 ** (block / 4) - 1) for block in range(5)]
    for found in passed:
        assert found == pytest.approx(wanted, abs=0.03)
    assert all(drops(3, 5, 0.0, torch.device("cpu"))(block, hidden[:3]) is None for block in range(5))


def test_curricula() -> None:
    exits = [4, 8, 12]
    assert [enabled(exits, "rotational", step, 9) for step in range(4)] == [[4], [8], [12], [4]]
    assert enabled(exits, "all", 0, 9) == exits and enabled([], "rotational", 3, 9) == []
    grown = [enabled(exits, "gradual", step, 12) for step in range(12)]
    assert grown[0] == [12] and grown[2] == [8, 12] and grown[5:] == [exits] * 7


def test_settings_that_cannot_be() -> None:
    for wish in ({"dropout": 1.0}, {"scale": 0.0}, {"curriculum": "none"}, {"target": "luck"}, {"lr": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wish))):
            LayerSkip(**wish)  # type: ignore[arg-type]


def test_a_batch_with_nothing_to_learn_teaches_nothing(tmp_path: Path) -> None:
    """A prompt that is as long as its row: its loss is 0 and no number of the network becomes NaN."""
    network = DecoderNetwork(tiny.decoder("llama"))
    run = Run(network, tmp_path, seed=0)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    rows = Texts([[5, 6, 7, 8]] * 2, [4, 4])
    assert (rows.batch([0, 1])[1] == IGNORED).all()
    layerskip.train(run, {"train": rows}, (1, 3), LayerSkip(batch_size=2, dropout=0.0))
    for name, value in network.state_dict().items():
        assert torch.isfinite(value).all() and torch.allclose(value, before[name], atol=1e-3)


# --- texts ---


def tokenizer() -> PreTrainedTokenizerFast:
    """A word a token, [SEP] ends texts."""
    return PreTrainedTokenizerFast(tokenizer_object=tiny.tokenizer(), eos_token="[SEP]", pad_token="[PAD]")


def written(folder: Path, *rows: Any, split_: str = "train") -> str:
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / f"{split_}.jsonl").write_text(lines, encoding="utf-8")
    return str(folder)


def test_of_pairs_completions_are_learned(tmp_path: Path) -> None:
    first, second = {"prompt": "the film was", "completion": "good"}, {"prompt": "", "completion": "a plot"}
    source = written(tmp_path, first, second)
    rows = load_texts(source, tokenizer(), 9)["train"]
    ids = {word: tokenizer().convert_tokens_to_ids(word) for word in (*tiny.WORDS,)}
    assert rows.ids == [
        [ids[word] for word in ("the", "film", "was", "good", "[SEP]")],
        [ids[word] for word in ("a", "plot", "[SEP]")],
    ]
    given, following = rows.batch([0, 1])
    assert following[0].tolist() == [IGNORED, IGNORED, ids["good"], ids["[SEP]"], IGNORED]
    assert following[1].tolist() == [ids["plot"], ids["[SEP]"], IGNORED, IGNORED, IGNORED]
    assert given[1].tolist()[3:] == [0, 0] and rows.lengths.tolist() == [5, 3]
    short = load_texts(source, tokenizer(), 4)["train"]
    assert short.ids[0] == [ids[word] for word in ("film", "was", "good", "[SEP]")]  # a prompt's end stays


def test_texts_stand_one_after_another(tmp_path: Path) -> None:
    source = written(tmp_path, {"text": "the film\u2028was good"}, {"text": "a plot"})
    rows = load_texts(source, tokenizer(), 4)["train"]
    assert [len(row) for row in rows.ids] == [4, 4] and rows.starts == [1, 1]
    end = tokenizer().eos_token_id
    assert sum(row.count(end) for row in rows.ids) == 2 and rows.ids[1][0] == end


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a", "completion": "the film was good"}, "row 1: the completion has 5 tokens, rows 4"),
        ({"prompt": 3, "completion": "the"}, "row 1: column 'prompt' must be a text, found 3"),
        ({"words": "the"}, "neither 'text' nor prompt and completion, but words"),
        ({"text": ""}, "no text in it"),
    ],
)
def test_texts_that_cannot_be(tmp_path: Path, row: Any, said: str) -> None:
    with pytest.raises(BadData, match=said):
        load_texts(written(tmp_path, row), tokenizer(), 4)


# --- exits beside a model ---


def test_exits_come_back(tmp_path: Path) -> None:
    network = DecoderNetwork(tiny.decoder("llama"))
    save_exits(network, tmp_path)
    assert not list(tmp_path.iterdir())  # nothing was learned beyond the model
    network.add_exits((1, 2), policies=True)
    with torch.no_grad():
        network.exits["1"].weight.fill_(0.5)  # type: ignore[operator, union-attr]
    save_exits(network, tmp_path)
    again = DecoderNetwork(tiny.decoder("llama"))
    load_exits(again, tmp_path)
    assert sorted(again.exits) == sorted(again.policies) == ["1", "2"]
    assert float(again.exits["1"].weight.detach()[0, 0]) == 0.5  # type: ignore[union-attr, index]
    (tmp_path / "exits.safetensors").write_bytes(b"nothing")
    with pytest.raises(BadCheckpoint, match="does not fit the model beside it"):
        load_exits(DecoderNetwork(tiny.decoder("llama")), tmp_path)


def test_exits_of_a_larger_model_are_refused(tmp_path: Path) -> None:
    network = DecoderNetwork(tiny.decoder("llama"))
    network.add_exits((1, 3))
    network.exits["7"] = network.exits.pop("3")
    save_exits(network, tmp_path)
    with pytest.raises(BadCheckpoint, match="it is for block 7, the model has 3"):
        load_exits(DecoderNetwork(tiny.decoder("llama")), tmp_path)


def test_large_blocks_are_kept_where_glibc_is() -> None:
    import platform

    assert keep_large_blocks() == (platform.libc_ver()[0] == "glibc")


# --- by ee-train ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder, and texts."""
    root = tmp_path_factory.mktemp("layerskip")
    tiny.decoder("llama").save_pretrained(root / "model")
    tokenizer().save_pretrained(root / "model")
    rows = [{"text": SENTENCES[n % 3]} for n in range(60)]
    written(root / "data", *rows)
    written(root / "data", *rows[:6], split_="dev")
    return root


def trained(folder: Path, out: str, *words: str, exits: str = "1") -> Any:
    given = ["--model", str(folder / "model"), "--data", str(folder / "data"), "--out", str(folder / out)]
    given += ["--precision", "fp32"]  # as the other trainings of this process
    sets = ["--set", "lr=0.01", "--set", "batch_size=4", "--set", "curriculum=all"]
    return CliRunner().invoke(
        train, [*given, "--recipe", "layerskip", "--exits", exits, "--max-length", "16", *sets, *words]
    )


def test_exits_learn_and_the_folder_is_a_model(folder: Path) -> None:
    done = trained(folder, "ckpt", "--set", "epochs=6", "--set", "target=model")
    assert done.exit_code == 0, done.output
    told = json.loads((folder / "ckpt" / "training.json").read_text(encoding="utf-8"))
    assert told["recipe"] == "layerskip" and told["exits"] == [1, 3] and told["data"]["rows"]["train"] > 20
    network, _ = load_decoder(str(folder / "model"))
    run = Run(network, folder / "scratch", seed=0)
    before = layerskip.measure(run, load_texts(str(folder / "data"), tokenizer(), 16)["dev"], [1])
    assert told["dev"]["exits"] == [1, 3]
    assert told["dev"]["loss"][0] < before["loss"][0] - 0.5 and told["dev"]["agrees"][0] > 0.6
    model = AutoModelForCausalLM.from_pretrained(folder / "ckpt")
    ids = AutoTokenizer.from_pretrained(folder / "ckpt")("the film was", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3


@pytest.mark.slow
def test_its_bundle_drafts(folder: Path) -> None:
    done = trained(folder, "drafting", "--set", "epochs=1")
    assert done.exit_code == 0, done.output
    words = [str(folder / "drafting"), "--out", str(folder / "bundle"), "--variants", "fp32"]
    done = CliRunner().invoke(split, words)
    assert done.exit_code == 0, done.output
    manifest = open_bundle(folder / "bundle").manifest
    assert [segment.blocks for segment in manifest.segments] == [(1,), (2, 3)]
    assert manifest.rule.name == "speculative" and manifest.provenance["recipe"] == "layerskip"


def test_what_ee_train_refuses(folder: Path, tmp_path: Path) -> None:
    done = trained(folder, "none", exits="9")
    assert done.exit_code == 2 and "block 9 does not exist" in done.output
    written(tmp_path / "data", {"text": "a film"}, split_="dev")
    words = ["--recipe", "layerskip", "--out", str(tmp_path / "out"), "--data", str(tmp_path / "data")]
    words += ["--precision", "fp32"]
    done = CliRunner().invoke(train, ["--model", str(folder / "model"), *words])
    assert done.exit_code == 2 and "has no train split" in done.output
    tiny.model_folder(tmp_path / "encoder")
    done = CliRunner().invoke(train, ["--model", str(tmp_path / "encoder"), *words])
    assert done.exit_code == 2 and "supported: gpt2, llama" in done.output
    with pytest.raises(BadModel, match="nowhere"):
        load_decoder(str(tmp_path / "nowhere"))
    assert not (tmp_path / "out").exists()
