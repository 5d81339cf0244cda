"""What a checkpoint's exits say of dev and test, and what leaving costs, kept in files beside the checkpoint.

A file belongs to the weights and the rows that it was made from and says which: with others it is made anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.models.forecasts import STATISTICS
from offramp.models.macs import exit_macs
from offramp.models.network import EarlyExitNetwork
from offramp.runtime.rules.sweep import Costs, ExitTable
from offramp.training.batches import Encoded, encode_for
from offramp.training.checkpoint import WEIGHTS, Checkpoint, load_checkpoint
from offramp.training.collect import collect
from offramp.training.data import Columns, load_data
from offramp.training.frontier import costs_of, table_of
from offramp.training.outcomes import Outcomes, collect_outcomes
from offramp.training.replanning import Ledger, bit_ledger

Floats = NDArray[np.float64]
SPLITS = ("dev", "test")


@dataclass(frozen=True)
class Heard:
    """Of one split: what every exit said and what leaving there costs.

    spent [rows, exits] and full [rows] (the network without early exits in fp32) by axis: layers, macs, bops.
    alone [rows, exits]: multiply-accumulates of a truncated network, which has that exit and no other.
    """

    table: ExitTable
    costs: Costs
    spent: Mapping[str, Floats]
    full: Mapping[str, Floats]
    alone: Floats


@dataclass(frozen=True)
class Paths:
    """Of one split, for rule quee: what every path through the variants ends in, and its bit operations."""

    outcomes: Outcomes
    ledger: Ledger


@dataclass(frozen=True)
class Ears:
    """A checkpoint with the encoded rows of dev and test, and the digests that files are known by."""

    folder: Path
    loaded: Checkpoint
    rows: Mapping[str, Encoded]
    keys: Mapping[str, str]

    @property
    def rule(self) -> str:
        """The rule that the checkpoint was trained for."""
        training = self.loaded.training
        points = training.get("operating_points") or [{"rule": {"name": "max_probability"}}]
        return str(training.get("rule") or points[0]["rule"]["name"])

    def heard(self, split: str) -> Heard:
        """Every exit on every row, in fp32."""
        network, rows = self.loaded.network, self.rows[split]

        def listen() -> dict[str, Any]:
            table = table_of(collect(network, rows, what=f"{self.folder.name} {split}"))
            gates = {} if table.gates is None else {"gates": table.gates}
            return {"logits": table.logits, "labels": table.labels, **gates}

        kept = self._kept(split, self.keys[split], listen)
        table = ExitTable(kept["logits"], kept.get("gates"), kept["labels"])
        costs = costs_of(network, rows.lengths)
        ledger = bit_ledger(network, rows.lengths, ["fp32"])
        shape = costs.to_exit.shape
        bops = ledger.stem[:, None] + ledger.steps[:, 0].cumsum(1)
        spent = {"layers": np.broadcast_to(costs.blocks.astype(float), shape), "macs": costs.to_exit}
        full = {"layers": np.full(shape[0], float(costs.blocks[-1])), "macs": costs.full}
        alone = costs.to_exit - earlier_heads(network, rows.lengths)
        return Heard(table, costs, spent | {"bops": bops}, full | {"bops": ledger.full}, alone)

    def paths(self, split: str, names: tuple[str, ...] = ()) -> Paths:
        """All paths of rule quee, in these variants or those that the checkpoint has forecasts for."""
        network, rows = self.loaded.network, self.rows[split]
        names = names or tuple(network.spec.forecast)

        def follow() -> dict[str, Any]:
            found = collect_outcomes(network, rows, names, what=f"{self.folder.name} {split} paths")
            return {"seen": found.seen, "wrong": found.wrong}

        kept = self._kept(
            f"{split}.paths.{'.'.join(names)}", f"{self.keys[split]} {names} {STATISTICS}", follow
        )
        outcomes = Outcomes(names, kept["seen"], kept["wrong"], rows.lengths)
        return Paths(outcomes, bit_ledger(network, rows.lengths, names))

    def _kept(self, what: str, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Arrays of the file, made now unless it is there and belongs to these weights and rows."""
        file = self.folder.with_name(f"{self.folder.name}.{what}.npz")
        if file.is_file():
            with np.load(file, allow_pickle=False) as kept:
                if "key" in kept.files and str(kept["key"]) == key:
                    return {name: kept[name] for name in kept.files if name != "key"}
        made = make()
        beside = file.with_name(f".{file.name}")
        with beside.open("wb") as target:
            np.savez_compressed(target, key=np.array(key), **made)
        beside.replace(file)
        return made


def listen_to(folder: Path, data: str, splits: tuple[str, ...] = SPLITS) -> Ears:
    """Load a checkpoint and the rows that it is judged on."""
    loaded, rows = load_checkpoint(folder), load_data(data, Columns())
    encoded = {split: encode_for(loaded, rows.split(split)) for split in splits}
    weights = digest_of(folder)
    keys = {}
    for split in splits:
        part = rows.split(split)
        pictures = None if part.images is None else part.images.files
        said = hashlib.sha256(repr((part.text, part.text_b, pictures)).encode())
        for array in (encoded[split].label, encoded[split].lengths):
            said.update(np.ascontiguousarray(array).tobytes())
        keys[split] = f"{weights} {said.hexdigest()[:16]}"
    return Ears(folder, loaded, encoded, keys)


def digest_of(folder: Path) -> str:
    """The checkpoint's weights in sixteen digits."""
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()[:16]


def earlier_heads(network: EarlyExitNetwork, lengths: NDArray[np.int64]) -> Floats:
    """Multiply-accumulates of the exits and policies before each exit [rows, exits], which a truncated
    network does without.
    """
    tokens = lengths.astype(np.float64)[:, None]
    heads = [exit_macs(network, index) for index in range(len(network.spec.exits) - 1)]
    each = tokens * np.array([head.token for head in heads]) + np.array([head.row for head in heads])
    before: Floats = np.concatenate([np.zeros((len(lengths), 1)), each.cumsum(1)], axis=1)
    return before
