"""What golden.py runs: of each bundle ee-split, ee-run and load(); of some ee-calibrate, ee-bench, ee-eval.

A run is a name and a function that gives a dict: column strings (a word a row), scores in millionths, or
`raw`, a tree whose names go through the tables of golden.py. `near` says by how much numbers may differ.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import golden_make as make
from golden import COARSE, FINE, Doors, Run

INPUTS = "../inputs/"
TINY = ("fp32", "int8", "int4", "fp16")


@dataclass(frozen=True)
class Kind:
    """A checkpoint and how it is run. split: options of ee-split; rules: (name, threshold or None); specs:
    rules of load() alone; file: what ee-run reads; kept: rows whose scores are kept; extra: further runs.
    """

    name: str
    variants: tuple[str, ...]
    split: tuple[str, ...]
    file: str
    rules: tuple[tuple[str, float | None], ...]
    specs: tuple[tuple[str, dict[str, float]], ...] = ()
    kept: int = 1000
    decodes: bool = False
    sizes: tuple[int, ...] = (1, 8)
    extra: bool = True


LEAVE: tuple[tuple[str, float | None], ...] = (
    ("gate", None), ("gate", 0.3), ("max_probability", 0.9), ("entropy", 0.5), ("margin", 0.7),
    ("patience", 1), ("fixed", 2), ("never", None),
)  # fmt: skip
WAYS: tuple[tuple[str, float | None], ...] = (
    ("never", None), ("gate", None), ("gate", 0.95), ("max_probability", 0.15), ("entropy", 0.83),
    ("margin", 0.05), ("patience", 1), ("fixed", 1), ("skip", 2), ("speculative", None),
)  # fmt: skip
LARGE: tuple[tuple[str, float | None], ...] = (
    ("never", None), ("max_probability", 0.85), ("entropy", 0.04), ("margin", 0.7), ("patience", 2),
    ("fixed", 5), ("skip", 5), ("speculative", None),
)  # fmt: skip
DEEP = (*LEAVE[:6], ("patience", 3), ("fixed", 6), ("never", None))
DEV = ("--int8-range", "reduced", "--dev")


def confident(threshold: float) -> tuple[str, dict[str, float]]:
    return "patience_confident", {"threshold": threshold, "patience": 1.0}


def drafts(exit: float, number: float) -> tuple[str, dict[str, float]]:
    return "speculative", {"exit": exit, "drafts": number}


def prices(*numbers: float) -> tuple[tuple[str, float | None], ...]:
    return (("quee", None), *(("quee", number) for number in numbers))


RIVALS = ("--rivals", "rivals_text", "--truncate", "2")
TEXT = Kind("text", TINY, (*DEV, INPUTS + "hard.jsonl", *RIVALS), "texts.jsonl", LEAVE, (confident(0.5),))
QUEE = Kind("quee", TINY[:3], DEV[:2], "texts.jsonl", (*LEAVE[2:], *prices(0.02, 0.5)))
IMAGE = Kind("image", TINY[:2], (*DEV, "../data_image/dev"), "", (*LEAVE[:5], ("fixed", 1), LEAVE[-1]))
TALK = (confident(0.87), drafts(1, 3), drafts(2, 5))
LLAMA = Kind("llama", TINY, (), "prompts.jsonl", WAYS, TALK, decodes=True)
SST2, TREC6 = "../data_sst2/", "../data_trec6/"
E5 = Kind("e5", TINY[:3], (*DEV, SST2 + "dev.jsonl"), SST2 + "test.jsonl", DEEP, (confident(0.5),), 60)
PRICED = (*DEEP[2:], *prices(0.02, 0.2))
E5_QUEE = Kind("e5_quee", TINY[:2], DEV[:2], TREC6 + "test.jsonl", PRICED, (), 60, extra=False)
MORE = (confident(0.06), drafts(5, 3), drafts(4, 2))
SMOLLM2 = Kind("smollm2", TINY[:3], ("--segments", "every 5"), "talk.jsonl", LARGE, MORE, decodes=True)
SETS: dict[str, tuple[Kind, ...]] = {
    "tiny": (TEXT, QUEE, IMAGE, LLAMA),
    "e5": (E5, E5_QUEE),
    "smollm2": (SMOLLM2,),
}


def play(
    name: str, doors: Doors, assets: Path | None, recorded: dict[str, Any] | None, *, reuse: bool
) -> Iterator[Run]:
    """The runs of a set. Points of a bundle are those of the record where there is one."""
    work = doors.cwd.parent
    make.inputs(work / "inputs")
    for kind in SETS[name]:
        make.checkpoint(kind.name, work, doors.command, assets)
        if name == "tiny" and kind.name == "image":
            make.pictures(work / "inputs" / "pictures")
        yield from _bundle(kind, doors, recorded, reuse)
    if name == "tiny":
        from golden_mistakes import mistakes

        yield from mistakes(doors)


def _bundle(kind: Kind, doors: Doors, recorded: dict[str, Any] | None, reuse: bool) -> Iterator[Run]:
    bundle = f"bundle_{kind.name}"
    key = f"ee-split {kind.name}"
    told = _split(kind, doors, reuse)
    yield key, lambda: told
    points = (told if recorded is None else recorded[key])["points"]
    runner = decode if kind.decodes else _classify
    yield from _runs(kind, bundle, points, doors, runner)
    yield from (_pieces if kind.decodes else _answers)(kind, bundle, doors)
    if kind.extra:
        from golden_extras import extras

        yield from extras(kind, bundle, doors, recorded)


def _split(kind: Kind, doors: Doors, reuse: bool) -> dict[str, Any]:
    """Files, points and manifest of the bundle that ee-split makes of the checkpoint."""
    bundle = f"bundle_{kind.name}"
    if not reuse or not (doors.cwd / bundle).exists():
        words = ["ee-split", f"../ckpt_{kind.name}", "--out", bundle, "--variants", ",".join(kind.variants)]
        code, _, said = doors.command([*words, *kind.split, "--overwrite"])
        if code:
            raise SystemExit(f"ee-split {kind.name}: exit code {code}: {said[-2000:]}")
    return described(doors, bundle)


def described(doors: Doors, bundle: str) -> dict[str, Any]:
    """Points, files and manifest of a bundle."""
    manifest = doors.manifest(bundle)
    points = {p[doors.field("name")]: p[doors.field("variant")] for p in manifest[doors.field("points")]}
    files = {file.name: "-" for file in sorted((doors.cwd / bundle).iterdir())}
    return {"points": points, "raw": {"files": files, "manifest": _plain(manifest)}}


def _plain(tree: Any) -> Any:
    """A manifest without hashes, tensors, versions and measured times."""
    if isinstance(tree, dict):
        return {
            k: _plain(v)
            for k, v in tree.items()
            if k not in ("files", "inputs", "outputs", "provenance", "ms")
        }
    return [_plain(value) for value in tree] if isinstance(tree, list) else tree


def _runs(kind: Kind, bundle: str, points: dict[str, str], doors: Doors, runner: Any) -> Iterator[Run]:
    """ee-run by the bundle's own rule, by every rule and variant, and at every point; by way of `runner`."""
    wishes: list[tuple[list[str], str]] = [([], kind.variants[0])]
    for (rule, number), variant in product(kind.rules, kind.variants):
        more = [] if number is None else ["--threshold", f"{number:g}"]
        wishes.append((["--rule", rule, *more, "--variant", variant], variant))
        if kind.decodes and rule not in ("never", "skip", "speculative", "route"):
            wishes.append(([*wishes[-1][0], "--cache", "propagate"], variant))
    wishes += [(["--point", point], variant) for point, variant in points.items()]
    for wish, variant in wishes:
        yield from runner(kind, bundle, wish, variant, doors)


def _classify(kind: Kind, bundle: str, wish: list[str], variant: str, doors: Doors) -> Iterator[Run]:
    near = FINE if variant == "fp32" else COARSE
    files = [INPUTS + kind.file] if kind.file else [INPUTS + f"pictures/{at}.png" for at in (0, 1, 2)]
    if not kind.file:
        files += [
            INPUTS + f"pictures/{name}" for name in ("broken.png", "list.txt", "list.jsonl", "gone.png")
        ]
    for size in kind.sizes:
        words = ["ee-run", *files, "--bundle", bundle, "--threads", "1", *wish, "--batch-size", str(size)]
        name = " ".join([*words[:1], bundle, *wish, "--batch-size", str(size)])
        yield name, partial(_answered, words, doors, near, kind.kept, not wish)
    if kind.file.startswith("texts") and not wish:
        for more, given in (
            (["--format", "text"], kind.file),
            ([], "texts.txt"),
            (["--warm-up", "--stats"], "-"),
        ):
            stdin = b"good\n\nthe film is bad\n" if given == "-" else b""
            words = ["ee-run", given if given == "-" else INPUTS + given, "--bundle", bundle, *more]
            yield " ".join(words), partial(_answered, words, doors, near, kind.kept, True, stdin)


def _lines(words: Sequence[str], doors: Doors, given: bytes = b"") -> tuple[int, list[dict[str, Any]]]:
    code, out, said = doors.command(words, given)
    if code not in (0, 1):
        return code, [{doors.field("error"): said, doors.field("line"): 0}]
    return code, [json.loads(line) for line in out.decode("utf-8").splitlines()]


def _shape(lines: Sequence[dict[str, Any]], doors: Doors, full: bool) -> dict[str, Any]:
    """Which lines are in error; full: their texts and the keys of all lines, which no rule changes."""
    bad = [line for line in lines if doors.field("error") in line]
    found: dict[str, Any] = {"failed": " ".join(str(line[doors.field("line")]) for line in bad)}
    if full:
        found["errors"] = [line[doors.field("error")] for line in bad]
        found["raw"] = {key: "-" for line in lines for key in line}
    return found


def _answered(
    words: Sequence[str], doors: Doors, near: int, kept: int, full: bool, given: bytes = b""
) -> dict[str, Any]:
    """What ee-run said of every line, as columns."""
    code, lines = _lines(words, doors, given)
    get = doors.field
    good = [line for line in lines if get("error") not in line]
    found: dict[str, Any] = {"code": code, "near": near, **_shape(lines, doors, full)}
    for name in ("label", "exit", "depth"):
        found[name] = " ".join(str(line[get(name)]) for line in good)
    found["score"] = [round(1e6 * line[get("score")]) for line in good[:kept]]
    found["truncated"] = [at for at, line in enumerate(good) if line.get(get("truncated"))]
    if found["depth"] == found["exit"]:
        found["depth"] = "as exit"
    return found


def decode(kind: Kind, bundle: str, wish: list[str], variant: str, doors: Doors) -> Iterator[Run]:
    """ee-run on prompts; texts of rule speculative where rounding makes them depend on time are left out."""
    tokens = ["--max-new-tokens", "24" if kind.file == "talk.jsonl" else "8"]
    files = [kind.file, *(["prompts.txt"] if kind.file == "prompts.jsonl" and not wish else [])]
    if "speculative" in wish and variant in ("int8", "int4"):
        return
    for file in files:
        words = ["ee-run", INPUTS + file, "--bundle", bundle, "--threads", "1", *wish, *tokens]
        name = " ".join([*words[:1], bundle, *wish, file])
        yield name, partial(_written, words, doors, "speculative" in wish, not wish)


def _written(words: Sequence[str], doors: Doors, adaptive: bool, full: bool) -> dict[str, Any]:
    """Texts of ee-run; adaptive: what depends on time is left out."""
    code, lines = _lines(words, doors)
    get = doors.field
    good = [line for line in lines if get("error") not in line]
    found: dict[str, Any] = {"code": code, **_shape(lines, doors, full)}
    found["text"] = [line[get("text")] for line in good]
    for name in ("tokens", "depth", *(() if adaptive else ("ran",))):
        found[name] = " ".join(str(line[get(name)]) for line in good)
    return found


def _answers(kind: Kind, bundle: str, doors: Doors) -> Iterator[Run]:
    """The same by load(): one by one and by map, with the signals of every step."""
    items: list[Any] = [
        "a very good film",
        ["the film is good", "a dull plot"],
        "bad",
        "the plot is quite awful",
    ]
    if not kind.file:
        items = [INPUTS + f"pictures/{at}.png" for at in range(6)]
    elif kind.kept < 1000:
        lines = (doors.cwd / INPUTS / kind.file).read_text(encoding="utf-8").splitlines()
        items = [json.loads(line)["text"] for line in lines[:12]]
    specs: list[tuple[Any, dict[str, Any]]] = [(None, {})]
    specs += [(None, {"rule": r} | ({} if n is None else {"threshold": n})) for r, n in kind.rules]
    specs += [(spec, {}) for spec in kind.specs]
    for variant in kind.variants:
        near = FINE if variant == "fp32" else COARSE
        wishes = [
            {"door": door, "items": items, "spec": spec, "load": more | {"variant": variant, "threads": 1}}
            for (spec, more), door in product(specs, ("call", "map"))
        ]
        names = [f"load {bundle} {_said(w['spec'], w['load'])} {w['door']}" for w in wishes]
        yield from _together(bundle, wishes, names, near, doors, _columns)


def _columns(found: list[list[Any]]) -> dict[str, Any]:
    columns = list(zip(*found, strict=True))
    told = {n: " ".join(map(str, columns[at])) for at, n in enumerate(("label", "exit", "depth"))}
    steps = [" ".join(steps) for steps in columns[4]]
    return told | {"score": columns[3], "steps": steps, "signals": columns[5], "truncated": columns[6]}


def _pieces(kind: Kind, bundle: str, doors: Doors) -> Iterator[Run]:
    """Tokens of decoders by load(): every rule, and rules of two parameters, in both kinds of cache."""
    items: list[Any] = [["the film was good and the plot", {"max_new_tokens": 12}], ["a dull scene", {}]]
    items[1][1] = {"max_new_tokens": 20, "stop": ["the", "very"]}
    if kind.file == "talk.jsonl":
        items = [
            [text, {"max_new_tokens": 24}] for text in ("The film begins with", "1, 2, 3, 4, 5,", "Dear Sir")
        ]
    rules = [
        (None, {"rule": r} | ({} if n is None else {"threshold": n}))
        for r, n in kind.rules
        if r != "speculative"
    ]
    specs: list[tuple[Any, dict[str, Any]]] = [*rules, *((spec, {}) for spec in kind.specs)]
    specs.append((("patience_confident", kind.specs[0][1]), {"cache": "propagate"}))
    for variant in kind.variants:
        wishes = [
            {"door": "generate", "items": items, "spec": s, "load": m | {"variant": variant, "threads": 1}}
            for s, m in specs
        ]
        names = [f"load {bundle} {_said(w['spec'], w['load'])}" for w in wishes]
        yield from _together(bundle, wishes, names, 0, doors, _said_tokens)


def _said_tokens(found: list[list[list[Any]]]) -> dict[str, Any]:
    """Of each answer; how many drafts proved right is the sum of `drafted`."""
    told: dict[str, Any] = {"text": ["".join(piece[0] for piece in pieces) for pieces in found]}
    for at, name in enumerate(("token", "depth", "ran", "drafted"), 1):
        told[name] = " | ".join(" ".join(str(int(piece[at])) for piece in pieces) for pieces in found)
    return told


def _said(spec: Any, words: dict[str, Any]) -> str:
    told = [f"{spec[0]}({', '.join(f'{k}={v:g}' for k, v in spec[1].items())})"] if spec else []
    return " ".join([*told, *(f"{k}={v}" for k, v in words.items() if k != "threads")])


def _together(
    bundle: str, wishes: list[dict[str, Any]], names: list[str], near: int, doors: Doors, read: Any
) -> Iterator[Run]:
    """One run a wish; all wishes share one process, which starts with the first."""
    cache: list[dict[str, Any]] = []

    def run(at: int) -> dict[str, Any]:
        if not cache:
            cache.extend(doors.python(bundle, wishes))
        one = cache[at]
        if "raises" in one:
            return {"raw": one["raises"], "message": one["message"]}
        return {"near": near, **read(one["found"])}

    for at, name in enumerate(names):
        yield name, partial(run, at)
