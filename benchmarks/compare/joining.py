"""Join comparisons of the same methods that ran with other seeds, as on several machines, into one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from offramp.benchmarks.compare.judge import LISTING, ROWS, TIMES
from offramp.benchmarks.compare.kept_rows import rows_file
from offramp.runtime.errors import BadSetting
from offramp.training.checkpoint import write_json

SAME = ("settings", "data", "rows", "reference", "fine_tuned")  # what all comparisons must have


def join(folders: Sequence[Path], out: Path) -> None:
    """Write into `out` the rows of all comparisons in `folders`, and what was compared, for the judge.

    Each folder is one of ee-compare, or a copy of its comparison.json and rows/. Milliseconds are those of
    the first folder that has them. Raises BadSetting if two folders have a seed in common or other methods.
    """
    listings = [_listing(folder) for folder in folders]
    first, seeds = listings[0], [seed for listing in listings for seed in listing["seeds"]]
    for folder, listing in zip(folders, listings, strict=True):
        for name, value in _compared(listing).items():
            if value != _compared(first)[name]:
                raise BadSetting(f"--join {folder}: {name} is not that of {folders[0]}")
    if out.resolve() in [folder.resolve() for folder in folders]:
        raise BadSetting(f"--join {out}: it is --out, too; name another --out")
    if len(set(seeds)) < len(seeds):
        raise BadSetting(f"--join: seeds {', '.join(map(str, sorted(seeds)))}: one is there twice")
    (out / ROWS).mkdir(parents=True, exist_ok=True)
    for folder, listing in zip(folders, listings, strict=True):
        for seed in listing["seeds"]:
            for method in first["methods"]:
                file = rows_file(folder / ROWS, method, seed)
                if not file.is_file():
                    raise BadSetting(f"--join {folder}: {file.name} is missing in its {ROWS}/")
                shutil.copyfile(file, out / ROWS / file.name)
    timed = next((f for f, listing in zip(folders, listings, strict=True) if listing["times"]), None)
    if timed is not None:
        shutil.copyfile(timed / TIMES, out / TIMES)
    recipes = {
        name: entry | {"first_right": _in_order(name, listings)} for name, entry in first["recipes"].items()
    }
    joined = first | {"seeds": sorted(seeds), "recipes": recipes, "times": timed is not None}
    joined["command"] = "; ".join(listing["command"] for listing in listings)
    write_json(out / LISTING, joined)


def _listing(folder: Path) -> dict[str, Any]:
    if not (folder / LISTING).is_file():
        raise BadSetting(f"--join {folder}: it has no {LISTING}, which ee-compare writes at its end")
    listing: dict[str, Any] = json.loads((folder / LISTING).read_text(encoding="utf-8"))
    return listing


def _in_order(recipe: str, listings: Sequence[dict[str, Any]]) -> list[Any]:
    """The figures of a recipe's first right exits, in the order of the seeds."""
    of_seeds = {
        seed: figures
        for listing in listings
        for seed, figures in zip(listing["seeds"], listing["recipes"][recipe]["first_right"], strict=True)
    }
    return [of_seeds[seed] for seed in sorted(of_seeds)]


def _compared(listing: dict[str, Any]) -> dict[str, Any]:
    """What must be the same in all comparisons, by name."""
    recipes = {name: (e["models"], e["same_exits_as"]) for name, e in listing["recipes"].items()}
    return {
        **{name: listing[name] for name in SAME},
        "methods": sorted(listing["methods"]),
        "recipes": recipes,
    }
