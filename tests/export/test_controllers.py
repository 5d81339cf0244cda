"""A bundle with controllers walks as the network computes: recipe layer_selection's choice for each token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from offramp.export.bundle import write_bundle
from offramp.export.decoder import ExportableDecoder, open_decoder
from offramp.export.monolith import whole_network
from offramp.export.options import ExportOptions
from offramp.models.controllers import Controllers, controllers_of
from offramp.models.decoder import DecoderNetwork, hidden_states, skip_blocks
from offramp.runtime import RuleSpec, load_generator
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import CONTROLLER
from offramp.runtime.rules.skip import spec_of_list
from offramp.runtime.tuning.completions import score_walk
from offramp.runtime.tuning.search_skips import search_skips
from offramp.training.checkpoint import save_exits
from offramp.training.recipes.layer_selection import controlled_blocks, counting

pytestmark = pytest.mark.slow  # exports decoders

BLOCKS = 5
PROMPT = [5, 9, 30, 12, 44]
# Rotated keys that are appended to the cache, and keys of a cache that grows in place. Rotated ones in such a
# cache, also of tokens that skip a segment: test_generation.
FAMILIES = ["llama", "gpt2"]


def controlled_network(family: str) -> DecoderNetwork:
    """A random network of five blocks, whose controllers choose differently for different tokens."""
    config = tiny.DECODERS[family]()
    config.num_hidden_layers = BLOCKS
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    network = DecoderNetwork(model)
    controllers = Controllers(BLOCKS, network.hidden_size, start=0.0)
    with torch.no_grad():
        for parameter in controllers.parameters():
            parameter.normal_(std=0.5)
    network.controllers = controllers
    return network.eval()


@pytest.fixture(scope="module", params=tiny.with_slow(FAMILIES, "llama"))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A network with controllers, and its bundle in fp32 and int8, from the folder that ee-train leaves."""
    folder, network = tmp_path_factory.mktemp("controlled"), controlled_network(request.param)
    network.model.save_pretrained(folder / "model")
    save_exits(network, folder / "model")
    tiny.tokenizer().save(str(folder / "model" / "tokenizer.json"))
    source = open_decoder(folder / "model")
    assert controllers_of(source.network) is not None
    write_bundle(source, source.split("each"), folder / "bundle", ExportOptions(("fp32", "int8")))
    return network, folder / "bundle"


@torch.no_grad()
def computed(network: DecoderNetwork, ids: list[int], prompt: int, shift: float = 0.0) -> tuple[Any, Any]:
    """Logits and blocks run of every token, of which those after the prompt are controlled; by torch."""
    controllers, whole = controllers_of(network), torch.tensor([ids])
    assert controllers is not None
    may_skip, depth = torch.arange(len(ids))[None] >= prompt, torch.full((1, len(ids)), float(BLOCKS))
    mask = counting(controlled_blocks(controllers, may_skip, None, [], shift), depth)
    *_, last = hidden_states(network, whole, mask)
    return network.head(last)[0], depth[0]


def test_the_rule_of_the_bundle_is_select(exported: Any) -> None:
    manifest = open_bundle(exported[1]).manifest
    assert manifest.rule == RuleSpec("select", {"threshold": 0.5})
    sizes = [
        [tensor.shape[2] for tensor in segment.first_graph.outputs if tensor.name == CONTROLLER]
        for segment in manifest.segments
    ]
    assert sizes == [[3], [2], [1], [], []]


@pytest.mark.parametrize("shift", [0.0, 1.0, -1.0])
def test_answers_are_those_of_the_network(exported: Any, shift: float) -> None:
    """A shift of the logits of running is another threshold of P(run)."""
    network, bundle = exported
    threshold = 1 / (1 + np.exp(shift))
    with load_generator(bundle, rule="select", threshold=threshold) as session:
        tokens = list(session.tokens(PROMPT, 24))
    ids = [*PROMPT, *(token.id for token in tokens)]
    logits, depth = computed(network, ids[:-1], len(PROMPT), shift)
    assert logits.argmax(-1).tolist()[len(PROMPT) - 1 :] == ids[len(PROMPT) :]
    assert [token.depth for token in tokens[1:]] == depth[len(PROMPT) :].tolist()
    assert tokens[0].depth == BLOCKS
    if shift == 0:
        assert len({token.depth for token in tokens[1:]}) > 1, "tokens should differ in what they skip"


def test_texts_that_walk_together_skip_as_each_does_alone(exported: Any) -> None:
    prompts = ["the film was good", "a plot", "the scene was very bad and", "not a film", "warm"]
    with load_generator(exported[1]) as session:
        alone = [[(chunk.token, chunk.depth) for chunk in session.generate(text, 12)] for text in prompts]
        together: list[list[tuple[int, int]]] = [[] for _ in prompts]
        for number, chunk in session.generate_many(prompts, 12, batch_size=3):
            together[number].append((chunk.token, chunk.depth))  # type: ignore[union-attr]
    assert together == alone


def test_scores_of_a_walk_are_those_of_the_network(exported: Any) -> None:
    network, bundle = exported
    completion = torch.randint(3, 60, (20,), generator=torch.Generator().manual_seed(1)).tolist()
    logits, depth = computed(network, [*PROMPT, *completion], len(PROMPT))
    expected = functional.cross_entropy(logits[len(PROMPT) : -1], torch.tensor(completion[1:]))
    with load_generator(bundle) as session:
        assert session.rule.name == "select"
        walked = score_walk(session, PROMPT, completion)
    assert walked.nats == pytest.approx(float(expected), abs=1e-3)
    assert walked.depth == pytest.approx(float(depth[len(PROMPT) : -1].mean()))


def test_int8_walks_by_its_controllers(exported: Any) -> None:
    with load_generator(exported[1], variant="int8") as session:
        tokens = list(session.tokens(PROMPT, 24))
    assert len({token.depth for token in tokens[1:]}) > 1


@pytest.mark.parametrize("skipped", [{1, 3}, {0}, {2, 4}, {0, 1, 2, 3}], ids=str)
def test_lists_are_walked_as_the_network_skips_blocks(exported: Any, skipped: set[int]) -> None:
    network, bundle = exported
    with load_generator(bundle, rule=spec_of_list(skipped)) as session:
        tokens = list(session.tokens(PROMPT, 16))
    ids = [*PROMPT, *(token.id for token in tokens)]
    with torch.no_grad():
        mask = skip_blocks(frozenset(skipped), len(PROMPT))
        *_, last = hidden_states(network, torch.tensor([ids[:-1]]), mask)
        right = network.head(last)[0].argmax(-1).tolist()
    assert right[len(PROMPT) - 1 :] == ids[len(PROMPT) :]
    assert {token.depth for token in tokens[1:]} == {BLOCKS - len(skipped)}


@torch.no_grad()
def test_the_search_adds_what_costs_least(exported: Any) -> None:
    """Each list of the search is the best by the network's own loss, given the list before."""
    network, bundle = exported
    random = torch.Generator().manual_seed(3)
    rows = [(PROMPT, torch.randint(3, 60, (9,), generator=random).tolist()) for _ in range(4)]

    def nats(skipped: frozenset[int]) -> float:
        losses = []
        for prompt, completion in rows:
            *_, last = hidden_states(
                network, torch.tensor([prompt + completion]), skip_blocks(skipped, len(prompt))
            )
            logits = network.head(last)[0, len(prompt) : -1]
            losses.append(functional.cross_entropy(logits, torch.tensor(completion[1:])))
        return float(torch.stack(losses).mean())

    with load_generator(bundle, rule="never") as session:
        lists = search_skips(session, rows, least_share=0.4)
        wide = search_skips(session, rows, beam=3, least_share=0.4)
    assert [len(skip_list.skipped) for skip_list in lists] == [1, 2, 3]
    before = frozenset[int]()
    for skip_list in lists:
        candidates = [before | {block} for block in (1, 2, 3) if block not in before]
        assert skip_list.skipped == min(candidates, key=nats)
        assert skip_list.nats == pytest.approx(nats(skip_list.skipped), abs=1e-3)
        before = skip_list.skipped
    pairs = [frozenset(pair) for pair in ((1, 2), (1, 3), (2, 3))]
    assert wide[1].skipped == min(pairs, key=nats), "a beam of three keeps every list of one"


def test_other_cuts_are_refused_but_for_one_segment(tmp_path: Path) -> None:
    network = controlled_network("llama")
    source = ExportableDecoder(network, tmp_path)
    for cuts in ((2, 5), "every 2", (1, 2, 3, 5)):
        with pytest.raises(ValueError, match=r"cut after each block \(--segments each\)"):
            source.split(cuts)
    assert not any(tensor.name == CONTROLLER for tensor in whole_network(source).outputs)
    facts = source.facts(source.split((BLOCKS,)), ("fp32",))
    assert facts.rule.name == "never"
    assert source.facts(source.split("each"), ("fp32",)).rule.name == "select"
