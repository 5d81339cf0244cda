"""Benchmark layer_selection: its data, scores with a cache against whole texts, menus, and all of it once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner

from offramp.benchmarks.layer_selection import AS_FULL, main, oracle_lines, router_line
from offramp.benchmarks.layer_selection_data import (
    Pairs,
    in_words,
    intent_pairs,
    read_json_lines,
    read_pairs,
    rouge_l,
    sentence_pairs,
)
from offramp.benchmarks.layer_selection_scores import (
    FIELDS,
    complete_lines,
    controlled,
    evaluate,
    forced_scores,
    greedy_answers,
    random_routes,
    read_prompts,
    shift_for_depth,
    skips,
)
from offramp.models.controllers import Controllers
from offramp.models.decoder import DecoderNetwork, hidden_states, skip_blocks
from offramp.training.cli import train
from offramp.training.recipes.layer_selection import controlled_blocks

RANDOM = np.random.default_rng(0)
PAIRS = Pairs(
    [RANDOM.integers(3, 60, 4 + n % 3).tolist() for n in range(6)],
    [RANDOM.integers(3, 60, 4 + n % 2).tolist() for n in range(6)],
    ["the film"] * 6,
    [0, 0, 1, 1, 2, 2],
)


def controllers() -> Controllers:
    torch.manual_seed(3)
    random_controllers = Controllers(3, 32, start=0.0)
    torch.nn.init.normal_(random_controllers["2"].weight)  # type: ignore[arg-type]
    return random_controllers


# --- data ---


def test_a_prompt_has_several_messages_and_test_rows_come_in_two_wordings() -> None:
    rows = [{"text": f"text {n}", "label_text": f"label_{n}"} for n in range(7)]
    pairs = intent_pairs(rows, 3, seed=0)
    assert len(pairs) == 2 and pairs[0]["prompt"] != pairs[1]["prompt"]
    numbers = [line[7:] for line in str(pairs[0]["prompt"]).splitlines()[1:4]]
    assert str(pairs[0]["completion"]).splitlines() == [f"- label {number}" for number in numbers]
    twice = intent_pairs(rows, 3, seed=0, both_wordings=True)
    assert [pair["group"] for pair in twice] == [0, 0, 1, 1]
    assert twice[0]["completion"] == twice[1]["completion"] and twice[0]["prompt"] != twice[1]["prompt"]
    assert in_words("PlayMusic") == "play music" and in_words("book_flight") == "book flight"


def test_a_text_is_cut_between_sentences() -> None:
    first, second = "The film " + "very " * 14 + "good.", "It was one of the best!"
    (pair,) = sentence_pairs([f"{first} {second} The end.", "Short. Text.", f"{first} Too short."])
    assert (pair["prompt"], pair["completion"]) == (first, " " + second)


def test_line_ends_of_unicode_do_not_end_a_row(tmp_path: Path) -> None:
    tiny.write_rows(tmp_path, {"text": "a\u2028b"}, {"text": "c\x85d"})
    assert [row["text"] for row in read_json_lines(tmp_path / "train.jsonl")] == ["a\u2028b", "c\x85d"]


def test_pairs_are_read_with_their_groups(tmp_path: Path) -> None:
    row = {"prompt": "the film", "completion": "was good", "group": 7}
    source = tiny.write_rows(tmp_path, row, row | {"prompt": "a plot"}, row | {"prompt": ""}, split="test")
    pairs = read_pairs(source, tiny.hub_tokenizer(), {"test": 10}, 20)["test"]
    assert len(pairs) == 2 and pairs.twins is not None and pairs.twins.tolist() == [1, 0]
    assert [len(ids) for ids in pairs.completions] == [3, 3] and pairs.references == ["was good"] * 2
    assert read_pairs(source, tiny.hub_tokenizer(), {"test": 1}, 20)["test"].twins is None


def test_rouge_l_by_hand() -> None:
    assert rouge_l("the cat sat on the mat", "the mat sat") == pytest.approx(2 * 2 / 9)
    assert rouge_l("- Play Music", "play music!") == 1
    assert rouge_l("a", "") == 0 and rouge_l("", "") == 1


# --- scores ---


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_scores_with_a_cache_are_those_of_whole_texts(family: str) -> None:
    network, chosen = DecoderNetwork(tiny.decoder(family)).eval(), controllers()
    index = [0, 3, 4]
    prompts = read_prompts(network, [PAIRS.prompts[i] for i in index])
    completions = [PAIRS.completions[i] for i in index]
    for configuration in ("full", "skip", "exit", "controllers"):
        skipped = {"skip": frozenset({1}), "exit": frozenset({1, 2})}.get(configuration, frozenset[int]())
        configured = controlled(chosen, 0.0) if configuration == "controllers" else skips(skipped, 3)
        scores = forced_scores(network, prompts, completions, index, configured)
        for row, i in enumerate(index):
            prompt, completion = PAIRS.prompts[i], PAIRS.completions[i]
            ids = torch.tensor([prompt + completion])
            mask = skip_blocks(skipped, len(prompt))
            if configuration == "controllers":
                may_skip = torch.arange(ids.shape[1])[None] >= len(prompt)
                mask = controlled_blocks(chosen, may_skip, None, [])
            *_, last = hidden_states(network, ids, mask)
            logits = network.head(last)[0, len(prompt) : -1]
            losses = torch.nn.functional.cross_entropy(logits, torch.tensor(completion[1:]), reduction="none")
            expected = [float(part.mean()) for part in (losses, losses[::2], losses[1::2])]
            assert scores[row, :3] == pytest.approx(expected, rel=1e-3)
        if configuration == "controllers":
            assert len(np.unique(scores[:, 5])) > 1 and (scores[:, 5] > 2).any()
        else:
            assert (scores[:, 5] == 3 - len(skipped)).all()


@torch.no_grad()
def test_greedy_answers_of_skipped_blocks_are_those_without_a_cache() -> None:
    network = DecoderNetwork(tiny.decoder("llama")).eval()
    prompts = read_prompts(network, PAIRS.prompts)
    rows = list(range(6))
    full = greedy_answers(network, prompts, rows, skips(frozenset(), 3), 4, stop=-1)
    assert full == tiny.greedy(network, PAIRS.prompts, 4)
    skipped = frozenset({1})
    answers = greedy_answers(network, prompts, rows, skips(skipped, 3), 4, stop=-1)
    for prompt, answer in zip(PAIRS.prompts, answers, strict=True):
        ids = list(prompt)
        for _ in range(4):
            *_, last = hidden_states(network, torch.tensor([ids]), skip_blocks(skipped, len(prompt)))
            ids.append(int(network.head(last[0, -1]).argmax()))
        assert answer == ids[len(prompt) :]
    assert answers != full
    stopped = greedy_answers(network, prompts, rows, skips(frozenset(), 3), 4, stop=full[0][2])
    assert stopped[0] == full[0][: full[0].index(full[0][2])]


def test_an_answer_is_exact_if_the_greedy_answer_is_the_completion() -> None:
    network = DecoderNetwork(tiny.decoder("llama")).eval()
    prompts = read_prompts(network, PAIRS.prompts)
    right = tiny.greedy(network, PAIRS.prompts, 3)
    wrong_first = [[(answer[0] + 1) % 60, *answer[1:]] for answer in right]
    wrong_last = [[*answer[:2], (answer[2] + 1) % 60] for answer in right]
    for completions, exact in ((right, 1), (wrong_first, 0), (wrong_last, 0)):
        scores = forced_scores(network, prompts, completions, range(6), skips(frozenset(), 3))
        assert (scores[:, FIELDS.index("exact")] == exact).all()


def test_random_routes_belong_to_their_rows() -> None:
    routes = random_routes(50, 6, 4, seed=0)
    ones = torch.zeros(3, 2, 4)
    masks = [routes([7, 8, 7], (3, 2)) for _ in range(2)]
    assert masks[0] is not None and masks[1] is not None
    runs = [
        torch.stack([o if (o := m(b, ones)) is not None else torch.ones(3, 2) for b in range(6)])
        for m in masks
    ]
    assert torch.equal(*runs) and torch.equal(runs[0][:, 0], runs[0][:, 2])
    assert (runs[0].sum(0) == 4).all()


def test_controllers_are_shifted_to_a_depth() -> None:
    network = DecoderNetwork(tiny.decoder("llama")).eval()
    prompts = read_prompts(network, PAIRS.prompts)
    shift = shift_for_depth(network, PAIRS, controllers(), 2.5, batch=3)
    scores = forced_scores(network, prompts, PAIRS.completions, range(6), controlled(controllers(), shift))
    assert scores[:, 5].mean() == pytest.approx(2.5, abs=0.2)


def test_an_interrupted_evaluation_continues(tmp_path: Path) -> None:
    network, file = DecoderNetwork(tiny.decoder("llama")).eval(), tmp_path / "scores.jsonl"
    configurations = {"full": skips(frozenset(), 3), "skip": skips(frozenset({1}), 3)}
    options: dict[str, Any] = {"batch": 2, "router_blocks": [1, 3], "max_new_tokens": {"skip": 3}}
    arguments = network, tiny.hub_tokenizer(), PAIRS, configurations, file
    scores, features = evaluate(*arguments, **options)
    assert scores.shape == (6, 2, len(FIELDS)) and features.shape == (6, 2, 32)
    missing = np.isnan(scores)
    assert missing[:, 0, FIELDS.index("rouge_l")].all() and missing.sum() == 6  # no answers were asked for
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) * 2 // 3])
    resumed, _ = evaluate(*arguments, **options)
    assert file.read_bytes() == whole and np.array_equal(resumed, scores, equal_nan=True)
    assert len(complete_lines(file)) == 3 and complete_lines(tmp_path / "none") == []


# --- menus ---


def test_lines_of_a_menu_by_hand() -> None:
    # Rows come in twos; the shallow configuration is right for one group and for half of another.
    shallow, deep = [1.0, 1, 1, 0, 0, 0], [1.0] * 6
    table, twins = np.array([shallow, deep]).T, np.array([1, 0, 3, 2, 5, 4])
    lines = oracle_lines(table, None, twins, [1, 3], [2], draws=3)
    assert lines["static mix"] == pytest.approx({"2": 0.75, AS_FULL: 3})
    assert lines["oracle"] == pytest.approx({"2": 1, AS_FULL: 2})
    assert lines["oracle, held out"] == pytest.approx({"2": 5 / 6, AS_FULL: 3})
    assert lines["oracle, shuffled"] == pytest.approx({"2": 1, AS_FULL: 2})  # as many are right somewhere
    by_tokens = oracle_lines(table, (table, table[twins]), None, [1, 3], [2], draws=1)
    assert by_tokens["oracle, held out"] == pytest.approx({"2": 5 / 6, AS_FULL: 3})


def test_a_router_learns_what_its_features_show() -> None:
    random = np.random.default_rng(0)
    features = random.normal(size=(400, 5))
    easy = features[:, 2] > 0
    table = np.stack([np.where(easy, 1.0, 0.0), np.ones(400)], 1)
    dev, test = (features[:200], table[:200]), (features[200:], table[200:])
    line = router_line(dev, test, [1, 3], [2])
    assert line["2"] is not None and line["2"] > 0.85  # without knowledge 0.75
    assert line["2 depth"] is not None and line["2 depth"] < 2.2
    assert line[AS_FULL] is not None and line[AS_FULL] < 3


# --- all of it ---


@pytest.mark.slow
def test_from_labelled_rows_to_the_table(tmp_path: Path) -> None:
    def call(command: Any, *words: object) -> str:
        result = CliRunner().invoke(command, list(map(str, words)), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    for split, count in (("train", 60), ("dev", 24), ("test", 16)):
        named = [row | {"label_text": ("bad", "good")[row["label"]]} for row in tiny.rows(count, seed=count)]
        tiny.write_rows(tmp_path / "labelled", *named, split=split)
    data, model = tmp_path / "pairs", tmp_path / "model"
    call(main, "intents", data, "--rows", tmp_path / "labelled", "--messages", 2, "--test", 8)
    tiny.decoder("llama").save_pretrained(model)
    tiny.hub_tokenizer().save_pretrained(model)
    common = ("--data", data, "--recipe", "layer_selection", "--max-length", 60, "--precision", "fp32")
    call(train, *common, "--model", model, "--set", "selection=full", "--out", tmp_path / "tuned")
    for name, words in (
        ("skip2", ("selection=skip", "blocks_run=2")),
        ("menu", ("selection=menu", "blocks_run=3,2")),
        ("chosen", ("selection=controllers",)),
    ):
        sets = [word for setting in words for word in ("--set", setting)]
        call(train, *common, "--model", tmp_path / "tuned", *sets, "--out", tmp_path / name)
    variants = [word for name in ("skip2", "menu", "chosen") for word in ("--variant", tmp_path / name)]
    measure = ["measure", "--model", tmp_path / "tuned", *variants, "--data", data, "--blocks", "2"]
    measure += ["--router-blocks", "1,3", "--shuffles", 2, "--max-new-tokens", 6, "--batch", 5]
    measure += ["--scratch", tmp_path / "scratch", "--out", tmp_path / "result.json"]
    output = call(main, *measure)
    result = json.loads((tmp_path / "result.json").read_text())
    names = (
        "tuned, full; tuned, skip 2; tuned, exit 2; tuned, random route 2; skip2; menu, full; menu, skip 2"
    )
    assert list(result["configurations"]) == [*names.split("; "), "chosen, as learned", "chosen, at 2"]
    assert result["configurations"]["tuned, skip 2"]["depth"] == 2
    assert result["configurations"]["tuned, full"]["cost"] == 1 and result["test_rows"] == 16
    assert result["held_out_by"] == "wording" and "oracle, held out" in output
    menus = ["skips of tuned", "skips and exits of tuned", "trained lists", "skips of menu"]
    assert list(result["menus"]) == menus
    assert result["menus"]["trained lists"]["configurations"] == ["tuned, full", "skip2"]
    lines = result["menus"]["skips of tuned"]["lines"]
    assert list(lines) == ["nats", "exact", "rouge_l"] and "router after block 3" in lines["nats"]
    before = (tmp_path / "result.json").read_text()
    call(main, *measure)  # from the raw scores
    assert (tmp_path / "result.json").read_text() == before
    refused = CliRunner().invoke(main, [*map(str, measure), "--rows", "4"])
    assert refused.exit_code == 2 and "scores of other settings" in refused.output
