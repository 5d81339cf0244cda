"""Perplexity, depth and time of a decoder's rules as its bundle walks them, beside the same network in torch.

    python benchmarks/walked_points.py --bundle BUNDLE --model MODEL --data ../shared/data/wikitext2_eval \
        --window 256 --first-row 4 --rows 48 --dev-rows 8 --out FILE

MODEL is the folder of which ee-split wrote BUNDLE. --data has splits dev and test: texts, which are joined
and cut into windows, the first half of each a prompt; or prompts with completions. Prompts run all blocks;
the tokens of a completion walk one after another, each given those before it. Perplexity is of the tokens
after the first, a mean of nats over rows. Lists of segments to skip are searched on rows of dev by the bundle
itself (--dev-rows 0: those of its points are taken); even skips of as many segments are beside them. A bundle
with controllers walks by them, too, and one with a router at each of its route points.

torch: the same tokens by benchmarks/layer_selection_scores.py, which computes all blocks and then selects.
ms: mean time of a token with its head; rules take turns row by row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from offramp.benchmarks.layer_selection_scores import (
    Configuration,
    controlled,
    forced_scores,
    read_prompts,
    skips,
)
from offramp.models.controllers import controllers_of
from offramp.models.decoder import DecoderNetwork
from offramp.runtime import RuleSpec, load_generator
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import CONTROLLER, Manifest
from offramp.runtime.rules.skip import skipped_segments, spec_of_list
from offramp.runtime.tuning.completions import WalkedScore, score_walk
from offramp.runtime.tuning.search_skips import Pair, search_skips
from offramp.training.checkpoint import write_json
from offramp.training.data import BadData
from offramp.training.decoder import load_decoder
from offramp.training.lm_data import load_token_rows

FULL = RuleSpec("never", {})
BATCH = 8  # rows that torch scores together


def read_rows(
    data: str, tokenizer: PreTrainedTokenizerBase, window: int, counts: Mapping[str, range]
) -> dict[str, list[Pair]]:
    """Read prompts and completions as token ids, by split; counts: the rows that are taken of each.

    Texts are cut into windows, of which the first half is the prompt. Rows without a prompt, or with less
    than two tokens of completion, are left out before rows are counted. Raises BadData for a missing split.
    """
    splits, rows = load_token_rows(data, tokenizer, window), dict[str, list[Pair]]()
    for split, places in counts.items():
        if split not in splits:
            raise BadData(f"{data} has no {split} split")
        pairs = list[Pair]()
        for ids, start in zip(splits[split].ids, splits[split].starts, strict=True):
            if start == 1:  # a window of a text, or a completion without a prompt
                start = window // 2 if len(ids) == window else len(ids)
            if len(ids) > start + 1:
                pairs.append((ids[:start], ids[start:]))
        rows[split] = pairs[places.start : places.stop]
    return rows


def rules_to_walk(
    manifest: Manifest, lists: Mapping[str, frozenset[int]], counts: Sequence[int]
) -> dict[str, RuleSpec]:
    """The rules that are walked, by the name of their line.

    lists: skipped segments (0-based) by name. counts: numbers of segments that even skips run.
    """
    segments, rules = len(manifest.segments), {"full": FULL}
    rules |= {f"even skip, {run} segments": RuleSpec("skip", {"segments": run}) for run in counts}
    rules |= {name: spec_of_list(skipped) for name, skipped in lists.items()}
    if any(tensor.name == CONTROLLER for tensor in manifest.segments[0].first_graph.outputs):
        rules["controllers"] = RuleSpec("select", {"threshold": 0.5})
    rules |= {point.name: point.rule for point in manifest.points if point.rule.name == "route"}
    return {name: rule for name, rule in rules.items() if segments > 1 or rule is FULL}


def walk_rules(
    bundle: Path, rules: Mapping[str, RuleSpec], rows: Sequence[Pair], **options: Any
) -> dict[str, list[WalkedScore]]:
    """Scores of all rows by each rule; rules take turns row by row. options: of load_generator."""
    scores: dict[str, list[WalkedScore]] = {name: [] for name in rules}
    with ExitStack() as opened:
        sessions = {
            name: opened.enter_context(load_generator(bundle, rule=rule, global_pool=True, **options))
            for name, rule in rules.items()
        }
        for prompt, completion in tqdm(rows, desc="walking", unit="row"):
            for name, session in sessions.items():
                scores[name].append(score_walk(session, prompt, completion))
    return scores


def torch_nats(
    network: DecoderNetwork, manifest: Manifest, rules: Mapping[str, RuleSpec], rows: Sequence[Pair]
) -> dict[str, float]:
    """Mean nats a token of the same rows in torch, of the rules whose blocks do not depend on the bundle."""
    configurations = dict[str, Configuration]()
    for name, rule in rules.items():
        if rule.name == "select":
            controllers = controllers_of(network)
            if controllers is None:
                raise click.UsageError("the bundle has controllers, and the model has none: name its folder")
            configurations[name] = controlled(controllers, 0.0)
        elif rule.name in ("never", "skip"):
            blocks = {
                block - 1
                for segment in _skipped(rule, len(manifest.segments))
                for block in manifest.segments[segment].blocks
            }
            configurations[name] = skips(frozenset(blocks), network.block_count)
    nats: dict[str, list[float]] = {name: [] for name in configurations}
    for start in tqdm(range(0, len(rows), BATCH), desc="torch", unit="batch"):
        batch = rows[start : start + BATCH]
        prompts = read_prompts(network, [prompt for prompt, _ in batch])
        completions, index = [completion for _, completion in batch], range(len(batch))
        for name, configuration in configurations.items():
            nats[name] += forced_scores(network, prompts, completions, index, configuration)[:, 0].tolist()
    return {name: float(np.mean(values)) for name, values in nats.items()}


def _skipped(rule: RuleSpec, segments: int) -> frozenset[int]:
    """The segments (0-based) that rules never and skip do not run."""
    if "segments" in rule.parameters:
        return skipped_segments(segments, int(rule.parameters["segments"]))
    return frozenset(number - 1 for number in rule.skipped)


def lines_of(
    scores: Mapping[str, Sequence[WalkedScore]], rules: Mapping[str, RuleSpec], torch: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """The figures of each rule."""
    lines: dict[str, dict[str, Any]] = {}
    for name, walked in scores.items():
        nats = float(np.mean([score.nats for score in walked]))
        line: dict[str, Any] = {
            "perplexity": round(float(np.exp(nats)), 4),
            "nats": round(nats, 5),
            "depth": round(float(np.mean([score.depth for score in walked])), 3),
            "ms": round(1e3 * float(np.mean([score.seconds for score in walked])), 3),
        }
        if name in torch:
            line["torch_perplexity"] = round(float(np.exp(torch[name])), 4)
        if rules[name].skipped:
            line["skipped_segments"] = list(rules[name].skipped)
        lines[name] = line
    return lines


def show(lines: Mapping[str, Mapping[str, Any]], title: str) -> None:
    """Print a table, a line for each rule."""
    table, columns = Table(title=title), ("depth", "perplexity", "torch_perplexity", "ms")
    table.add_column("rule")
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    for name, line in lines.items():
        table.add_row(name, *(f"{line[key]:.2f}" if key in line else "" for key in columns))
    Console(width=120).print(table)


@click.command(context_settings={"show_default": True})
@click.option("--bundle", required=True, type=click.Path(exists=True, path_type=Path), help="See above.")
@click.option("--model", required=True, help="Folder or name of the model that was split.")
@click.option("--data", required=True, help="Folder with splits dev and test.")
@click.option("--window", default=256, help="Tokens of a window of texts, and of the longest pair.")
@click.option("--rows", default=48, help="Rows of test.")
@click.option("--first-row", default=0, help="Row of test (from 0) with which to begin.")
@click.option("--dev-rows", default=8, help="Rows of dev on which lists are searched; 0: the bundle's lists.")
@click.option("--beam", default=1, help="Lists of each length that the search keeps.")
@click.option("--shares", default="0.8,0.6", help="Shares of the segments that lists and even skips run.")
@click.option("--variant", help="Variant to walk.  [default: the bundle's]")
@click.option("--threads", type=int, help="Threads.  [default: one for each core]")
@click.option("--torch/--no-torch", "in_torch", default=True, help="Whether torch computes the same rows.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="JSON file of the figures.")
def main(bundle: Path, model: str, data: str, variant: str | None, out: Path, **o: Any) -> None:
    """Walk a bundle's rules over completions, print the table and write it."""
    network, tokenizer = load_decoder(model)
    network.eval()
    test = range(o["first_row"], o["first_row"] + o["rows"])
    rows = read_rows(data, tokenizer, o["window"], {"dev": range(o["dev_rows"]), "test": test})
    manifest, options = open_bundle(bundle).manifest, {"variant": variant, "threads": o["threads"]}
    segments = len(manifest.segments)
    shares = [float(share) for share in o["shares"].split(",")]
    counts = sorted({max(2, round(share * segments)) for share in shares}, reverse=True)
    counts = [run for run in counts if run < segments]
    lists = {p.name: frozenset(n - 1 for n in p.rule.skipped) for p in manifest.points if p.rule.skipped}
    if o["dev_rows"]:
        with load_generator(bundle, rule="never", global_pool=True, **options) as session:
            least = min(counts, default=segments) / segments
            searched = {len(x.skipped): x for x in search_skips(session, rows["dev"], o["beam"], least)}
        lists = {
            f"searched skip, {run} segments": searched[segments - run].skipped
            for run in counts
            if segments - run in searched
        }
    rules = rules_to_walk(manifest, lists, counts)
    scores = walk_rules(bundle, rules, rows["test"], **options)
    torch = torch_nats(network, manifest, rules, rows["test"]) if o["in_torch"] else {}
    lines = lines_of(scores, rules, torch)
    facts = {"bundle": bundle.name, "model": Path(model).name, "data": Path(data).name, "variant": variant}
    about = {"command": "benchmarks/walked_points.py", **facts, **o, "blocks": manifest.blocks}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, about | {"segments": segments, "test_rows": len(rows["test"]), "rules": lines})
    show(lines, f"{bundle.name}: {manifest.blocks} blocks in {segments} segments")


if __name__ == "__main__":
    main()
