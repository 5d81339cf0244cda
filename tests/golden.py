"""What users see of offramp, frozen: `record` writes it down, `compare` holds other code to it.

    python tests/golden.py record --work work/ --out tests/data/golden/tiny.json --set tiny
    python tests/golden.py compare --work work/ --record tests/data/golden/tiny.json

Both use only commands (ee-run and the others) and `from offramp.runtime import load`. Checkpoints are made
once, in --work; `compare` splits the same checkpoints again with the code under test, so old bundles need not
be readable. A record holds the runs of golden_runs.py and golden_mistakes.py: labels, scores (in millionths),
exits, depths, texts, tokens, exit codes, bundle files, manifests, operating points, key trees of JSON files.

The tables below map names of the record to names of the code under test. Wording may change: error texts that
differ are notes. What must stay: exit codes, which lines are in error, and that the message about a mistake
names the word that is wrong.

Not in a record, because it depends on time: milliseconds and rates; of rule speculative without parameters
all but texts and tokens, and these too in variants that round (int8, int4); the recalibration of rule quee,
choices of --segments auto, and values of ee-bench. Engines use one thread. Only records of one kind of
machine with the same versions are comparable: a record names both.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

# Old name -> new name; a name that is not here is the same in both.
OPTIONS: dict[str, str] = {
    "--cache": "--exit-kv",
    "--against": "--baselines",
    "--rivals": "--baselines",
    "--whole-image": "--no-crop",
    "--points-from": "--calibration-split",
    "--within": "--max-accuracy-drop",
}  # of commands, such as "--cache": "--exit-kv"; --within and --no-crop too
FIELDS: dict[str, str] = {
    "ran": "blocks_run",
    "points_from": "calibration_split",
    "within": "max_accuracy_drop",
    "contenders": "candidates",
    "segments_end_behind": "segments_end_after",
    "fills": "cache_fills",
    "leaving": "exit_hidden",
    "Session": "Classifier",
    "Writer": "TextGenerator",
    "Piece": "TextChunk",
}  # keys of JSON lines, JSON files and manifests, attributes and classes of Python
KEYWORDS: dict[str, str] = {"cache": "exit_kv"}  # of load(), generate() and map()
FILES: dict[str, str] = {"rivals.json": "baselines.json"}  # files of a bundle or of a folder of single graphs

FINE, COARSE = 1, 100  # millionths by which numbers may differ: of fp32, of other variants
EITHER = ("errors", "message", "said")  # texts: a difference is a note
COLUMNS = ("label", "exit", "depth", "ran", "tokens", "token", "drafted")  # space-separated words, one a row

SNIPPET = """
import json, sys
from offramp.runtime import RuleSpec, load
job = json.load(sys.stdin)
F, K = (lambda n: job["fields"].get(n, n)), (lambda n: job["keywords"].get(n, n))
def millionths(x): return None if x is None else round(1e6 * x)
def answer(a):
    return [*(getattr(a, F(n)) for n in ("label", "exit", "depth")), millionths(getattr(a, F("score"))),
            [f"{s}{v}" for s, v in getattr(a, F("steps"))],
            [millionths(x) for pair in getattr(a, F("signals")) for x in pair], getattr(a, F("truncated"))]
def run(wish):
    words = {K(n): v for n, v in wish["load"].items()}
    if wish.get("spec"): words[K("rule")] = RuleSpec(*wish["spec"])
    with load(job["bundle"], **words) as session:
        if wish["door"] == "generate":
            found = []
            for prompt, more in wish["items"]:
                pieces = list(session.generate(prompt, **{K(n): v for n, v in more.items()}))
                names = ("text", "token", "depth", "ran", "drafted")
                found.append([[getattr(p, F(n)) for n in names] for p in pieces])
            return found
        items = [tuple(i) if isinstance(i, list) else i for i in wish["items"]]
        if wish["door"] == "map":
            return [answer(a) for a in session.map(items, **{K("batch_size"): 8})]
        return [answer(session(*i) if isinstance(i, tuple) else session(i)) for i in items]
out = []
for wish in job["wishes"]:
    try:
        out.append({"found": run(wish)})
    except Exception as e:
        kinds = [k.__name__ for k in type(e).__mro__ if k not in (object, BaseException, Exception)]
        out.append({"raises": kinds, "message": str(e)})
json.dump(out, sys.stdout)
"""


@dataclass
class Doors:
    """How the code under test is reached. cwd: where bundles lie. renamed: whether the tables apply."""

    cwd: Path
    bin: Path | None
    renamed: bool
    notes: list[str] = field(default_factory=list)

    def field(self, name: str) -> str:
        return FIELDS.get(name, name) if self.renamed else name

    def option(self, word: str) -> str:
        return OPTIONS.get(word, word) if self.renamed else word

    def command(self, words: Sequence[str], given: bytes = b"") -> tuple[int, bytes, str]:
        """Exit code, stdout and stderr of a command in a fresh process."""
        name, *rest = words
        start = [str(self.bin / name)] if self.bin else [sys.executable, "-c", _call(name), name]
        done = subprocess.run(
            [*start, *map(self.option, rest)], input=given, capture_output=True, cwd=self.cwd, env=_quiet()
        )
        return done.returncode, done.stdout, done.stderr.decode("utf-8", "replace")

    def python(self, bundle: str, wishes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """What load() and a session do, by wish, in one fresh process."""
        tables = {"fields": FIELDS, "keywords": KEYWORDS} if self.renamed else {"fields": {}, "keywords": {}}
        job = json.dumps({"bundle": bundle, "wishes": wishes, **tables}).encode()
        done = subprocess.run(
            [sys.executable, "-c", SNIPPET], input=job, capture_output=True, cwd=self.cwd, env=_quiet()
        )
        if done.returncode:
            raise SystemExit(f"load() on {bundle}: {done.stderr.decode()[-2000:]}")
        found: list[dict[str, Any]] = json.loads(done.stdout)
        return found

    def manifest(self, bundle: str) -> dict[str, Any]:
        told: dict[str, Any] = json.loads((self.cwd / bundle / "manifest.json").read_text(encoding="utf-8"))
        return told


def _call(name: str) -> str:
    """Python code that runs a command by its entry point; sys.argv is ["-c", name, ...]."""
    target = next((e.value for e in entry_points(group="console_scripts", name=name)), None)
    project = HERE.parent / "pyproject.toml"
    if project.is_file():  # an editable installation may be older than its checkout
        for line in project.read_text(encoding="utf-8").splitlines():
            if line.replace(" ", "").startswith(f'{name}="'):
                target = line.split('"')[1]
    if target is None:
        raise SystemExit(f"{name}: no such command is installed; give a folder of commands with --bin")
    module, _, function = target.partition(":")
    return f"import sys; sys.argv = sys.argv[1:]; from {module} import {function}; sys.exit({function}())"


def _quiet() -> dict[str, str]:
    """The environment of processes: two threads of torch at most, nothing asked of any hub, wide tables."""
    more = {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "PYTHONWARNINGS": "ignore"}
    return {**os.environ, **more, "TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "0"}


def renamed(tree: Any) -> Any:
    """A tree of the record with the names of the code under test."""
    if isinstance(tree, dict):
        names = FIELDS | OPTIONS | FILES
        return {names.get(key, key): renamed(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [renamed(value) for value in tree]
    return FILES.get(tree, FIELDS.get(tree, tree)) if isinstance(tree, str) else tree


def differences(old: Any, new: Any, near: float, path: str = "") -> Iterator[tuple[str, str]]:
    """(kind, where and what) of all that differs; kind "note" or "FAIL". near: what numbers may differ by."""
    name = path.rpartition("/")[2]
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old.keys() | new.keys():
            if key not in old or key not in new:
                yield "FAIL", f"{path}/{key}: {'not in the record' if key not in old else 'missing'}"
            else:
                yield from differences(old[key], new[key], near, f"{path}/{key}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for at, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from differences(one, other, near, f"{path}[{at}]")
    elif any(part in EITHER for part in path.split("/")) and isinstance(old, str) and isinstance(new, str):
        if old != new:
            yield "note", f"{path}: {old!r} is now {new!r}"
    elif isinstance(old, str) and isinstance(new, str) and name in COLUMNS and old != new:
        words, others = old.split(" "), new.split(" ")
        rows = [at for at, (a, b) in enumerate(zip(words, others, strict=False)) if a != b]
        yield "FAIL", f"{path}: {len(rows)} of {len(words)} rows differ, the first {rows[:8]}"
    elif isinstance(old, (int, float)) and isinstance(new, (int, float)) and not isinstance(old, bool):
        if abs(old - new) > near:
            yield "FAIL", f"{path}: {old} is now {new}"
    elif old != new:
        yield "FAIL", f"{path}: {old!r:.300} is now {new!r:.300}"


def made_by(commit: str | None) -> dict[str, Any]:
    """The commit, versions and machine that a record is of."""
    if commit is None:
        words = ["git", "-C", str(HERE), "rev-parse", "HEAD"]
        commit = subprocess.run(words, capture_output=True, text=True).stdout.strip()
    versions = {}
    for name in ("numpy", "onnxruntime", "tokenizers", "torch", "transformers", "onnx"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = ""
    lines = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = next((x.partition(": ")[2] for x in lines.splitlines() if x.startswith("model name")), "")
    return {"commit": commit, "python": platform.python_version(), "cpu": cpu, "versions": versions}


def main() -> None:
    from golden_runs import SETS, play

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("action", choices=["record", "compare"])
    parser.add_argument("--work", type=Path, required=True, help="Folder of checkpoints, inputs and bundles.")
    parser.add_argument("--out", type=Path, help="Record to write; of compare too, if wished.")
    parser.add_argument("--record", type=Path, help="Record to compare with.")
    parser.add_argument(
        "--set", dest="wish", choices=[*SETS, "all"], help="[default: those of --record, or tiny]"
    )
    parser.add_argument(
        "--bin", type=Path, help="Folder with the commands. [default: pyproject's entry points]"
    )
    parser.add_argument(
        "--assets", type=Path, help="Folder with models/ and data/, to make checkpoints of e5."
    )
    parser.add_argument("--commit", help="Commit that a record is of. [default: HEAD]")
    parser.add_argument(
        "--reuse", action="store_true", help="Keep bundles of the last time, where there are."
    )
    parser.add_argument("--no-renames", action="store_true", help="Compare with code that has the old names.")
    parser.add_argument(
        "--only", default="", help="Only runs whose name holds this; the others of --out stay."
    )
    wish = parser.parse_args()
    compares = wish.action == "compare"
    if (wish.record if compares else wish.out) is None:
        parser.error("say --record FILE" if compares else "say --out FILE")
    source = wish.record if compares else wish.out
    old = expanded(source) if compares or (wish.only and source.exists()) else {"sets": {}}
    sets = list(old["sets"]) if compares and not wish.wish else [wish.wish or "tiny"]
    found: dict[str, Any] = {"made_by": made_by(wish.commit), "sets": {}}
    failed = 0
    for name in list(SETS) if sets == ["all"] else sets:
        cwd = wish.work.resolve() / wish.action
        cwd.mkdir(parents=True, exist_ok=True)
        doors = Doors(cwd, wish.bin and wish.bin.resolve(), compares and not wish.no_renames)
        recorded = old["sets"].get(name)
        runs: dict[str, Any] = {} if compares or recorded is None else recorded
        for key, run in play(name, doors, wish.assets, recorded, reuse=wish.reuse):
            if wish.only in key:
                print(f"{name}: {key}", file=sys.stderr, flush=True)
                runs[key] = json.loads(json.dumps(run()))  # as it is read back: lists for tuples
        found["sets"][name] = runs
        if compares:
            failed += judged(recorded, runs, doors, partial=bool(wish.only))
    if wish.out is not None:
        wish.out.parent.mkdir(parents=True, exist_ok=True)
        wish.out.write_text(written(found), encoding="utf-8")
    if compares:
        print(f"{failed} differences" if failed else "as recorded")
        raise SystemExit(min(failed, 1))


def judged(old: dict[str, Any], new: dict[str, Any], doors: Doors, *, partial: bool) -> int:
    """Print all that differs; gives the number of failures."""
    failed = 0
    for key, before in old.items():
        if key not in new:
            failed += not partial
            print(f"FAIL {key}: not run" if not partial else "", end="\n" if not partial else "")
            continue
        before = {**before, "raw": renamed(before["raw"])} if doors.renamed and "raw" in before else before
        near = before.get("near", 1e-4)
        for kind, what in differences(before, new[key], near):
            failed += kind == "FAIL"
            print(f"{kind} {key}{what}")
    for key in new.keys() - old.keys():
        failed += 1
        print(f"FAIL {key}: not in the record")
    return failed


def expanded(file: Path) -> dict[str, Any]:
    """A record as it was before `shortened`."""
    told: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    for name, runs in told["sets"].items():
        told["sets"][name] = {key: runs[run["as"]] if "as" in run else run for key, run in runs.items()}
    return told


def shortened(runs: dict[str, Any]) -> dict[str, Any]:
    """Runs with {"as": name} for a run that found what an earlier one did; in other batches, nearly that."""
    known: dict[str, str] = {}
    told: dict[str, Any] = {}
    for key, run in runs.items():
        text = json.dumps(run)
        twin = key.replace("--batch-size 8", "--batch-size 1")
        twin = f"{key[:-3]}call" if key.startswith("load") and key.endswith(" map") else twin
        close = twin != key and not [*differences(runs[twin], run, run["near"])]
        first = known.get(text, known.get(json.dumps(runs[twin])) if close else None)
        told[key] = {"as": first} if first else run
        known.setdefault(text, first or key)
    return told


def written(found: dict[str, Any]) -> str:
    """A record as JSON, one run a line."""
    lines = []
    for name, runs in found["sets"].items():
        short = shortened(runs)
        each = [f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in short.items()]
        lines.append(f"{json.dumps(name)}: {{\n" + ",\n".join(each) + "\n}")
    head = json.dumps(found["made_by"], indent=1)
    return f'{{"made_by": {head},\n"sets": {{\n' + ",\n".join(lines) + "\n}}\n"


Run = tuple[str, Callable[[], dict[str, Any]]]

if __name__ == "__main__":
    main()
