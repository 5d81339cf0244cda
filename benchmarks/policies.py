"""Which reward, estimator and input make the better policy, on the frozen exits of one joint checkpoint.

    python benchmarks/policies.py joint_ckpt/ --data DATA --json benchmarks/results/policies_sst2.json

Everything is measured on dev: accuracy minus that of the max-probability rule at equal mean exit, averaged
over shares of the depth from 0.2 to 0.7 and over --tries seeds of the policy. --judge names rows that the
checkpoint has not been trained on; each variant is then also trained with rewards computed there (the setting
holdout of the recipe).
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from torch import nn
from tqdm import tqdm

from offramp.models.policies import KINDS
from offramp.runtime.rules.sweep import accuracy_at, settings_to_try, sweep
from offramp.training.batches import encode
from offramp.training.checkpoint import Checkpoint, load_checkpoint
from offramp.training.collect import Collected, collect
from offramp.training.data import load_data
from offramp.training.frontier import costs_of, table_of
from offramp.training.hardness import easiness
from offramp.training.recipes.consistentee import (
    ConsistentEE,
    draw_alpha,
    policy_loss,
    qualities,
    rewards,
)

SHARES = (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7)
DEFAULT = ConsistentEE()
VARIANTS = {
    "default": DEFAULT,
    "quality=correct": dataclasses.replace(DEFAULT, quality="correct"),
    "quality=ce": dataclasses.replace(DEFAULT, quality="ce", alpha=0.03),
    "quality=correct hardness": dataclasses.replace(DEFAULT, quality="correct", hardness=True, alpha=0.03),
    "the paper's reward (ce, hardness)": dataclasses.replace(
        DEFAULT, quality="ce", hardness=True, alpha=0.04
    ),
    "estimator=sampled": dataclasses.replace(DEFAULT, estimator="sampled"),
    "policy=state": dataclasses.replace(DEFAULT, policy="state"),
    "policy=both": dataclasses.replace(DEFAULT, policy="both"),
    "spread=1": dataclasses.replace(DEFAULT, spread=1.0),
}


def learn(checkpoint: Checkpoint, seen: Collected, settings: ConsistentEE, seed: int) -> nn.ModuleList:
    """The recipe's policy stage, on what the frozen exits said of the rows in `seen`."""
    network = checkpoint.network
    torch.manual_seed(seed)
    made = KINDS[settings.policy].make(network.hidden_size, len(network.spec.exits) - 1)
    network.policies, network.spec = made.train(), dataclasses.replace(network.spec, policy=settings.policy)
    rows = len(seen.labels)
    quality = qualities(seen.logits, seen.labels, settings.quality)
    easy = easiness(seen.logits, seen.labels) if settings.hardness else torch.ones(rows)
    optimizer = torch.optim.AdamW(network.policies.parameters(), lr=settings.policy_lr)
    # As many steps on few held-out rows as on the whole of train.
    steps = settings.policy_epochs * 28
    for step in range(steps):
        chosen = torch.randint(rows, (256,))
        for group in optimizer.param_groups:
            group["lr"] = settings.policy_lr * min(1.0, 10 * (step + 1) / steps) * (1 - step / steps)
        alpha, shift = draw_alpha(256, settings, torch.device("cpu"))
        gates = network.gates(seen.pooled[chosen], seen.logits[chosen]) + shift[:, None]
        loss = policy_loss(gates, rewards(quality[chosen], alpha, easy[chosen]), settings)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.policies.eval()


def gains(checkpoint: Checkpoint, dev: Collected) -> list[float]:
    """Accuracy of the policies minus max-probability's at each share of the depth, where both reach it."""
    network = checkpoint.network
    with torch.no_grad():
        gates = network.gates(dev.pooled, dev.logits)
    table, costs = table_of(dataclasses.replace(dev, gates=gates)), costs_of(network, dev.lengths)
    curves = [sweep(rule, settings_to_try(rule, table), table, costs) for rule in ("gate", "max_probability")]
    found = []
    for share in SHARES:
        learned, plain = (accuracy_at(curve, share * network.block_count) for curve in curves)
        found.append(np.nan if learned is None or plain is None else learned - plain)
    return found


@click.command(context_settings={"show_default": True})
@click.argument("checkpoint", type=click.Path(exists=True, path_type=Path))
@click.option("--data", required=True, help="As in ee-train; train and dev are read.")
@click.option("--judge", help="File of rows that the checkpoint has not seen, for rewards on held-out rows.")
@click.option("--tries", default=2, help="Seeds of each policy.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Where to write the figures.")
def main(checkpoint: Path, data: str, judge: str | None, tries: int, json_file: Path | None) -> None:
    """Train every variant on cached features, print the gains on dev."""
    loaded = load_checkpoint(checkpoint)
    tokenizer = Tokenizer.from_file(str(loaded.tokenizer))
    rows = {name: load_data(data).split(name) for name in ("train", "dev")}
    if judge is not None:
        rows["held out"] = load_data(judge, dev_share=0.001).split("train")
    seen = {
        name: collect(loaded.network, encode(part, tokenizer, loaded.text), what=name)
        for name, part in rows.items()
    }
    sources = [name for name in seen if name != "dev"]
    table = Table(title=f"accuracy gained over max-probability at equal mean exit, {Path(data).name} (dev)")
    for name in (
        "variant",
        "rewards on",
        "mean",
        *(f"{share * loaded.network.block_count:.1f}" for share in SHARES),
    ):
        table.add_column(name, justify="left" if name in ("variant", "rewards on") else "right")
    results: list[dict[str, Any]] = []
    jobs = [(source, name) for source in sources for name in VARIANTS]
    for source, name in tqdm(jobs, file=sys.stderr, unit="variant"):
        tried = []
        for seed in range(tries):
            learn(loaded, seen[source], VARIANTS[name], seed)
            tried.append(gains(loaded, seen["dev"]))
        mean = np.nanmean(np.array(tried), axis=0)
        reached = bool(np.isfinite(mean).all())
        results.append({"variant": name, "rewards on": source, "mean": round(float(np.nanmean(mean)), 3)})
        results[-1] |= {
            "every share reached": reached,
            "gains": [round(float(g), 3) for g in np.nan_to_num(mean)],
        }
        table.add_row(name, source, f"{np.nanmean(mean):+.2f}", *(f"{gain:+.2f}" for gain in mean))
    Console(width=150).print(table)
    if json_file is not None:
        facts = {"checkpoint": checkpoint.name, "data": Path(data).name, "split": "dev", "shares": SHARES}
        json_file.write_text(json.dumps({**facts, "variants": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
