"""split(): what is cut where, what travels between, and that it is the same network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from offramp.export.split import Segment, kept_exits, split
from offramp.models.families import FAMILIES
from offramp.models.macs import segment_macs, stem_macs
from offramp.runtime.bundle.manifest import NEXT, Tensor

SCRIPT = Path(__file__).resolve().parents[2] / "export" / "split.py"


def walk(segments: list[Segment], given: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """What every segment puts out, each fed by those before it."""
    state, said = dict(given), []
    with torch.no_grad():
        for segment in segments:
            out = segment.module(*(state[tensor.name] for tensor in segment.inputs))
            named = {tensor.name: value for tensor, value in zip(segment.outputs, out, strict=True)}
            state |= {name.removeprefix(NEXT): value for name, value in named.items()}
            said.append(named)
    return said


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize(
    ("pooling", "policy"),
    [
        ("mean", "both"),
        ("cls", "state"),
        ("mean", "statistics"),
        ("cls", None),
        ("mean", "jei"),
        ("cls", "lte"),
    ],
)
def test_segments_are_the_network(family: str, pooling: str, policy: str | None) -> None:
    network = tiny.network(family, pooling=pooling, policy=policy)
    given = tiny.inputs(family) if family in tiny.CONFIGS else tiny.pixel_values()
    said = walk(split(network), given)[1:]
    with torch.no_grad():
        whole = network(given)
    for number, out in enumerate(said):
        torch.testing.assert_close(out["logits"], whole.logits[:, number], atol=1e-5, rtol=0)
        if whole.gates is not None and number < 2:
            torch.testing.assert_close(out["gate"], whole.gates[:, number].sigmoid(), atol=1e-5, rtol=0)
        assert ("gate" in out) == (policy is not None and number < 2)


def test_names_and_shapes_are_the_contract() -> None:
    stem, first, *_, last = split(tiny.network("mpnet"))
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
    stem, first, *_ = split(tiny.network("deit"))
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
    for segment in split(tiny.network(policy="state")):
        assert not any("evidence" in tensor.name for tensor in (*segment.inputs, *segment.outputs))


def test_dropped_exits_group_blocks_and_keep_their_own_heads() -> None:
    network = tiny.network()
    segments = split(network, (2,))
    assert [segment.blocks for segment in segments] == [(), (1, 2), (3,)]
    said = walk(segments, tiny.inputs())
    with torch.no_grad():
        logits = network(tiny.inputs()).logits
    torch.testing.assert_close(said[1]["logits"], logits[:, 1], atol=1e-5, rtol=0)
    torch.testing.assert_close(said[2]["logits"], logits[:, 2], atol=1e-5, rtol=0)


def test_macs_are_those_of_the_network() -> None:
    network = tiny.network("electra")
    stem, *segments = split(network)
    assert vars(stem.macs) == vars(stem_macs(network)) and stem.macs.token == 16 * 32
    assert [vars(segment.macs) for segment in segments] == [vars(cost) for cost in segment_macs(network)]


def test_nothing_is_copied() -> None:
    network = tiny.network()
    own = {parameter.data_ptr() for parameter in network.backbone.parameters()}
    for segment in split(network)[1:]:
        assert {parameter.data_ptr() for parameter in segment.module.blocks.parameters()} <= own  # type: ignore[union-attr]


def test_wishes() -> None:
    network = tiny.network()
    assert kept_exits(network, "each") == (1, 2, 3)
    assert kept_exits(network, "every 2") == (2, 3)
    assert kept_exits(network, "1") == (1, 3)
    with pytest.raises(ValueError, match="block 4 does not exist"):
        kept_exits(network, "4")


def test_an_exit_that_is_not_there_is_refused_with_those_that_are() -> None:
    network = tiny.network()
    object.__setattr__(network.spec, "exits", (2, 3))
    with pytest.raises(ValueError, match="no exit after block 1: this checkpoint has exits after 2, 3"):
        split(network, (1,))


def test_half_precision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"torch\.bfloat16"):
        split(tiny.network().bfloat16())


def test_the_script_is_the_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "--segments" in done.stdout


def test_the_script_without_offramp_says_what_to_install(tmp_path: Path) -> None:
    # -S: no site-packages, -I: no PYTHONPATH; what is left is a Python that never saw an install
    done = subprocess.run(
        [sys.executable, "-S", "-I", SCRIPT], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "pip install -e '.[export,cpu]'" in done.stderr and done.stderr.count("\n") == 1
