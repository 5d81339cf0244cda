"""Keys and values of all blocks in one array each."""

from __future__ import annotations

import numpy as np

from offramp.runtime.bundle.manifest import Tensor
from offramp.runtime.engines.kv_cache import shape_of, stacks_of


def past(block: int, heads: int = 2) -> list[Tensor]:
    return [
        Tensor(f"past_k_{block}", "float32", ("batch", heads, 4, "past")),
        Tensor(f"past_v_{block}", "float32", ("batch", heads, "past", 4)),
    ]


def test_what_is_added_to_some_blocks_comes_to_stand_in_their_pasts() -> None:
    for kept in stacks_of([tensor for block in (1, 2, 3) for tensor in past(block)], 8):
        new = kept.added(2)
        kind, axis = next(iter(kept.parts))[5], 3 if "past_k_1" in kept.parts else 2
        assert list(new.parts) == [f"new_{kind}_{block}" for block in (1, 2, 3)]
        for part in new.parts.values():
            part[...] = np.random.default_rng(0).random(part.shape)
        rows = new.rows({"new_k_2", "new_v_2", "new_k_3", "new_v_3", "next_hidden"})
        assert rows == slice(1, 3)
        kept.by_token[5:7, rows] = new.by_token[:, rows]
        assert not kept.parts[f"past_{kind}_1"].any()
        for block in (2, 3):
            held = kept.parts[f"past_{kind}_{block}"]
            places = np.moveaxis(held, axis, 0)
            assert np.array_equal(places[5:7], np.moveaxis(new.parts[f"new_{kind}_{block}"], axis, 0))
            assert not places[:5].any() and not places[7:].any()
            assert held.flags.c_contiguous  # a graph is given its address


def test_a_larger_one_has_the_same_parts() -> None:
    for kept in stacks_of(past(1) + past(2), 8):
        larger = kept.like(24)
        assert list(larger.parts) == list(kept.parts) and larger.by_token.shape[0] == 24


def test_blocks_of_another_form_stand_apart() -> None:
    stacks = stacks_of([*past(1), *past(2, heads=3)], 8)
    assert [list(stack.parts) for stack in stacks] == [["past_k_1"], ["past_v_1"], ["past_k_2"], ["past_v_2"]]
    assert [stack.added(1).rows({"new_k_2"}) for stack in stacks] == [None, None, slice(0, 1), None]
    assert shape_of(past(1)[0], 5, 7) == (1, 2, 4, 7)
