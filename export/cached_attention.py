"""Attention to a cache that is extended in place: ONNX Runtime's own operator, and what it computes.

While a module is exported, `cached_attention` becomes one node, GroupQueryAttention of domain com.microsoft,
which rotates, attends and writes the new keys and values. Otherwise it computes the same in torch, so that
ee-split can compare the graphs with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from offramp.models.decoder import MASKED, DecoderNetwork, KeyValue, cap, rotated
from offramp.models.families.decoder import Attention
from offramp.models.families.family import Context
from offramp.runtime.bundle.manifest import LAST_POSITIONS, TOTAL_LENGTH, RotationFacts, table_names

OPERATOR = "com.microsoft::GroupQueryAttention"
# The operator's limits on a CPU: sizes of heads, of heads that it rotates, and frequencies of a rotation.
SIZE_STEP, ROTATED_SIZE_STEP, FREQUENCIES_STEP = 8, 16, 8


def reason_against(network: DecoderNetwork) -> str | None:
    """Say which attention of a network the operator cannot express; None if it can express all of it."""
    for number, block in enumerate(network.blocks, 1):
        form = network.whole_attention(block)
        step = ROTATED_SIZE_STEP if form.rotation else SIZE_STEP
        if form.size % step:
            return f"block {number} has heads of size {form.size}, which is no multiple of {step}"
        turned = len(network.rotations[form.rotation].frequencies) if form.rotation else 0
        if turned % FREQUENCIES_STEP:
            return (
                f"block {number} rotates {2 * turned} numbers of a head, which is no multiple of "
                f"{2 * FREQUENCIES_STEP}"
            )
    return None


def rotation_facts(network: DecoderNetwork) -> dict[str, RotationFacts]:
    """The rotations of a network's blocks as a manifest states them, by name."""
    used = {form.rotation for form in map(network.whole_attention, network.blocks)}
    return {
        name: RotationFacts(tuple(rotation.frequencies.float().tolist()), rotation.factor)
        for name, rotation in network.rotations.items()
        if name in used
    }


def cached_attention(
    form: Attention, heads: Tensor, past: KeyValue, context: Context
) -> tuple[Tensor, KeyValue]:
    """Attend to a cache and to new tokens, and extend the cache.

    heads [rows, tokens, all heads * size], as DecoderFamily.project gives them. past: keys and values, each
    [rows, kv heads, places, size]. context: last_positions int32 [rows], the place of each row's last token;
    total_length int32, one more than the largest of them; and the tables of the form's rotation [places,
    frequencies]. Gives attended [rows, tokens, heads * size], and the cache with the new tokens.
    """
    if torch.onnx.is_in_onnx_export():
        return _operator(form, heads, past, context)
    rows, tokens, _ = heads.shape
    last = context[LAST_POSITIONS.name].long()
    positions = (last + 1 - tokens)[:, None] + torch.arange(tokens)  # [rows, tokens]
    parts = heads.unflatten(-1, (-1, form.size)).transpose(1, 2)
    turned, new_values = parts.split([form.heads + form.kv_heads, form.kv_heads], dim=1)
    turned = rotated(turned, form, rotations_at(context, [form.rotation] if form.rotation else [], positions))
    queries, new_keys = turned.split([form.heads, form.kv_heads], dim=1)
    keys, values = past[0].clone(), past[1].clone()
    for row in range(rows):
        keys[row, :, positions[row]], values[row, :, positions[row]] = new_keys[row], new_values[row]
    groups = form.heads // form.kv_heads
    all_keys, all_values = (part.repeat_interleave(groups, dim=1) for part in (keys, values))
    scores = cap(queries @ all_keys.transpose(2, 3) * form.scale, form.softcap)
    distance = positions[:, :, None] - torch.arange(keys.shape[2])  # [rows, tokens, places]
    seen = distance >= 0 if form.window is None else (distance >= 0) & (distance < form.window)
    weights = scores.masked_fill(~seen[:, None], MASKED).softmax(-1)
    return (weights @ all_values).transpose(1, 2).flatten(2), (keys, values)


def rotations_at(tables: Context, rotations: Iterable[str], positions: Tensor) -> Context:
    """Cosine and sine of rotations at positions [batch, seq], as `rotated` reads them.

    tables: cosines and sines of each rotation [places, frequencies], by name.
    """
    context: Context = {}
    for rotation in rotations:
        cosine, sine = (
            functional.embedding(positions, tables[name])[:, None] for name in table_names(rotation)
        )
        context[f"{rotation}_cosine"] = torch.cat([cosine, cosine], dim=-1)
        context[f"{rotation}_sine"] = torch.cat([-sine, sine], dim=-1)
    return context


def _operator(form: Attention, heads: Tensor, past: KeyValue, context: Context) -> tuple[Tensor, KeyValue]:
    tables = [context[name] for name in table_names(form.rotation)] if form.rotation else []
    lengths = context[LAST_POSITIONS.name], context[TOTAL_LENGTH.name]
    attributes: dict[str, Any] = {
        "num_heads": form.heads,
        "kv_num_heads": form.kv_heads,
        "scale": form.scale,
        "do_rotary": int(bool(form.rotation)),
    }
    if form.window is not None:
        attributes["local_window_size"] = form.window
    if form.softcap is not None:
        attributes["softcap"] = form.softcap
    rows, tokens, _ = heads.shape
    attended, keys, values = torch.onnx.ops.symbolic_multi_out(
        OPERATOR,
        (heads, None, None, *past, *lengths, *tables),  # keys and values stand beside queries in heads
        attrs=attributes,
        dtypes=(torch.float32,) * 3,
        shapes=([rows, tokens, form.heads * form.size], past[0].shape, past[1].shape),
        version=1,
    )
    return attended, (keys, values)
