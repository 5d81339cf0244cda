"""Layer selection of decoders: static skips and exits, oracles with controls, routers (arXiv 2410.20022).

    python benchmarks/layer_selection.py intents OUT --rows ../shared/data/clinc150
    python benchmarks/layer_selection.py sentences OUT --texts FILMS      # folder of fetch.py films
    python benchmarks/layer_selection.py measure --model FULL --variant SKIP7 --data OUT --out FILE

measure: every static configuration (a number of blocks that answer tokens run, as an even skip or as an exit)
on test rows, quality by sequence: nats a token of the reference completion, whether the greedy answer is the
completion (exact), ROUGE-L of the greedy answer (fixed lists alone). --model is fine-tuned at full depth and
also measured under random routes; --variant are folders of recipe layer_selection that start from it. A
variant trained with a fixed list is measured with it, one trained with several routes with every skip,
controllers as learned and shifted on dev to the numbers of --blocks.

A menu is a set of configurations from which one is chosen for each sequence. Lines of its tables:
static mix: the best mixture of configurations that knows nothing about a sequence, the line to beat.
oracle: chosen by the test scores. oracle, shuffled: the same where the scores of each configuration are
permuted over sequences, with (centred) or without the sequence's own mean: the winner's curse.
oracle, held out: chosen by the same request in other words, judged on this one; for nats without such rows,
chosen by every other token, judged on the rest.
router: ridge regression of rule `route` on the hidden state of the prompt's last token, fitted on dev rows.

Raw scores stay in --scratch; a killed run continues from there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from offramp.benchmarks.fetch import cache_folder
from offramp.benchmarks.layer_selection_data import (
    Pairs,
    intent_pairs,
    read_json_lines,
    read_pairs,
    sentence_pairs,
    write_split,
)
from offramp.benchmarks.layer_selection_scores import (
    FIELDS,
    Configuration,
    controlled,
    evaluate,
    random_routes,
    shift_for_depth,
    skips,
)
from offramp.models.controllers import controllers_of
from offramp.models.decoder import DecoderNetwork
from offramp.runtime.rules.route import PRICES, Router, fit_router
from offramp.training.checkpoint import TRAINING, read_json, write_json
from offramp.training.decoder import load_decoder
from offramp.training.knapsack import (
    Allocation,
    allocate,
    held_out,
    judge,
    shuffled,
    smallest_judged_cost,
    smallest_mean_cost,
    without_knowledge,
)
from offramp.training.recipes.layer_selection import LayerSelectionSettings, even_skip, routes_of

FULL, TRAINED = "full", "trained lists"
QUALITIES = ("nats", "exact", "rouge_l")
SERVES_ALL = ("menu", "random", "stochastic")  # selections measured with every skip
AS_FULL = "as good as full"
SHIFT_ROWS = 64  # dev rows on which the shifts of controllers are chosen


@dataclass
class Scores:
    """Scores of all models: by configuration [rows, FIELDS], by model features [rows, blocks, hidden].

    costs: blocks that a fixed configuration runs; fill: whether it leaves keys and values in skipped blocks.
    """

    test: dict[str, np.ndarray]
    dev: dict[str, np.ndarray]
    features: dict[str, tuple[np.ndarray, np.ndarray]]
    costs: dict[str, int]
    fill: dict[str, bool]


def configurations_of(
    name: str, settings: LayerSelectionSettings, counts: Sequence[int], blocks: int
) -> dict[str, frozenset[int]]:
    """Skipped blocks of the fixed configurations in which a model is measured, by name."""
    if settings.selection in ("skip", "exit"):
        return {name: routes_of(settings, blocks)[0]}
    if settings.selection == "controllers":
        return {}
    skipped = {f"{name}, full": frozenset[int]()}
    skipped |= {f"{name}, skip {run}": even_skip(blocks, run) for run in counts if run < blocks}
    if settings.selection == FULL:
        skipped |= {f"{name}, exit {run}": frozenset(range(run, blocks)) for run in counts if run < blocks}
    return skipped


def score_model(
    folder: Path, name: str, pairs: dict[str, Pairs], scratch: Path, scores: Scores, o: dict[str, Any]
) -> DecoderNetwork:
    """Score one model on dev and test rows under all its configurations; adds to `scores`."""
    network, tokenizer = load_decoder(str(folder))
    network.eval()
    blocks, counts = network.block_count, o["blocks"]
    settings = settings_of(folder)
    fixed = configurations_of(name, settings, counts, blocks)
    both: dict[str, Configuration] = {key: skips(skipped, blocks) for key, skipped in fixed.items()}
    on_test = dict(both)
    if settings.selection == FULL:
        for run in counts:
            if 2 <= run < blocks:
                routes = random_routes(len(pairs["test"]), blocks, run, seed=0)
                on_test[f"{name}, random route {run}"] = routes
    elif settings.selection == "controllers":
        on_test |= controller_configurations(network, name, pairs["dev"], scratch, o)
    sizes = {"batch": o["batch"], "router_blocks": o["router_blocks"]}
    features = list[np.ndarray]()
    for split, configurations, target in (("dev", both, scores.dev), ("test", on_test, scores.test)):
        if not configurations:  # controllers are no choice of a router
            continue
        answers = split == "test" or o["router_answers"]
        table, read = evaluate(
            network,
            tokenizer,
            pairs[split],
            configurations,
            scratch / f"{name}_{split}.jsonl",
            max_new_tokens=dict.fromkeys(fixed, o["max_new_tokens"]) if answers else {},
            **sizes,
        )
        features.append(read)
        target |= {key: table[:, number] for number, key in enumerate(configurations)}
    scores.features[name] = features[0], features[-1]
    scores.costs |= {key: blocks - len(skipped) for key, skipped in fixed.items()}
    scores.fill |= {key: settings.selection == "controllers" for key in on_test}
    return network


def controller_configurations(
    network: DecoderNetwork, name: str, dev: Pairs, scratch: Path, o: dict[str, Any]
) -> dict[str, Configuration]:
    """Controllers as learned, and with a shift for each number of blocks, chosen on dev and kept on disk."""
    controllers = controllers_of(network)
    assert controllers is not None
    file = scratch / f"{name}_shifts.json"
    shifts = read_json(file) if file.is_file() else {}
    few = dev.first(SHIFT_ROWS)
    for run in tqdm(o["blocks"], desc=f"{name}: shifts", unit="depth"):
        if str(run) not in shifts and 2 <= run < network.block_count:
            shifts[str(run)] = shift_for_depth(network, few, controllers, run, o["batch"])
            write_json(file, shifts)
    configurations = {f"{name}, as learned": controlled(controllers, 0.0)}
    return configurations | {f"{name}, at {run}": controlled(controllers, shifts[run]) for run in shifts}


def settings_of(folder: Path) -> LayerSelectionSettings:
    """The settings that a folder was trained with; those of full depth for a folder of another recipe."""
    training = read_json(folder / TRAINING) if (folder / TRAINING).is_file() else {}
    if training.get("recipe") == "layer_selection":
        return LayerSelectionSettings(**training["settings"])
    return LayerSelectionSettings(selection=FULL)


# --- menus ---


def menus_of(name: str, settings: dict[str, LayerSelectionSettings], costs: dict[str, int]) -> dict[str, Any]:
    """The menus: by name the model whose features a router reads, and the configurations.

    name: the fine-tuned model; settings: by model. Menus of one configuration are left out.
    """
    configurations = [key for key in costs if key.startswith(f"{name}, ")]
    full = f"{name}, full"
    menus = {
        f"skips of {name}": (name, [key for key in configurations if ", exit " not in key]),
        f"skips and exits of {name}": (name, configurations),
        TRAINED: (name, [full, *(key for key in costs if settings.get(key) is not None)]),
    }
    for other, s in settings.items():
        if s.selection in SERVES_ALL and other != name:
            menus[f"skips of {other}"] = other, [key for key in costs if key.startswith(f"{other}, ")]
    return {menu: value for menu, value in menus.items() if len(value[1]) > 1}


def quality_table(scores: dict[str, np.ndarray], names: Sequence[str], quality: str) -> np.ndarray:
    """Scores [rows, configurations] of a quality, the higher the better (nats with minus)."""
    table = np.stack([scores[name][:, FIELDS.index(quality)] for name in names], 1)
    return -table if quality.startswith("nats") else table


def oracle_lines(
    table: np.ndarray,
    halves: tuple[np.ndarray, np.ndarray] | None,
    twins: np.ndarray | None,
    costs: Sequence[int],
    budgets: Sequence[int],
    draws: int,
) -> dict[str, dict[str, float | None]]:
    """Lines of a menu by kind of choice: quality at each mean number of blocks, and the least number that is
    as good as the deepest configuration.

    table, halves [rows, configurations]: higher is better.
    """
    rows, goal = len(table), float(table[:, int(np.argmax(costs))].mean())

    def line(allocations: Iterable[Allocation]) -> dict[str, float | None]:
        # One allocation at a time: its choices take two bytes a row and budget.
        each = [
            ([a.mean_scores[b * rows] for b in budgets], smallest_mean_cost(a, goal)) for a in allocations
        ]
        means, depths = np.mean([m for m, _ in each], axis=0), [depth for _, depth in each]
        return {**dict(zip(map(str, budgets), means.tolist(), strict=True)), AS_FULL: float(np.mean(depths))}

    lines = {"static mix": line([allocate(without_knowledge(table), costs)])}
    lines["oracle"] = line([allocate(table, costs)])
    for kind, centred in (("oracle, shuffled", False), ("oracle, shuffled, centred", True)):
        lines[kind] = line(allocate(shuffled(table, seed, centred=centred), costs) for seed in range(draws))
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    if twins is not None:
        parts = [(table, table[twins])]
    elif halves is not None:
        parts = [halves, halves[::-1]]
    if parts:
        allocations, judging = [held_out(seen, costs) for seen, _ in parts], [other for _, other in parts]
        pairs = list(zip(allocations, judging, strict=True))
        held: dict[str, float | None] = {
            str(b): float(np.mean([judge(a, s, b * rows) for a, s in pairs])) for b in budgets
        }
        judged_goal = float(np.mean([other[:, int(np.argmax(costs))].mean() for other in judging]))
        lines["oracle, held out"] = held | {AS_FULL: smallest_judged_cost(allocations, judging, judged_goal)}
    return lines


def router_line(
    dev: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    costs: Sequence[int],
    budgets: Sequence[int],
) -> dict[str, float | None]:
    """The line of a router; dev and test: features [rows, hidden] and scores [rows, configurations].

    Prices are chosen on dev, also that of "as good as full", whose quality on test is given beside its depth.
    """
    layers = np.array(costs, np.float64)
    router, full = fit_router(*dev, layers), int(np.argmax(costs))

    def on_test(price: float) -> tuple[float, float]:
        chosen = router.choose_routes(test[0], price)
        return float(test[1][np.arange(len(chosen)), chosen].mean()), float(layers[chosen].mean())

    line: dict[str, float | None] = {"error": router.error}
    for budget in budgets:
        quality, depth = on_test(router.price_for_cost(dev[0], budget))
        line |= {str(budget): quality, f"{budget} depth": depth}
    price = highest_price_as_good(router, dev, float(dev[1][:, full].mean()))
    quality, depth = on_test(price)
    return line | {AS_FULL: depth, f"{AS_FULL} quality": quality}


def highest_price_as_good(router: Router, dev: tuple[np.ndarray, np.ndarray], goal: float) -> float:
    """The highest price at which the router's choices reach `goal` on dev; 0 if none does."""
    rows = np.arange(len(dev[0]))
    reached = [p for p in PRICES if dev[1][rows, router.choose_routes(dev[0], p)].mean() >= goal - 1e-9]
    return max(reached, default=0.0)


def measure_menus(
    scores: Scores, menus: dict[str, Any], pairs: dict[str, Pairs], o: dict[str, Any]
) -> dict[str, Any]:
    """All lines, by menu and quality."""
    qualities = [q for q in QUALITIES if q != "rouge_l" or o["max_new_tokens"]]
    results: dict[str, Any] = {}
    for menu, (model, names) in tqdm(menus.items(), desc="menus", unit="menu"):
        costs = [scores.costs[name] for name in names]
        budgets = [b for b in o["blocks"] if min(costs) <= b < max(costs)]
        results[menu] = {"configurations": names, "blocks": costs, "lines": {}}
        for quality in qualities:
            table, halves = quality_table(scores.test, names, quality), None
            if quality == "nats":
                even, odd = (quality_table(scores.test, names, f"nats_{part}") for part in ("even", "odd"))
                halves = even, odd
            lines = oracle_lines(table, halves, pairs["test"].twins, costs, budgets, o["shuffles"])
            dev_table = quality_table(scores.dev, names, quality)
            for place, block in enumerate(o["router_blocks"]):
                if not np.isnan(dev_table).any():
                    dev_features, features = (part[:, place] for part in scores.features[model])
                    line = router_line((dev_features, dev_table), (features, table), costs, budgets)
                    lines[f"router after block {block}"] = line
            results[menu]["lines"][quality] = {kind: rounded(line) for kind, line in lines.items()}
    return results


def rounded(line: dict[str, float | None]) -> dict[str, float | None]:
    """A line with five digits."""
    return {key: None if value is None else round(value, 5) for key, value in line.items()}


# --- figures and tables ---


@torch.no_grad()
def cost_share(network: DecoderNetwork, depth: float, fill: bool) -> float:
    """Multiply-adds of an answer token with a mean depth, by those at full depth; attention is left out.

    fill: keys and values of skipped blocks are computed and charged; with a fixed list nobody reads them.
    """
    block = sum(p.numel() for p in network.blocks[0].parameters() if p.ndim == 2)
    ids = torch.zeros(1, 1, dtype=torch.long)
    hidden, context = network.stem(ids, ids, torch.zeros(1, 0))
    keys, values = network.cache_fill(0, hidden, context)
    kept = network.hidden_size * (keys.numel() + values.numel()) * fill
    head, blocks = network.hidden_size * network.vocab_size, network.block_count
    return (depth * block + (blocks - depth) * kept + head) / (blocks * block + head)


def figures_of(
    scores: Scores, full: str, twins: np.ndarray | None, network: DecoderNetwork
) -> dict[str, Any]:
    """Means over test rows by configuration; "se": standard error of the difference to full depth of nats.

    Rows that ask for the same in other words count as one.
    """
    figures: dict[str, dict[str, float | None]] = {}
    for name, table in scores.test.items():
        difference = table[:, 0] - scores.test[full][:, 0]
        if twins is not None:
            difference = (difference + difference[twins])[np.arange(len(twins)) < twins] / 2
        depth = float(table[:, FIELDS.index("depth")].mean())
        figures[name] = {
            "depth": round(depth, 3),
            "cost": round(cost_share(network, depth, scores.fill[name]), 4),
            **{q: round(float(table[:, FIELDS.index(q)].mean()), 5) for q in QUALITIES},
            "se": round(float(difference.std() / len(difference) ** 0.5), 5),
        }
        if np.isnan(table[:, FIELDS.index("rouge_l")]).all():
            figures[name]["rouge_l"] = None
    return figures


def show(result: dict[str, Any]) -> None:
    """Print the configurations, then the lines of every menu."""
    console = Console(width=150)
    table = Table(title=f"{result['model']}, {result['network_blocks']} blocks: static configurations, test")
    for column in ("configuration", "depth", "cost", *QUALITIES, "se (nats)"):
        table.add_column(column, justify="left" if column == "configuration" else "right")
    for name, line in result["configurations"].items():
        values = [line[key] for key in ("depth", "cost", *QUALITIES, "se")]
        table.add_row(name, *("" if value is None else f"{value:.3f}" for value in values))
    console.print(table)
    for menu, entry in result["menus"].items():
        for quality, lines in entry["lines"].items():
            budgets = [key for key in lines["oracle"] if key != AS_FULL]
            table = Table(title=f"{menu}: {quality} at a mean number of blocks")
            for column in ("choice", *budgets, AS_FULL):
                table.add_column(column, justify="left" if column == "choice" else "right")
            for kind, line in lines.items():
                values = [line[key] for key in budgets]
                if quality == "nats":
                    values = [-value for value in values]
                depth = line[AS_FULL]
                cells = [f"{value:.3f}" for value in values]
                table.add_row(kind, *cells, "never" if depth is None else f"{depth:.2f}")
            console.print(table)


# --- commands ---


def numbers(text: str) -> list[int]:
    """Whole numbers separated by commas."""
    return [int(word) for word in text.split(",")]


@click.group(help=__doc__, context_settings={"show_default": True})
def main() -> None:
    """The command group that makes data and measures."""


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--rows", required=True, type=click.Path(exists=True, path_type=Path), help="Labelled data.")
@click.option("--messages", default=3, help="Messages a prompt.")
@click.option("--train", "train_pairs", default=3000, help="Pairs to train on.")
@click.option("--dev", "dev_pairs", default=400, help="Pairs of dev.")
@click.option("--test", "test_pairs", default=400, help="Pairs of test, each in two wordings.")
def intents(out: Path, rows: Path, messages: int, train_pairs: int, dev_pairs: int, test_pairs: int) -> None:
    """Write pairs from labelled rows {text, label_text}: several messages, and their labels in words."""
    for split, count in (("train", train_pairs), ("dev", dev_pairs), ("test", test_pairs)):
        labelled = read_json_lines(rows / f"{split}.jsonl")
        twice = split == "test"
        pairs = intent_pairs(labelled, messages, seed=0, both_wordings=twice)
        write_split(out, split, pairs[: count * (1 + twice)])
    click.echo(out)


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--texts", required=True, type=click.Path(exists=True, path_type=Path), help="Rows {text}.")
@click.option("--train", "train_pairs", default=1500, help="Pairs to train on.")
@click.option("--dev", "dev_pairs", default=400, help="Pairs of dev; taken from train after those.")
@click.option("--test", "test_pairs", default=300, help="Pairs of test.")
def sentences(out: Path, texts: Path, train_pairs: int, dev_pairs: int, test_pairs: int) -> None:
    """Write pairs from texts: the beginning, and the sentence that follows."""
    pairs = sentence_pairs(row["text"] for row in read_json_lines(texts / "train.jsonl"))
    write_split(out, "train", pairs[:train_pairs])
    write_split(out, "dev", pairs[train_pairs : train_pairs + dev_pairs])
    tests = sentence_pairs(row["text"] for row in read_json_lines(texts / "test.jsonl"))
    write_split(out, "test", tests[:test_pairs])
    click.echo(out)


@main.command()
@click.option("--model", required=True, type=click.Path(exists=True, path_type=Path), help="See above.")
@click.option(
    "--variant", "variants", multiple=True, type=click.Path(exists=True, path_type=Path), help="See above."
)
@click.option("--data", required=True, help="Folder with dev and test of {prompt, completion}.")
@click.option("--blocks", default="22,15,10,7,4", help="Blocks that configurations run, and budgets.")
@click.option("--rows", default=800, help="Test rows.")
@click.option("--dev-rows", default=400, help="Dev rows, on which routers and shifts are fitted.")
@click.option("--max-length", default=256, help="Longest prompt with completion, in tokens.")
@click.option("--max-new-tokens", default=24, help="Longest greedy answer; 0: no ROUGE-L.")
@click.option("--router-answers", is_flag=True, help="Greedy answers on dev too, for routers by ROUGE-L.")
@click.option("--router-blocks", default="4,30", help="Blocks whose hidden state routers read.")
@click.option("--shuffles", default=10, help="Permutations of the shuffled oracle.")
@click.option("--batch", default=32, help="Rows a batch.")
@click.option("--scratch", type=click.Path(path_type=Path), help="Raw scores.  [default: the cache]")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="JSON file of the result.")
def measure(
    model: Path, variants: tuple[Path, ...], data: str, scratch: Path | None, out: Path, **o: Any
) -> None:
    """Measure configurations, oracles and routers; print the tables and write the result."""
    facts = {"model": model.name, "variants": [v.name for v in variants], "data": Path(data).name, **o}
    o |= {"blocks": numbers(o["blocks"]), "router_blocks": numbers(o["router_blocks"])}
    scratch = scratch or cache_folder() / out.stem
    scratch.mkdir(parents=True, exist_ok=True)
    keep_settings(scratch / "settings.json", {k: v for k, v in facts.items() if k != "variants"})
    folders = {model.name: model, **{variant.name: variant for variant in variants}}
    if len(folders) != 1 + len(variants):
        raise click.UsageError("--model and --variant need folders of different names")
    _, tokenizer = load_decoder(str(model))
    counts = {"dev": o["dev_rows"], "test": o["rows"]}
    pairs, scores = read_pairs(data, tokenizer, counts, o["max_length"]), Scores({}, {}, {}, {}, {})
    for name, folder in folders.items():
        network = score_model(folder, name, pairs, scratch, scores, o)
    settings = {name: settings_of(folder) for name, folder in folders.items()}
    full, twins = f"{model.name}, full", pairs["test"].twins
    result = {
        "command": "benchmarks/layer_selection.py measure",
        **facts,
        "network_blocks": network.block_count,
        "test_rows": len(pairs["test"]),
        "held_out_by": "tokens" if twins is None else "wording",
        "configurations": figures_of(scores, full, twins, network),
        "menus": measure_menus(scores, menus_of(model.name, settings, scores.costs), pairs, o),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, result)
    show(result)


def keep_settings(file: Path, settings: dict[str, Any]) -> None:
    """Write the settings of raw scores; raises UsageError if the folder has scores of other settings.

    Variants may be added to scores that exist.
    """
    if file.is_file() and read_json(file) != settings:
        raise click.UsageError(
            f"{file.parent}: scores of other settings; remove it, or give another --scratch"
        )
    write_json(file, settings)


if __name__ == "__main__":
    main()
