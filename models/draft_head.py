"""A draft head: one block that predicts a decoder's next hidden state, so that it can draft tokens (EAGLE).

It reads, of each token, the embedding, and the normed hidden state that the last block gave for the token
before it. A linear layer joins them, and a block of the model's own family, with keys and values of its own,
predicts the hidden state of the token itself, from which the model's own norm and head get logits of the
token after it. The prediction can stand in for the last block's hidden state, so that drafts follow from
drafts (EAGLE, arXiv 2401.15077). No weight of the model changes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from offramp.models.decoder import MASKED, DecoderNetwork, cap, project_heads
from offramp.models.families.decoder import Attention

PREFIX = "draft_head."  # of the names of its weights in a network that has one
EPSILON = 1e-6  # added to the mean square of a vector before its root divides the vector


class DraftHead(nn.Module):
    """The weights of a draft head: the layer that joins its inputs, and a block.

    The block is a copy of the model's last one. That is a block of the right form for every family, whose
    outputs have the size that the model's final norm expects; and if its input is close to what the last
    block reads (training begins with that, see recipe draft_head), its output is close to what the model
    computes. The joining layer is zero until it is trained or loaded.
    """

    def __init__(self, network: DecoderNetwork) -> None:
        super().__init__()
        self.join = nn.Linear(2 * network.hidden_size, network.hidden_size)
        for parameter in self.join.parameters():
            nn.init.zeros_(parameter)
        self.block = copy.deepcopy(network.blocks[-1]).requires_grad_(True)

    def inputs(self, embedded: Tensor, normed_before: Tensor) -> Tensor:
        """What the joining layer reads [batch, seq, 2 * hidden]: both vectors, scaled to the same size.

        embedded [batch, seq, hidden]: what the stem gives for tokens. normed_before [batch, seq, hidden]: the
        normed hidden states of the tokens before them, or predictions of these.
        """
        return torch.cat([scaled(normed_before), scaled(embedded)], dim=-1)

    def forward(self, embedded: Tensor, normed_before: Tensor) -> Tensor:
        """The block's input [batch, seq, hidden]; the arguments are those of inputs()."""
        joined: Tensor = self.join(self.inputs(embedded, normed_before))
        return joined


def scaled(vectors: Tensor) -> Tensor:
    """Vectors [..., size], each divided by the root of its mean square."""
    vectors = vectors.float()
    return vectors * torch.rsqrt(vectors.square().mean(-1, keepdim=True) + EPSILON)


def draft_head_of(network: nn.Module) -> DraftHead | None:
    """The draft head of a network, or None if it has none."""
    draft_head = getattr(network, PREFIX[:-1], None)
    return draft_head if isinstance(draft_head, DraftHead) else None


def add_draft_head(network: DecoderNetwork) -> DraftHead:
    """Give a network an untrained draft head in place of any that it has; returns it."""
    draft_head = DraftHead(network)
    setattr(network, PREFIX[:-1], draft_head)
    return draft_head


def load_draft_head(network: DecoderNetwork, state: Mapping[str, Tensor]) -> DraftHead:
    """Give a network the trained draft head of these tensors, whose names begin with PREFIX; returns it.

    Raises ValueError if the tensors are not those of a draft head of this network.
    """
    draft_head = DraftHead(network)
    if other := [name for name in state if not name.startswith(PREFIX)]:
        raise ValueError(f"{other[0]} is no weight of a draft head")
    try:
        draft_head.load_state_dict({name.removeprefix(PREFIX): value for name, value in state.items()})
    except RuntimeError as problem:
        reason = " ".join(str(problem).split())  # its lines name the weights
        raise ValueError(f"no draft head of this model: {reason}") from problem
    setattr(network, PREFIX[:-1], draft_head)
    return draft_head


def normed_hidden(network: DecoderNetwork, hidden: Tensor) -> Tensor:
    """Hidden states after the last block, or predictions of them [..., hidden], by the model's final norm."""
    normed: Tensor = network.family.norm(network.model)(hidden)
    return normed


def normed_before(network: DecoderNetwork, normed: Tensor) -> Tensor:
    """The normed hidden state of the token before each token [batch, seq, hidden].

    normed [batch, seq, hidden]: those of the tokens themselves. Before the first token of a text it is that
    of a hidden state of zeros, so that a text's tokens have the same places here and in the model's cache.
    """
    first = normed_hidden(network, torch.zeros_like(normed[:, :1]))
    return torch.cat([first, normed[:, :-1]], dim=1)


def predict_hidden(
    network: DecoderNetwork,
    draft_head: DraftHead,
    ids: Tensor,
    normed: Tensor,
    steps: int,
    noise: float = 0.0,
) -> Iterator[Tensor]:
    """Predict the hidden states [batch, seq, hidden] of whole texts, for each of `steps` drafts in a row.

    ids [batch, seq], padded at the end. normed [batch, seq, hidden]: the model's normed hidden states. The
    first prediction reads the state of the token before from `normed`; the next one reads it from the first
    prediction, and so on. Of step n (from 0), tokens before place n have no meaning.

    A token of step n attends to what its drafts have in the cache when they are generated one by one: to
    itself and the n - 1 tokens before it as of the steps from n down to 1, and to all earlier tokens as of
    step 0. So one pass of a step computes the drafts after every place of a text.

    noise: the first step's normed states, scaled to a mean square of 1, get uniform noise of -noise to noise
    (as EAGLE's training has it). A step's gradient goes to keys and values of earlier steps, and not to their
    predictions.
    """
    family, block = network.family, draft_head.block
    form = network.attention(block)
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    embedded, context = family.embed(network.model, ids, positions), network.rotate_by(positions)
    before = scaled(normed_before(network, normed))
    if noise:
        added = noise * (2 * torch.rand_like(before) - 1)
        added[:, 0] = 0  # there is no state before the first token, and noise alone would be scaled up
        before = before + added
    keys, values = list[Tensor](), list[Tensor]()
    for _ in range(steps):
        joined = draft_head(embedded, before)
        queries, new_keys, new_values = project_heads(family, form, block, joined, context)
        keys.append(new_keys)
        values.append(new_values)
        hidden = family.finish_block(block, joined, attend_to_steps(queries, keys, values, form))
        yield hidden
        before = normed_before(network, normed_hidden(network, hidden.detach()))


def attend_to_steps(
    queries: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], form: Attention
) -> Tensor:
    """Attention of the tokens of the newest step [batch, seq, heads * size]; see predict_hidden.

    queries [batch, heads, seq, size], scaled. keys, values: by step, each [batch, kv heads, seq, size].
    """
    groups, newest, tokens = form.heads // form.kv_heads, len(keys) - 1, queries.shape[2]
    keys = [part.repeat_interleave(groups, dim=1) for part in keys]
    values = [part.repeat_interleave(groups, dim=1) for part in values]
    places = torch.arange(tokens, device=queries.device)
    distances = places[:, None] - places  # [seq, seq], from a query to a key of step 0
    seen = distances >= newest
    if form.window is not None:
        seen &= distances < form.window
    # One key of every later step, and how many places it lies before the query.
    nearer = [(step, newest - step) for step in range(1, newest + 1)]
    scores = [queries @ keys[0].transpose(2, 3)]
    scores += [(queries * _moved(keys[step], by)).sum(-1, keepdim=True) for step, by in nearer]
    allowed = [seen]
    for _, by in nearer:
        allowed.append(torch.full_like(seen[:, :1], form.window is None or by < form.window))
    masked = cap(torch.cat(scores, dim=-1), form.softcap).masked_fill(~torch.cat(allowed, dim=-1), MASKED)
    weights = masked.softmax(-1)  # [batch, heads, seq, seq + newest]
    attended: Tensor = weights[..., :tokens] @ values[0]
    for number, (step, by) in enumerate(nearer, tokens):
        attended = attended + weights[..., number : number + 1] * _moved(values[step], by)
    return attended.transpose(1, 2).flatten(2)


def _moved(heads: Tensor, places: int) -> Tensor:
    """Heads [batch, heads, seq, size], each token's where the token `places` after it was; zeros at first."""
    if not places:
        return heads
    return torch.cat([torch.zeros_like(heads[:, :, :places]), heads[:, :, :-places]], dim=2)
