"""ViT, DeiT and DINOv2 against transformers' own forward, block by block, at two sizes."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

from offramp.models import EarlyExitNetwork, NetworkSpec, family_of
from offramp.models.macs import segment_macs, stem_macs

FAMILIES = sorted(tiny.VISION)


def network(family: str, pooling: str = "cls", policy: str | None = None) -> EarlyExitNetwork:
    spec = NetworkSpec(("a", "b"), (1, 2, 3), pooling, policy)
    return EarlyExitNetwork(lively(tiny.backbone(family)), spec).eval()


def lively(backbone: Any) -> Any:
    """Fresh tokens, positions and norms are zeros and ones, which would hide that one is left out."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return backbone


def resized(backbone: Any, size: int) -> Any:
    vision = family_of(backbone.config.model_type).vision
    assert vision is not None
    vision.resize(backbone, size)
    return backbone


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_matches_transformers(family: str) -> None:
    base = lively(tiny.backbone(family))
    inputs = tiny.pixel_values()
    with torch.no_grad():
        out = base(**inputs, output_hidden_states=True)
        net = EarlyExitNetwork(base, NetworkSpec(("a", "b"), (1, 2, 3), "cls")).eval()
        hidden, context = net.stem(inputs)
        assert context == {}, "no image token is padding"
        torch.testing.assert_close(hidden, out.hidden_states[0], atol=1e-5, rtol=0)
        for block in range(net.block_count):
            hidden = net.run_block(block, hidden, context)
            torch.testing.assert_close(hidden, out.hidden_states[block + 1], atol=1e-5, rtol=0)
        # The last exit reads what transformers' own classifier reads: after the final LayerNorm.
        torch.testing.assert_close(
            net.pooled(-1, hidden, context), out.last_hidden_state[:, 0], atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_exits_read_the_final_norm_of_the_patches(family: str) -> None:
    net = network(family, "mean")
    prefix = 2 if family == "deit" else 1
    with torch.no_grad():
        hidden, context = net.stem(tiny.pixel_values())
        hidden = net.run_block(0, hidden, context)
        expected = net.backbone.layernorm(hidden)[:, prefix:].mean(1)
        torch.testing.assert_close(net.pooled(-1, hidden, context), expected, atol=1e-5, rtol=0)
    assert net.pooler is None, "BERT's pooler is not for images"


@pytest.mark.parametrize("family", FAMILIES)
def test_another_size_is_what_transformers_interpolates(family: str) -> None:
    # DINOv2 interpolates whenever the size differs; the others when they are asked to.
    options = {} if family == "dinov2" else {"interpolate_pos_encoding": True}
    inputs = tiny.pixel_values(size=24)
    with torch.no_grad():
        base = lively(tiny.backbone(family))
        reference = base(**inputs, **options, output_hidden_states=True).hidden_states[-1]
        net = EarlyExitNetwork(resized(base, 24), NetworkSpec(("a", "b"), (1, 2, 3), "cls")).eval()
        hidden, context = net.stem(inputs)
        for block in range(net.block_count):
            hidden = net.run_block(block, hidden, context)
        torch.testing.assert_close(hidden, reference, atol=1e-5, rtol=0)
    assert net.longest == hidden.shape[1] == (38 if family == "deit" else 37)
    assert net.config.image_size == 24, "a checkpoint is built anew from the configuration"
    again = type(base)(net.config)
    again.load_state_dict(base.state_dict(), strict=False)  # shapes must fit; its own pooler is gone


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_its_images(family: str) -> None:
    net, inputs = network(family, "mean", "both"), tiny.pixel_values(3)["pixel_values"]
    with torch.no_grad():
        whole = net({"pixel_values": inputs})
        alone = [net({"pixel_values": image[None]}) for image in inputs]
    torch.testing.assert_close(whole.logits, torch.cat([out.logits for out in alone]), atol=1e-5, rtol=0)
    assert whole.gate_logits is not None
    torch.testing.assert_close(
        whole.gate_logits, torch.cat([out.gate_logits for out in alone]), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_macs_are_counted_over_tokens(family: str, pooling: str) -> None:
    net = network(family, pooling)
    net.config._attn_implementation = "eager"  # written out, so that the counter sees both products
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(tiny.pixel_values(1))
    counted = sum(cost.of(net.longest) for cost in (stem_macs(net), *segment_macs(net)))
    assert counter.get_total_flops() == 2 * counted
