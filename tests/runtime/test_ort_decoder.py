"""The ONNX Runtime engine of decoders, with both forms of cache: its signals, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from tiny_bundles import GENERATOR, GENERATOR_NATIVE

from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.engines import ort_decoder, ort_slots
from offramp.runtime.engines.base import EngineOptions, open_engine
from offramp.runtime.errors import BadInput, BadSetting
from offramp.runtime.sequence import KEPT_TOKENS, TokenSequence

SEGMENTS = 3


def open_decoder(bundle: Path = GENERATOR, variant: str = "fp32", **options: Any) -> Any:
    return open_engine(open_bundle(bundle), variant, EngineOptions(**options))


@pytest.fixture(scope="module", params=[GENERATOR, GENERATOR_NATIVE], ids=["appended", "in place"])
def bundle(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Iterator[Any]:
    engine = open_decoder(bundle)
    yield engine
    engine.close()


def random_ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 60, count).tolist()


def begin(engine: Any, ids: list[int]) -> TokenSequence:
    sequence: TokenSequence = engine.begin({"input_ids": np.array([ids], np.int64)})
    return sequence


def full_depth(engine: Any, sequence: TokenSequence, rows: int = 1) -> Any:
    """Signals of the newest rows after the last segment."""
    sequence.rows = rows
    for segment in range(SEGMENTS):
        signals = engine.step(segment, 0, sequence)
    return signals


def test_tokens_one_by_one_equal_a_prompt(engine: Any) -> None:
    ids = random_ids(30)
    prompt = full_depth(engine, begin(engine, ids), 30)
    hidden, logits = prompt.hidden.copy(), prompt.logits.copy()
    sequence = begin(engine, ids[:1])
    for position in range(30):
        if position:
            sequence.feed(ids[position : position + 1])
        signals = full_depth(engine, sequence)
        np.testing.assert_allclose(signals.hidden[0], hidden[position], atol=1e-4)
        np.testing.assert_allclose(signals.logits[0], logits[position], atol=1e-4)
    assert sequence.blocks_run == 30 * engine.manifest.blocks


def test_tokens_after_a_long_prompt_equal_a_prompt(engine: Any) -> None:
    """A prompt of more than KEPT_TOKENS tokens runs on arrays of its own."""
    ids = random_ids(2 * KEPT_TOKENS + 8)
    expected = full_depth(engine, begin(engine, ids)).logits.copy()
    sequence = begin(engine, ids[: KEPT_TOKENS + 4])
    full_depth(engine, sequence)
    sequence.feed(ids[KEPT_TOKENS + 4 :])
    np.testing.assert_allclose(full_depth(engine, sequence).logits, expected, atol=1e-4)


def test_cache_that_grows_keeps_what_it_holds(
    bundle: Path, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = random_ids(50)
    expected = full_depth(engine, begin(engine, ids)).logits.copy()
    monkeypatch.setattr(ort_decoder, "PLACES", 8)
    monkeypatch.setattr(ort_slots, "PLACES", 8)
    engine = open_decoder(bundle)
    sequence = begin(engine, ids[:5])
    cache: Any = sequence.runner
    assert cache.places == 8
    places = set()
    for position in range(5, 50):
        full_depth(engine, sequence)
        sequence.feed(ids[position : position + 1])
        places.add(cache.places)
    np.testing.assert_allclose(full_depth(engine, sequence).logits, expected, atol=1e-4)
    assert places == {8, 16, 32, 64}


def test_truncated_sequence_goes_on_as_if_nothing_had_been_fed(engine: Any) -> None:
    ids = random_ids(6)
    sequence = begin(engine, ids[:5])
    full_depth(engine, sequence)
    sequence.feed(ids[5:])
    expected = full_depth(engine, sequence).logits.copy()
    sequence.feed([1, 2, 3])
    full_depth(engine, sequence)
    sequence.truncate(5)
    sequence.feed(ids[5:])
    np.testing.assert_allclose(full_depth(engine, sequence).logits, expected, atol=1e-4)


def test_signals_before_the_last_segment(engine: Any) -> None:
    sequence = begin(engine, random_ids(4))
    sequence.rows = 2
    hidden = engine.manifest.hidden_size
    for segment in range(SEGMENTS):
        signals = engine.step(segment, 0, sequence)
        assert signals.hidden.shape == (2, hidden) and signals.logits.shape == (2, engine.manifest.vocab_size)
        assert (signals.gate is None) == (segment + 1 == SEGMENTS) and signals.forecast is None
        if signals.gate is not None:
            assert signals.gate.shape == (2,) and ((signals.gate > 0) & (signals.gate < 1)).all()
            exit_logits = signals.logits.copy()
            assert not np.allclose(exit_logits, sequence.runner.logits(signals.hidden)), "it has a translator"


@pytest.mark.parametrize("variant", ["fp32", "int8"])
def test_logits_of_a_token_are_the_same_among_others(bundle: Path, variant: str) -> None:
    engine = open_decoder(bundle, variant)
    cache: Any = begin(engine, [5]).runner
    hidden = np.random.default_rng(0).normal(size=(12, engine.manifest.hidden_size)).astype(np.float32)
    hidden[3] *= 50  # one scale for all twelve would lose the others
    logits = cache.logits(hidden).copy()
    for row in range(12):
        np.testing.assert_allclose(cache.logits(hidden[row : row + 1])[0], logits[row], atol=1e-5, rtol=1e-5)
    draft_logits = cache.logits(hidden, draft=True)
    assert draft_logits.shape[1] < logits.shape[1]
    if variant == "fp32":
        np.testing.assert_allclose(draft_logits, logits[:, : draft_logits.shape[1]], atol=1e-4)


def test_skipped_segment_runs_no_graph(engine: Any) -> None:
    sequence = begin(engine, random_ids(4))
    full_depth(engine, sequence)
    sequence.feed([7])
    engine.step(0, 0, sequence)
    engine.skip(1, sequence)
    engine.step(2, 0, sequence)
    assert sequence.filled == [5, 5, 5]
    assert sequence.blocks_run == 4 * engine.manifest.blocks + engine.manifest.blocks - 1


def test_sequences_do_not_share_a_cache(engine: Any) -> None:
    sequences = [begin(engine, random_ids(4, seed)) for seed in (1, 2)]
    expected = [full_depth(engine, begin(engine, [*random_ids(4, seed), 9])).logits.copy() for seed in (1, 2)]
    for sequence in sequences:
        full_depth(engine, sequence)
    for sequence, logits in zip(sequences, expected, strict=True):
        sequence.feed([9])
        np.testing.assert_allclose(full_depth(engine, sequence).logits, logits, atol=1e-4)


def test_other_variant_is_refused(engine: Any) -> None:
    sequence = begin(engine, [5])
    with pytest.raises(BadSetting, match="opened in fp32; open another session in int8"):
        engine.step(0, 1, sequence)
    with pytest.raises(BadSetting, match="open another session in int8"):
        engine.prepare(1, [0])


def test_join_and_take_are_refused(engine: Any) -> None:
    sequence = begin(engine, [5])
    with pytest.raises(BadSetting, match="sequences walk one by one"):
        engine.join([sequence, sequence])
    with pytest.raises(BadSetting, match="sequences walk one by one"):
        engine.take(sequence, np.array([0]))
    assert engine.max_rows == 1


def test_sequence_beyond_the_longest_input_is_refused(engine: Any) -> None:
    with pytest.raises(BadInput, match="65 tokens: this network reads 64, prompt and answer together"):
        begin(engine, [5] * 65)


def test_name_device_and_facts(engine: Any) -> None:
    assert (engine.name, engine.device) == ("ort", "cpu")
    assert engine.facts["onnxruntime"] == onnxruntime.__version__
    assert set(engine.facts) == {"onnxruntime", "threads", "pool"}


def test_graphs_are_opened_when_first_used(bundle: Path) -> None:
    engine = open_decoder(bundle, lazy=True)
    assert set(engine._open) == {"stem", "head"}
    engine.step(0, 0, begin(engine, [5]))
    assert set(engine._open) == {"stem", "head", "segment_00"}
    engine.prepare(0, range(SEGMENTS))
    assert set(engine._open) == {"stem", "head", "segment_00", "segment_01", "segment_02"}
    engine.close()
    assert not engine._open
