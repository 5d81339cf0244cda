"""Buffers: used again, and not more idle ones than allowed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from plain_sessions import inputs
from tiny_bundles import CLASSIFIER

from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.engines import buffers
from offramp.runtime.engines.base import EngineOptions, open_engine
from offramp.runtime.engines.buffers import BufferPool


@dataclass(eq=False)
class Idle:
    """Something that a pool keeps."""

    rows: int
    length: int
    bytes: int = 10


def test_pool_gives_back_what_has_the_shape() -> None:
    pool = BufferPool(Idle)
    first, second = pool.get(1, 5), pool.get(2, 5)
    for kept in (first, second):
        pool.put(kept)
    assert pool.get(2, 5) is second and pool.get(1, 5) is first
    assert pool.get(1, 5) is not first, "it has one owner"


def test_pool_keeps_so_many_and_drops_the_least_recently_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "_IDLE_COUNT", 3)
    pool = BufferPool(Idle)
    kept = [pool.get(1, length) for length in range(5)]
    for item in kept:
        pool.put(item)
    assert [pool.get(1, length) is item for length, item in enumerate(kept)] == [
        False,
        False,
        True,
        True,
        True,
    ]


def test_pool_keeps_so_many_bytes_and_at_least_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "_IDLE_BYTES", 25)
    pool = BufferPool(Idle)
    kept = [Idle(1, length) for length in range(3)]
    for item in kept:
        pool.put(item)
    large = Idle(1, 9, 1000)
    pool.put(large)
    assert pool.get(1, 9) is large
    assert [pool.get(1, length) is item for length, item in enumerate(kept)] == [False] * 3


def test_pool_of_one_shape_drops_the_least_recently_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "_IDLE_COUNT", 2)
    pool = BufferPool(Idle)
    kept = [Idle(1, 1) for _ in range(3)]
    for item in kept:
        pool.put(item)
    assert {id(pool.get(1, 1)) for _ in range(2)} == {id(kept[1]), id(kept[2])}


def test_cleared_pool_is_empty() -> None:
    pool = BufferPool(Idle)
    item = pool.get(1, 1)
    pool.put(item)
    pool.clear()
    assert pool.get(1, 1) is not item


@pytest.fixture
def engine() -> Iterator[Any]:
    engine: Any = open_engine(open_bundle(CLASSIFIER), "fp32", EngineOptions())
    yield engine
    engine.close()


def test_engine_uses_buffers_again(engine: Any) -> None:
    state = engine.begin(inputs(1, 5))
    kept = state.buffers
    engine.drop(state)
    again = engine.begin(inputs(1, 5))
    assert again.buffers is kept
    assert engine.begin(inputs(1, 5)).buffers is not kept
