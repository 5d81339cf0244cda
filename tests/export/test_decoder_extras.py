"""What a decoder's bundle has for early exits: translators, policies, drafts, small weights, chats."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tiny
import torch
from click.testing import CliRunner
from torch import nn

from offramp.export.cli import main as split
from offramp.export.decoder_bundle import write_decoder
from offramp.export.decoder_verify import NotTheNetwork, verify_decoder
from offramp.models.decoder import DecoderNetwork
from offramp.models.depth import hidden_states
from offramp.runtime import BadInput, BadSetting, load
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.engines.ort_decoder import DecoderEngine
from offramp.runtime.engines.threads import claim
from offramp.runtime.errors import BadManifest
from offramp.runtime.generate import generate
from offramp.runtime.generator import Writer
from offramp.runtime.sequence import Lane
from offramp.training.checkpoint import save_exits

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'robot' %}{{ raise_exception('no robots') }}"
    "{% endif %}{{ message['content'] + ' ' }}{% endfor %}{% if add_generation_prompt %}the{% endif %}"
)


def with_exits(family: str, blocks: tuple[int, ...], policies: bool) -> DecoderNetwork:
    """A random network with exits that say something."""
    network = DecoderNetwork(tiny.decoder(family))
    network.add_exits(blocks, policies=policies)
    with torch.no_grad():
        for part in (*network.exits.values(), *network.policies.values()):
            assert isinstance(part, nn.Linear)
            part.weight.normal_(std=0.3)
            part.bias.normal_(std=0.3)
    return network


@pytest.fixture(scope="module", params=tiny.with_slow(["llama", "gpt2", "qwen3"], "llama"))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A network with exits behind blocks 1 and 2, and its bundle by ee-split, as ee-train leaves a folder."""
    folder, network = tmp_path_factory.mktemp(request.param), with_exits(request.param, (1, 2), True)
    network.model.generation_config.eos_token_id = network.model.generation_config.pad_token_id = None
    network.model.save_pretrained(folder / "model")
    save_exits(network, folder / "model")
    tiny.tokenizer().save(str(folder / "model" / "tokenizer.json"))
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    told = {"recipe": "consistentee_lm", "exits": [1, 2, 3], "data": {"name": "films"}, "seed": 4}
    (folder / "model" / "training.json").write_text(json.dumps(told), encoding="utf-8")
    words = [str(folder / "model"), "--out", str(folder / "bundle"), "--variants", "fp32,int8,int4"]
    done = CliRunner().invoke(split, words)
    assert done.exit_code == 0, done.output
    assert "written and verified, 3 segments of 3 blocks" in done.output and "fill_02" in done.output
    return network.eval(), folder / "bundle"


def engine(bundle: Path, variant: str = "fp32") -> DecoderEngine:
    return DecoderEngine(onnxruntime, open_bundle(bundle), variant, claim(onnxruntime, None, True))


@torch.no_grad()
def test_where_tokens_leave(made: Any) -> None:
    network, bundle = made
    manifest = open_bundle(bundle).manifest
    assert manifest.rule.name == "gate" and manifest.provenance["recipe"] == "consistentee_lm"
    ids = torch.randint(3, 60, (1, 9))
    states, lane = [state[0] for state in hidden_states(network, ids)], Lane(engine(bundle))
    lane.feed(ids[0].tolist())
    for segment in (0, 1):
        told, block = lane.advance(segment), segment + 1
        np.testing.assert_allclose(told.leaving, network.leaving(block, states[segment]), atol=1e-4)
        assert told.gate is not None
        np.testing.assert_allclose(told.gate, network.gate(block, states[segment]), atol=1e-4)
        np.testing.assert_allclose(told.hidden, states[segment], atol=1e-4)
    last = lane.advance(2)
    assert last.gate is None and last.leaving is not None and (last.leaving == last.hidden).all()


def test_a_gate_decides(made: Any) -> None:
    network, bundle = made
    ids = tiny.tokenizer().encode("the film was good").ids
    with load(bundle) as session:
        pieces = list(session.generate("the film was good", 10))
    assert len({piece.depth for piece in pieces}) > 1
    with torch.no_grad():
        for at, piece in enumerate(pieces[1:], 1):
            whole = torch.tensor([[*ids, *(p.token for p in pieces[:at])]])
            states = [state[0, -1:] for state in hidden_states(network, whole)]
            gates = [float(network.gate(block, states[block - 1][None])[0, 0]) for block in (1, 2)]
            assert piece.depth == next((b for b in (1, 2) if gates[b - 1] > 0), 3)
            logits = network.head(network.leaving(piece.depth, states[piece.depth - 1]))
            assert int(logits.argmax()) == piece.token  # the cache is that of the full depth


@pytest.mark.parametrize("variant", ["fp32", "int8", "int4"])
def test_a_token_says_the_same_among_others_as_alone(made: Any, variant: str) -> None:
    """Without it drafts could not be verified; of rounded products nothing is left of the others."""
    cache = engine(made[1], variant).cache()
    hidden = np.random.default_rng(0).normal(size=(12, 32)).astype(np.float32)
    hidden[3] *= 50  # a scale that all twelve shared would drown the others
    together = cache.logits(hidden).copy()
    for row, logits in zip(hidden, together, strict=True):
        np.testing.assert_allclose(cache.logits(row[None])[0], logits, atol=1e-5, rtol=1e-5)
    ids = torch.randint(3, 60, (12,), generator=torch.Generator().manual_seed(2)).tolist()
    lanes = [Lane(engine(made[1], variant)) for _ in range(2)]
    lanes[0].feed(ids)
    whole = lanes[0].through().hidden.copy()
    for at, token in enumerate(ids):
        lanes[1].feed([token])
        alone = lanes[1].through().hidden[0]
        # A last bit may round an activation to the next of 8 bits.
        allowed = 1e-5 if variant == "fp32" else 0.03
        np.testing.assert_allclose(whole[at], alone, atol=allowed * float(np.abs(alone).max()))


def test_small_weights_are_small_and_wholly_so(made: Any) -> None:
    """Weights of blocks and heads, 8 and 4 bits; the stem has none."""
    bundle = open_bundle(made[1])
    assert bundle.manifest.decoder is not None
    for stage in (*bundle.manifest.segments, *bundle.manifest.decoder.cache_fills, bundle.manifest.decoder.head):
        sizes = [bundle.manifest.files[stage.variants[name].file].bytes for name in ("fp32", "int8", "int4")]
        assert sizes[2] < sizes[1] < sizes[0]
    assert list(bundle.manifest.stem.variants) == ["fp32"]
    exact, coarse = engine(made[1]), engine(made[1], "int4")
    hidden = np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32)
    apart = np.abs(exact.cache().logits(hidden) - coarse.cache().logits(hidden)).max()
    assert 1e-3 < apart < 1.0


def test_messages_become_a_prompt(made: Any, decoder_bundle: Callable[[str], Any]) -> None:
    with load(made[1]) as session:
        messages = [{"role": "user", "content": "the film"}, {"role": "user", "content": "was good"}]
        assert isinstance(session, Writer)
        ids = tiny.tokenizer().encode("the film was good the", add_special_tokens=False).ids
        assert session.ids_of(messages) == ids != session.ids_of("the film was good the")
        said = [token.id for token in generate(session.decoder, ids, 6, way=session.way)]
        assert [piece.token for piece in session.generate(messages, 6)] == said
        with pytest.raises(BadInput, match="refuses these messages: no robots"):
            session.generate([{"role": "robot", "content": "beep"}])
        for wrong, said in (
            ([], "found none"),
            ([{"role": "user"}], "message 0: expected"),
            (7, "a string or messages"),
        ):
            with pytest.raises(BadInput, match=said):
                session.generate(wrong)  # type: ignore[arg-type]
    with load(decoder_bundle("llama")[1]) as session, pytest.raises(BadSetting, match="has no chat template"):
        session.generate(messages)


@pytest.mark.parametrize(
    ("stage", "way", "value", "message"),
    [
        ("segments 0", ["outputs", -1, "name"], "gates", r"segments\[0\]: it puts out"),
        ("segments 0", ["outputs", -2, "shape", 2], 31, "all but the last put out leaving"),
        ("decoder cache_fills 0", ["outputs", 0, "name"], "new_k_9", r"decoder.cache_fills\[0\]: it must put out"),
        ("decoder cache_fills 0", ["inputs", 0, "name"], "state", r"decoder.cache_fills\[0\]: its input state"),
        ("decoder head", ["outputs", 0, "shape", 2], 59, r"must make logits \[batch, seq, 60\]"),
    ],
)
def test_a_manifest_that_cannot_be(
    made: Any, tmp_path: Path, stage: str, way: list[Any], value: Any, message: str
) -> None:
    bundle = Path(shutil.copytree(made[1], tmp_path / "bundle"))
    told = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    found: Any = told
    for word in stage.split():
        found = found[int(word) if word.isdigit() else word]
    for facts in found["variants"].values():
        place: Any = facts
        for step in way[:-1]:
            place = place[step]
        place[way[-1]] = value
    (bundle / "manifest.json").write_text(json.dumps(told), encoding="utf-8")
    with pytest.raises(BadManifest, match=message):
        open_bundle(bundle)


def test_graphs_of_another_network_are_told(made: Any) -> None:
    family = made[0].model.config.model_type
    network = with_exits(family, (1, 2), True)
    with torch.no_grad():
        network.policies["2"].bias += 1.0  # type: ignore[operator]
    with pytest.raises(NotTheNetwork, match="segment_01, variant fp32, tensor gate"):
        verify_decoder(network, made[1])
    network = with_exits(family, (1, 2), True)
    with torch.no_grad():
        network.model.lm_head.weight[50] += 1.0
    with pytest.raises(NotTheNetwork, match="head, variant fp32, tensor logits"):
        verify_decoder(network, made[1])


def test_a_segment_ends_where_there_is_an_exit(tmp_path: Path) -> None:
    tiny.tokenizer().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="may not end behind block 2: there are exits behind 1"):
        write_decoder(with_exits("llama", (1,), False), tmp_path, tmp_path / "bundle", cuts="each")
    assert not (tmp_path / "bundle").exists()
