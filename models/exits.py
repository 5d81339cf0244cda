"""Exits: pool a block's hidden state into one vector and classify it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from offramp.models.families.family import READS

POOLINGS = ("mean", "cls", "attention")  # of exits that read a whole row
HEADS = ("linear", "mlp")
DECAY = 0.5  # of an ensemble, at the start


def pooling_weights(attention_mask: Tensor) -> Tensor:
    """Weights of mean pooling [batch, 1, seq], which sum to one over the real tokens: one product pools."""
    keep = attention_mask[:, None, :].float()  # [batch, 1, seq]
    return keep / keep.sum(dim=-1, keepdim=True).clamp(min=1.0)


def patch_weights(hidden: Tensor, prefix: int) -> Tensor:
    """Weights of the mean over patches [1, 1, seq], the same for every row; hidden [batch, seq, hidden]."""
    tokens = hidden.shape[1]
    positions = torch.arange(tokens, device=hidden.device)
    return ((positions >= prefix).float() / (tokens - prefix)).view(1, 1, tokens)


def pool(hidden: Tensor, weights: Tensor | None, norm: nn.Module | None = None) -> Tensor:
    """Pool hidden [batch, seq, hidden] into one vector a row [batch, hidden].

    It is the weighted mean of the tokens or, without weights, the first token.
    norm: applied to each token before pooling.
    """
    if weights is None:
        first = hidden[:, 0]  # taken before the norm, which is then computed for one token only
        return first if norm is None else norm(first)
    normed = hidden if norm is None else norm(hidden)
    return (weights @ normed).squeeze(1)  # a squeeze, not a gather: it moves no data


def pool_tokens(
    hidden: Tensor,
    context: Mapping[str, Tensor],
    norm: nn.Module | None,
    attention: AttentionPool | None,
    pooler: Pooler | None,
    own_pool: OwnPool | None = None,
    *,
    per_token: bool = False,
) -> Tensor:
    """Pool hidden [batch, seq, hidden] into [batch, hidden] as an exit reads it.

    context: that of the stem. norm: applied to each token first. attention: the exit's own pooling, or None.
    pooler: applied to the pooled vector, or None. own_pool: that of a model's own head, which replaces all.
    per_token: the exit reads each token, and nothing is pooled.
    """
    if own_pool is not None:
        own: Tensor = own_pool(hidden, context.get("mask"), norm)
        return own
    if per_token:
        return hidden if norm is None else norm(hidden)
    if attention is None:
        vector = pool(hidden, context.get("pool"), norm)
    else:
        vector = attention(hidden if norm is None else norm(hidden), context.get("pool"))
    pooled: Tensor = vector if pooler is None else pooler(vector)
    return pooled


class OwnPool(nn.Module):
    """The pooling before a model's own head, as transformers' classification model does it.

    reads: a name in READS, prefix: tokens before the patches; see HeadLayout.
    """

    def __init__(self, reads: str, prefix: int = 1) -> None:
        super().__init__()
        if reads not in READS:
            raise ValueError(f"reads {reads!r}; choose one of {', '.join(READS)}")
        self.reads, self.prefix = reads, prefix

    def forward(self, hidden: Tensor, mask: Tensor | None, norm: nn.Module | None) -> Tensor:
        """Pool hidden [batch, seq, hidden] into [batch, hidden], or twice as wide for two vectors.

        Reading "tokens", it pools nothing.

        mask [batch, 1, 1, seq]: additive, None without padding. norm: applied to each token first.
        """
        if self.reads == "first":
            return pool(hidden, None, norm)
        normed = hidden if norm is None else norm(hidden)
        if self.reads == "tokens":
            return normed
        if self.reads == "patches":
            patches: Tensor = normed[:, self.prefix :].mean(1)
            return patches
        if self.reads == "first_and_patches":
            return torch.cat([normed[:, 0], normed[:, self.prefix :].mean(1)], dim=1)
        if mask is None:
            return normed.mean(1)
        weights = mask.squeeze(1).softmax(-1)  # [batch, 1, seq], equal for all real tokens, 0 for others
        return (weights @ normed).squeeze(1)


class AttentionPool(nn.Module):
    """Pool hidden [batch, seq, hidden] by learned attention into [batch, hidden], one module for each exit.

    The weights of a row's tokens are the softmax of their products with one learned query. The query starts
    at zero, so that training starts from the mean of the tokens. (A query for each of 12 parts of the
    features was no better on dev.)
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.query = nn.Linear(hidden_size, 1, bias=False)
        nn.init.zeros_(self.query.weight)

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Pool hidden [batch, seq, hidden]; mask [batch, 1, seq], additive, or None for no padding."""
        scores = self.query(hidden).transpose(1, 2)  # [batch, 1, seq]
        if mask is not None:
            scores = scores + mask
        pooled: Tensor = (scores.softmax(-1) @ hidden).squeeze(1)
        return pooled


class Pooler(nn.Module):
    """A dense layer and tanh on the pooled vector [batch, hidden], one for all exits.

    It is BERT's pooler, shared as in PABEE and ConsistentEE.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)

    def forward(self, pooled: Tensor) -> Tensor:
        """Apply the pooler to pooled [batch, hidden]; gives the same shape."""
        return self.dense(pooled).tanh()  # type: ignore[no-any-return]


class Standardize(nn.Module):
    """A layer that centres and scales each feature of the pooled vector by running statistics.

    Exits at every depth then learn at the same rate. Pooled vectors of shallow blocks lie close together
    (spread 1.5 at length 384 after block 1 of a BERT, 7 after block 11): with one learning rate the shallow
    exits reach five points of accuracy less. The statistics are running ones, not the batch's, so that
    training and evaluation compute the same and a batch of one row is no special case.
    """

    mean: Tensor
    variance: Tensor
    seen: Tensor  # number of batches so far; a name in checkpoints

    def __init__(self, features: int, momentum: float = 0.05) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("variance", torch.ones(features))
        self.register_buffer("seen", torch.zeros(()))

    @property
    def scale(self) -> Tensor:
        """The factor on each centred feature [features]."""
        return (self.variance + 1e-6).rsqrt()

    def forward(self, vector: Tensor) -> Tensor:
        """Standardize vectors [batch, features]; in training mode the statistics are updated first."""
        if self.training and len(vector):  # a batch of texts may have no word
            with torch.no_grad():
                self._update(vector.float())
        return (vector.float() - self.mean) * self.scale  # [batch, features]

    @torch.no_grad()
    def folded_into(self, layer: nn.Linear) -> nn.Linear:
        """A copy of the linear layer behind this one that standardizes its input by its own weights."""
        linear = nn.Linear(layer.in_features, layer.out_features)
        weight = layer.weight * self.scale
        linear.weight.copy_(weight)
        linear.bias.copy_(layer.bias - weight @ self.mean)
        return linear

    def _update(self, vector: Tensor) -> None:
        # The first batches have equal weights (a running mean), later ones the momentum.
        self.seen += 1
        weight = torch.clamp(1.0 / self.seen, min=self.momentum)
        centre = vector.mean(0)
        spread = (vector - self.mean).square().mean(0) if len(vector) == 1 else vector.var(0, correction=0)
        self.mean.lerp_(centre, weight)
        self.variance.lerp_(spread, weight)


def join_logits(logits: Tensor, decay: Tensor | None, before: Tensor | None) -> Tensor:
    """Join an exit's logits with those of the ensemble of all exits before it, each [batch, classes].

    The result is logits + decay * before with one learned number an exit: as probabilities, the normalized
    product of the exits' probabilities, each to a power (Zero Time Waste, arXiv 2106.05409, which learns a
    number for each pair of exits). decay: None without an ensemble, before: None at the first exit; then the
    logits are returned as they are.
    """
    if decay is None or before is None:
        return logits
    return logits + decay * before


class Exit(nn.Module):
    """A classifier at the end of a segment, pooled [batch, hidden] -> logits [batch, classes].

    It standardizes, applies dropout, and ends with one linear layer; head "mlp" has another linear layer of
    the same size and a GELU before it. attention: the pooling of the network's tokens for this exit, if each
    exit has its own. ensemble: whether it is joined with the exits before it, see join.
    """

    def __init__(
        self,
        hidden_size: int,
        classes: int,
        dropout: float,
        head: str = "linear",
        attention: AttentionPool | None = None,
        *,
        ensemble: bool = False,
    ) -> None:
        super().__init__()
        self.own_pool = None  # a model's own head has one
        self.attention = attention
        self.decay = nn.Parameter(torch.tensor(DECAY)) if ensemble else None
        self.standardize = Standardize(hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.dense = nn.Linear(hidden_size, hidden_size) if head == "mlp" else None
        self.classify = nn.Linear(hidden_size, classes)

    def forward(self, pooled: Tensor) -> Tensor:
        """Compute logits [batch, classes] from pooled [batch, hidden]."""
        vector = self.standardize(pooled)
        if self.dense is not None:
            vector = functional.gelu(self.dense(vector))
        return self.classify(self.dropout(vector))  # type: ignore[no-any-return]

    def join(self, logits: Tensor, before: Tensor | None) -> Tensor:
        """Join this exit's logits with those of the exits before it in an ensemble; see join_logits.

        No gradient flows into the exits before, so that an exit learns what they leave over, as in boosting.
        """
        return join_logits(logits, self.decay, None if before is None else before.detach())

    @torch.no_grad()
    def folded(self) -> nn.Module:
        """This exit in evaluation mode without standardization, the form for an exported graph."""
        if self.dense is None:
            return self.standardize.folded_into(self.classify)
        return nn.Sequential(self.standardize.folded_into(self.dense), nn.GELU(), self.classify)
