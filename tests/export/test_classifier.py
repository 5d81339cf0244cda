"""split_classifier(): what is cut where, what travels between, and that it is the same network."""

from __future__ import annotations

import pytest
import tiny
import torch

from offramp.export.classifier import parse_cuts, split_classifier, truncate
from offramp.export.segments import SplitNetwork
from offramp.models.macs import segment_macs, stem_macs
from offramp.runtime.bundle.manifest import NEXT, Tensor


def walk(split: SplitNetwork, inputs: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The outputs of every segment but the stem, each fed by those before it."""
    values, outputs = dict(inputs), []
    with torch.no_grad():
        for segment in split:
            tensors = segment.module(*segment.reads(values))
            named = {tensor.name: value for tensor, value in zip(segment.outputs, tensors, strict=True)}
            values |= {name.removeprefix(NEXT): value for name, value in named.items()}
            outputs.append(named)
    return outputs[1:]


@pytest.mark.parametrize("family", sorted({*tiny.CONFIGS, *tiny.VISION}))
@pytest.mark.parametrize(
    ("pooling", "policy", "head", "ensemble"),
    [
        ("mean", "both", "linear", False),
        ("cls", "state", "linear", False),
        ("mean", "statistics", "mlp", False),
        ("cls", None, "linear", False),
        ("mean", "jei", "linear", False),
        ("cls", "lte", "linear", False),
        ("attention", "both", "linear", False),
        ("attention", None, "mlp", False),
        ("attention", None, "mlp", True),
        ("mean", "both", "linear", True),
    ],
)
def test_segments_are_the_network(
    family: str, pooling: str, policy: str | None, head: str, ensemble: bool
) -> None:
    network = tiny.network(family, pooling=pooling, policy=policy, head=head, ensemble=ensemble)
    inputs = tiny.inputs(family) if family in tiny.CONFIGS else tiny.pixel_values()
    outputs = walk(split_classifier(network), inputs)
    with torch.no_grad():
        whole = network(inputs)
    for number, out in enumerate(outputs):
        torch.testing.assert_close(out["logits"], whole.logits[:, number], atol=1e-5, rtol=0)
        if whole.gate_logits is not None and number < 2:
            torch.testing.assert_close(out["gate"], whole.gate_logits[:, number].sigmoid(), atol=1e-5, rtol=0)
        assert ("gate" in out) == (policy is not None and number < 2)


def test_names_and_shapes_are_the_contract() -> None:
    stem, first, *_, last = split_classifier(tiny.network("mpnet"))
    assert [tensor.name for tensor in stem.inputs] == ["input_ids", "attention_mask"]
    assert (
        stem.outputs
        == first.inputs
        == (
            Tensor("hidden", "float32", ("batch", "seq", 32)),
            Tensor("mask", "float32", ("batch", 1, 1, "seq")),
            Tensor("pool", "float32", ("batch", 1, "seq")),
            Tensor("position_bias", "float32", (1, 4, "seq", "seq")),
            Tensor("evidence", "float32", ("batch", 2)),
        )
    )
    assert [tensor.name for tensor in first.outputs] == ["next_hidden", "next_evidence", "logits", "gate"]
    assert last.outputs == (Tensor("logits", "float32", ("batch", 2)),)
    assert "evidence" not in [tensor.name for tensor in last.inputs]


def test_images_travel_without_a_mask_and_share_their_weights() -> None:
    stem, first, *_ = split_classifier(tiny.network("deit"))
    assert stem.inputs == (Tensor("pixel_values", "float32", ("batch", 3, 16, 16)),)
    assert (
        stem.outputs
        == first.inputs
        == (
            Tensor("hidden", "float32", ("batch", 18, 32)),
            Tensor("pool", "float32", (1, 1, 18)),
            Tensor("evidence", "float32", ("batch", 2)),
        )
    )


def test_policies_of_the_state_alone_carry_no_evidence() -> None:
    for segment in split_classifier(tiny.network(policy="state")):
        assert not any("evidence" in tensor.name for tensor in (*segment.inputs, *segment.outputs))


def test_dropped_exits_group_blocks_and_keep_their_own_heads() -> None:
    network = tiny.network()
    split = split_classifier(network, (2,))
    assert [segment.blocks for segment in split] == [(), (1, 2), (3,)]
    outputs = walk(split, tiny.inputs())
    with torch.no_grad():
        logits = network(tiny.inputs()).logits
    torch.testing.assert_close(outputs[0]["logits"], logits[:, 1], atol=1e-5, rtol=0)
    torch.testing.assert_close(outputs[1]["logits"], logits[:, 2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kept", [(2, 3), (3,)])
def test_an_ensemble_reads_the_dropped_exits_too(kept: tuple[int, ...]) -> None:
    network = tiny.network(policy=None, ensemble=True)
    split = split_classifier(network, kept)
    outputs = walk(split, tiny.inputs())
    with torch.no_grad():
        whole = network(tiny.inputs()).logits
    for block, out in zip(kept, outputs, strict=True):
        torch.testing.assert_close(out["logits"], whole[:, block - 1], atol=1e-5, rtol=0)
    total = sum(segment.macs.row for segment in split.segments)
    assert total == sum(segment.row for segment in segment_macs(network))


def test_a_truncated_ensemble_answers_as_its_last_exit() -> None:
    network = tiny.network(policy=None, ensemble=True)
    outputs = walk(truncate(network, 2), tiny.inputs())
    with torch.no_grad():
        expected = network(tiny.inputs()).logits[:, 1]
    torch.testing.assert_close(outputs[0]["logits"], expected, atol=1e-5, rtol=0)


def test_macs_are_those_of_the_network() -> None:
    network = tiny.network("electra")
    stem, *segments = split_classifier(network)
    assert vars(stem.macs) == vars(stem_macs(network)) and stem.macs.token == 16 * 32
    assert [vars(segment.macs) for segment in segments] == [vars(cost) for cost in segment_macs(network)]


def test_nothing_is_copied() -> None:
    network = tiny.network()
    weights = {parameter.data_ptr() for parameter in network.backbone.parameters()}
    for segment in split_classifier(network).segments:
        assert {parameter.data_ptr() for parameter in segment.module.blocks.parameters()} <= weights  # type: ignore[union-attr]


def test_cuts_are_read_from_text() -> None:
    network = tiny.network()
    assert parse_cuts(network, "each") == (1, 2, 3)
    assert parse_cuts(network, "every 2") == (2, 3)
    assert parse_cuts(network, "1") == (1, 3)
    with pytest.raises(ValueError, match="block 4 does not exist"):
        parse_cuts(network, "4")


def test_an_exit_that_is_not_there_is_refused_with_those_that_are() -> None:
    network = tiny.network()
    object.__setattr__(network.spec, "exits", (2, 3))
    with pytest.raises(ValueError, match="no exit after block 1: this checkpoint has exits after 2, 3"):
        split_classifier(network, (1,))


def test_half_precision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"torch\.bfloat16"):
        split_classifier(tiny.network().bfloat16())
