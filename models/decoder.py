"""A decoder taken apart: stem, blocks that read and extend a cache, and a head run only where it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offramp.models.depth import Decide, hidden_states
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
        # By block: what stands before the head where a token leaves there, what tells whether it may, and
        # what tells whether a token runs the block at all (a models.controllers.Controllers, if trained).
        # Names begin as a classifier's do, for their learning rates.
        self.exits, self.policies, self.controllers = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks in order."""
        return self.family.blocks(self.model)

    def forward(self, ids: Tensor, decide: Decide | None = None) -> list[Tensor]:
        """Hidden behind every block, for training: see depth.hidden_states."""
        return list(hidden_states(self, ids, decide))

    def stem(self, ids: Tensor, positions: Tensor, past_valid: Tensor) -> tuple[Tensor, Context]:
        """Embed ids [batch, seq] at positions [batch, seq] behind a past that counts where past_valid
        [batch, past] is 1.

        Gives hidden [batch, seq, hidden] and what every block reads: mask_past [batch, 1, seq, past] and
        mask_new [batch, 1, seq, seq], additive, and what the family adds. Positions grow within a row.
        """
        hidden = self.family.embed(self.model, ids, positions)
        past = (1.0 - past_valid[:, None, None, :].to(hidden.dtype)) * HIDDEN_PAST
        past = past.expand(-1, -1, ids.shape[1], -1)
        later = positions[:, None, :, None] < positions[:, None, None, :]  # [batch, 1, seq, seq]
        context = {"mask_past": past, "mask_new": later.to(hidden.dtype) * HIDDEN_PAST}
        return hidden, context | self.family.context(self.model, hidden, positions)

    def run_block(self, block: int, hidden: Tensor, context: Context, past: Pair) -> tuple[Tensor, Pair]:
        """Run block number `block` (0-based): hidden [batch, seq, hidden] -> the same shape, and its new keys
        and values for the cache.
        """
        return run_block(self.family, self.blocks[block], hidden, context, past)

    def add_exits(self, blocks: Sequence[int], *, policies: bool = False) -> None:
        """Translators, which change nothing yet, and policies where wished, behind these blocks (1-based).

        A translator is a linear map of the normed hidden state, added to it before the head (as the "tuned
        lens", arXiv 2303.08112); a policy is one number of it (ConsistentEE's for LLaMA).
        """
        for block in blocks:
            translator = nn.Linear(self.hidden_size, self.hidden_size)
            nn.init.zeros_(translator.weight)
            nn.init.zeros_(translator.bias)
            self.exits[str(block)] = translator
            if policies:
                self.policies[str(block)] = nn.Linear(self.hidden_size, 1)

    def leaving(self, block: int, hidden: Tensor) -> Tensor:
        """What the head reads of tokens that leave behind this block (1-based), the same shape as hidden."""
        if (name := str(block)) not in self.exits:
            return hidden
        translated: Tensor = self.exits[name](self.family.norm(self.model)(hidden))
        return hidden + translated

    def gate(self, block: int, hidden: Tensor) -> Tensor:
        """Logit of P(exit) of each token behind this block (1-based) [batch, seq]."""
        told: Tensor = self.policies[str(block)](self.family.norm(self.model)(hidden))
        return told[..., 0]

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocabulary] of hidden [..., hidden] behind the last block, or of `leaving`."""
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
    lies; and queries of heads that share keys are rows of one product, so that keys are not repeated, and the
    mask is, which is the same for every block of a graph.
    """
    rows, heads, tokens, size = queries.shape
    shared = past[0].shape[1]  # heads of keys and values
    groups = heads // shared
    queries = queries.reshape(rows, shared, groups * tokens, size)
    mask = torch.cat([mask_past, mask_new], dim=-1).repeat(1, 1, groups, 1)  # [batch, 1, groups * seq, all]
    shares = (torch.cat([queries @ past[0], queries @ new[0]], dim=-1) + mask).softmax(-1)
    before, among = shares.split([mask_past.shape[-1], tokens], dim=-1)
    seen: Tensor = before @ past[1] + among @ new[1]  # [batch, kv heads, groups * seq, size]
    return seen.view(rows, heads, tokens, size).transpose(1, 2).reshape(rows, tokens, heads * size)
