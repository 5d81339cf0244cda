"""What exits of a language model say of tokens, how many blocks a token needs, what leaving comes to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from offramp.models.decoder import DecoderNetwork
from offramp.training.texts import IGNORED, Texts


@dataclass(frozen=True)
class Said:
    """Of tokens that may leave early; exits are in order, the last block among them.

    states: hidden behind the exits before the last [tokens, exits - 1, hidden]. following: what is right
    [tokens]. losses: nats; words: the likeliest [tokens, exits]. leads: of the likeliest over the next, in
    probability; cosines: of the hidden state and the one a block before, -1 behind block 1 [tokens, exits -
    1].
    """

    states: Tensor
    following: Tensor
    losses: Tensor
    words: Tensor
    leads: Tensor
    cosines: Tensor

    def __len__(self) -> int:
        return len(self.following)

    @property
    def right(self) -> Tensor:
        """Where the likeliest is right [tokens, exits]."""
        return self.words == self.following[:, None]


def memorized_block(right: Tensor, exits: Sequence[int]) -> Tensor:
    """Blocks in front of the first exit from which on every exit is right [tokens]; all blocks where the last
    one is wrong.

    right [tokens, exits], exits: blocks (1-based) that end with the last.
    """
    steady = right.long().flip(1).cumprod(1).sum(1)  # [tokens] how many exits at the end are all right
    first = (len(exits) - steady).clamp(max=len(exits) - 1)
    return torch.tensor(exits, device=right.device)[first]


def may_leave(following: Tensor) -> Tensor:
    """Tokens that may leave early [batch, seq]: those whose next one is learned, less the first of each row,
    which is the prompt's last and runs every block.
    """
    learned = following != IGNORED
    return learned & (learned.cumsum(1) > 1)


def some(where: Tensor, most: int) -> Tensor:
    """At most so many of the places [batch, seq], drawn where there are more."""
    places = where.flatten().nonzero()[:, 0]
    kept = torch.zeros_like(where.flatten())
    kept[places[torch.randperm(len(places))[:most].to(places.device)]] = True
    return kept.view_as(where)


@torch.no_grad()
def hidden_at(
    network: DecoderNetwork, ids: Tensor, where: Tensor, exits: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Of tokens at `where` [batch, seq], every one of them at full depth: hidden behind each exit [tokens,
    exits, hidden] and its cosine with the hidden state a block before [tokens, exits].
    """
    network.model.eval()  # what is frozen drops nothing out
    states = [state[where] for state in network(ids)]
    cosines = [
        functional.cosine_similarity(states[block - 1].float(), states[block - 2].float(), dim=-1)
        if block > 1
        else -torch.ones(len(states[0]), device=ids.device)
        for block in exits
    ]
    return torch.stack([states[block - 1] for block in exits], 1), torch.stack(cosines, 1)


def exit_logits(network: DecoderNetwork, states: Tensor, exits: Sequence[int]) -> Iterator[Tensor]:
    """Logits [tokens, vocabulary] of one exit after another: states [tokens, exits, hidden]."""
    for number, block in enumerate(exits):
        yield network.head(network.exit_hidden(block, states[:, number])).float()


def gates_of(network: DecoderNetwork, states: Tensor, exits: Sequence[int]) -> Tensor:
    """Logits of P(exit) [tokens, exits - 1] behind all exits but the last: states [tokens, exits - 1 or more,
    hidden].
    """
    with torch.autocast(states.device.type, enabled=False):  # bf16 would only blur the probabilities
        told = [network.gate_logit(block, states[:, n].float()) for n, block in enumerate(exits[:-1])]
    return torch.stack(told, 1)


@torch.no_grad()
def listen(
    network: DecoderNetwork,
    rows: Texts,
    index: Sequence[int],
    exits: Sequence[int],
    batch_size: int,
    tokens: int,
) -> Said:
    """What exits say of these rows, so many rows and, as logits are large, tokens at a time."""
    network.eval()
    found: list[list[Tensor]] = [[] for _ in range(6)]
    for start in tqdm(range(0, len(index), batch_size), desc="what exits say", mininterval=1.0):
        ids, following = rows.batch(index[start : start + batch_size], network.model.device)
        where = may_leave(following)
        states, cosines = hidden_at(network, ids, where, exits)
        for part, labels in zip(states.split(tokens), following[where].split(tokens), strict=True):
            losses, words, leads = [], [], []
            for logits in exit_logits(network, part, exits):
                losses.append(functional.cross_entropy(logits, labels, reduction="none"))
                first = logits.softmax(-1).topk(2, dim=-1)
                words.append(first.indices[:, 0])
                leads.append(first.values[:, 0] - first.values[:, 1])
            for kept, value in zip(found[2:5], (losses, words, leads), strict=True):
                kept.append(torch.stack(value, 1))
        found[0].append(states[:, :-1])
        found[1].append(following[where])
        found[5].append(cosines[:, :-1])
    all_of = [torch.cat(values) for values in found]
    return Said(all_of[0], all_of[1], all_of[2], all_of[3], all_of[4][:, :-1], all_of[5])


def first_above(scores: Tensor, bar: float) -> Tensor:
    """Exit at which each token leaves, 0-based [tokens]: the first whose score [tokens, exits - 1] is above
    the bar, else the last.
    """
    always = torch.ones_like(scores[:, :1], dtype=torch.bool)
    return torch.cat([scores > bar, always], 1).long().argmax(1)


def outcome(said: Said, left: Tensor, exits: Sequence[int]) -> dict[str, Any]:
    """What leaving there comes to, left [tokens] as first_above gives it: mean depth in blocks, share of
    tokens by exit, loss in nats, share of tokens said right, and as the last block says.
    """
    shares = torch.bincount(left, minlength=len(exits)) / len(said)
    words = said.words.gather(1, left[:, None])[:, 0]
    return {
        "depth": round(float(torch.tensor(exits, device=left.device)[left].double().mean()), 3),
        "shares": [round(share, 4) for share in shares.tolist()],
        "loss": _mean(said.losses.gather(1, left[:, None])),
        "right": _mean(words == said.following),
        "agrees": _mean(words == said.words[:, -1]),
    }


def nearest(
    said: Said, scores: Tensor, depth: float, exits: Sequence[int], steps: int = 200
) -> dict[str, Any]:
    """The outcome, and its threshold, whose mean depth is nearest to `depth`, of one threshold for all exits
    that is swept over quantiles of scores [tokens, exits - 1].
    """
    ordered = scores.flatten().sort().values
    places = torch.linspace(0, len(ordered) - 1, steps + 1).round().long()
    bars = [float(ordered[0]) - 1, *ordered[places.to(ordered.device)].tolist()]
    blocks = torch.tensor(exits, device=scores.device, dtype=torch.float64)
    depths = [float(blocks[first_above(scores, bar)].mean()) for bar in bars]
    best = min(range(len(bars)), key=lambda number: abs(depths[number] - depth))
    return {"threshold": round(bars[best], 7), **outcome(said, first_above(scores, bars[best]), exits)}


@torch.no_grad()
def compared(network: DecoderNetwork, said: Said, exits: Sequence[int]) -> dict[str, Any]:
    """What each exit says, by exit; what the policies at 0.5 come to, and CALM's two rules at their depth."""
    if not len(said):
        return {"tokens": 0}
    policy = outcome(said, first_above(gates_of(network, said.states, exits), 0.0), exits)
    stay = [outcome(said, torch.full_like(said.following, number), exits) for number in range(len(exits))]
    return {
        "tokens": len(said),
        "exits": list(exits),
        **{name: [one[name] for one in stay] for name in ("loss", "agrees", "right")},
        "policy": policy,
        "calm": {  # thresholds are tuned on these very tokens
            "confidence": nearest(said, said.leads, policy["depth"], exits),
            "cosine": nearest(said, said.cosines, policy["depth"], exits),
        },
    }


def _mean(values: Tensor) -> float:
    return round(float(values.double().mean()), 4)
