"""What a comparison keeps of a method for one seed: answers and costs of its settings for all rows of test.

Every table is computed from these files, so that ee-compare --recompute needs no network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.benchmarks.compare.frontiers import SettingResults
from offramp.benchmarks.compare.specs import safe_name

FORMAT = 2  # of the files and of the judge; with another one rows are evaluated again


@dataclass(frozen=True)
class ChosenSetting:
    """A setting chosen on dev: rule, starting variant, number of the model, and its figures on dev, percent.

    point: the name of the operating point, for points that training chose.
    """

    rule: str
    parameters: Mapping[str, float]
    variant: str
    model: int
    macs_saved: float
    accuracy: float
    point: str = ""


@dataclass(frozen=True)
class MethodRows:
    """One method for one seed on test: a recipe's exits with a rule.

    kind: "rule" (settings swept on dev), "published" (one model a point) or "variant" (one precision).
    results: of `settings`, in the same order. full_right [rows]: whether full depth is right, of the model
    that is most accurate there on dev. trials: settings tried on dev. figures: at the point that saves half.
    published: figures on test of every published point, chosen or not.
    """

    name: str
    recipe: str
    rule: str
    kind: str
    seed: int
    results: SettingResults
    full_right: NDArray[np.bool_]
    settings: Sequence[ChosenSetting]
    trials: int
    figures: Mapping[str, Any]
    published: Sequence[Mapping[str, Any]] = ()

    @property
    def reach(self) -> float:
        """Percent of multiply-accumulates that the cheapest setting of the method's own saves on test.

        The first exit for all rows, which every method may use, is not a setting of its own.
        """
        own = [at for at, setting in enumerate(self.settings) if setting.rule not in ("fixed", "never")]
        spent, full = self.results.spent["macs"], self.results.full["macs"].sum()
        return max([100 * (1 - float(spent[at].sum() / full)) for at in own], default=0.0)


def method_name(recipe: str, rule: str) -> str:
    """The name of a method in the tables."""
    return f"{recipe} + {rule}"


def rows_file(folder: Path, name: str, seed: int) -> Path:
    """The file that keeps a method's rows for a seed."""
    return folder / f"{safe_name(name)}_{seed}.npz"


def save_rows(rows: MethodRows, folder: Path, key: str) -> None:
    """Write a method's rows; key: digest of weights, data and options, by which the file is used again."""
    about = {
        "format": FORMAT,
        "key": key,
        "count": rows.results.right.shape[1],
        **{name: getattr(rows, name) for name in ("name", "recipe", "rule", "kind", "seed", "trials")},
        "settings": [asdict(setting) for setting in rows.settings],
        "figures": dict(rows.figures),
        "published": list(rows.published),
    }
    arrays: dict[str, NDArray[Any]] = {
        f"spent_{axis}": values.astype(np.float32) for axis, values in rows.results.spent.items()
    }
    arrays |= {f"full_{axis}": values for axis, values in rows.results.full.items()}
    arrays["right"] = np.packbits(rows.results.right, axis=1)
    arrays["full_right"] = np.packbits(rows.full_right)
    folder.mkdir(parents=True, exist_ok=True)
    file = rows_file(folder, rows.name, rows.seed)
    temporary = file.with_name(f".{file.name}")
    with temporary.open("wb") as target:
        np.savez_compressed(target, about=np.array(json.dumps(about)), **arrays)  # type: ignore[arg-type]
    temporary.replace(file)


def has_rows(folder: Path, name: str, seed: int, key: str) -> bool:
    """Whether a method's rows are kept and have this key."""
    file = rows_file(folder, name, seed)
    if not file.is_file():
        return False
    with np.load(file, allow_pickle=False) as stored:
        about = json.loads(str(stored["about"]))
    return bool(about["format"] == FORMAT and about["key"] == key)


def load_rows(folder: Path, name: str, seed: int) -> MethodRows:
    """Read a method's rows; ValueError if the file is of another format."""
    file = rows_file(folder, name, seed)
    with np.load(file, allow_pickle=False) as stored:
        about = json.loads(str(stored["about"]))
        if about["format"] != FORMAT:
            raise ValueError(f"{file}: format {about['format']}, this version reads {FORMAT}")
        count = about["count"]
        axes = [key.removeprefix("full_") for key in stored.files if key.startswith("full_")]
        axes.remove("right")
        spent = {axis: stored[f"spent_{axis}"].astype(float) for axis in axes}
        full = {axis: stored[f"full_{axis}"] for axis in axes}
        right = np.unpackbits(stored["right"], axis=1, count=count).astype(bool)
        full_right = np.unpackbits(stored["full_right"], count=count).astype(bool)
    settings = [ChosenSetting(**setting) for setting in about["settings"]]
    names = ("name", "recipe", "rule", "kind", "seed", "trials", "figures", "published")
    results = SettingResults(right, spent, full)
    return MethodRows(
        **{name: about[name] for name in names}, results=results, full_right=full_right, settings=settings
    )
