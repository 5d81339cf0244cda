"""The graph of a draft head's block: what it computes, what its bundle says, and texts with its drafts."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner

from offramp.export.bundle import write_bundle
from offramp.export.cli import main as ee_split
from offramp.export.decoder import DRAFT_IDS as DEFAULT_DRAFT_IDS
from offramp.export.decoder import ExportableDecoder, open_decoder
from offramp.export.describe import build_manifest
from offramp.export.options import ExportOptions
from offramp.export.verify import NotVerified, verify
from offramp.models.decoder import DecoderNetwork
from offramp.models.draft_head import add_draft_head, draft_head_of, normed_hidden, predict_hidden
from offramp.runtime import load_generator
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import EXIT_HIDDEN, PREVIOUS_HIDDEN
from offramp.runtime.rules import RuleSpec
from offramp.runtime.rules.speculative import HEAD
from offramp.runtime.sequence import TokenSequence
from offramp.training.checkpoint import save_exits
from offramp.training.lm_data import TokenRows
from offramp.training.loop import Run
from offramp.training.recipes.draft_head import DraftHeadSettings, prepare, train

pytestmark = pytest.mark.slow

DRAFT_IDS = 30  # of 60: half of the right ids cannot be drafted


def prompts(count: int) -> list[list[int]]:
    random = np.random.default_rng(2)
    return [random.integers(3, 60, 3 + 4 * number).tolist() for number in range(count)]


def drafting_network(family: str, folder: Path) -> DecoderNetwork:
    """A network whose draft head is often right: trained on the model's own answers."""
    network = DecoderNetwork(tiny.decoder(family))
    starts = prompts(8)
    answers = tiny.greedy(network, starts, 20)
    rows = [prompt + answer for prompt, answer in zip(starts, answers, strict=True)]
    token_rows = {"train": TokenRows(rows, [len(prompt) for prompt in starts])}
    settings = DraftHeadSettings(epochs=20, batch_size=2, lr=0.01)
    prepare(network, (3,), settings)
    train(Run(network, folder / "run", seed=0), token_rows, (3,), settings)
    return network.eval()


def write(folder: Path, family: str, *, portable: bool, cuts: str, variants: Sequence[str]) -> Path:
    """The bundle of a network with a draft head, written and verified."""
    network = drafting_network(family, folder)
    network.model.save_pretrained(folder / "model")
    tiny.hub_tokenizer().save_pretrained(folder / "model")
    save_exits(network, folder / "model")
    source = open_decoder(folder / "model", portable=portable)
    source = dataclasses.replace(source, draft_ids=DRAFT_IDS)
    write_bundle(source, source.split(cuts), folder / "bundle", ExportOptions(tuple(variants)))
    return folder / "bundle"


# Appended caches, and heads of 16, whose cache grows in place: two segments, in three precisions.
WHOLE = [("llama", True), ("qwen3", False)]
# The block of other families in fp32 alone: every graph costs seconds.
FORMS = [*WHOLE, ("gpt2", False), ("gemma2", True), ("gemma3_text", False), ("gpt_neox", True)]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[str, bool]], Path]:
    """By form: its bundle, written once. Folder `model` beside it is what a training leaves."""

    @cache
    def write_form(form: tuple[str, bool]) -> Path:
        (family, portable), whole = form, form in WHOLE
        variants = ("fp32", "int8", "int4") if whole else ("fp32",)
        folder = tmp_path_factory.mktemp(family)
        return write(folder, family, portable=portable, cuts="2", variants=variants)

    return write_form


@pytest.fixture(scope="module", params=FORMS, ids=str)
def bundle(request: pytest.FixtureRequest, written: Callable[[tuple[str, bool]], Path]) -> Path:
    return written(request.param)


def test_manifest_names_the_block(bundle: Path) -> None:
    manifest = open_bundle(bundle).manifest
    assert manifest.decoder is not None
    block = manifest.decoder.draft_block
    assert block is not None and block.blocks == (4,) and manifest.blocks == 3
    inputs = [tensor.name for tensor in block.first_graph.inputs]
    assert inputs[:2] == ["hidden", PREVIOUS_HIDDEN] and {"past_k_4", "past_v_4"} <= set(inputs)
    assert [tensor.name for tensor in block.first_graph.outputs] == [EXIT_HIDDEN, "new_k_4", "new_v_4"]
    assert block.first_graph.file == "draft_block.onnx" and "draft_block.onnx" in manifest.files
    assert manifest.rule == RuleSpec("speculative", {})


@torch.no_grad()
@pytest.mark.parametrize("pieces", [(1,) * 9, (6, 2, 1), (20, 1, 3)])
def test_steps_of_the_runner_are_those_of_torch(bundle: Path, pieces: tuple[int, ...]) -> None:
    """Also where tokens are run a second time: as at a draft that was wrong."""
    folder = bundle.parent / "model"
    network = open_decoder(folder).network
    draft_head = draft_head_of(network)
    assert draft_head is not None
    ids = torch.randint(3, 60, (1, sum(pieces)), generator=torch.Generator().manual_seed(1))
    states = network(ids)[-1]
    normed = normed_hidden(network, states)
    expected = next(predict_hidden(network, draft_head, ids, normed, 1))[0].numpy()
    before = torch.cat([torch.zeros(1, 1, network.hidden_size), states[:, :-1]], 1)[0].numpy()
    with load_generator(bundle) as session:
        sequence: TokenSequence = session.engine.begin({"input_ids": ids[:, :1].numpy()})
        runner = sequence.runner.draft_runner()
        assert runner is not None
        start = 0
        for count in pieces:
            here, tokens = slice(start, start + count), ids[0, start : start + count].tolist()
            runner.make_room(start + count)
            other = np.full_like(before[here], 0.5)
            runner.run(0, [7] * count, start, other)  # drafts that are not accepted
            actual = runner.run(0, tokens, start, before[here]).exit_hidden
            np.testing.assert_allclose(actual, expected[here], atol=2e-4, rtol=1e-3)
            head = network.head(torch.from_numpy(actual[-1:].copy())).numpy()
            np.testing.assert_allclose(
                runner.logits(actual[-1:], draft=True), head[:, :DRAFT_IDS], atol=1e-3, rtol=1e-3
            )
            start += count
        session.engine.drop(sequence)


@pytest.mark.parametrize("drafts", [None, 1, 4])
def test_texts_are_those_of_full_depth(bundle: Path, drafts: int | None) -> None:
    parameters = {} if drafts is None else {"head": 1.0, "drafts": float(drafts)}
    with (
        load_generator(bundle, rule=RuleSpec("speculative", parameters)) as session,
        load_generator(bundle, rule="never") as full,
    ):
        for prompt in prompts(6):
            expected = list(full.tokens(prompt, 30, ()))
            tokens = list(session.tokens(prompt, 30, ()))
            assert [token.id for token in tokens] == [token.id for token in expected]
        stats = session.draft_stats
        assert stats is not None and HEAD in stats.offered
        # Of some families the tiny twin learns little in a second.
        least = (0.2 if bundle.parent.name.startswith(("llama", "qwen3")) else 0.05) / (drafts or 1)
        if drafts is not None:
            assert stats.rounds[HEAD] > 10
            assert stats.accepted[HEAD] / stats.offered[HEAD] > least


def test_drafts_go_on_to_the_longest_sequence(bundle: Path) -> None:
    rule = RuleSpec("speculative", {"head": 1.0, "drafts": 8.0})
    with load_generator(bundle, rule=rule) as session, load_generator(bundle, rule="never") as full:
        prompt = prompts(3)[-1]
        expected = [token.id for token in full.tokens(prompt, 100, ())]
        tokens = list(session.tokens(prompt, 100, ()))
        assert [token.id for token in tokens] == expected and tokens[-1].ended == "context"


@pytest.mark.parametrize("form", WHOLE, ids=str)
def test_other_precisions_draft_too(
    form: tuple[str, bool], written: Callable[[tuple[str, bool]], Path]
) -> None:
    folder = written(form)
    rule = RuleSpec("speculative", {"head": 1.0, "drafts": 2.0})
    for variant in ("int8", "int4"):
        with load_generator(folder, rule=rule, variant=variant) as session:
            for prompt in prompts(4):
                assert list(session.tokens(prompt, 20, ()))
            stats = session.draft_stats
            assert stats is not None and stats.accepted[HEAD] > 0


def test_a_wrong_block_is_not_verified(written: Callable[[tuple[str, bool]], Path]) -> None:
    """Such a bundle is not written: test_decoder_exits."""
    folder = written(WHOLE[0])
    source = dataclasses.replace(open_decoder(folder.parent / "model", portable=True), draft_ids=DRAFT_IDS)
    split = source.split("2")
    assert split.draft_block is not None
    verify(source, folder, split, ("fp32",)).require_good()
    other = add_draft_head(source.network)  # the network is another one than the split and its graphs
    assert not bool(other.join.weight.any())
    with pytest.raises(NotVerified, match="draft_block, tensor exit_hidden"):
        verify(source, folder, split, ("fp32",)).require_good()


def test_ee_split_writes_one_segment_and_the_block(
    tmp_path: Path, written: Callable[[tuple[str, bool]], Path]
) -> None:
    shutil.copytree(written(WHOLE[0]).parent / "model", tmp_path / "model")
    training = {"recipe": "draft_head", "exits": [3]}
    (tmp_path / "model" / "training.json").write_text(json.dumps(training), encoding="utf-8")
    words = [str(tmp_path / "model"), "--out", str(tmp_path / "bundle"), "--variants", "fp32"]
    done = CliRunner().invoke(ee_split, words)
    assert done.exit_code == 0, done.output
    assert "draft_block" in done.output
    manifest = open_bundle(tmp_path / "bundle").manifest
    assert len(manifest.segments) == 1 and manifest.rule.name == "speculative"
    with load_generator(tmp_path / "bundle") as session:
        assert session.draft_stats is not None and HEAD in session.draft_stats.sources


def test_bundles_without_a_draft_head_say_nothing_of_it(tmp_path: Path) -> None:
    tiny.tokenizer().save(str(tmp_path / "tokenizer.json"))
    source = ExportableDecoder(
        DecoderNetwork(tiny.decoder("llama")), tmp_path, draft_ids=DRAFT_IDS, portable=True
    )
    split = source.split("3")
    assert split.draft_block is None and DraftHeadSettings().draft_ids == DEFAULT_DRAFT_IDS
    assert "draft_block" not in build_manifest(source, split, ("fp32",)).to_json()
