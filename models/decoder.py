"""A decoder taken apart: stem, blocks that read and extend a cache, and a head run only where it is asked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from offramp.models.families import decoder_family_of
from offramp.models.families.decoder import DecoderFamily
from offramp.models.families.family import Context

# Of one block: keys [batch, kv heads, size, tokens], values [batch, kv heads, tokens, size]. Keys lie so that
# the product with queries moves no data.
Pair = tuple[Tensor, Tensor]
HIDDEN_PAST = float(torch.finfo(torch.float16).min) / 2  # see families.family.additive_mask


class DecoderNetwork(nn.Module):
    """A transformers causal language model whose blocks take what they attended to before, and give what
    they add to it. A cache has places for more tokens than it holds: past_valid says which count.

    Raises UnsupportedFamily where no adapter knows the model.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        config = model.config
        self.family: DecoderFamily = decoder_family_of(config.model_type)
        self.longest = self.family.longest(config)
        self.model = model
        self.block_count = len(self.family.blocks(model))
        self.vocab_size, self.hidden_size = int(config.vocab_size), int(config.hidden_size)

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks in order."""
        return self.family.blocks(self.model)

    def stem(self, ids: Tensor, positions: Tensor, past_valid: Tensor) -> tuple[Tensor, Context]:
        """Embed ids [batch, seq] at positions [batch, seq] behind a past that counts where past_valid
        [batch, past] is 1.

        Gives hidden [batch, seq, hidden] and what every block reads: mask_past [batch, 1, 1, past] and
        mask_new [batch, 1, seq, seq], additive, and what the family adds. Positions grow within a row.
        """
        hidden = self.family.embed(self.model, ids, positions)
        past = (1.0 - past_valid[:, None, None, :].to(hidden.dtype)) * HIDDEN_PAST
        later = positions[:, None, :, None] < positions[:, None, None, :]  # [batch, 1, seq, seq]
        context = {"mask_past": past, "mask_new": later.to(hidden.dtype) * HIDDEN_PAST}
        return hidden, context | self.family.context(self.model, hidden, positions)

    def run_block(self, block: int, hidden: Tensor, context: Context, past: Pair) -> tuple[Tensor, Pair]:
        """Run block number `block` (0-based): hidden [batch, seq, hidden] -> the same shape, and its new keys
        and values for the cache.
        """
        return run_block(self.family, self.blocks[block], hidden, context, past)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [batch, seq, vocabulary] of hidden [batch, seq, hidden] behind any block."""
        return self.model.lm_head(self.family.norm(self.model)(hidden))  # type: ignore[no-any-return]


def run_block(
    family: DecoderFamily, block: nn.Module, hidden: Tensor, context: Context, past: Pair
) -> tuple[Tensor, Pair]:
    """See DecoderNetwork.run_block."""
    queries, keys, values = family.project(block, hidden, context)
    new = keys.transpose(2, 3), values
    attended = attend(queries, past, new, context["mask_past"], context["mask_new"])
    return family.finish(block, hidden, attended), new


def attend(queries: Tensor, past: Pair, new: Pair, mask_past: Tensor, mask_new: Tensor) -> Tensor:
    """Attention of queries [batch, heads, seq, size], scaled, to the past and to the new tokens: [batch, seq,
    heads * size].

    Scores of the two stand side by side for one softmax, so that the cache, which is long, is read where it
    lies; and queries of heads that share keys are rows of one product, so that keys are not repeated.
    """
    rows, heads, tokens, size = queries.shape
    shared = past[0].shape[1]  # heads of keys and values
    groups = heads // shared
    queries = queries.reshape(rows, shared, groups * tokens, size)
    before = queries @ past[0] + mask_past  # [batch, kv heads, groups * seq, past]
    among = (queries @ new[0]).view(rows, shared, groups, tokens, tokens) + mask_new[:, :, None]
    among = among.view(rows, shared, groups * tokens, tokens)
    shares = torch.cat([before, among], dim=-1).softmax(-1)
    length = past[0].shape[3]
    seen = shares[..., :length] @ past[1] + shares[..., length:] @ new[1]
    seen = seen.view(rows, shared, groups, tokens, size).permute(0, 3, 1, 2, 4)
    return seen.reshape(rows, tokens, heads * size)
