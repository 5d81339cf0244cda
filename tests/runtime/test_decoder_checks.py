"""Manifests of decoders whose cache grows in place: what is read, written again, and refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from tiny_bundles import GENERATOR, GENERATOR_NATIVE

from offramp.runtime.bundle.checks import read_manifest
from offramp.runtime.bundle.manifest import APPENDED, FILE_NAME, IN_PLACE, RotationFacts
from offramp.runtime.engines.rotation import rotation_tables
from offramp.runtime.errors import BadManifest


def facts_of(bundle: Any = GENERATOR_NATIVE) -> Any:
    return json.loads((bundle / FILE_NAME).read_text(encoding="utf-8"))


@pytest.mark.parametrize(("bundle", "cache"), [(GENERATOR, APPENDED), (GENERATOR_NATIVE, IN_PLACE)])
def test_manifest_is_written_as_it_was_read(bundle: Any, cache: str) -> None:
    text = (bundle / FILE_NAME).read_text(encoding="utf-8")
    manifest = read_manifest(text, source="here")
    assert manifest.decoder is not None and manifest.decoder.cache == cache
    assert manifest.to_json() == text
    assert ("cache" in json.loads(text)["decoder"]) == (cache == IN_PLACE)


def change(place: Any, path: str, new: Any) -> None:
    *parents, last = [int(key) if key.lstrip("-").isdigit() else key for key in path.split()]
    for key in parents:
        place = place[key]
    place[last] = new


@pytest.mark.parametrize(
    ("graphs", "path", "new", "message"),
    [
        ("stem", "inputs 0 dtype", "int32", "stem: of cache 'in_place' it reads input_ids and perhaps"),
        ("stem", "outputs 0 shape 2", 15, "it puts out hidden float32 .* alone, found hidden float32"),
        (
            "segments 0",
            "inputs 1 dtype",
            "int64",
            "input last_positions .* is not a tensor of a cache in place",
        ),
        (
            "segments 0",
            "inputs 2 shape",
            ["batch"],
            "input total_length .* is not a tensor of a cache in place",
        ),
        ("segments 0", "inputs 3 shape 1", 4, "input rotation_cosine_table .* is not a tensor of a cache"),
        ("segments 1", "inputs -1 shape 2", 7, r"past_v_2 must be float32 \[batch, heads, places, size\]"),
        ("segments 1", "inputs -1 dtype", "float16", r"past_v_2 must be float32 .* found past_v_2 float16"),
        ("segments 1", "outputs 1 shape 3", 8, "new_k_2 must be as past_k_2, found"),
        ("segments 1", "inputs 0 shape 1", "past", "'past'; expected one of 'batch', 'seq', 'places'"),
        ("decoder cache_fills 0", "outputs 0 shape 2", "places", "it must put out what segment_01 adds"),
        ("decoder cache_fills 0", "inputs 1 name", "last_positions", "its input last_positions"),
    ],
)
def test_wrong_graph_is_named(graphs: str, path: str, new: Any, message: str) -> None:
    segment = facts = facts_of()
    for key in graphs.split():
        segment = segment[int(key) if key.isdigit() else key]
    for variant in segment["variants"].values():
        change(variant, path, new)
    with pytest.raises(BadManifest, match=message):
        read_manifest(json.dumps(facts), source="here")


@pytest.mark.parametrize(
    ("bundle", "path", "new", "message"),
    [
        (GENERATOR_NATIVE, "cache", "both", "decoder.cache: 'both'; expected one of 'appended', 'in_place'"),
        (GENERATOR_NATIVE, "rotations rotation frequencies", [], "frequencies: their number: 0; expected 1"),
        (
            GENERATOR_NATIVE,
            "rotations rotation frequencies",
            [1.0] * 5000,
            "their number: 5000; expected at most",
        ),
        (
            GENERATOR_NATIVE,
            "rotations rotation factor",
            4e38,
            r"rotations\['rotation'\]: 4e\+38; expected at most",
        ),
        (GENERATOR_NATIVE, "rotations rotation turns", 1, "turns: unknown key"),
        (
            GENERATOR,
            "rotations",
            {"r": {"frequencies": [1.0]}},
            "decoder.rotations: they are for cache 'in_place'",
        ),
        (GENERATOR_NATIVE, "windows", [0], "decoder.windows: 0; expected 1 or more"),
        (GENERATOR, "windows", [8], "decoder.windows: they are for cache 'in_place'"),
        (GENERATOR, "cache", "in_place", "expected one of 'batch', 'seq', 'places'"),
    ],
)
def test_wrong_field_is_named(bundle: Any, path: str, new: Any, message: str) -> None:
    facts = facts_of(bundle)
    change(facts["decoder"], path, new)
    with pytest.raises(BadManifest, match=message):
        read_manifest(json.dumps(facts), source="here")


def test_tables_of_rotations_grow_without_other_numbers() -> None:
    rotations = {"rotation": RotationFacts((1.0, 0.25), 2.0)}
    small, large = rotation_tables(rotations, 8), rotation_tables(rotations, 64)
    assert list(small) == ["rotation_cosine_table", "rotation_sine_table"]
    for name, table in small.items():
        assert table.dtype == np.float32 and table.flags.c_contiguous
        assert np.array_equal(large[name][:8], table)
    right = 2 * np.cos(np.arange(64)[:, None] * [1.0, 0.25])
    np.testing.assert_allclose(large["rotation_cosine_table"], right, atol=1e-6)
