"""Each adapter of a vision family against transformers' own forward, block by block, at two sizes."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import tiny_families
import torch
from torch.utils.flop_counter import FlopCounterMode

from offramp.models import family_of
from offramp.models.macs import segment_macs, stem_macs

FAMILIES = [*sorted(tiny.VISION), *sorted(tiny_families.IMAGES), *tiny_families.IMAGE_FORMS]
PREFIX = {
    "deit": 2,
    "dinov2_with_registers": 4,
    "siglip_vision_model": 0,
}  # tokens before the patches, where it is not one
RESIZES_ALWAYS = ("dinov2", "beit")  # the others interpolate when they are asked to


def resized(backbone: Any, size: int) -> Any:
    vision = family_of(backbone.config.model_type).vision
    assert vision is not None
    vision.resize(backbone, size)
    return backbone


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_matches_transformers(family: str) -> None:
    inputs = tiny.pixel_values()
    with torch.no_grad():
        out = tiny_families.backbone(family)(**inputs, output_hidden_states=True)
        net = tiny_families.network(family, "cls")
        hidden, context = net.stem(inputs)
        assert "mask" not in context, "no image token is padding"
        torch.testing.assert_close(hidden, out.hidden_states[0], atol=1e-5, rtol=0)
        for block in range(net.block_count):
            hidden = net.run_block(block, hidden, context)
            torch.testing.assert_close(hidden, out.hidden_states[block + 1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "clip_vision_model"])
def test_the_last_exit_reads_what_the_classifier_of_transformers_reads(family: str) -> None:
    inputs = tiny.pixel_values()
    with torch.no_grad():
        expected = tiny_families.backbone(family)(**inputs).last_hidden_state[
            :, 0
        ]  # after the last norm, if any
        net = tiny_families.network(family, "cls")
        hidden, context = net.stem(inputs)
        for block in range(net.block_count):
            hidden = net.run_block(block, hidden, context)
    torch.testing.assert_close(net.pooled(-1, hidden, context), expected, atol=1e-5, rtol=0)


def test_exits_of_clip_read_its_pooled_vector() -> None:
    inputs = tiny.pixel_values()
    with torch.no_grad():
        expected = tiny_families.backbone("clip_vision_model")(**inputs).pooler_output
        net = tiny_families.network("clip_vision_model", "cls")
        hidden, context = net.stem(inputs)
        for block in range(net.block_count):
            hidden = net.run_block(block, hidden, context)
    torch.testing.assert_close(net.pooled(-1, hidden, context), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_exits_read_the_normed_patches(family: str) -> None:
    net = tiny_families.network(family, "mean")
    with torch.no_grad():
        hidden, context = net.stem(tiny.pixel_values())
        hidden = net.run_block(0, hidden, context)
        normed = hidden if net.norm is None else net.norm(hidden)
        expected = normed[:, PREFIX.get(family, 1) :].mean(1)
        torch.testing.assert_close(net.pooled(-1, hidden, context), expected, atol=1e-5, rtol=0)
    assert net.pooler is None, "BERT's pooler is not for images"


def test_only_a_beit_that_norms_the_mean_of_its_patches_has_no_norm_for_exits() -> None:
    assert [name for name in FAMILIES if tiny_families.network(name).norm is None] == ["beit"]


@pytest.mark.parametrize("family", FAMILIES)
def test_another_size_is_what_transformers_interpolates(family: str) -> None:
    options = {} if family.startswith(RESIZES_ALWAYS) else {"interpolate_pos_encoding": True}
    inputs = tiny.pixel_values(size=24)
    with torch.no_grad():
        reference = tiny_families.backbone(family)(
            **inputs, **options, output_hidden_states=True
        ).hidden_states[-1]
        base = resized(tiny_families.backbone(family), 24)
        net = tiny_families.as_network(base, "cls")
        hidden, context = net.stem(inputs)
        for block in range(net.block_count):
            hidden = net.run_block(block, hidden, context)
        torch.testing.assert_close(hidden, reference, atol=1e-5, rtol=0)
    assert net.longest == hidden.shape[1] == 36 + PREFIX.get(family, 1)
    assert net.config.image_size == 24, "a checkpoint is built anew from the configuration"
    again = type(base)(net.config)
    again.load_state_dict(base.state_dict(), strict=False)  # shapes must fit; its own pooler is gone


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_its_images(family: str) -> None:
    net, inputs = tiny_families.network(family, "mean", "both"), tiny.pixel_values(3)["pixel_values"]
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
    net = tiny_families.network(family, pooling)
    net.config._attn_implementation = "eager"  # written out, so that the counter sees both products
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(tiny.pixel_values(1))
    counted = sum(cost.of(net.longest) for cost in (stem_macs(net), *segment_macs(net)))
    assert counter.get_total_flops() == 2 * counted
