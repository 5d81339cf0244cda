"""Results that a comparison stores beside a checkpoint: outputs of every exit on dev and test, and the
bundle.

A stored file or bundle contains the digest of the weights and rows from which it was computed. With other
weights or rows it is computed again.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from offramp.models.forecasts import STATISTICS
from offramp.models.macs import exit_macs
from offramp.models.network import EarlyExitNetwork
from offramp.runtime.rules.sweep import ExitMacs, ExitTable
from offramp.training.batches import Encoded, encode_rows
from offramp.training.checkpoint import NETWORK, WEIGHTS, Checkpoint, load_checkpoint
from offramp.training.collect import collect, exit_costs, exit_table
from offramp.training.data import Columns
from offramp.training.options import parse_settings
from offramp.training.outcomes import Outcomes, collect_outcomes
from offramp.training.recipes.quee import QueeSettings
from offramp.training.replay import WalkCosts, bit_costs
from offramp.training.user_model import load_matching

Floats = NDArray[np.float64]
SPLITS = ("dev", "test")


@dataclass(frozen=True)
class ExitOutputs:
    """Outputs of every exit on one split in fp32, and the cost of each row's walk up to each exit.

    spent [rows, exits] and full [rows] (the network without early exits in fp32) by axis: layers, macs, bops.
    truncated [rows, exits]: multiply-accumulates of the truncated network that has this exit and no other.
    """

    table: ExitTable
    costs: ExitMacs
    spent: Mapping[str, Floats]
    full: Mapping[str, Floats]
    truncated: Floats


@dataclass(frozen=True)
class VariantPaths:
    """Outcomes of every walk that rule quee can take through the variants on one split, and their costs in
    bit operations.

    outcomes: with the inputs that the checkpoint's forecasts read. statistics [rows, nodes, 3]: of the exit's
    softmax after each walk.
    """

    outcomes: Outcomes
    statistics: NDArray[np.float32]
    costs: WalkCosts


@dataclass(frozen=True)
class CheckpointOutputs:
    """A checkpoint with its encoded rows of dev and test; computes and stores what its exits give for them.

    digests: by split, that of weights and rows.
    """

    folder: Path
    checkpoint: Checkpoint
    rows: Mapping[str, Encoded]
    digests: Mapping[str, str]

    @property
    def rule(self) -> str:
        """The name of the exit rule that the checkpoint was trained for."""
        training = self.checkpoint.training
        points = training.get("operating_points") or [{"rule": {"name": "max_probability"}}]
        return str(training.get("rule") or points[0]["rule"]["name"])

    def exit_outputs(self, split: str) -> ExitOutputs:
        """The fp32 outputs of every exit on every row of a split."""
        network, rows = self.checkpoint.network, self.rows[split]

        def compute() -> dict[str, Any]:
            table = exit_table(collect(network, rows, description=f"{self.folder.name} {split}"))
            gates = {} if table.gates is None else {"gates": table.gates}
            return {"logits": table.logits, "labels": table.labels, **gates}

        arrays = load_or_compute(self._file(split), self.digests[split], compute)
        table = ExitTable(arrays["logits"], arrays.get("gates"), arrays["labels"])
        costs = exit_costs(network, rows.lengths)
        bits = bit_costs(network, rows.lengths, ["fp32"])
        shape = costs.to_exit.shape
        bops = bits.stem[:, None] + bits.steps[:, 0].cumsum(1)
        spent = {"layers": np.broadcast_to(costs.blocks.astype(float), shape), "macs": costs.to_exit}
        full = {"layers": np.full(shape[0], float(costs.blocks[-1])), "macs": costs.full}
        truncated = costs.to_exit - earlier_exit_macs(network, rows.lengths)
        return ExitOutputs(table, costs, spent | {"bops": bops}, full | {"bops": bits.full}, truncated)

    def variant_paths(self, split: str) -> VariantPaths:
        """The outcomes of all walks of a checkpoint of recipe quee on a split."""
        network, rows = self.checkpoint.network, self.rows[split]
        tree = self.quee_settings.tree(len(network.spec.exits))
        names = tuple(network.spec.forecast)

        def compute() -> dict[str, Any]:
            description = f"{self.folder.name} {split} walks"
            outcomes = collect_outcomes(network, rows, names, tree, description=description)
            return {"inputs": outcomes.inputs, "wrong": outcomes.wrong}

        kind = f"{tree.changes} {tree.increase} {network.spec.forecast_inputs} {STATISTICS}"
        digest = f"{self.digests[split]} {names} walks {kind}"
        arrays = load_or_compute(self._file(f"{split}.paths.{'.'.join(names)}"), digest, compute)
        outcomes = Outcomes(names, tree, arrays["inputs"], arrays["wrong"], rows.lengths)
        return VariantPaths(
            outcomes.select_inputs(self.quee_settings.inputs),
            outcomes.inputs[..., :STATISTICS],
            bit_costs(network, rows.lengths, names),
        )

    @property
    def quee_settings(self) -> QueeSettings:
        """The settings of recipe quee with which the checkpoint was trained."""
        words = tuple(f"{name}={value}" for name, value in self.checkpoint.training["settings"].items())
        return parse_settings(QueeSettings, words)

    def _file(self, what: str) -> Path:
        return self.folder.with_name(f"{self.folder.name}.{what}.npz")


def load_or_compute(file: Path, digest: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Arrays of a file; they are computed and written unless the file has this digest."""
    if file.is_file():
        with np.load(file, allow_pickle=False) as stored:
            if "key" in stored.files and str(stored["key"]) == digest:
                return {name: stored[name] for name in stored.files if name != "key"}
    arrays = compute()
    temporary = file.with_name(f".{file.name}")
    with temporary.open("wb") as target:
        np.savez_compressed(target, key=np.array(digest), **arrays)
    temporary.replace(file)
    return arrays


def collect_outputs(folder: Path, data: str, splits: tuple[str, ...] = SPLITS) -> CheckpointOutputs:
    """Load a checkpoint and encode its evaluation rows; outputs are computed on first access."""
    checkpoint = load_checkpoint(folder)
    rows = load_matching(data, Columns(), checkpoint.network.spec.labels)
    encoded = {split: encode_rows(checkpoint, rows.split(split)) for split in splits}
    weights = weights_digest(folder)
    digests = {}
    for split in splits:
        plain = rows.split(split)
        images = None if plain.images is None else plain.images.files
        digest = hashlib.sha256(repr((plain.text, plain.text_b, images)).encode())
        for array in (encoded[split].label, encoded[split].lengths):
            digest.update(np.ascontiguousarray(array).tobytes())
        digests[split] = f"{weights} {digest.hexdigest()[:16]}"
    return CheckpointOutputs(folder, checkpoint, encoded, digests)


def weights_digest(folder: Path) -> str:
    """The first sixteen hex digits of the sha256 of a checkpoint's weights."""
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()[:16]


def exits_digest(folder: Path) -> str:
    """The sha256 of all of a checkpoint that its exits' outputs depend on: without policies and forecasts."""
    spec = json.loads((folder / NETWORK).read_text(encoding="utf-8"))["network"]
    spec = {name: value for name, value in spec.items() if not name.startswith(("policy", "forecast"))}
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode())
    for name, tensor in sorted(load_file(folder / WEIGHTS).items()):
        if not name.startswith(("policies.", "forecasts.")):
            digest.update(name.encode() + np.ascontiguousarray(tensor).tobytes())
    return digest.hexdigest()


def earlier_exit_macs(network: EarlyExitNetwork, lengths: NDArray[np.int64]) -> Floats:
    """Multiply-accumulates of the exits and policies before each exit [rows, exits].

    A truncated network has none of them.
    """
    tokens = lengths.astype(np.float64)[:, None]
    heads = [exit_macs(network, index) for index in range(len(network.spec.exits) - 1)]
    each = tokens * np.array([head.token for head in heads]) + np.array([head.row for head in heads])
    before: Floats = np.concatenate([np.zeros((len(lengths), 1)), each.cumsum(1)], axis=1)
    return before


def ensure_bundle(checkpoint: Path, variants: tuple[str, ...], *, baselines: bool = False) -> Path:
    """The folder of the bundle beside a checkpoint, which ee-split writes unless it is there already.

    An existing bundle is used if it has these weights, these variants and, with `baselines`, the baselines.
    """
    bundle = checkpoint.with_name(f"{checkpoint.name}.bundle")
    key_file = checkpoint.with_name(f"{checkpoint.name}.bundle.key")
    needed = {*variants, *({"baselines"} if baselines else ())}
    weights, *present = key_file.read_text(encoding="utf-8").split() if key_file.is_file() else ("",)
    if weights != weights_digest(checkpoint) or not needed <= {*present}:
        words = ["--out", str(bundle), "--variants", ",".join(variants), "--overwrite"]
        words += ["--baselines", str(baselines_folder(checkpoint))] if baselines else []
        command = [str(Path(sys.executable).parent / "ee-split"), str(checkpoint), *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        key_file.write_text(" ".join([weights_digest(checkpoint), *sorted(needed)]), encoding="utf-8")
    return bundle


def baselines_folder(checkpoint: Path) -> Path:
    """The folder beside a checkpoint that holds its baselines, the single graphs."""
    return checkpoint.with_name(f"{checkpoint.name}.baselines")
