"""Quality of a decoder against the blocks that its tokens run: one table of ways to run fewer.

    python benchmarks/depth.py --model MODEL --wikitext ../shared/data/wikitext2_eval \
        --summaries ../shared/data/t0_summaries --out benchmarks/results/depth_NAME.json

Two tasks. wikitext: windows of --window tokens, whose first half is a prompt; perplexity of the second half
(lines are joined by the end of text: not the published perplexity). samsum: greedy answers of at most
--answer tokens, ROUGE-L. Prompts run every block, so does the first answer token, which is theirs; depth and
cost are of the others, a mean over rows. Cost is the share of a full token's multiply-adds, with keys and
values that skipped blocks are left, heads, and all that deciding took.

Everything is fitted on dev rows of the task, by loss where it has one; the rows of the table are test rows.
"oracle" chooses one of the fixed ways a text, by the test scores themselves; its controls are in
training.knapsack ("held out": by every other token of the text, or by the answer to the same dialogue where
the prompt asks in other words). "router" makes the same choice by the prompt.

--controllers, --fixed: folders of recipe layer_selection with backbone=frozen, trained from this model; where
the first is not given, controllers that lie in the model's own folder are taken. Policies are asked where the
folder has some. Raw scores lie in --scratch, and a run that was killed goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from offramp.benchmarks.depth_fit import Dev
from offramp.benchmarks.depth_methods import Costs, costs_of, ways_of
from offramp.benchmarks.depth_rows import Score, Task, evaluate, losses, summaries, wikitext
from offramp.benchmarks.fetch import cache_folder
from offramp.models.controllers import Controllers, controllers_of, load_controllers
from offramp.models.decoder import DecoderNetwork
from offramp.runtime.rules.router import fit
from offramp.training.checkpoint import EXITS, TRAINING, read_json, write_json
from offramp.training.decoders import load_decoder
from offramp.training.knapsack import best, held_out, shuffled, smallest_depth


def measured(task: Task, scores: list[Score], full: list[Score], costs: Costs) -> dict[str, Any]:
    """Figures of a way: means over rows; rows whose answer ends at once have no depth. se: standard error of
    how far the score is from that of full depth, over texts.
    """
    depths, shares = [], []
    for row, score in enumerate(scores):
        depth, extra = float(score["depth"]), float(score["extra"])  # type: ignore[arg-type]
        context = len(task.test.prompts[row]) + float(score["tokens"]) / 2  # type: ignore[arg-type]
        depths.append(depth)
        shares.append(costs.share(depth, extra, context))
    mean = float(np.mean([score["score"] for score in scores]))
    apart = np.array([one["score"] for one in scores]) - np.array([one["score"] for one in full])
    if task.test.twins is not None:
        apart = (apart + apart[task.test.twins])[::2] / 2  # they stand in twos
    return {
        "quality": round(task.quality(mean), 3),
        "score": round(mean, 5),
        "se": round(float(apart.std() / len(apart) ** 0.5), 5),
        "depth": round(float(np.nanmean(depths)), 3),
        "cost": round(float(np.nanmean(shares)), 4),
    }


def context_of(task: Task, found: dict[str, list[Score]]) -> float:
    """Tokens that a token has before it, at full depth, on average."""
    answered = [float(one["tokens"]) for one in found["full"]]  # type: ignore[arg-type]
    return float(np.mean([len(prompt) for prompt in task.test.prompts]) + np.mean(answered) / 2)


def chosen(
    task: Task, found: dict[str, list[Score]], fixed: dict[str, int], costs: Costs, depths: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """Lines of the oracle and of its controls, at these mean depths and where it reaches the full score."""
    names, layers, rows = list(fixed), list(fixed.values()), len(task.test)
    scores = np.array([[one["score"] for one in found[name]] for name in names]).T
    lines: dict[str, dict[str, Any]] = {}

    def line(name: str, score: float, depth: float) -> None:
        cost = costs.share(depth, 0, context_of(task, found))
        facts = {"quality": round(task.quality(score), 3), "score": round(score, 5)}
        lines[name] = {**facts, "depth": round(depth, 3), "cost": round(cost, 4)}

    # What a choice is made by and what it is judged by: halves of a text's tokens, or two wordings.
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    if task.test.references is None:
        halves = np.array([[one["halves"] for one in found[name]] for name in names]).transpose(2, 1, 0)
        pairs = [(halves[0], halves[1]), (halves[1], halves[0])]
    elif task.test.twins is not None:
        pairs = [(scores, scores[task.test.twins])]

    def unseen(depth: int) -> float:
        return float(np.mean([held_out(seen, judged, layers, depth * rows) for seen, judged in pairs]))

    for depth in depths:
        budget = depth * rows
        line(f"oracle, {depth}", best(scores, layers)[budget], depth)
        for name, centred in (("shuffled", False), ("shuffled within texts", True)):
            drawn_ = [best(shuffled(scores, seed, centred=centred), layers)[budget] for seed in range(20)]
            line(f"oracle {name}, {depth}", float(np.mean(drawn_)), depth)
        if pairs:
            line(f"oracle held out, {depth}", unseen(depth), depth)
    if pairs:
        enough = (d for d in range(min(layers), max(layers)) if unseen(d) >= scores[:, 0].mean())
        reached = next(enough, max(layers))
        score = unseen(reached) if reached < max(layers) else float(scores[:, 0].mean())
        line("oracle held out, as good as full", score, reached)
    depth_ = smallest_depth(scores, layers)
    line("oracle, as good as full", best(scores, layers)[round(depth_ * rows)], depth_)
    for name, centred in (("shuffled", False), ("shuffled within texts", True)):
        drawn_ = [smallest_depth(shuffled(scores, seed, centred=centred), layers) for seed in range(20)]
        line(f"oracle {name}, as good as full", scores[:, 0].mean(), float(np.mean(drawn_)))
    return lines


def routed(
    task: Task,
    found: dict[str, list[Score]],
    fixed: dict[str, int],
    learned: tuple[np.ndarray, np.ndarray],
    features: tuple[np.ndarray, np.ndarray],
    costs: Costs,
    depths: Sequence[int],
) -> dict[str, dict[str, Any]]:
    """Lines of the router; learned: features and scores of the rows it learns from, features: of dev and of
    test.
    """
    layers = np.array(list(fixed.values()), np.float64)
    scores = np.array([[one["score"] for one in found[name]] for name in fixed]).T
    router, rows = fit(*learned, layers), np.arange(len(scores))
    lines = {}
    for depth in depths:
        way = router.choose(features[1], router.price_for(features[0], depth))
        score, reached = float(scores[rows, way].mean()), float(layers[way].mean())
        # Asked once a text, which is charged to its tokens.
        tokens = float(np.mean([float(one["tokens"]) for one in found["full"]]))  # type: ignore[arg-type]
        extra = costs.hidden * len(layers) / max(1.0, tokens)
        lines[f"router, {depth}"] = {
            "quality": round(task.quality(score), 3),
            "score": round(score, 5),
            "depth": round(reached, 3),
            "cost": round(costs.share(reached, extra, context_of(task, found)), 4),
            "error": round(router.error, 3),  # of its forecasts, rows left out; 1: it knows nothing
        }
    return lines


def run_task(
    network: DecoderNetwork, task: Task, told: dict[str, Controllers], budgets: Sequence[int], **of: int
) -> dict[str, dict[str, Any]]:
    """All lines of a task by method."""
    task.folder.mkdir(parents=True, exist_ok=True)
    batch, reads, costs = of["batch"], of["reads"], costs_of(network)
    dev = Dev(network, task.dev, batch, task.judge)
    ways, fixed = ways_of(network, task, dev, told, budgets, of["seeds"])
    del dev  # its cache is large
    menu = {name: ways[name] for name in fixed}
    sizes = {"batch": batch, "reads": reads}
    seen, known = evaluate(network, task.fit, menu, losses, task.folder / "fit", **sizes)
    _, dev_features = evaluate(network, task.dev, {}, losses, task.folder / "dev", **sizes)
    found, features = evaluate(network, task.test, ways, task.judge, task.folder / "test", **sizes)
    lines = {name: measured(task, scores, found["full"], costs) for name, scores in found.items()}
    for budget in budgets:
        drawn = [lines.pop(f"random route, {budget}, seed {seed}") for seed in range(of["seeds"])]
        mean = {key: float(np.mean([one[key] for one in drawn])) for key in ("score", "depth", "cost")}
        spread = round(float(np.std([one["quality"] for one in drawn])), 3)
        quality = round(task.quality(mean["score"]), 3)
        lines[f"random route, {budget}"] = {"quality": quality, "seeds": spread, **mean}
    fitted = np.array([[one["score"] for one in seen[name]] for name in menu]).T
    lines |= routed(task, found, fixed, (known, fitted), (dev_features, features), costs, budgets)
    return lines | chosen(task, found, fixed, costs, budgets)


def loaded(folder: Path | None, network: DecoderNetwork, input: str) -> Controllers | None:
    """Controllers of a folder, or those that the network came with; raises SystemExit where they are not what
    they are taken for.
    """
    if folder is None:
        own = controllers_of(network)
        return own if input == "hidden" and own is not None and len(own) else None
    settings = read_json(folder / TRAINING)["settings"]
    if settings.get("input") != input or settings.get("backbone") != "frozen":
        raise SystemExit(f"{folder}: not of recipe layer_selection with input={input} and backbone=frozen")
    try:
        return load_controllers(load_file(folder / EXITS), network.block_count, network.hidden_size)
    except ValueError as problem:
        raise SystemExit(f"{folder}: {problem}") from problem


@click.command(context_settings={"show_default": True})
@click.option("--model", required=True, help="A causal language model, as ee-train takes it.")
@click.option("--wikitext", "wiki", help="Folder with dev and test of {text}.")
@click.option("--summaries", "pairs", help="Folder with train, dev and test of {prompt, completion, task}.")
@click.option("--controllers", type=click.Path(exists=True, path_type=Path), help="See above.")
@click.option("--fixed", type=click.Path(exists=True, path_type=Path), help="See above.")
@click.option("--prompts", default=200, help="Test rows of samsum.")
@click.option("--tokens", default=16384, help="Test tokens of wikitext.")
@click.option("--window", default=512, help="Tokens of a wikitext row.")
@click.option("--answer", default=48, help="Most tokens of an answer.")
@click.option("--shares", default="0.4,0.6,0.8,0.9", help="Budgets, shares of the blocks.")
@click.option("--dev-rows", default=8, help="Rows that ways are fitted on.")
@click.option("--fit-rows", default=64, help="Rows that the router learns from.")
@click.option(
    "--reads", default=0, help="Block whose hidden state the router reads; 0: the first exit, or 4."
)
@click.option("--seeds", default=3, help="Draws of random routes.")
@click.option("--batch", default=8, help="Rows a batch.")
@click.option("--device", default="cpu", help="As torch names it.")
@click.option("--scratch", type=click.Path(path_type=Path), help="Raw scores; the cache where not given.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="JSON file of the table.")
def main(model: str, wiki: str | None, pairs: str | None, scratch: Path | None, out: Path, **o: Any) -> None:
    """Measure every way at every budget, print the table and write it."""
    if not (wiki or pairs):
        raise click.UsageError("give --wikitext, --summaries or both")
    network, tokenizer = load_decoder(model)
    network.to(o["device"]).eval()
    blocks = network.block_count
    shares = [float(share) for share in o["shares"].split(",")]
    budgets = sorted({min(blocks - 1, max(2, round(share * blocks))) for share in shares}, reverse=True)
    o["reads"] = o["reads"] or min([*map(int, network.exits), min(4, blocks)])
    sources = {"controller": o.pop("controllers"), "fixed controller": o.pop("fixed")}
    inputs = {"controller": "hidden", "fixed controller": "fixed"}
    told = {name: loaded(folder, network, inputs[name]) for name, folder in sources.items()}
    carried = {name: one.to(o["device"]).eval() for name, one in told.items() if one is not None}
    names = {"model": Path(model).name, **{name: Path(f).name for name, f in sources.items() if f}}
    facts = {**names, **{key: value for key, value in o.items() if key != "device"}}
    scratch = scratch or cache_folder() / out.stem
    scratch.mkdir(parents=True, exist_ok=True)
    if (scratch / "settings.json").is_file() and read_json(scratch / "settings.json") != facts:
        raise SystemExit(f"{scratch}: begun with other settings; remove it or give another --scratch")
    write_json(scratch / "settings.json", facts)
    sizes = {key: o[key] for key in ("batch", "reads", "seeds")}
    of = o["dev_rows"], o["fit_rows"]
    found = {}
    with torch.no_grad():
        if wiki:
            task = wikitext(wiki, tokenizer, o["window"], o["tokens"], *of, scratch / "wikitext")
            found["wikitext"] = run_task(network, task, carried, budgets, **sizes)
        if pairs:
            task = summaries(pairs, tokenizer, o["prompts"], o["answer"], *of, scratch / "samsum")
            found["samsum"] = run_task(network, task, carried, budgets, **sizes)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, {"command": "benchmarks/depth.py", **facts, "blocks": blocks, "tasks": found})
    show(found, names["model"], blocks)


def show(found: dict[str, dict[str, dict[str, Any]]], model: str, blocks: int) -> None:
    """The table, a line a method."""
    table = Table(title=f"{model}, {blocks} blocks: quality against depth (means over test rows)")
    table.add_column("method")
    for task in found:
        for name in (f"{task}: depth", "cost", "perplexity" if task == "wikitext" else "ROUGE-L"):
            table.add_column(name, justify="right")
    for method in dict.fromkeys(name for lines in found.values() for name in lines):
        cells = []
        for lines in found.values():
            line = lines.get(method, {})
            cells += [f"{line[key]:.2f}" if key in line else "" for key in ("depth", "cost", "quality")]
        table.add_row(method, *cells)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
