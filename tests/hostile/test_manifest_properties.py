"""A changed manifest is refused with a typed error, or gives a manifest that can be written and read."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_bundles import CLASSIFIER, EMBEDDING, GENERATOR, TOKENS

from offramp.runtime.bundle.checks import read_manifest
from offramp.runtime.errors import BadManifest

pytestmark = pytest.mark.slow

SOURCES = [
    json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    for folder in (CLASSIFIER, GENERATOR, TOKENS, EMBEDDING)
]
NUMBERS = (
    st.integers(-2, 20)
    | st.sampled_from([2**31, 2**63, 10**12, 10**30, 10**400, -(2**63)])
    | st.floats(allow_nan=False, allow_infinity=False)
)
TEXTS = st.text(max_size=6) | st.sampled_from(
    ["..", "/", "\ud800", "\0", "batch", "past", "fp32", "stem.onnx"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
Place = tuple[Any, Any]  # an object or list, and a key or index in it


def places(value: Any) -> list[Place]:
    """Every place of a value at which another value can stand."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in [(value, key), *places(value[key])]]


@st.composite
def changed_manifests(draw: st.DrawFn) -> str:
    """A manifest of a tiny bundle with up to three values replaced, removed, or exchanged for another."""
    manifest = copy.deepcopy(draw(st.sampled_from(SOURCES)))
    for _ in range(draw(st.integers(1, 3))):
        all_places = places(manifest)
        holder, key = all_places[draw(st.integers(0, len(all_places) - 1))]
        what = draw(st.sampled_from(["replace", "remove", "exchange"]))
        if what == "replace":
            holder[key] = draw(VALUES)
        elif what == "remove":
            del holder[key]
        else:
            other, at = all_places[draw(st.integers(0, len(all_places) - 1))]
            holder[key] = copy.deepcopy(other[at])
    return json.dumps(manifest)


def check(text: str) -> None:
    try:
        manifest = read_manifest(text, source="here")
    except BadManifest as problem:
        assert str(problem).startswith("here: ") and str(problem).isprintable() and len(str(problem)) < 1000
        return
    assert read_manifest(manifest.to_json(), source="again") == manifest


@settings(
    max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
@given(changed_manifests())
def test_changed_manifest_is_refused_or_can_be_written_again(text: str) -> None:
    check(text)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(VALUES)
def test_any_json_is_refused(value: Any) -> None:
    check(json.dumps(value))


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.text(max_size=200) | st.text('{}[]",:0123456789.eE-tfn\\u ', max_size=200))
def test_any_text_is_refused(text: str) -> None:
    check(text)
