"""The house rules: who may import whom, what stays light, how long a file may be, and the README's tree.

Needs no torch. Also a command: `python tests/test_house.py` compares the README's tree with the folders, and
with `--write` it rewrites the tree.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent

# What each room may import of ours: whole rooms, or single modules of one.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "runtime": (),
    "models": (),
    # Pixels are made by one code, in training as when walking.
    "training": ("models", "runtime.rules", "runtime.images"),
    "export": (
        "models",
        "training.checkpoint",
        "runtime.manifest",
        "runtime.bundle",
        "runtime.engines",
        "runtime.rules",
        # --segments auto and --dev measure the bundle that was written, as its users will walk it.
        "runtime.session",
        "runtime.opening",
        "runtime.calibrate",
        "runtime.labelled",
        "runtime.errors",
        "runtime.rivals",  # what ee-split writes for ee-bench is read back before it gets its name
        "runtime.images",
        # A decoder's bundle is walked before it gets its name, and timed to find where to cut.
        "runtime.lane",
        "runtime.generate",
        "runtime.chat",
    ),
    "benchmarks": ("runtime", "models", "training", "export"),
}
# All that the runtime may import of others': its dependencies in pyproject, and the modules of its engines.
RUNTIME_IMPORTS = {"numpy", "click", "tokenizers", "PIL", "jinja2", "onnxruntime", "tensorrt", "tensorrt_rtx"}
HEAVY = ("torch", "transformers", "onnx", "datasets")

LONGEST = 300  # lines
LONGER: dict[str, str] = {}  # file -> why it is longer than that and still one thing

# Folders without an __init__.py have no docstring to take their line of the README's tree from.
PURPOSE = {
    ".ci": "what CI runs",
    "benchmarks/results": "what the benchmarks measured, as JSON",
    "docs": "how to, and what was tried and measured",
    "docs/measured.md": "every contender and every figure, written by `make bench`",
    "docs/comparison.md": "every method by data set and over all, written by benchmarks/compare_all.py",
    "docs/add-a-method.md": "how a method is added: one file and one line, with an example that a test runs",
    "docs/decoders.md": "language models: early exit per token, routes, and the lossless mode",
    "docs/gpu.md": "walking on NVIDIA GPUs, and what was verified how",
    "docs/jetson.md": "walking on a Jetson",
    "docs/log.md": "a dated log of what was tried, negative results too",
    ".ci/run": "check, test, then the wheel alone on the oldest and the newest Python",
    "tests": "one test file a source file, under the same names",
    "tests/data": "a tiny bundle, checked in, with its generator",
    "tests/doubles": "CUDA and TensorRT on host memory, which refuse what the real ones refuse",
}
BEGIN, END = "<!-- tree: make tree -->", "<!-- end of tree -->"

# Folders of one machine, at the start of an absolute path. Written so that this very line is none.
MACHINE_PATH = re.compile(r"(?<![\w.~$}])/(?:home|root|Users|work|mnt|srv|tmp)/\w")


def rooms() -> list[str]:
    """Top-level folders that are imported as offramp.X."""
    return sorted(file.parent.name for file in ROOT.glob("*/__init__.py"))


def sources(room: str) -> list[Path]:
    """Every Python file of a room."""
    return sorted(file for file in (ROOT / room).rglob("*.py") if "__pycache__" not in file.parts)


def pyproject() -> dict[str, Any]:
    """pyproject.toml, read."""
    settings: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return settings


def is_module(name: str) -> bool:
    """Whether offramp.<name> is a file or a folder of the checkout."""
    place = ROOT.joinpath(*name.split("."))
    return place.is_dir() or place.with_suffix(".py").is_file()


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module name) of every import in a file, at any depth; relative ones made absolute."""
    package = ["offramp", *file.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{module}.{alias.name}"
                ours = name.startswith("offramp.") and is_module(name.removeprefix("offramp."))
                yield node.lineno, name if ours else module


def allowed(room: str, module: str) -> bool:
    """Whether a room may import offramp.<module>."""
    return any(module == door or module.startswith(door + ".") for door in (room, *MAY_IMPORT[room]))


def text_files() -> Iterator[Path]:
    """What is committed or about to be: git's list, or every file of the rooms where there is no git."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if listing.returncode == 0:
        files = [ROOT / name for name in listing.stdout.decode().split("\0") if name]
    else:
        files = [file for folder in (*rooms(), "tests", "docs", ".ci") for file in (ROOT / folder).rglob("*")]
        files += ROOT.glob("*")
    for file in files:
        if file.is_file() and not file.is_symlink() and b"\0" not in file.read_bytes()[:4096]:
            yield file


def purpose(path: Path) -> str:
    """A file's or folder's line in the tree: its docstring's first sentence, or its entry in PURPOSE."""
    name = path.relative_to(ROOT).as_posix()
    file = path / "__init__.py" if path.is_dir() else path
    if name in PURPOSE:
        return PURPOSE[name]
    if path.is_dir() and path.parent == ROOT / "tests" and path.name in MAY_IMPORT:
        return f"of {path.name}/"
    assert file.suffix == ".py" and file.is_file(), f"{name} has no line in PURPOSE (tests/test_house.py)"
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    assert docstring, f"{file.relative_to(ROOT)} has no docstring to take its line of the README's tree from"
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    return paragraph.split(". ")[0].rstrip(".:")  # a colon does not end the sentence


def tree() -> str:
    """The README's tree: rooms with every source file, tests as folders and shared files."""
    rows: list[tuple[str, str]] = []

    def visit(path: Path, depth: int) -> None:
        rows.append(("  " * depth + path.name + "/" * path.is_dir(), purpose(path)))
        if not path.is_dir():
            return
        in_tests = path == ROOT / "tests"
        inside = [entry for entry in sorted(path.iterdir()) if entry.name != "__pycache__"]
        for entry in inside:
            is_source = entry.suffix in {".py", ".md"} or path.name == ".ci"
            if entry.is_file() and is_source and entry.name != "__init__.py":
                visit(entry, depth + 1)
        for entry in inside:
            if entry.is_dir() and (in_tests or (entry / "__init__.py").is_file() or entry.name == "results"):
                if in_tests:
                    rows.append(("  " + entry.name + "/", purpose(entry)))
                else:
                    visit(entry, depth + 1)

    for folder in (*rooms(), "tests", "docs", ".ci"):
        if (ROOT / folder).is_dir():
            visit(ROOT / folder, 0)
    width = max(len(name) for name, _ in rows) + 2
    return "```\n" + "\n".join(f"{name:<{width}}{line}".rstrip() for name, line in rows) + "\n```"


def readme_parts() -> tuple[str, str, str]:
    """The README before, in and after its tree."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1, f"README.md needs {BEGIN} and {END}, once each"
    before, rest = text.split(BEGIN)
    block, after = rest.split(END)
    return before, block.strip(), after


def test_rooms_import_only_what_they_may() -> None:
    assert set(rooms()) <= set(MAY_IMPORT), "a new room needs its line in MAY_IMPORT"
    wrong = []
    for room in rooms():
        for file in sources(room):
            for line, name in imports(file):
                bare = name.split(".")[0] in MAY_IMPORT
                ours = name == "offramp" or name.startswith("offramp.")
                if bare or (ours and not allowed(room, name.removeprefix("offramp").lstrip("."))):
                    wrong.append(f"{file.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_runtime_imports_nothing_heavy_anywhere() -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file in sources("runtime")
        for line, name in imports(file)
        if name.split(".")[0] not in {"offramp", *RUNTIME_IMPORTS, *sys.stdlib_module_names}
    ]
    assert not wrong, "\n".join(wrong)


def test_importing_the_runtime_loads_nothing_heavy() -> None:
    script = f"import sys, offramp.runtime; print([name for name in {HEAVY} if name in sys.modules])"
    # Not from the root, which python -c would put on sys.path: the rooms are to be found by their mapping.
    command = [sys.executable, "-c", script]
    loaded = subprocess.run(command, cwd=ROOT / "docs", capture_output=True, text=True, check=False)
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.strip() == "[]"


def test_pyproject_lists_exactly_the_folders() -> None:
    settings = pyproject()["tool"]["setuptools"]
    inits = [file for room in rooms() for file in sources(room) if file.name == "__init__.py"]
    folders = {".".join(["offramp", *file.parent.relative_to(ROOT).parts]) for file in inits}
    assert set(settings["packages"]) == folders
    assert settings["package-dir"] == {f"offramp.{room}": room for room in rooms()}
    assert not (ROOT / "__init__.py").exists()
    assert not (ROOT / "offramp").exists(), "offramp is a namespace: it has no folder"


def test_tensorrt_brings_nothing_but_bindings() -> None:
    extra = pyproject()["project"]["optional-dependencies"]["trt"]
    assert {re.split(r"[<>=\[]", wish)[0] for wish in extra} == {"tensorrt-cu13", "cuda-python"}


def test_make_and_ruff_know_the_rooms() -> None:
    listed = re.search(r"^ROOMS := (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert listed is not None
    assert listed[1].split() == rooms()
    assert sorted(pyproject()["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]) == rooms()


def test_every_room_is_typed() -> None:
    untyped = [room for room in rooms() if not (ROOT / room / "py.typed").is_file()]
    assert untyped == [], "these rooms lack their empty py.typed"


def test_no_source_file_is_too_long() -> None:
    lengths = {
        file.relative_to(ROOT).as_posix(): len(file.read_text(encoding="utf-8").splitlines())
        for room in rooms()
        for file in sources(room)
    }
    long = {name: lines for name, lines in lengths.items() if lines > LONGEST}
    assert set(long) - set(LONGER) == set(), f"over {LONGEST} lines: split, or give the reason in LONGER"
    assert set(LONGER) - set(long) == set(), "no longer that long: take it out of LONGER"


def test_the_tree_in_the_readme_is_the_tree() -> None:
    assert readme_parts()[1] == tree(), "the README's tree is out of date: make tree"


def test_no_text_mentions_a_path_of_one_machine() -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{number} {line.strip()[:100]}"
        for file in text_files()
        for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if MACHINE_PATH.search(line)
    ]
    assert not wrong, "\n".join(wrong)


def main(arguments: list[str]) -> int:
    """Compare the README's tree with the folders, or rewrite it; 0 when they agree."""
    if arguments not in ([], ["--write"]):
        print("usage: python tests/test_house.py [--write]", file=sys.stderr)
        return 2
    before, block, after = readme_parts()
    if block == tree():
        return 0
    if not arguments:
        print("README.md: the tree is out of date; make tree rewrites it", file=sys.stderr)
        return 1
    (ROOT / "README.md").write_text(f"{before}{BEGIN}\n{tree()}\n{END}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
