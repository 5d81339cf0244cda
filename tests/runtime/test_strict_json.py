"""Reading into dataclasses; test_manifest has what is refused."""

from __future__ import annotations

import typing
from dataclasses import dataclass

import pytest

from offramp.runtime.bundle.strict_json import build_value


@dataclass(frozen=True)
class Leaf:
    size: int


@dataclass(frozen=True)
class Tree:
    leaves: tuple[Leaf, ...]


def test_type_hints_are_evaluated_once_per_class(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated: list[object] = []
    evaluate = typing.get_type_hints

    def count(kind: object) -> dict[str, object]:
        evaluated.append(kind)
        return evaluate(kind)

    monkeypatch.setattr(typing, "get_type_hints", count)
    value = {"leaves": [{"size": 1}, {"size": 2}]}
    for _ in range(2):
        assert build_value(Tree, value, "tree") == Tree((Leaf(1), Leaf(2)))
    assert evaluated == [Tree, Leaf]
