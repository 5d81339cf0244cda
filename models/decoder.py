"""A decoder in parts: stem, blocks that read and extend a cache, exits, and a head.

`hidden_states` runs whole texts at once with a separate depth for every token, for training and verification.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from offramp.models.families import decoder_family_of
from offramp.models.families.decoder import Attention, DecoderFamily
from offramp.models.families.family import Context

if TYPE_CHECKING:  # a slow import, needed for annotations only
    from transformers import PreTrainedModel

# Keys [batch, kv heads, size, tokens] and values [batch, kv heads, tokens, size] of one block. In this layout
# the product of queries and keys moves no data.
KeyValue = tuple[Tensor, Tensor]
# (block, 0-based, hidden [batch, seq, hidden] before it) -> 1 for tokens that run the block, 0 for tokens
# that skip it, shares between them in training [batch, seq]; None if all tokens run it
BlockMask = Callable[[int, Tensor], Tensor | None]
MASKED = float(torch.finfo(torch.float16).min) / 2  # see families.family.additive_mask


class DecoderNetwork(nn.Module):
    """A transformers causal language model whose blocks take cached keys and values and return new ones.

    The cache may have unused places: past_valid marks those that are used. Raises UnsupportedFamily if there
    is no adapter for the model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        config = model.config
        self.family: DecoderFamily = decoder_family_of(config.model_type)
        self.longest = self.family.longest(config)
        self.model = model
        self.block_count = len(self.family.blocks(model))
        self.vocab_size, self.hidden_size = int(config.vocab_size), int(config.hidden_size)
        self.rotations = self.family.rotations(model)
        # Scales of scores, by the rotation that contains them: its square root for queries and for keys. That
        # saves a product for every block, where a rotation turns whole heads and has one scale.
        self._scales: dict[str, float] = {}
        for name, rotation in self.rotations.items():
            forms = [form for form in map(self.family.attention, self.blocks) if form.rotation == name]
            scales = {form.scale for form in forms}
            if len(scales) == 1 and all(2 * len(rotation.frequencies) == form.size for form in forms):
                self._scales[name] = scales.pop()
        self.windows = sorted(
            {window for block in self.blocks if (window := self.attention(block).window) is not None}
        )
        # Logits are softcap * tanh(logits / softcap) in Gemma 2.
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        # By block (1-based, as a string): the translator before the head of a token that exits there, the
        # policy of that exit, and the controller that decides whether a token runs the block (a
        # models.controllers.Controllers, if trained). A classifier's exits and policies have the same names,
        # by which training finds their learning rates.
        self.exits, self.policies, self.controllers = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()

    @property
    def blocks(self) -> nn.ModuleList:
        """The model's blocks in order."""
        return self.family.blocks(self.model)

    def attention(self, block: nn.Module) -> Attention:
        """How a block attends after `rotate_by`, which contains the scale of its scores where it can.

        scale: what is left of it, 1 where its rotation contains it.
        """
        form = self.whole_attention(block)
        return replace(form, scale=1.0) if form.rotation in self._scales else form

    def whole_attention(self, block: nn.Module) -> Attention:
        """How a block attends, with the whole scale; a window that no text exceeds is none."""
        form = self.family.attention(block)
        window = form.window if form.window is not None and form.window < self.longest else None
        return replace(form, window=window)

    def forward(self, ids: Tensor, block_mask: BlockMask | None = None) -> list[Tensor]:
        """The hidden states [batch, seq, hidden] after every block, for training: see hidden_states."""
        return list(hidden_states(self, ids, block_mask))

    def stem(self, ids: Tensor, positions: Tensor, past_valid: Tensor) -> tuple[Tensor, Context]:
        """Embed ids [batch, seq] at positions [batch, seq] that follow a cached past.

        past_valid [batch, past]: 1 for cached tokens that are used. Gives hidden [batch, seq, hidden] and the
        tensors that every block reads: mask_past [batch, 1, seq, past] and mask_new [batch, 1, seq, seq],
        additive, the same with the length of a window in their names, and of every rotation its cosine and
        sine [batch, 1, seq, rotated size]. Positions grow within a row; the past has no gaps.
        """
        hidden = self.family.embed(self.model, ids, positions)
        past = (1.0 - past_valid[:, None, None, :].to(hidden.dtype)) * MASKED
        past = past.expand(-1, -1, ids.shape[1], -1)
        later = positions[:, None, :, None] < positions[:, None, None, :]  # [batch, 1, seq, seq]
        new = later.to(hidden.dtype) * MASKED
        context = {"mask_past": past, "mask_new": new}
        for window in self.windows:
            places = torch.arange(past_valid.shape[1], device=ids.device)
            far = positions[:, None, :, None] - places >= window
            context[f"mask_past_{window}"] = torch.minimum(past, far.to(hidden.dtype) * MASKED)
            far = positions[:, None, :, None] - positions[:, None, None, :] >= window
            context[f"mask_new_{window}"] = torch.minimum(new, far.to(hidden.dtype) * MASKED)
        return hidden, context | self.rotate_by(positions)

    def rotate_by(self, positions: Tensor) -> Context:
        """Cosine and sine of every rotation at positions [batch, seq], each [batch, 1, seq, rotated size].

        The sine contains the sign of the half that is swapped with the other, and both the square root of the
        scores' scale where `attention` says 1.
        """
        context: Context = {}
        for name, rotation in self.rotations.items():
            angles = positions[:, None, :, None].float() * rotation.frequencies.to(positions.device)
            factor = rotation.factor * self._scales.get(name, 1.0) ** 0.5
            cosine, sine = angles.cos() * factor, angles.sin() * factor
            context[f"{name}_cosine"] = torch.cat([cosine, cosine], dim=-1)
            context[f"{name}_sine"] = torch.cat([-sine, sine], dim=-1)
        return context

    def run_block(
        self, block: int, hidden: Tensor, context: Context, past: KeyValue
    ) -> tuple[Tensor, KeyValue]:
        """Run one block (0-based) on hidden [batch, seq, hidden] with its cached keys and values.

        Gives hidden of the same shape, and the new keys and values for the cache.
        """
        form = self.attention(self.blocks[block])
        return run_block(self.family, form, self.blocks[block], hidden, context, past)

    def cache_fill(self, block: int, hidden: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Keys and values [batch, kv heads, seq, size] that tokens leave in a block (0-based) they skip."""
        layer = self.blocks[block]
        return project_cache(self.family, self.attention(layer), layer, hidden, context)

    def add_exits(self, blocks: Sequence[int], *, policies: bool = False) -> None:
        """Add an exit after each of these blocks (1-based): a translator and, with `policies`, a policy.

        Translators change nothing before training. A translator is a linear map of the normed hidden state,
        added to it before the head (the "tuned lens", arXiv 2303.08112); a policy is a linear map of the
        normed hidden state to one number (ConsistentEE's for LLaMA).
        """
        for block in blocks:
            translator = nn.Linear(self.hidden_size, self.hidden_size)
            nn.init.zeros_(translator.weight)
            nn.init.zeros_(translator.bias)
            self.exits[str(block)] = translator
            if policies:
                self.policies[str(block)] = nn.Linear(self.hidden_size, 1)

    def exit_hidden(self, block: int, hidden: Tensor) -> Tensor:
        """The input of the head for tokens that exit after this block (1-based), in the shape of hidden."""
        if (name := str(block)) not in self.exits:
            return hidden
        translated: Tensor = self.exits[name](self.family.norm(self.model)(hidden))
        return hidden + translated

    def gate_logit(self, block: int, hidden: Tensor) -> Tensor:
        """The policy's logit of P(exit) of each token after this block (1-based) [batch, seq]."""
        logits: Tensor = self.policies[str(block)](self.family.norm(self.model)(hidden))
        return logits[..., 0]

    def head(self, hidden: Tensor) -> Tensor:
        """The logits [..., vocabulary] for hidden [..., hidden] after the last block, or for exit_hidden."""
        lm_head = cast("nn.Module", self.model.lm_head)
        logits: Tensor = lm_head(self.family.norm(self.model)(hidden))
        return cap(logits, self.softcap)


def run_block(
    family: DecoderFamily,
    form: Attention,
    block: nn.Module,
    hidden: Tensor,
    context: Context,
    past: KeyValue,
) -> tuple[Tensor, KeyValue]:
    """Run one block of a decoder family on hidden [batch, seq, hidden] with its cached keys and values.

    form: how it attends. Gives hidden of the same shape, and the new keys and values for the cache.
    """
    queries, keys, values = project_heads(family, form, block, hidden, context)
    new = keys.transpose(2, 3), values
    masks = f"_{form.window}" if form.window else ""
    attended = attend(
        queries, past, new, context[f"mask_past{masks}"], context[f"mask_new{masks}"], form.softcap
    )
    return family.finish_block(block, hidden, attended), new


def project_heads(
    family: DecoderFamily, form: Attention, block: nn.Module, hidden: Tensor, context: Context
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [batch, heads, seq, size], rotated and scaled; keys and values [batch, kv heads, seq, size].

    Queries and keys are rotated side by side, in half as many operators.
    """
    heads = family.project(block, hidden, "qkv").unflatten(-1, (-1, form.size)).transpose(1, 2)
    turned, values = heads.split([form.heads + form.kv_heads, form.kv_heads], dim=1)
    queries, keys = rotated(turned, form, context).split([form.heads, form.kv_heads], dim=1)
    return queries if form.scale == 1 else queries * form.scale, keys, values


def project_cache(
    family: DecoderFamily, form: Attention, block: nn.Module, hidden: Tensor, context: Context
) -> tuple[Tensor, Tensor]:
    """The keys and values alone [batch, kv heads, seq, size], for tokens that skip the block."""
    heads = family.project(block, hidden, "kv").unflatten(-1, (-1, form.size)).transpose(1, 2)
    keys, values = heads.chunk(2, dim=1)
    return rotated(keys, form, context), values


def rotated(heads: Tensor, form: Attention, context: Context) -> Tensor:
    """Heads [batch, heads, seq, size], rotated by their positions as the block's attention says."""
    if not form.rotation:
        return heads
    cosine, sine = context[f"{form.rotation}_cosine"], context[f"{form.rotation}_sine"]
    turned, rest = heads, None
    if cosine.shape[-1] < form.size:
        turned, rest = heads.split([cosine.shape[-1], form.size - cosine.shape[-1]], dim=-1)
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cosine + torch.cat([second, first], dim=-1) * sine
    return turned if rest is None else torch.cat([turned, rest], dim=-1)


def cap(values: Tensor, softcap: float | None) -> Tensor:
    """Values between -softcap and softcap, by tanh; as they are for None."""
    return values if softcap is None else torch.tanh(values / softcap) * softcap


def attend(
    queries: Tensor,
    past: KeyValue,
    new: KeyValue,
    mask_past: Tensor,
    mask_new: Tensor,
    softcap: float | None = None,
) -> Tensor:
    """Compute attention of scaled queries [batch, heads, seq, size] to past and new tokens.

    Gives the attended values [batch, seq, heads * size].
    The scores of the two are concatenated for one softmax, so the long cache is read in place. Queries of
    heads that share keys are rows of one product: keys are not repeated, only the mask is, which is the same
    for every block of a graph.
    """
    rows, heads, tokens, size = queries.shape
    kv_heads = past[0].shape[1]
    groups = heads // kv_heads
    queries = queries.reshape(rows, kv_heads, groups * tokens, size)
    mask = torch.cat([mask_past, mask_new], dim=-1).repeat(1, 1, groups, 1)  # [batch, 1, groups * seq, all]
    scores = cap(torch.cat([queries @ past[0], queries @ new[0]], dim=-1), softcap)
    weights_past, weights_new = (scores + mask).softmax(-1).split([mask_past.shape[-1], tokens], dim=-1)
    attended: Tensor = weights_past @ past[1] + weights_new @ new[1]  # [batch, kv heads, groups * seq, size]
    return attended.view(rows, heads, tokens, size).transpose(1, 2).reshape(rows, tokens, heads * size)


def hidden_states(
    network: DecoderNetwork, ids: Tensor, block_mask: BlockMask | None = None
) -> Iterator[Tensor]:
    """Compute hidden [batch, seq, hidden] after every block in turn, for ids [batch, seq] padded at the end.

    A token that skips a block still writes keys and values there, computed from its unchanged hidden state by
    the block's norm and projections. So a token that exits is one that skips all later blocks (the
    "propagated" cache). All blocks are computed and then selected from: depth is counted, no time is saved.
    """
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    family, hidden = network.family, network.family.embed(network.model, ids, positions)
    context = network.rotate_by(positions)
    for number, block in enumerate(network.blocks):
        mask = None if block_mask is None else block_mask(number, hidden)
        form = network.attention(block)
        heads = project_heads(family, form, block, hidden, context)
        attended = _attend_at_once(*heads, form).transpose(1, 2).flatten(2)  # [batch, seq, heads * size]
        output = family.finish_block(block, hidden, attended)
        hidden = output if mask is None else torch.lerp(hidden, output, mask[..., None].to(hidden.dtype))
        yield hidden


def _attend_at_once(queries: Tensor, keys: Tensor, values: Tensor, form: Attention) -> Tensor:
    """Attention of all tokens to those before them [batch, heads, seq, size]."""
    if form.window is None and form.softcap is None:
        return functional.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=1.0, enable_gqa=True
        )
    tokens = queries.shape[2]
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=queries.device).tril()
    if form.window is not None:
        seen = seen.triu(1 - form.window)
    if form.softcap is None:
        return functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=seen, scale=1.0, enable_gqa=True
        )
    keys, values = (part.repeat_interleave(form.heads // form.kv_heads, dim=1) for part in (keys, values))
    scores = cap(queries @ keys.transpose(2, 3), form.softcap).masked_fill(~seen, MASKED)
    return scores.softmax(-1) @ values


def exit_after(depths: Tensor) -> BlockMask:
    """A block mask by which each token runs only its first blocks; depths [batch, seq]: how many."""

    def block_mask(block: int, hidden: Tensor) -> Tensor:
        return (depths > block).to(hidden.dtype)

    return block_mask


def skip_blocks(skipped: frozenset[int], first: int = 0) -> BlockMask:
    """A block mask: tokens from position `first` on skip these blocks (0-based), earlier ones none."""

    def block_mask(block: int, hidden: Tensor) -> Tensor | None:
        if block not in skipped:
            return None
        mask = torch.zeros(hidden.shape[:2], device=hidden.device)
        mask[:, :first] = 1
        return mask

    return block_mask
