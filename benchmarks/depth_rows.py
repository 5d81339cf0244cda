"""The rows that depth.py measures on, and what a way of tokens scores on them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from offramp.models.decoder import DecoderNetwork
from offramp.models.generation import Cache, Walk, Way, advance, generate, read_prompts
from offramp.training.checkpoint import read_json, write_json
from offramp.training.texts import load_texts

SEEN = 4  # test rows that were looked at while ways were designed: they are left out


@dataclass(frozen=True)
class Rows:
    """Prompts and what follows each, as ids; references: texts that answers are held against, or None where
    what follows is what is scored. twins: by row, the row that asks for the same in other words, where all
    have one.
    """

    prompts: list[list[int]]
    after: list[list[int]]
    references: list[str] | None = None
    twins: list[int] | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def part(self, begin: int, end: int) -> Rows:
        """Rows begin to end."""
        texts = None if self.references is None else self.references[begin:end]
        return Rows(self.prompts[begin:end], self.after[begin:end], texts)

    def batches(self, size: int) -> list[list[int]]:
        """Row numbers, together with those of like length."""
        order = sorted(range(len(self)), key=lambda i: (len(self.prompts[i]), len(self.after[i])))
        return [order[at : at + size] for at in range(0, len(order), size)]


Score = dict[str, float | list[float]]
Judge = Callable[[DecoderNetwork, Rows, Sequence[int], Cache, Way | None], list[Score]]


@torch.no_grad()
def losses(
    network: DecoderNetwork, rows: Rows, index: Sequence[int], cache: Cache, way: Way | None
) -> list[Score]:
    """Of each row, what follows its prompt, as it stands: score, minus nats a token, that of every other
    token (halves), depth, extra. The first token is the prompt's to predict: it is not scored.
    """
    hidden, walk = follow(network, rows, index, cache, way)
    return judged(network, rows, index, hidden, walk)


@torch.no_grad()
def judged(
    network: DecoderNetwork, rows: Rows, index: Sequence[int], hidden: Tensor, walk: Walk
) -> list[Score]:
    """The same of hidden states that a walk has left [batch, seq, hidden]."""
    found: list[Score] = []
    for row, i in enumerate(index):
        after = torch.tensor(rows.after[i][1:], device=hidden.device)
        pieces = zip(hidden[row, : len(after)].split(256), after.split(256), strict=True)
        said = torch.cat(
            [functional.cross_entropy(network.head(h).float(), t, reduction="none") for h, t in pieces]
        )
        halves = [-float(said[part::2].mean()) if len(said) > 1 else -float(said[0]) for part in (0, 1)]
        score: Score = {"score": -float(said.mean()), "halves": halves, "tokens": len(after)}
        for name, values in (("depth", walk.depth), ("extra", walk.extra)):
            score[name] = float(values[row, : len(after)].float().mean())
        found.append(score)
    return found


@torch.no_grad()
def follow(
    network: DecoderNetwork,
    rows: Rows,
    index: Sequence[int],
    cache: Cache,
    way: Way | None,
    states: list[Tensor] | None = None,
    start: tuple[int, Tensor] | None = None,
) -> tuple[Tensor, Walk]:
    """What follows the prompts, its last token not: hidden as the head reads it, and the walk; states and
    start as of `advance`.
    """
    device = cache.counts.device
    longest = max(len(rows.after[i]) for i in index) - 1
    ids = torch.zeros(len(index), longest, dtype=torch.long)
    counts = torch.zeros(len(index), longest, dtype=torch.bool)
    for row, i in enumerate(index):
        fed = rows.after[i][:-1]
        ids[row, : len(fed)], counts[row, : len(fed)] = torch.tensor(fed), True
    walk = Walk(torch.tensor(index, device=device), torch.full_like(ids, network.block_count, device=device))
    fed_ = ids.to(device), counts.to(device)
    return advance(network, cache.copy(longest), *fed_, walk, way, states, start), walk


@torch.no_grad()
def answers(
    network: DecoderNetwork,
    rows: Rows,
    index: Sequence[int],
    cache: Cache,
    way: Way | None,
    *,
    tokenizer: object,
    most: int,
) -> list[Score]:
    """Of each row, its greedy answer: score, ROUGE-L (F, stemmed not, in percent), depth, extra of tokens
    behind the first, which comes of the prompt's own pass.
    """
    from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]

    assert rows.references is not None
    stop = set(tokenizer.all_special_ids)  # type: ignore[attr-defined]
    told = generate(network, [rows.prompts[i] for i in index], most, stop, way, rows=index, cache=cache)
    scorer, found = RougeScorer(["rougeL"]), list[Score]()
    for row, i in enumerate(index):
        text = tokenizer.decode(told.tokens[row], skip_special_tokens=True)  # type: ignore[attr-defined]
        score: Score = {"score": 100 * scorer.score(rows.references[i], text)["rougeL"].fmeasure}
        score["tokens"] = len(told.tokens[row])
        for name, values in (("depth", told.depths[row][1:]), ("extra", told.extra[row][1:])):
            score[name] = float(np.mean(values)) if values else float("nan")
        found.append(score)
    return found


@dataclass
class Task:
    """Rows of a task: those that ways are fitted on, that the router learns from, and that are measured."""

    name: str
    dev: Rows
    fit: Rows
    test: Rows
    judge: Judge
    folder: Path

    def quality(self, score: float) -> float:
        """Perplexity of a mean score in nats, or ROUGE-L as it is."""
        return float(np.exp(-score)) if self.test.references is None else score

    def remember(self, name: str, compute: Callable[[], Any]) -> Any:
        """What was fitted, computed once."""
        file = self.folder / f"{name}.json"
        if not file.is_file():
            write_json(file, {"value": compute()})
        return read_json(file)["value"]


def wikitext(
    source: str, tokenizer: Any, window: int, tokens: int, dev: int, fitted: int, folder: Path
) -> Task:
    """Windows of dev and test; the router learns from dev windows behind those that ways are fitted on."""
    found, half = load_texts(source, tokenizer, window), window // 2
    parts = {}
    for split in ("dev", "test"):
        rows = [row for row in found[split].ids if len(row) == window]
        parts[split] = Rows([row[:half] for row in rows], [row[half:] for row in rows])
    test = parts["test"].part(SEEN, SEEN + max(1, tokens // window))
    return Task(
        "wikitext", parts["dev"].part(0, dev), parts["dev"].part(dev, dev + fitted), test, losses, folder
    )


def summaries(
    source: str, tokenizer: Any, prompts: int, answer: int, dev: int, fitted: int, folder: Path
) -> Task:
    """Pairs: dev and train as they stand, prompts of test's samsum part, drawn with seed 0: dialogues, each
    in two wordings of the prompt where it has as many.
    """
    longest, plain = 1024, partial(tokenizer.decode, skip_special_tokens=True)
    found = load_texts(source, tokenizer, longest)
    pairs = {}
    for split, most in (("dev", dev), ("train", fitted)):
        texts = found[split]
        order = np.random.default_rng(0).permutation(len(texts)).tolist()
        taken = [i for i in order if len(texts.ids[i]) > texts.starts[i] + 1 and texts.starts[i] > 1][:most]
        after = [texts.ids[i][texts.starts[i] :] for i in taken]
        said = [text.strip() for text in map(plain, after)]
        pairs[split] = Rows([texts.ids[i][: texts.starts[i]] for i in taken], after, said)
    lines = (Path(source) / "test.jsonl").read_text(encoding="utf-8").splitlines()
    raw = [row for row in map(json.loads, lines) if row["task"].startswith("samsum")]
    raw, twins = _twice([raw[i] for i in np.random.default_rng(0).permutation(len(raw))], prompts)
    ids = [tokenizer(r["prompt"], add_special_tokens=False).input_ids[answer - longest :] for r in raw]
    texts_ = [r["completion"].replace("<|endoftext|>", "").strip() for r in raw]
    judge = partial(answers, tokenizer=tokenizer, most=answer)
    test = Rows(ids, [[] for _ in ids], texts_, twins)
    return Task("samsum", pairs["dev"], pairs["train"], test, judge, folder)


def _twice(rows: list[dict[str, str]], most: int) -> tuple[list[dict[str, str]], list[int] | None]:
    """Rows in twos that have a completion in common, and each one's twin; the rows as they stand where there
    is only one of each. Texts of which a row was seen are left out.
    """
    groups: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault(row["completion"], []).append(row)
    for row in rows[:SEEN]:
        groups.pop(row["completion"], None)
    if any(len(group) < 2 for group in groups.values()):
        return [row for group in groups.values() for row in group][:most], None
    drawn = [row for group in groups.values() for row in group[:2]][: most - most % 2]
    return drawn, [row ^ 1 for row in range(len(drawn))]


def evaluate(
    network: DecoderNetwork,
    rows: Rows,
    ways: dict[str, Way | None],
    judge: Judge,
    folder: Path,
    *,
    batch: int,
    reads: int,
) -> tuple[dict[str, list[Score]], np.ndarray]:
    """Scores of all rows by way, and hidden states of their prompts' last token behind block `reads`
    [rows, hidden]; what stands in the folder, one line a row, is not computed again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    features = f"features {reads}"
    names = {name: name.replace(" ", "_").replace(",", "") for name in [features, *ways]}
    kept: dict[str, dict[int, Any]] = {}
    for name, file in names.items():
        path = folder / f"{file}.jsonl"
        kept[name] = dict(_whole_lines(path)) if path.is_file() else {}
    batches = rows.batches(batch)
    with tqdm(total=len(batches) * len(names), desc=folder.name, unit="batch", file=sys.stderr) as bar:
        for index in batches:
            cache = None
            for name in names:
                bar.update()
                if all(i in kept[name] for i in index):
                    continue
                bar.set_postfix_str(name)
                cache = cache or read_prompts(network, [rows.prompts[i] for i in index])
                if name == features:
                    found: Any = cache.states[reads - 1].tolist()
                else:
                    found = judge(network, rows, index, cache, ways[name])
                with (folder / f"{names[name]}.jsonl").open("a", encoding="utf-8") as file_:
                    for i, one in zip(index, found, strict=True):
                        file_.write(json.dumps([i, one]) + "\n")
                        kept[name][i] = one
    ordered = {name: [kept[name][i] for i in range(len(rows))] for name in names}
    return ordered, np.array(ordered.pop(features), np.float64)


def _whole_lines(path: Path) -> list[tuple[int, Any]]:
    """A run that was killed may have left half a line, to which the next run would have appended."""
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        path.write_bytes(whole)
    return [tuple(json.loads(line)) for line in whole.splitlines()]
