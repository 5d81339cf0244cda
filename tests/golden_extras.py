"""Further runs of golden.py on some bundles: ee-calibrate, ee-eval, ee-bench, ee-verify."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import partial
from typing import Any

from golden import Doors, Run
from golden_runs import INPUTS, Kind, decode, described


def extras(kind: Kind, bundle: str, doors: Doors, recorded: dict[str, Any] | None) -> Iterator[Run]:
    """ee-calibrate on a copy of the bundle, ee-eval, ee-bench and ee-verify, as far as each applies."""
    if kind.name in ("text", "image", "llama", "smollm2", "e5"):
        yield from _calibrated(kind, bundle, doors, recorded)
    if kind.name in ("text", "quee", "e5"):
        data = {"e5": "../data_sst2"}.get(kind.name, "../data_text")
        words = ["ee-eval", f"../ckpt_{kind.name}", "--data", data, "--points-from", "dev", "--within", "2"]
        more = ["--json", f"eval_{kind.name}.json", "--picture", f"eval_{kind.name}.png"]
        yield " ".join(words), partial(_json, doors, [*words, *more], f"eval_{kind.name}.json")
    if kind.name in ("text", "llama"):
        file = f"bench_{kind.name}.json"
        words = ["ee-bench", "--bundle", bundle, "--rows", "4", "--turns", "1", "--threads", "1", "--data"]
        if kind.decodes:
            words += [INPUTS + "talk.jsonl", "--rules", "gate,fixed:1,speculative", "--max-new-tokens", "6"]
            more = ["--json", file]
        else:
            words += ["../data_text/test.jsonl", "--points", "default,int8-default"]
            words += ["--against", "rivals_text"]
            more = ["--json", file, "--report", "bench.html"]
        yield " ".join(words), partial(_bench, doors, [*words, *more], file)
        yield f"ee-verify {bundle}", lambda: {"code": doors.command(["ee-verify", bundle])[0]}


def _calibrated(kind: Kind, bundle: str, doors: Doors, recorded: dict[str, Any] | None) -> Iterator[Run]:
    files = {"text": INPUTS + "hard.jsonl", "image": "../data_image/dev", "e5": "../data_sst2/dev.jsonl"}
    files |= {"llama": "../data_pairs/dev.jsonl", "smollm2": INPUTS + "talk_pairs.jsonl"}
    rule = {"text": ["--rule", "max_probability"], "e5": ["--rule", "margin"]}.get(kind.name, [])
    copy = f"{bundle}_calibrated"
    shutil.rmtree(doors.cwd / copy, ignore_errors=True)
    shutil.copytree(doors.cwd / bundle, doors.cwd / copy)
    words = ["ee-calibrate", files[kind.name], "--bundle", copy, "--threads", "1", *rule]
    code, out, _ = doors.command(words)
    told: dict[str, Any] = {"code": code, "said": out.decode("utf-8")} | described(doors, copy)
    told["raw"] = {"files": told["raw"]["files"], "points": told["raw"]["manifest"][doors.field("points")]}
    name = " ".join(words)
    yield name, lambda: told
    points = (told if recorded is None else recorded[name])["points"]
    if kind.decodes:
        for point in list(points)[::2]:
            yield from decode(kind, copy, ["--point", point], points[point], doors)
        wish = ["--rule", "route", "--threshold", "0.001", "--variant", "int8"]
        yield from decode(kind, copy, wish, "int8", doors)


def _json(doors: Doors, words: list[str], file: str) -> dict[str, Any]:
    (doors.cwd / file).unlink(missing_ok=True)
    code, _, said = doors.command(words)
    if code:
        return {"code": code, "said": said}
    told = json.loads((doors.cwd / file).read_text(encoding="utf-8"))
    told.pop("curves", None)
    return {"code": code, "near": 1e-2, "raw": told}


def _bench(doors: Doors, words: list[str], file: str) -> dict[str, Any]:
    (doors.cwd / file).unlink(missing_ok=True)
    code, out, said = doors.command(words)
    if code:
        return {"code": code, "said": said}
    tree = _keys(json.loads((doors.cwd / file).read_text(encoding="utf-8")))
    names = sorted(
        {
            line.split("  ")[0]
            for line in out.decode().splitlines()
            if line[:1].isalpha() and " drafts " not in line
        }
    )
    return {"code": code, "raw": tree, "said": " | ".join(names)}


def _keys(tree: Any) -> Any:
    """The keys of a JSON tree: lists as what all their entries have; an object by numbers as "by number"."""
    if isinstance(tree, dict):
        by_number = all(key.isdigit() for key in tree)
        return "by number" if by_number else {key: _keys(value) for key, value in tree.items()}
    if isinstance(tree, list):
        merged: Any = "-"
        for value in tree:
            merged = _merged(merged, _keys(value))
        return [merged]
    return "-"


def _merged(one: Any, other: Any) -> Any:
    if isinstance(one, dict) and isinstance(other, dict):
        return {key: _merged(one.get(key, "-"), other.get(key, "-")) for key in one | other}
    if isinstance(one, list) and isinstance(other, list):
        return [_merged(one[0], other[0])]
    return one if other in ("-", "by number") else other
