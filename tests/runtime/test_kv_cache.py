"""Keys and values of all blocks in one array each."""

from __future__ import annotations

import numpy as np

from offramp.runtime.bundle.manifest import Tensor
from offramp.runtime.engines.kv_cache import past_arrays, sequence_shape


def past(block: int, heads: int = 2) -> list[Tensor]:
    return [
        Tensor(f"past_k_{block}", "float32", ("batch", heads, 4, "past")),
        Tensor(f"past_v_{block}", "float32", ("batch", heads, "past", 4)),
    ]


def test_added_tokens_are_written_into_the_past_of_their_blocks() -> None:
    for kept in past_arrays([tensor for block in (1, 2, 3) for tensor in past(block)], 8):
        new = kept.for_new_tokens(2)
        kind, axis = next(iter(kept.by_name))[5], 3 if "past_k_1" in kept.by_name else 2
        assert list(new.by_name) == [f"new_{kind}_{block}" for block in (1, 2, 3)]
        for view in new.by_name.values():
            view[...] = np.random.default_rng(0).random(view.shape)
        blocks = new.block_range({"new_k_2", "new_v_2", "new_k_3", "new_v_3", "next_hidden"})
        assert blocks == slice(1, 3)
        kept.by_token[5:7, blocks] = new.by_token[:, blocks]
        assert not kept.by_name[f"past_{kind}_1"].any()
        for block in (2, 3):
            view = kept.by_name[f"past_{kind}_{block}"]
            places = np.moveaxis(view, axis, 0)
            assert np.array_equal(places[5:7], np.moveaxis(new.by_name[f"new_{kind}_{block}"], axis, 0))
            assert not places[:5].any() and not places[7:].any()
            assert view.flags.c_contiguous, "a graph is bound to its address"


def test_larger_past_has_the_same_tensors() -> None:
    for kept in past_arrays(past(1) + past(2), 8):
        larger = kept.empty_past(24)
        assert list(larger.by_name) == list(kept.by_name) and larger.by_token.shape[0] == 24
        assert not larger.by_token.any()


def test_blocks_of_different_shapes_have_their_own_arrays() -> None:
    arrays = past_arrays([*past(1), *past(2, heads=3)], 8)
    assert [list(array.by_name) for array in arrays] == [
        ["past_k_1"],
        ["past_v_1"],
        ["past_k_2"],
        ["past_v_2"],
    ]
    assert [array.for_new_tokens(1).block_range({"new_k_2"}) for array in arrays] == [
        None,
        None,
        slice(0, 1),
        None,
    ]


def test_shape_of_one_sequence() -> None:
    assert sequence_shape(past(1)[0], 5, 7) == (1, 2, 4, 7)
    assert sequence_shape(Tensor("hidden", "float32", ("batch", "seq", 8)), 5, 7) == (1, 5, 8)
