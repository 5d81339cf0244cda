"""Recipe draft_head: what it learns, that the model stays as it is, and that a killed run goes on."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner

from offramp.models.decoder import DecoderNetwork
from offramp.models.draft_head import (
    add_draft_head,
    draft_head_of,
    normed_before,
    normed_hidden,
    predict_hidden,
)
from offramp.training.checkpoint import DRAFT_HEAD, EXITS, BadCheckpoint, load_exits, save_exits
from offramp.training.cli import train as ee_train
from offramp.training.decoder import load_decoder
from offramp.training.lm_data import TokenRows
from offramp.training.loop import Run
from offramp.training.recipes import draft_head as recipe
from offramp.training.recipes.draft_head import (
    CachedStates,
    DraftHeadSettings,
    draft_words,
    feature_loss,
    first_rows,
    fit_join,
    measure_drafts,
    prepare,
    train,
)


@cache
def answer_rows(count: int, length: int = 8) -> TokenRows:
    """Random prompts and greedy tokens of the full network."""
    random = np.random.default_rng(0)
    rows = [random.integers(3, 60, 3 + number % 4).tolist() for number in range(count)]
    answers = tiny.greedy(DecoderNetwork(tiny.decoder("llama")), rows, length)
    return TokenRows(
        [row + answer for row, answer in zip(rows, answers, strict=True)], [len(row) for row in rows]
    )


def trained(folder: Path, **settings: Any) -> tuple[DecoderNetwork, dict[str, Any]]:
    """The trained network, and the recipe's results on the rows that it was trained on."""
    network = DecoderNetwork(tiny.decoder("llama"))
    s = DraftHeadSettings(**{"epochs": 12, "lr": 0.01} | settings)
    prepare(network, (1, 2, 3), s)
    rows = answer_rows(64)
    return network, train(Run(network, folder, seed=0), {"train": rows, "dev": rows}, (1, 2, 3), s)


def test_invalid_settings_are_refused() -> None:
    for setting in ({"steps": 0}, {"noise": -0.1}, {"lr": 0.0}, {"tokens": 0}, {"feature_weight": -1.0}):
        with pytest.raises(ValueError, match=next(iter(setting))):
            DraftHeadSettings(**setting)  # type: ignore[arg-type]


@pytest.mark.slow
def test_drafts_learn_and_the_model_stays_as_it_was(tmp_path: Path) -> None:
    network = DecoderNetwork(tiny.decoder("llama"))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    add_draft_head(network)
    untrained = measure_drafts(network, answer_rows(64), 16_384)
    network, results = trained(tmp_path)
    assert results["exits"] == [3]  # one segment
    dev = results["dev"]
    assert dev["tokens"] == untrained["tokens"] == 64 * 8
    assert untrained["accepted"][0] < 0.2 and dev["accepted"][0] > untrained["accepted"][0] + 0.4
    assert min(dev["accepted"]) > 0.4 and dev["tokens_a_round"] > 1.8 > untrained["tokens_a_round"]
    for name, value in before.items():
        assert torch.equal(network.state_dict()[name], value), name


@pytest.mark.slow
def test_the_first_fit_reads_what_the_last_block_reads() -> None:
    network = DecoderNetwork(tiny.decoder("llama"))
    draft_head, rows = add_draft_head(network), answer_rows(64, 30)
    fit_join(network, rows)
    ids, targets = rows.batch(range(64))
    with torch.no_grad():
        states = network(ids)
        embedded = network.family.embed(network.model, ids, torch.arange(ids.shape[1])[None])
        joined = draft_head(embedded, normed_before(network, normed_hidden(network, states[-1])))
        chosen = targets >= 0
        error = (joined - states[-2])[chosen].square().mean()
    assert error < 0.75 * states[-2][chosen].var(0).mean()  # a constant would have all of it


def naive_drafts(network: DecoderNetwork, row: list[int], start: int, steps: int) -> list[list[bool]]:
    """Whether the drafts after every token of an answer are the model's own tokens, one chain at a time."""
    draft_head = draft_head_of(network)
    assert draft_head is not None
    chains = []
    for end in range(start, len(row)):
        ids, chain = row[:end], list[bool]()
        for step in range(steps):
            tokens = torch.tensor([ids])
            normed = normed_hidden(network, network(tokens)[-1])
            own = int(network.head(network(tokens)[-1][:, -1]).argmax())
            # Of the last `step` tokens the draft head reads its own predictions.
            hidden = list(predict_hidden(network, draft_head, tokens, normed, step + 1))[-1][:, -1]
            draft = int(network.head(hidden).argmax())
            chain.append(draft == own)
            if draft != own or end + step >= len(row) or row[end + step] != own or end + step + 1 >= len(row):
                break
            ids = [*ids, draft]
        chains.append(chain)
    return chains


@pytest.mark.slow
@torch.no_grad()
def test_measured_shares_are_those_of_drafts_one_by_one() -> None:
    network = DecoderNetwork(tiny.decoder("llama"))
    add_draft_head(network)
    fit_join(network, answer_rows(64))
    few = first_rows(answer_rows(64), np.ones(64), 12)
    rows = TokenRows([list(row) for row in few.ids], few.starts)
    rows.ids[3][-2] = 5  # another token than the model's own: rows of drafts end there
    measured = measure_drafts(network, rows, 16_384, steps=3)
    chains = [
        chain
        for row, start in zip(rows.ids, rows.starts, strict=True)
        for chain in naive_drafts(network, row, start, 3)
    ]
    for step, share in enumerate(measured["accepted"]):
        right = [chain[step] for chain in chains if len(chain) > step]
        assert share == pytest.approx(sum(right) / max(1, len(right)), abs=1e-3), step
    assert measured["tokens"] == len(chains)


def test_words_are_the_first_of_a_large_vocabulary() -> None:
    network = DecoderNetwork(tiny.decoder("llama"))
    assert len(draft_words(network, 31)[0]) == 60 and len(draft_words(network, 30)[0]) == 30
    assert torch.equal(draft_words(network, 20)[0], network.model.lm_head.weight[:20])


def test_the_feature_loss_does_not_depend_on_the_size_of_states() -> None:
    predicted, right = torch.randn(5, 8), torch.randn(5, 8)
    torch.testing.assert_close(feature_loss(predicted, right), feature_loss(50 * predicted, 50 * right))
    assert float(feature_loss(right, right)) == 0
    assert float(feature_loss(predicted[:0], right[:0])) == 0


def test_the_number_of_tokens_is_bounded() -> None:
    rows = answer_rows(64)
    few = first_rows(rows, rows.lengths, 40)
    assert 0 < few.lengths.sum() <= 40 < first_rows(rows, rows.lengths, 60).lengths.sum()
    assert len(first_rows(rows, rows.lengths, 1)) == 1


def test_states_are_those_of_the_model_and_go_on_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, rows = DecoderNetwork(tiny.decoder("llama")), answer_rows(64)
    monkeypatch.setattr(recipe, "SAVED_EVERY", 2)
    run, calls = Run(network, tmp_path, seed=0), list[int]()
    forward = DecoderNetwork.forward

    def killed(self: DecoderNetwork, ids: torch.Tensor, block_mask: Any = None) -> Any:
        calls.append(len(ids))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return forward(self, ids, block_mask)

    monkeypatch.setattr(DecoderNetwork, "forward", killed)
    with pytest.raises(KeyboardInterrupt):
        CachedStates.compute(run, rows)
    calls[:] = [0] * 10
    states = CachedStates.compute(Run(network, tmp_path, seed=0), rows)
    assert len(calls) - 10 == 8 - 2  # two batches of eight were saved
    again = CachedStates.compute(run, rows)
    assert len(calls) - 10 == 6  # they are read from the file
    index = np.array([5, 0, 63])
    ids, _ = rows.batch(index)
    with torch.no_grad():
        expected = normed_hidden(network, forward(network, ids)[-1])
    for place, row in enumerate(index):
        length = len(rows.ids[row])
        actual = states.batch(index)[place]
        torch.testing.assert_close(actual[:length], expected[place, :length], atol=2e-3, rtol=2e-3)
        assert not actual[length:].any()
    assert torch.equal(again.batch(index), states.batch(index))


def test_other_rows_have_other_states(tmp_path: Path) -> None:
    network = DecoderNetwork(tiny.decoder("llama"))
    run = Run(network, tmp_path, seed=0)
    for count in (8, 9):
        CachedStates.compute(run, first_rows(answer_rows(64), np.ones(64), count))
    assert len(list(tmp_path.glob("states-*.npy"))) == 2


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole, _ = trained(tmp_path / "whole", epochs=2)
        monkeypatch.setattr(Run, "__init__", _saving_every_step(Run.__init__))
        batches = 0

        def killed(predicted: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            nonlocal batches
            batches += 1
            if batches == 20:
                raise KeyboardInterrupt
            return feature_loss(predicted, right)

        with monkeypatch.context() as patched:
            patched.setattr(recipe, "feature_loss", killed)
            with pytest.raises(KeyboardInterrupt):
                trained(tmp_path / "killed", epochs=2)
        assert json.loads((tmp_path / "killed" / "state.json").read_text())["step"] > 0
        resumed, _ = trained(tmp_path / "killed", epochs=2)
    finally:
        torch.set_num_threads(threads)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def _saving_every_step(original: Any) -> Any:
    def create(self: Any, network: Any, folder: Path, **options: Any) -> None:
        original(self, network, folder, **options | {"save_every": 0.0})

    return create


@pytest.mark.slow
def test_a_trained_draft_head_is_not_fitted_anew(tmp_path: Path) -> None:
    network, _ = trained(tmp_path / "first", epochs=1)
    draft_head = draft_head_of(network)
    assert draft_head is not None
    weight = draft_head.join.weight.clone()
    s = DraftHeadSettings(epochs=1, lr=1e-9)
    prepare(network, (1, 2, 3), s)
    train(Run(network, tmp_path / "second", seed=0), {"train": answer_rows(64)}, (1, 2, 3), s)
    assert draft_head_of(network) is draft_head
    torch.testing.assert_close(draft_head.join.weight, weight, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_cuts_are_exits_of_the_model_or_those_that_were_named(tmp_path: Path) -> None:
    network, rows, s = DecoderNetwork(tiny.decoder("llama")), answer_rows(64), DraftHeadSettings(epochs=1)
    run = Run(network, tmp_path / "named", seed=0)
    assert train(run, {"train": rows}, (2, 3), s)["exits"] == [2, 3]
    network.add_exits([1])
    run = Run(network, tmp_path / "exits", seed=0)
    assert train(run, {"train": rows}, (1, 2, 3), s)["exits"] == [1, 3]


@pytest.mark.slow
def test_ee_train_writes_the_model_and_its_draft_head(tmp_path: Path) -> None:
    tiny.decoder("llama").save_pretrained(tmp_path / "model")
    tiny.hub_tokenizer().save_pretrained(tmp_path / "model")
    texts = [{"text": row["text"]} for row in tiny.rows(80)]
    tiny.write_rows(tmp_path / "data", *texts)
    tiny.write_rows(tmp_path / "data", *texts[:10], split="dev")
    words = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data"), "--recipe", "draft_head"]
    words += ["--out", str(tmp_path / "ckpt"), "--precision", "fp32", "--max-length", "16"]
    done = CliRunner().invoke(ee_train, [*words, "--set", "epochs=2", "--set", "batch_size=4"])
    assert done.exit_code == 0, done.output
    training = json.loads((tmp_path / "ckpt" / "training.json").read_text(encoding="utf-8"))
    assert training["exits"] == [3] and len(training["dev"]["accepted"]) == 3
    assert (tmp_path / "ckpt" / DRAFT_HEAD).is_file() and not (tmp_path / "ckpt" / EXITS).exists()
    network, _ = load_decoder(str(tmp_path / "ckpt"))
    before, _ = load_decoder(str(tmp_path / "model"))
    for name, value in before.model.state_dict().items():
        assert torch.equal(value, network.model.state_dict()[name]), name
    draft_head = draft_head_of(network)
    assert draft_head is not None and bool(draft_head.join.weight.any())


def test_a_draft_head_of_another_model_is_refused(tmp_path: Path) -> None:
    network = DecoderNetwork(tiny.decoder("llama"))
    add_draft_head(network)
    network.add_exits([1])
    save_exits(network, tmp_path)
    assert (tmp_path / DRAFT_HEAD).is_file() and (tmp_path / EXITS).is_file()
    load_exits(same := DecoderNetwork(tiny.decoder("llama")), tmp_path)
    assert draft_head_of(same) is not None and list(same.exits) == ["1"]
    (tmp_path / EXITS).unlink()
    with pytest.raises(BadCheckpoint, match=rf"{DRAFT_HEAD} does not fit the model beside it"):
        load_exits(DecoderNetwork(tiny.decoder("gpt2")), tmp_path)
    (tmp_path / DRAFT_HEAD).write_bytes(b"no tensors")
    with pytest.raises(BadCheckpoint, match=DRAFT_HEAD):
        load_exits(same, tmp_path)
