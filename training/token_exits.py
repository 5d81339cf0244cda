"""Outputs of a language model's exits by token, and the result of rules that choose each token's exit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from offramp.models.decoder import DecoderNetwork
from offramp.runtime.progress import track
from offramp.training.lm_data import IGNORED, TokenRows


@dataclass(frozen=True)
class TokenOutputs:
    """The outputs of all exits for tokens that may exit early; exits are in order, the last block among them.

    states: hidden after the exits before the last [tokens, exits - 1, hidden]. targets: the right next token
    [tokens]. losses: in nats; predictions: the likeliest next token; both [tokens, exits]. margins: top
    probability minus the second; cosines: of the hidden state and the one a block before, -1 after block 1;
    both [tokens, exits - 1].
    """

    states: Tensor
    targets: Tensor
    losses: Tensor
    predictions: Tensor
    margins: Tensor
    cosines: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def right(self) -> Tensor:
        """Whether each prediction is the target [tokens, exits]."""
        return self.predictions == self.targets[:, None]


def may_exit_early(targets: Tensor) -> Tensor:
    """Which tokens may exit early [batch, seq]: those whose next token is learned, except the first of each
    row.

    That first one is the prompt's last token and runs every block.
    """
    learned = targets != IGNORED
    return learned & (learned.cumsum(1) > 1)


def sample_tokens(places: Tensor, count: int) -> Tensor:
    """Draw at most `count` of the marked tokens at random; gives their mask [batch, seq]."""
    marked = places.flatten().nonzero()[:, 0]
    sampled = torch.zeros_like(places.flatten())
    sampled[marked[torch.randperm(len(marked))[:count].to(marked.device)]] = True
    return sampled.view_as(places)


@torch.no_grad()
def states_at_exits(
    network: DecoderNetwork, ids: Tensor, where: Tensor, exits: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The hidden states of the tokens at `where` [batch, seq] after each exit, all tokens at full depth.

    Gives hidden [tokens, exits, hidden] and its cosine with the hidden state a block before [tokens, exits].
    """
    network.model.eval()  # the frozen model has no dropout
    states = [state[where] for state in network(ids)]
    cosines = [
        functional.cosine_similarity(states[block - 1].float(), states[block - 2].float(), dim=-1)
        if block > 1
        else -torch.ones(len(states[0]), device=ids.device)
        for block in exits
    ]
    return torch.stack([states[block - 1] for block in exits], 1), torch.stack(cosines, 1)


def exit_logits(network: DecoderNetwork, states: Tensor, exits: Sequence[int]) -> Iterator[Tensor]:
    """Compute the logits [tokens, vocabulary] of one exit after another; states [tokens, exits, hidden]."""
    for number, block in enumerate(exits):
        yield network.head(network.exit_hidden(block, states[:, number])).float()


def policy_logits(network: DecoderNetwork, states: Tensor, exits: Sequence[int]) -> Tensor:
    """Compute the policies' logits of P(exit) [tokens, exits - 1] after all exits but the last.

    states [tokens, exits - 1 or more, hidden].
    """
    with torch.autocast(states.device.type, enabled=False):  # bf16 would only lose precision
        columns = [network.gate_logit(block, states[:, n].float()) for n, block in enumerate(exits[:-1])]
    return torch.stack(columns, 1)


@torch.no_grad()
def collect_tokens(
    network: DecoderNetwork,
    rows: TokenRows,
    index: Sequence[int],
    exits: Sequence[int],
    batch_size: int,
    tokens: int,
) -> TokenOutputs:
    """Run the network on the rows at `index` and collect the outputs of the exits.

    `batch_size` rows run at a time and, as logits are large, the head reads `tokens` tokens at a time.
    """
    network.eval()
    states, cosines, targets = list[Tensor](), list[Tensor](), list[Tensor]()
    losses, predictions, margins = list[Tensor](), list[Tensor](), list[Tensor]()
    for start in track(range(0, len(index), batch_size), "outputs of exits", unit="batch"):
        ids, batch_targets = rows.batch(index[start : start + batch_size], network.model.device)
        where = may_exit_early(batch_targets)
        batch_states, batch_cosines = states_at_exits(network, ids, where, exits)
        states.append(batch_states[:, :-1])
        cosines.append(batch_cosines[:, :-1])
        targets.append(batch_targets[where])
        for chunk, labels in zip(batch_states.split(tokens), targets[-1].split(tokens), strict=True):
            columns: list[tuple[Tensor, Tensor, Tensor]] = []
            for logits in exit_logits(network, chunk, exits):
                top = logits.softmax(-1).topk(2, dim=-1)
                loss = functional.cross_entropy(logits, labels, reduction="none")
                columns.append((loss, top.indices[:, 0], top.values[:, 0] - top.values[:, 1]))
            for parts, values in zip((losses, predictions, margins), zip(*columns, strict=True), strict=True):
                parts.append(torch.stack(values, 1))
    return TokenOutputs(
        torch.cat(states),
        torch.cat(targets),
        torch.cat(losses),
        torch.cat(predictions),
        torch.cat(margins)[:, :-1],
        torch.cat(cosines),
    )


def first_exit_above(scores: Tensor, threshold: float) -> Tensor:
    """The first exit (0-based) whose score is above the threshold, else the last [tokens].

    scores [tokens, exits - 1].
    """
    always = torch.ones_like(scores[:, :1], dtype=torch.bool)
    return torch.cat([scores > threshold, always], 1).long().argmax(1)


def figures_at_exits(outputs: TokenOutputs, exit_numbers: Tensor, exits: Sequence[int]) -> dict[str, Any]:
    """The figures of tokens that exit at these exits [tokens] (0-based).

    Mean depth in blocks, share of tokens by exit, loss in nats, share of right predictions and of those that
    agree with the last block.
    """
    shares = torch.bincount(exit_numbers, minlength=len(exits)) / len(outputs)
    predictions = outputs.predictions.gather(1, exit_numbers[:, None])[:, 0]
    blocks = torch.tensor(exits, device=exit_numbers.device)
    return {
        "depth": round(float(blocks[exit_numbers].double().mean()), 3),
        "shares": [round(share, 4) for share in shares.tolist()],
        "loss": _mean(outputs.losses.gather(1, exit_numbers[:, None])),
        "right": _mean(predictions == outputs.targets),
        "agrees": _mean(predictions == outputs.predictions[:, -1]),
    }


def figures_at_depth(
    outputs: TokenOutputs, scores: Tensor, depth: float, exits: Sequence[int], steps: int = 200
) -> dict[str, Any]:
    """The figures at the threshold on scores for which the mean depth in blocks is nearest to `depth`.

    The threshold is the same for all exits; it is swept over quantiles of scores [tokens, exits - 1].
    """
    ordered = scores.flatten().sort().values
    places = torch.linspace(0, len(ordered) - 1, steps + 1).round().long()
    thresholds = [float(ordered[0]) - 1, *ordered[places.to(ordered.device)].tolist()]
    blocks = torch.tensor(exits, device=scores.device, dtype=torch.float64)
    depths = [float(blocks[first_exit_above(scores, threshold)].mean()) for threshold in thresholds]
    best = min(range(len(thresholds)), key=lambda number: abs(depths[number] - depth))
    result = figures_at_exits(outputs, first_exit_above(scores, thresholds[best]), exits)
    return {"threshold": round(thresholds[best], 7), **result}


@torch.no_grad()
def compare_rules(network: DecoderNetwork, outputs: TokenOutputs, exits: Sequence[int]) -> dict[str, Any]:
    """Compare each exit, the policies at P(exit) 0.5, and CALM's rules at the policies' mean depth."""
    if not len(outputs):
        return {"tokens": 0}
    gate_logits = policy_logits(network, outputs.states, exits)
    policy = figures_at_exits(outputs, first_exit_above(gate_logits, 0.0), exits)
    fixed = [
        figures_at_exits(outputs, torch.full_like(outputs.targets, number), exits)
        for number in range(len(exits))
    ]
    return {
        "tokens": len(outputs),
        "exits": list(exits),
        **{name: [result[name] for result in fixed] for name in ("loss", "agrees", "right")},
        "policy": policy,
        "calm": {  # thresholds are tuned on these very tokens
            "confidence": figures_at_depth(outputs, outputs.margins, policy["depth"], exits),
            "cosine": figures_at_depth(outputs, outputs.cosines, policy["depth"], exits),
        },
    }


def _mean(values: Tensor) -> float:
    return round(float(values.double().mean()), 4)
