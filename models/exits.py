"""Exits: pool a block's hidden state into one vector and classify it."""

from __future__ import annotations

from torch import Tensor, nn

POOLINGS = ("mean", "cls")


def pooling_weights(attention_mask: Tensor) -> Tensor:
    """Weights [batch, 1, seq] that sum to one over the real tokens, so that mean pooling is one matrix product."""
    keep = attention_mask[:, None, :].float()  # [batch, 1, seq]
    return keep / keep.sum(dim=-1, keepdim=True).clamp(min=1.0)


def pool(hidden: Tensor, weights: Tensor | None) -> Tensor:
    """One vector a row [batch, hidden]: the weighted mean of the tokens or, without weights, the first token."""
    if weights is None:
        return hidden[:, 0]
    return (weights @ hidden)[:, 0]


class Pooler(nn.Module):
    """Dense and tanh on the pooled vector, one for all exits (BERT's pooler, shared as in PABEE and ConsistentEE)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.dense(pooled).tanh()  # type: ignore[no-any-return]


class Exit(nn.Module):
    """A classifier at the end of a segment: dropout and one linear layer, pooled [batch, hidden] -> logits [batch, classes]."""

    def __init__(self, hidden_size: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Linear(hidden_size, classes)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.classify(self.dropout(pooled))  # type: ignore[no-any-return]
