"""Ways of tokens through a decoder's blocks, what they cost, and which of them depth.py measures."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from offramp.benchmarks.depth_fit import Dev, dialled, search, skips
from offramp.benchmarks.depth_rows import Task
from offramp.models.controllers import Controllers
from offramp.models.decoder import DecoderNetwork
from offramp.models.generation import Walk, Way
from offramp.training.checkpoint import read_json, write_json


@dataclass(frozen=True)
class Costs:
    """Multiply-adds a token: a block's products, its attention to one token, the keys and values that a
    token leaves in a block it goes past, the head, one linear layer of the hidden width.
    """

    blocks: int
    block: int
    pair: int
    kept: int
    head: int
    square: int
    hidden: int

    def of(self, depth: float, extra: float, context: float) -> float:
        """A token with so many tokens before it; extra is what deciding took."""
        run = depth * (self.block + self.pair * context)
        return run + (self.blocks - depth) * self.kept + self.head + extra

    def share(self, depth: float, extra: float, context: float) -> float:
        """The same by what a token of full depth costs."""
        return self.of(depth, extra, context) / self.of(self.blocks, 0, context)


@torch.no_grad()
def costs_of(network: DecoderNetwork) -> Costs:
    """Counted from weights and from the shapes of what a block projects."""
    device = next(network.parameters()).device
    ids = torch.zeros(1, 1, dtype=torch.long, device=device)
    hidden = network.family.embed(network.model, ids, ids)
    context = network.family.context(network.model, hidden, ids)
    queries, keys, _ = network.family.project(network.blocks[0], hidden, context)
    width = network.hidden_size
    return Costs(
        network.block_count,
        sum(p.numel() for p in network.blocks[0].parameters() if p.ndim == 2),
        2 * queries.shape[1] * queries.shape[3],
        2 * width * keys.shape[1] * keys.shape[3],
        width * network.vocab_size,
        width * width,
        width,
    )


# --- ways ---


def uniform(blocks: int, budget: int) -> list[int]:
    """Blocks (0-based) to go past, `budget` left: the middles of equal parts of what stands between the first
    block and the last.
    """
    past = blocks - budget
    return [1 + int((part + 0.5) * (blocks - 2) / past) for part in range(past)]


def static(network: DecoderNetwork, block: int, costs: Costs) -> Way:
    """All tokens leave behind so many blocks."""
    translated = costs.square if str(block) in network.exits else 0

    def way(number: int, hidden: Tensor, walk: Walk) -> Tensor | None:
        if number == block:
            walk.leave(block, torch.ones_like(walk.staying))
            walk.extra += translated
        return walk.staying.to(hidden) if number >= block else None

    return way


def drawn(blocks: int, budget: int, rows: int, seed: int) -> Way:
    """Each text has a way drawn for it: `budget` blocks, the first and the last among them."""
    kept = torch.zeros(rows, blocks)
    for row in range(rows):
        middle = np.random.default_rng([seed, row]).permutation(np.arange(1, blocks - 1))[: budget - 2]
        kept[row, [0, blocks - 1, *middle.tolist()]] = 1

    def way(number: int, hidden: Tensor, walk: Walk) -> Tensor:
        return kept.to(hidden)[walk.rows, number][:, None].expand(hidden.shape[:2])

    return way


def exiting(network: DecoderNetwork, rule: str, exits: Sequence[int], bar: float, costs: Costs) -> Way:
    """Tokens leave behind the first of these exits (1-based) whose signal is above the bar.

    rule: confidence, the lead of the likeliest token over the next in probability; cosine, of hidden states
    behind the exit and behind the block before (both CALM, arXiv 2207.07061); gate, what a ConsistentEE
    policy says. A confidence takes a product with the vocabulary at every exit asked; the one that a token
    leaves by is the one that it would have needed anyway.
    """
    before: list[Tensor] = []

    def way(number: int, hidden: Tensor, walk: Walk) -> Tensor | None:
        if number in exits:
            staying = walk.staying
            translated = costs.square if str(number) in network.exits else 0
            if rule == "confidence":
                told = _lead(network, network.leaving(number, hidden))
                asked, saved = costs.head + translated, costs.head
            elif rule == "cosine":
                told = functional.cosine_similarity(hidden, before.pop(), dim=-1)
                asked, saved = 3 * costs.hidden, -translated
            else:
                told = network.gate(number, hidden)
                asked, saved = costs.hidden, -translated
            walk.leave(number, told > bar)
            walk.extra += asked * staying - saved * (staying & ~walk.staying)
        if number + 1 in exits:
            before[:] = [hidden]
        return walk.staying.to(hidden) if number >= min(exits) else None

    return way


def _lead(network: DecoderNetwork, hidden: Tensor) -> Tensor:
    """In pieces: the vocabulary is wide."""
    leads = []
    for piece in hidden.flatten(0, 1).split(256):
        first = network.head(piece).float().softmax(-1).topk(2, dim=-1).values
        leads.append(first[:, 0] - first[:, 1])
    return torch.cat(leads).view(hidden.shape[:2])


def controlled(controllers: Controllers, shift: float, costs: Costs, *, free: bool = False) -> Way:
    """Tokens run the blocks whose controllers' margin, so much shifted, is above 0; free: controllers that
    know no token are a list, which costs nothing.
    """

    def way(number: int, hidden: Tensor, walk: Walk) -> Tensor | None:
        if str(number + 1) not in controllers:
            return None
        walk.extra += 0 if free else 2 * costs.hidden
        return (controllers.margin(number + 1, hidden) + shift > 0).to(hidden)

    return way


# --- what is measured ---


def ways_of(
    network: DecoderNetwork,
    task: Task,
    dev: Dev,
    told: dict[str, Controllers],
    budgets: Sequence[int],
    seeds: int,
) -> tuple[dict[str, Way | None], dict[str, int]]:
    """What is measured, by name; and the blocks of those that are fixed, which a text may choose among.

    Exits that the model learned are asked, or five, evenly.
    """
    blocks, costs = network.block_count, costs_of(network)
    exits = sorted(map(int, network.exits)) or sorted({max(1, blocks * n // 6) for n in range(1, 6)})
    exits = [block for block in exits if block < blocks]
    ways: dict[str, Way | None] = {"full": None}
    fixed = {"full": blocks}

    def dial(name: str, budget: int, make: Callable[[float], Way], low: float, high: float) -> None:
        key = f"{name} {budget}".replace(" ", "_")
        ways[f"{name}, {budget}"] = make(task.remember(key, lambda: dialled(dev, make, low, high, budget)))

    for block in sorted({*budgets, *exits} if network.exits else budgets, reverse=True):
        ways[f"static exit, {block}"] = static(network, block, costs)
    for budget in budgets:
        ways[f"uniform skip, {budget}"] = skips(uniform(blocks, budget))
    found = searched(task, dev, blocks - budgets[-1])
    for budget in budgets:
        ways[f"searched skip, {budget}"] = skips(found[: blocks - budget])
    for name in list(ways)[1:]:
        fixed[name] = int(name.rpartition(" ")[2])
    for budget in budgets:
        for seed in range(seeds):
            ways[f"random route, {budget}, seed {seed}"] = drawn(blocks, budget, len(task.test), seed)
    gates = [block for block in exits if str(block) in network.policies]
    if gates:
        ways["consistentee, as learned"] = exiting(network, "gate", gates, 0.0, costs)
    for name, one in told.items():
        ways[f"{name}, as learned"] = controlled(one, 0.0, costs, free=name == "fixed controller")
    for budget in tqdm(budgets, desc=f"{task.name}: thresholds", unit="budget", file=sys.stderr):
        for rule, low in (("confidence", 0.0), ("cosine", 0.5)):
            name = f"calm {rule}"
            dial(name, budget, lambda bar, r=rule: exiting(network, r, exits, bar, costs), low, 1.0)  # type: ignore[misc]
        if gates:
            dial("consistentee", budget, lambda bar: exiting(network, "gate", gates, bar, costs), -20.0, 20.0)
        for name, one in told.items():
            free = name == "fixed controller"
            dial(name, budget, lambda shift, c=one, f=free: controlled(c, shift, costs, free=f), -20.0, 20.0)  # type: ignore[misc]
    return ways, fixed


def searched(task: Task, dev: Dev, most: int) -> list[int]:
    """The list of skipped blocks, kept block by block."""
    file = task.folder / "searched.json"
    begun = read_json(file)["value"] if file.is_file() else []
    with tqdm(
        total=most, initial=len(begun), desc=f"{task.name}: search", unit="block", file=sys.stderr
    ) as bar:

        def step(found: list[int]) -> None:
            write_json(file, {"value": found})
            bar.update()

        return search(dev, most, begun, step)
