"""Scores of answers of a decoder whose answer tokens run some of the blocks, for layer_selection.py.

Prompts run all blocks, once for all configurations. A block that no token of a batch runs is not computed;
its keys and values are, from the unchanged hidden states, as published. With a fixed list they are never
read.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from offramp.benchmarks.layer_selection_data import Pairs, rouge_l
from offramp.models.controllers import Controllers
from offramp.models.decoder import BlockMask, DecoderNetwork, KeyValue
from offramp.training.recipes.layer_selection import (
    controlled_blocks,
    counting,
    random_runs,
    route_runs,
    run_mask,
)

# (row numbers [batch], shape [batch, seq] of the answer tokens) -> their block mask; None: all blocks
Configuration = Callable[[Sequence[int], tuple[int, int]], BlockMask | None]
# nats: of the completion's tokens after the first, a mean; of every other one of these. exact: the greedy
# answer is the completion. rouge_l: of the greedy answer, NaN if none was asked for. depth: mean blocks run.
FIELDS = ("nats", "nats_even", "nats_odd", "exact", "rouge_l", "depth")
DIAL_STEPS, WIDEST_SHIFT = 7, 12.0  # logits


@dataclass(frozen=True)
class Cache:
    """Keys and values of every block for the tokens so far.

    valid [batch, places]: places with a token; lengths [batch]: tokens of each row.
    """

    past: list[KeyValue]
    valid: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class Prompts:
    """Prompts of a batch that ran all blocks: the cache, and the hidden state of each last token after every
    block [blocks, batch, hidden].
    """

    cache: Cache
    states: Tensor


def extend(
    network: DecoderNetwork,
    cache: Cache,
    ids: Tensor,
    counts: Tensor,
    block_mask: BlockMask | None = None,
    states: list[Tensor] | None = None,
) -> tuple[Tensor, Cache]:
    """Run tokens [batch, seq] after the cached ones; the first counts [batch] of each row are tokens, the
    rest is padding.

    Gives hidden after the last block [batch, seq, hidden] and the longer cache. states: receives hidden after
    every block.
    """
    places = torch.arange(ids.shape[1], device=ids.device)
    hidden, context = network.stem(ids, cache.lengths[:, None] + places, cache.valid)
    past = cache.past
    if not past:
        keys, values = network.cache_fill(0, hidden, context)
        past = [(keys[:, :, :0].transpose(2, 3), values[:, :, :0])] * network.block_count
    longer = list[KeyValue]()
    for number, (old_keys, old_values) in enumerate(past):
        runs = None if block_mask is None else block_mask(number, hidden)
        if runs is not None and not bool(runs.any()):
            keys, values = network.cache_fill(number, hidden, context)
            new = keys.transpose(2, 3), values
        else:
            output, new = network.run_block(number, hidden, context, (old_keys, old_values))
            hidden = output if runs is None else torch.lerp(hidden, output, runs[..., None])
        longer.append((torch.cat([old_keys, new[0]], 3), torch.cat([old_values, new[1]], 2)))
        if states is not None:
            states.append(hidden)
    valid = torch.cat([cache.valid, places < counts[:, None]], 1)
    return hidden, Cache(longer, valid, cache.lengths + counts)


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of ids, padded at the end with 0 [batch, seq], and their lengths [batch]."""
    ids = torch.zeros(len(rows), max(1, *map(len, rows)), dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row, dtype=torch.long)
    return ids.to(device), torch.tensor([len(row) for row in rows], device=device)


@torch.no_grad()
def read_prompts(network: DecoderNetwork, prompts: Sequence[Sequence[int]]) -> Prompts:
    """Run prompts, of one token at least, through all blocks."""
    device = network.model.device
    ids, counts = padded(prompts, device)
    empty = Cache([], torch.zeros(len(prompts), 0, device=device), torch.zeros_like(counts))
    states = list[Tensor]()
    _, cache = extend(network, empty, ids, counts, states=states)
    rows = torch.arange(len(prompts), device=device)
    return Prompts(cache, torch.stack([state[rows, counts - 1] for state in states]))


@torch.no_grad()
def forced_scores(
    network: DecoderNetwork,
    prompts: Prompts,
    completions: Sequence[Sequence[int]],
    index: Sequence[int],
    configuration: Configuration,
) -> np.ndarray:
    """Scores [batch, FIELDS] of completions as they stand, without rouge_l.

    A greedy answer is the completion exactly if each of its tokens is the likeliest after those before.
    """
    device = network.model.device
    ids, counts = padded([completion[:-1] for completion in completions], device)
    depth = torch.full(ids.shape, float(network.block_count), device=device)
    block_mask = configuration(index, (ids.shape[0], ids.shape[1]))
    counted = None if block_mask is None else counting(block_mask, depth)
    hidden, _ = extend(network, prompts.cache, ids, counts, counted)
    first = network.head(prompts.states[-1]).argmax(-1)
    scores = np.full((len(completions), len(FIELDS)), np.nan)
    for row, completion in enumerate(completions):
        targets = torch.tensor(completion[1:], device=device)
        logits = network.head(hidden[row, : len(targets)]).float()
        losses = functional.cross_entropy(logits, targets, reduction="none")
        odd = losses[1::2] if len(losses) > 1 else losses
        exact = bool((logits.argmax(-1) == targets).all()) and int(first[row]) == completion[0]
        depths = depth[row, : len(targets)]
        scores[row, [0, 1, 2]] = [float(part.mean()) for part in (losses, losses[::2], odd)]
        scores[row, [3, 5]] = float(exact), float(depths.mean())
    return scores


@torch.no_grad()
def greedy_answers(
    network: DecoderNetwork,
    prompts: Prompts,
    index: Sequence[int],
    configuration: Configuration,
    max_new_tokens: int,
    stop: int,
) -> list[list[int]]:
    """The likeliest tokens after each prompt, up to `max_new_tokens` or to the stop token, without it."""
    cache, tokens = prompts.cache, network.head(prompts.states[-1]).argmax(-1)
    answers: list[list[int]] = [[] for _ in index]
    open_rows = set(range(len(index)))
    for step in range(max_new_tokens):
        for row, token in enumerate(tokens.tolist()):
            if token == stop:
                open_rows.discard(row)
            elif row in open_rows:
                answers[row].append(token)
        if not open_rows or step + 1 == max_new_tokens:
            break
        block_mask = configuration(index, (len(index), 1))
        hidden, cache = extend(network, cache, tokens[:, None], torch.ones_like(tokens), block_mask)
        tokens = network.head(hidden[:, 0]).argmax(-1)
    return answers


def evaluate(
    network: DecoderNetwork,
    tokenizer: Any,
    pairs: Pairs,
    configurations: dict[str, Configuration],
    file: Path,
    *,
    batch: int,
    router_blocks: Sequence[int],
    max_new_tokens: dict[str, int],
) -> tuple[np.ndarray, np.ndarray]:
    """Scores [rows, configurations, FIELDS], and features of routers [rows, router blocks, hidden].

    Features are hidden states of the prompt's last token after each of router_blocks (1-based). Results are
    appended to `file` batch by batch; batches that are there are not computed again. max_new_tokens: of
    greedy answers, by configuration; none and no rouge_l for the others.
    """
    finished = {tuple(line["rows"]): line for line in complete_lines(file)}
    scores = np.full((len(pairs), len(configurations), len(FIELDS)), np.nan)
    features = np.zeros((len(pairs), len(router_blocks), network.hidden_size))
    for index in tqdm(pairs.batches(batch), desc=file.stem, unit="batch", file=sys.stderr):
        line = finished.get(tuple(index))
        if line is None:
            line = _score_batch(
                network, tokenizer, pairs, index, configurations, router_blocks, max_new_tokens
            )
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(line) + "\n")
        scores[index] = np.array(line["scores"], np.float64)
        features[index] = line["features"]
    return scores, features


def _score_batch(
    network: DecoderNetwork,
    tokenizer: Any,
    pairs: Pairs,
    index: list[int],
    configurations: dict[str, Configuration],
    router_blocks: Sequence[int],
    max_new_tokens: dict[str, int],
) -> dict[str, Any]:
    prompts = read_prompts(network, [pairs.prompts[row] for row in index])
    completions = [pairs.completions[row] for row in index]
    scores = np.zeros((len(index), len(configurations), len(FIELDS)))
    for number, (name, configuration) in enumerate(configurations.items()):
        scores[:, number] = forced_scores(network, prompts, completions, index, configuration)
        if longest := max_new_tokens.get(name, 0):
            stop = int(tokenizer.eos_token_id)
            answers = greedy_answers(network, prompts, index, configuration, longest, stop)
            texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
            values = [rouge_l(pairs.references[row], text) for row, text in zip(index, texts, strict=True)]
            scores[:, number, FIELDS.index("rouge_l")] = values
    features = prompts.states[[block - 1 for block in router_blocks]].transpose(0, 1)
    rounded = np.round(features.cpu().numpy().astype(np.float64), 4)
    # NaN is no JSON: a missing value is null, which numpy reads as NaN.
    table = [[[None if np.isnan(v) else v for v in values] for values in row] for row in scores.tolist()]
    return {"rows": index, "scores": table, "features": rounded.tolist()}


def complete_lines(file: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file, from which an incomplete last line, left by a kill, is removed."""
    if not file.is_file():
        return []
    content = file.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    if complete != content:
        file.write_bytes(complete)
    return [json.loads(line) for line in complete.splitlines()]


# --- configurations ---


def skips(skipped: frozenset[int], blocks: int) -> Configuration:
    """All answer tokens skip these blocks (0-based)."""
    runs = route_runs([skipped], blocks)[:, None]  # [1, 1, blocks]
    return lambda index, shape: run_mask(runs, torch.ones(shape, dtype=torch.bool)) if skipped else None


def random_routes(rows: int, blocks: int, run: int, seed: int) -> Configuration:
    """Each row has its own random route of `run` blocks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        runs = random_runs(rows, blocks, run)
    return lambda index, shape: run_mask(runs[list(index)][:, None], torch.ones(shape, dtype=torch.bool))


def controlled(controllers: Controllers, shift: float) -> Configuration:
    """Controllers choose for every answer token; shift is added to their logits of running."""
    return lambda index, shape: controlled_blocks(
        controllers, torch.ones(shape, dtype=torch.bool), None, [], shift
    )


def shift_for_depth(
    network: DecoderNetwork, pairs: Pairs, controllers: Controllers, depth: float, batch: int
) -> float:
    """The shift of controllers whose mean depth on these rows is nearest to `depth`, by bisection."""
    prompts = [
        (index, read_prompts(network, [pairs.prompts[i] for i in index])) for index in pairs.batches(batch)
    ]
    low, high, nearest, error = -WIDEST_SHIFT, WIDEST_SHIFT, 0.0, np.inf
    for _ in range(DIAL_STEPS):
        shift = (low + high) / 2
        configuration = controlled(controllers, shift)
        depths = [
            forced_scores(network, read, [pairs.completions[i] for i in index], index, configuration)[:, 5]
            for index, read in prompts
        ]
        reached = float(np.concatenate(depths).mean())
        if abs(reached - depth) < error:
            nearest, error = shift, abs(reached - depth)
        low, high = (shift, high) if reached < depth else (low, shift)
    return nearest
