"""A decoder's bundle with exits, by ee-split, against its network: translators, policies, small weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner
from torch import nn

from offramp.export.bundle import write_bundle
from offramp.export.cli import main as split
from offramp.export.decoder import ExportableDecoder, open_decoder
from offramp.export.options import ExportOptions
from offramp.export.verify import NotVerified, verify
from offramp.models.decoder import DecoderNetwork, hidden_states
from offramp.runtime import load_generator
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import APPENDED, IN_PLACE
from offramp.runtime.generator import TextGenerator
from offramp.runtime.sequence import TokenSequence
from offramp.training.checkpoint import save_exits

TEMPLATE = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}the"


def with_exits(family: str, blocks: tuple[int, ...], policies: bool) -> DecoderNetwork:
    """A random network whose exits change the logits."""
    network = DecoderNetwork(tiny.decoder(family))
    network.add_exits(blocks, policies=policies)
    torch.manual_seed(11)
    with torch.no_grad():
        for part in (*network.exits.values(), *network.policies.values()):
            assert isinstance(part, nn.Linear)
            part.weight.normal_(std=0.3)
            part.bias.normal_(std=0.3)
    return network


# Appended caches (llama), and caches that grow in place (gpt2). Rotated keys in the latter: test_generation,
# their blocks in int8 and int4: test_cached_attention.
@pytest.fixture(scope="module", params=tiny.with_slow(["llama", "gpt2"]))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A network with exits after blocks 1 and 2, and its bundle by ee-split, as ee-train leaves a folder."""
    folder, network = tmp_path_factory.mktemp(request.param), with_exits(request.param, (1, 2), True)
    network.model.generation_config.eos_token_id = network.model.generation_config.pad_token_id = None
    network.model.save_pretrained(folder / "model")
    save_exits(network, folder / "model")
    tiny.tokenizer().save(str(folder / "model" / "tokenizer.json"))
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    training = {"recipe": "consistentee_lm", "exits": [1, 2, 3], "data": {"name": "films"}, "seed": 4}
    (folder / "model" / "training.json").write_text(json.dumps(training), encoding="utf-8")
    words = [str(folder / "model"), "--out", str(folder / "bundle"), "--variants", "fp32,int8,int4"]
    done = CliRunner().invoke(split, words)
    assert done.exit_code == 0, done.output
    assert "written and verified, 3 segments of 3 blocks" in done.output and "fill_02" in done.output
    why_portable = "no multiple of 16, so its graphs are written as with --portable"
    assert (why_portable in done.output) == (request.param == "llama")
    return network.eval(), folder / "bundle"


def new_sequence(session: TextGenerator, ids: list[int]) -> TokenSequence:
    return session.engine.begin({"input_ids": np.array([ids], np.int64)})


@torch.no_grad()
def test_exits_and_gates_are_those_of_the_network(exported: Any) -> None:
    network, bundle = exported
    manifest = open_bundle(bundle).manifest
    assert manifest.decoder is not None
    assert manifest.decoder.cache == (APPENDED if network.model.config.model_type == "llama" else IN_PLACE)
    assert manifest.rule.name == "gate" and manifest.provenance["recipe"] == "consistentee_lm"
    assert "chat_template.jinja" in manifest.files
    ids = torch.randint(3, 60, (1, 9))
    states = [state[0] for state in hidden_states(network, ids)]
    with load_generator(bundle) as session:
        sequence = new_sequence(session, ids[0].tolist())
        for segment in (0, 1):
            output, block = sequence.advance(segment), segment + 1
            exit_hidden = network.exit_hidden(block, states[segment])
            np.testing.assert_allclose(output.exit_hidden, exit_hidden, atol=1e-4)
            assert output.gate is not None
            gate = network.gate_logit(block, states[segment]).sigmoid()
            np.testing.assert_allclose(output.gate, gate, atol=1e-4)
            np.testing.assert_allclose(output.hidden, states[segment], atol=1e-4)
        last = sequence.advance(2)
    assert last.gate is None and (last.exit_hidden == last.hidden).all()


def test_a_gate_decides(exported: Any) -> None:
    network, bundle = exported
    ids = tiny.tokenizer().encode("the film was good").ids
    with load_generator(bundle) as session:
        chunks = list(session.generate("the film was good", 10))
    assert len({chunk.depth for chunk in chunks}) > 1
    with torch.no_grad():
        for number, chunk in enumerate(chunks[1:], 1):
            whole = torch.tensor([[*ids, *(c.token for c in chunks[:number])]])
            states = [state[0, -1:] for state in hidden_states(network, whole)]
            logits = [float(network.gate_logit(block, states[block - 1][None])[0, 0]) for block in (1, 2)]
            assert chunk.depth == next((block for block in (1, 2) if logits[block - 1] > 0), 3)
            exit_logits = network.head(network.exit_hidden(chunk.depth, states[chunk.depth - 1]))
            assert int(exit_logits.argmax()) == chunk.token  # the cache is that of full depth


@pytest.mark.parametrize("variant", ["fp32", "int8", "int4"])
def test_a_token_gets_the_same_among_others_as_alone(exported: Any, variant: str) -> None:
    """Without it drafts could not be verified: no scale may depend on the other tokens."""
    with load_generator(exported[1], variant=variant) as session:
        ids = torch.randint(3, 60, (12,), generator=torch.Generator().manual_seed(2)).tolist()
        sequence = new_sequence(session, ids)
        hidden = np.random.default_rng(0).normal(size=(12, 32)).astype(np.float32)
        hidden[3] *= 50  # a scale that all twelve shared would drown the others
        together = sequence.runner.logits(hidden).copy()
        for row, logits in zip(hidden, together, strict=True):
            np.testing.assert_allclose(sequence.runner.logits(row[None])[0], logits, atol=1e-5, rtol=1e-5)
        whole = [sequence.advance(segment) for segment in range(3)][-1].hidden.copy()
        one_by_one = new_sequence(session, ids[:1])
        for number, token in enumerate(ids):
            if number:
                one_by_one.feed([token])
            alone = [one_by_one.advance(segment) for segment in range(3)][-1].hidden[0]
            # A last bit may round an activation to the next of 8 bits.
            allowed = 1e-5 if variant == "fp32" else 0.03
            np.testing.assert_allclose(whole[number], alone, atol=allowed * float(np.abs(alone).max()))


def test_small_weights_are_small_in_every_graph(exported: Any) -> None:
    """Weights of blocks, 8 and 4 bits; of heads, 8 bits; embeddings, 8 bits, unless they are portable."""
    manifest = open_bundle(exported[1]).manifest
    assert manifest.decoder is not None
    for segment in (*manifest.segments, *manifest.decoder.cache_fills, manifest.decoder.head):
        sizes = [manifest.files[segment.variants[name].file].bytes for name in ("fp32", "int8", "int4")]
        assert sizes[1] < sizes[0]
        assert sizes[2] == sizes[1] if segment is manifest.decoder.head else sizes[2] < sizes[1]
    small = ["int8", "int4"] if manifest.decoder.cache == IN_PLACE else []
    assert list(manifest.stem.variants) == ["fp32", *small]
    stem_files = [manifest.files[graph.file].bytes for graph in manifest.stem.variants.values()]
    assert stem_files[1:] == [stem_files[-1]] * len(small) and stem_files[-1] <= stem_files[0]
    hidden = np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32)
    logits = {}
    for variant in ("fp32", "int4"):
        with load_generator(exported[1], variant=variant) as session:
            logits[variant] = new_sequence(session, [5]).runner.logits(hidden).copy()
    assert 1e-3 < np.abs(logits["fp32"] - logits["int4"]).max() < 1.0


def test_graphs_of_another_network_are_named(exported: Any) -> None:
    bundle = exported[1]
    source = open_decoder(bundle.parent / "model")
    variants = open_bundle(bundle).manifest.variants
    report = verify(source, bundle, source.split("each"), variants)
    report.require_good()
    assert {seam.segment for seam in report.differences} >= {"stem", "segment_02", "fill_01", "head"}
    with torch.no_grad():
        source.network.policies["2"].bias += 1.0  # type: ignore[operator]
    bad = verify(source, bundle, source.split("each"), variants).first_bad
    assert bad is not None and (bad.segment, bad.tensor) == ("segment_01", "gate")
    source = open_decoder(bundle.parent / "model")
    with torch.no_grad():
        source.network.model.lm_head.weight[50] += 1.0
    with pytest.raises(NotVerified, match="tensor logits, torch whole vs ORT segments"):
        verify(source, bundle, source.split("each"), ("fp32",)).require_good()


def test_a_segment_ends_where_there_is_an_exit(tmp_path: Path) -> None:
    source = ExportableDecoder(with_exits("llama", (1,), False), tmp_path)
    with pytest.raises(ValueError, match="may not end after block 2: there are exits after 1"):
        source.split("each")


@pytest.mark.slow
def test_a_bundle_that_is_not_the_network_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.tokenizer().save(str(tmp_path / "tokenizer.json"))
    source = ExportableDecoder(with_exits("llama", (1, 2), True), tmp_path)
    split = source.split((3,))
    with torch.no_grad():
        split.head.module.words.weight[3] += 5.0  # type: ignore[union-attr, operator]
    monkeypatch.setattr(source.network.model, "lm_head", tiny.decoder("llama").lm_head)
    with pytest.raises(NotVerified, match="head, tensor logits"):
        write_bundle(source, split, tmp_path / "bundle", ExportOptions())
    assert not (tmp_path / "bundle").exists()
