"""The rules of the house: who imports whom, what stays light, which names are used, and the tree in the docs.

Needs no torch. Also a command: `python tests/test_house.py` compares the tree in docs/structure.md with the
folders, and with `--write` it rewrites the tree.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
STRUCTURE = ROOT / "docs" / "structure.md"

# What each room may import of ours: whole rooms, folders of one, or single modules.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "runtime": (),
    "models": (),
    # Pixels and beginnings of words are made by one code, in training as at run time.
    "training": (
        "models",
        "runtime.rules",
        "runtime.bundle",
        "runtime.errors",
        "runtime.inputs.images",
        "runtime.inputs.tokenizer_checks",
        "runtime.inputs.words",
        "runtime.progress",
        "runtime.summary",
    ),
    "export": ("models", "training.checkpoint", "training.pretrained", "runtime"),
    "benchmarks": ("runtime", "models", "training", "export"),
}
# All that the runtime may import of others: its dependencies in pyproject, and the modules of its engines.
RUNTIME_IMPORTS = {"numpy", "click", "tokenizers", "PIL", "jinja2", "onnxruntime", "tensorrt", "tensorrt_rtx"}
RUNTIME_IMPORTS.add("cryptography")  # of the extra sign
# What only these folders of it import: their extras.
EXTRA_IMPORTS = {
    "runtime/serving/": {"fastapi", "starlette", "pydantic", "uvicorn", "prometheus_client", "ray"},
    "runtime/bulk": {"ray", "pyarrow"},
    "runtime/hub/": {"huggingface_hub"},
}
HEAVY = ("torch", "transformers", "onnx", "datasets")

MAX_LINES = 500
LONGER: dict[str, str] = {}  # file -> why it is longer than that and still one topic

# The walker alone runs segments.
STEPS_IN = {"runtime/walker.py"}
SESSION_KINDS = {
    "Session",
    "RowSession",
    "Classifier",
    "MultiLabelClassifier",
    "TokenClassifier",
    "Regressor",
    "Embedder",
    "TextGenerator",
}
SESSION_KINDS_IN = {"runtime/loading.py", "runtime/serving/models.py"}
# Where protocols are declared: a file, and its classes in which no `Any` may stand (none named: all of it).
PROTOCOLS: dict[str, tuple[str, ...]] = {
    "runtime/engines/base.py": (),
    "runtime/rules/base.py": (),
    "training/recipes/base.py": (),
    "models/families/family.py": (),
    "models/families/decoder.py": (),
    "runtime/drafts.py": ("DraftSource",),
    "runtime/engines/decoder_graphs.py": ("DecoderGraphs",),
    "runtime/sequence.py": ("CacheRunner", "Head"),
}

# Names that were replaced by plain ones (CHANGELOG has both). As a whole name:
RETIRED_NAMES = """
    Piece Writer Way Ears Made most made way ways turns clock decoder_turns tally Tally opening stacks fills
    leaving LEAVING foresees listen_to _call _alone _until _planned MOST most_rows MOST_ROWS
"""
# As a word in a name, such as `rivals` in `read_rivals`:
RETIRED_WORDS = """
    wish wishes chooser heard rival rivals contest contender contenders stretch stretches stage stages lane
    lanes said told found
"""
RETIRED_FILES = """
    wishes ways writer heard contest rivals prices tally opening stacks prompts whole half lane turns clock
    decoder_turns drafting
"""
RETIRED_OPTIONS = "--rivals --against --points-from --within --whole-image --cache"
RETIRED_KEYS = "ran"  # of JSON
KEPT = {"BundleNotFound"}
# They compare with what the names were before, or list them.
NOT_CHECKED = re.compile(r"tests/(golden\w*|test_house)\.py")

# Folders without an __init__.py have no docstring to take their line of the tree from.
PURPOSE = {
    ".ci": "what CI runs",
    ".ci/run": "check, test, then the wheel alone on the oldest and the newest Python",
    "benchmarks/results": "what the benchmarks measured, as JSON",
    "docs": "how to, and what was tried and measured",
    "docs/add-a-family.md": "how a family of encoders is added, with an example that a test runs",
    "docs/add-a-method.md": "how a method is added: one file and one line, with an example that a test runs",
    "docs/budgets.md": "budgets of time and depth, and audits of the answers; a test runs every block",
    "docs/tasks.md": "several labels, labels of words, numbers, embeddings; a test runs every block",
    "docs/your-model.md": "how a fine-tuned model gets exits; a test runs every block",
    "docs/ray.md": "many rows with Ray Data, pipelines, and ee-serve's application on Ray Serve",
    "docs/triton.md": "a model repository for NVIDIA's Triton, how its model walks, what was verified how",
    "docs/fleet.md": "how many replicas exits save: fleets simulated from measured costs",
    "docs/api.md": "the names of offramp.runtime; the site generates signatures and docstrings",
    "docs/concepts.md": "how a row is answered: segments, exits, rules, bundles, points; with a picture",
    "docs/index.md": "the start of the docs: what it is, two commands, where to go next",
    "docs/tutorials": "one task from an empty folder to a result; a test runs every block",
    "docs/tutorials/index.md": "what each tutorial begins and ends with",
    "docs/tutorials/add-exits.md": "exits for a fine-tuned classifier, with a guarantee",
    "docs/tutorials/images.md": "images by class folders",
    "docs/tutorials/intents.md": "short texts, int8, one core",
    "docs/tutorials/jetson.md": "TensorRT on the device; not run on one",
    "docs/tutorials/language-model.md": "split, draft, verify",
    "docs/tutorials/million-rows.md": "files, resuming, processes, Ray",
    "docs/tutorials/serve.md": "HTTP, keys, metrics",
    "docs/bundle-format.md": "files, fields of the manifest, rules as formulas: enough to write a walker",
    "docs/cli.md": "every command: input, exit codes, rules, operating points, options",
    "docs/comparison.md": "every method by data set and over all, written by a benchmark",
    "docs/decoders.md": "language models: early exit per token, routes, and the lossless mode",
    "docs/hub.md": "bundles on a model hub: push, pull, and the model card",
    "docs/gpu.md": "running on NVIDIA GPUs, and what was verified how",
    "docs/install.md": "extras, engines, Python versions, torch",
    "docs/jetson.md": "running on a Jetson",
    "docs/log.md": "a dated log of what was tried, negative results too",
    "docs/measured.md": "every candidate and every figure, written by `make figures`",
    "docs/serving.md": "ee-serve: routes, how requests are walked, budgets, audits, keys, figures",
    "docs/processes.md": "servers, workers, threads, containers, stopping ee-run; a test runs its files",
    "docs/operating-points.md": "measured and guaranteed points: what a guarantee says, and whether it holds",
    "docs/papers.md": "the published systems element by element, and what of them is built",
    "docs/structure.md": "rooms, doors, what to read in which order, every file",
    "tests": "one test file a source file, under the same names",
    "tests/data": "tiny bundles, checked in, with their generators",
    "tests/hostile": "what an attacker would write: bundles, inputs, templates; threats of SECURITY.md",
    "tests/doubles": "CUDA and TensorRT on host memory, Triton in this process, for tests of engines",
}
BEGIN, END = "<!-- tree: make tree -->", "<!-- end of tree -->"

# Folders of one machine, at the start of an absolute path. Written so that this very line is none.
MACHINE_PATH = re.compile(r"(?<![\w.~$}])/(?:home|root|Users|work|mnt|srv|tmp)/\w")


def rooms() -> list[str]:
    """Top-level folders that are imported as offramp.X."""
    return sorted(file.parent.name for file in ROOT.glob("*/__init__.py"))


def sources(*folders: str) -> list[Path]:
    """Every Python file of these rooms."""
    files = (file for folder in folders for file in (ROOT / folder).rglob("*.py"))
    return sorted(file for file in files if "__pycache__" not in file.parts)


def name_of(file: Path) -> str:
    """A file's path from the root."""
    return file.relative_to(ROOT).as_posix()


@cache
def parsed(file: Path) -> ast.Module:
    """The syntax tree of a Python file."""
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def pyproject() -> dict[str, Any]:
    """pyproject.toml, read."""
    settings: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return settings


def is_module(name: str) -> bool:
    """Whether offramp.<name> is a file or a folder of the checkout."""
    place = ROOT.joinpath(*name.split("."))
    return place.is_dir() or place.with_suffix(".py").is_file()


def statements(tree: ast.AST, *, typing: bool) -> Iterator[ast.AST]:
    """Every node but expressions; without typing, not those for type checkers alone (`if TYPE_CHECKING`)."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.expr):  # three of four nodes
            continue
        if not typing and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from statements(child, typing=typing)


@cache
def imports(file: Path, *, typing: bool = True) -> list[tuple[int, str]]:
    """(line, dotted module name) of every import in a file, at any depth; relative ones made absolute."""
    package = ["offramp", *file.relative_to(ROOT).parent.parts]
    modules: list[tuple[int, str]] = []
    for node in statements(parsed(file), typing=typing):
        if isinstance(node, ast.Import):
            modules += ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{module}.{alias.name}"
                ours = name.startswith("offramp.") and is_module(name.removeprefix("offramp."))
                modules.append((node.lineno, name if ours else module))
    return modules


def allowed(room: str, module: str) -> bool:
    """Whether a room may import offramp.<module>."""
    return any(module == door or module.startswith(door + ".") for door in (room, *MAY_IMPORT[room]))


def import_graph() -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports, at any depth; a package's __init__ has its name."""
    files = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in sources(*rooms())}
    modules = {name.removesuffix(".__init__"): file for name, file in files.items()}
    graph: dict[str, set[str]] = {}
    for module, file in modules.items():
        names = {name.removeprefix("offramp.") for _, name in imports(file, typing=False)}
        graph[module] = (names & modules.keys()) - {module}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others (Tarjan's algorithm)."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    path: list[str] = []
    groups = []

    def visit(module: str) -> None:
        number[module] = lowest[module] = len(number)
        path.append(module)
        for other in graph[module]:
            if other not in number:
                visit(other)
            if other in path:
                lowest[module] = min(lowest[module], lowest[other])
        if lowest[module] == number[module]:
            at = path.index(module)
            groups.append(sorted(path[at:]))
            del path[at:]

    for module in graph:
        if module not in number:
            visit(module)
    return [group for group in groups if len(group) > 1]


@cache
def walked(file: Path) -> list[ast.AST]:
    """Every node of a Python file."""
    return list(ast.walk(parsed(file)))


def names_in(file: Path) -> Iterator[tuple[int, str]]:
    """(line, name) of everything that a file names: classes, functions, arguments, variables, attributes."""
    for node in walked(file):
        line = getattr(node, "lineno", 0)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield line, node.name
        elif isinstance(node, (ast.arg, ast.keyword)) and node.arg is not None:
            yield line, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield line, node.id
        elif isinstance(node, ast.Attribute):
            yield line, node.attr
        elif isinstance(node, ast.alias) and node.asname:
            yield line, node.asname


@cache
def is_retired(name: str) -> bool:
    """Whether a name is, or has in it, one that the redesign replaced."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().split("_")
    if name in KEPT or words[0] == "test":  # names of tests are sentences
        return False
    return name in RETIRED_NAMES.split() or not set(words).isdisjoint(RETIRED_WORDS.split())


def retired_names(file: Path) -> list[str]:
    """What a file still has of the replaced names, options and keys, with the line of the first."""
    lines: dict[str, int] = {}
    counts: Counter[str] = Counter()
    if file.stem in RETIRED_FILES.split():
        lines[f"module {file.stem}"] = 1
    for line, name in names_in(file):
        if is_retired(name):
            counts[name] += 1
            lines.setdefault(name, line)
    for node in walked(file):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            words = {node.value, *node.value.split("/")} if node.value.startswith("--") else {node.value}
            for text in words & {*RETIRED_OPTIONS.split(), *RETIRED_KEYS.split()}:
                lines.setdefault(repr(text), node.lineno)
    return [f"{name_of(file)}:{line} {name} ({counts[name] or 1} x)" for name, line in lines.items()]


def text_files() -> Iterator[Path]:
    """What is committed: git's list, or every file of the rooms where there is no git."""
    command = ["git", "ls-files", "-z", "--cached"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if listing.returncode == 0:
        files = [ROOT / name for name in listing.stdout.decode().split("\0") if name]
    else:
        files = [file for folder in (*rooms(), "tests", "docs", ".ci") for file in (ROOT / folder).rglob("*")]
    for file in files:
        if file.is_file() and not file.is_symlink() and b"\0" not in file.read_bytes()[:4096]:
            yield file


def first_sentence(docstring: str) -> str:
    """The first sentence of a docstring, without its full stop."""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    return paragraph.split(". ")[0].rstrip(".:")  # a colon does not end the sentence


def purpose(path: Path) -> str:
    """A file's or folder's line in the tree: its docstring's first sentence, or its entry in PURPOSE."""
    name = name_of(path)
    file = path / "__init__.py" if path.is_dir() else path
    if name in PURPOSE:
        return PURPOSE[name]
    if path.is_dir() and path.parent == ROOT / "tests" and path.name in MAY_IMPORT:
        return f"of {path.name}/"
    assert file.suffix == ".py" and file.is_file(), f"{name} has no line in PURPOSE (tests/test_house.py)"
    docstring = ast.get_docstring(parsed(file))
    assert docstring, f"{name_of(file)} has no docstring to take its line of the tree from"
    return first_sentence(docstring)


def tree() -> str:
    """The tree of docs/structure.md: rooms with every source file, tests as folders and shared files."""
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
            known = (entry / "__init__.py").is_file() or entry.name in {"results", "tutorials"}
            if entry.is_dir() and (in_tests or known):
                if in_tests:
                    rows.append(("  " + entry.name + "/", purpose(entry)))
                else:
                    visit(entry, depth + 1)

    for folder in (*rooms(), "tests", "docs", ".ci"):
        if (ROOT / folder).is_dir():
            visit(ROOT / folder, 0)
    width = max(len(name) for name, _ in rows) + 2
    return "```\n" + "\n".join(f"{name:<{width}}{line}".rstrip() for name, line in rows) + "\n```"


def structure_parts() -> tuple[str, str, str]:
    """docs/structure.md before, in and after its tree."""
    text = STRUCTURE.read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1, f"{STRUCTURE.name} needs {BEGIN} and {END}, once each"
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
                    wrong.append(f"{name_of(file)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_no_modules_import_each_other() -> None:
    groups = circles(import_graph())
    assert not groups, "\n".join(" <-> ".join(group) for group in groups)


def test_circles_are_recognised() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}
    assert circles(graph) == [["b", "c"]]


def extras_of(file: Path) -> set[str]:
    """What a file may import because it is in a folder that needs an extra."""
    return {name for folder, names in EXTRA_IMPORTS.items() if folder in name_of(file) for name in names}


def test_the_runtime_imports_nothing_heavy_anywhere() -> None:
    wrong = [
        f"{name_of(file)}:{line} imports {name}"
        for file in sources("runtime")
        for line, name in imports(file, typing=False)
        if name.split(".")[0] not in {"offramp", *RUNTIME_IMPORTS, *extras_of(file), *sys.stdlib_module_names}
    ]
    assert not wrong, "\n".join(wrong)


def test_importing_the_runtime_loads_nothing_heavy() -> None:
    script = f"import sys, offramp.runtime; print([name for name in {HEAVY} if name in sys.modules])"
    # Not from the root, which python -c would put on sys.path: the rooms are to be found by their mapping.
    command = [sys.executable, "-c", script]
    loaded = subprocess.run(command, cwd=ROOT / "docs", capture_output=True, text=True, check=False)
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.strip() == "[]"


def test_only_the_walker_runs_segments() -> None:
    wrong = [
        f"{name_of(file)}:{node.lineno} {ast.unparse(node.func)}"
        for file in sources("runtime", "export", "benchmarks")
        if name_of(file) not in STEPS_IN
        for node in walked(file)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "step"
    ]
    assert not wrong, "\n".join(wrong)


def test_only_loading_asks_for_the_kind_of_a_session() -> None:
    wrong = []
    for file in sources("runtime", "export", "benchmarks"):
        if name_of(file) in SESSION_KINDS_IN:
            continue
        for node in walked(file):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
                kinds = {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}
                kinds |= {name.attr for name in ast.walk(node.args[1]) if isinstance(name, ast.Attribute)}
                if kinds & SESSION_KINDS:
                    wrong.append(f"{name_of(file)}:{node.lineno} {ast.unparse(node)}")
    assert not wrong, "\n".join(wrong)


def test_declared_protocols_have_no_any() -> None:
    wrong = []
    for name, classes in PROTOCOLS.items():
        body = parsed(ROOT / name).body
        parts = [node for node in body if isinstance(node, ast.ClassDef) and node.name in classes]
        assert len(parts) == len(classes), f"{name} has not all of {classes}"
        for part in parts or body:
            for node in ast.walk(part):
                if isinstance(node, (ast.Name, ast.alias)) and ast.unparse(node) == "Any":
                    wrong.append(f"{name}:{node.lineno}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_no_retired_name_is_left() -> None:
    files = [file for file in sources(*rooms(), "tests") if not NOT_CHECKED.fullmatch(name_of(file))]
    wrong = [line for file in files for line in retired_names(file)]
    assert not wrong, "\n".join(wrong)


def test_no_retired_option_is_documented() -> None:
    option = re.compile(rf"(?<![\w-])(?:{'|'.join(RETIRED_OPTIONS.split())})(?![\w-])")
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    wrong = [
        f"{name_of(page)}:{number} {line.strip()[:100]}"
        for page in pages
        if page.name != "log.md"  # what was tried under the old names
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1)
        if option.search(line)
    ]
    assert not wrong, "\n".join(wrong)


def test_pyproject_lists_exactly_the_folders() -> None:
    settings = pyproject()["tool"]["setuptools"]
    inits = [file for file in sources(*rooms()) if file.name == "__init__.py"]
    folders = {".".join(["offramp", *file.parent.relative_to(ROOT).parts]) for file in inits}
    folders.add("offramp.web")  # files of the page, not Python
    assert set(settings["packages"]) == folders
    assert settings["package-dir"] == {f"offramp.{room}": room for room in (*rooms(), "web")}
    assert not (ROOT / "__init__.py").exists()
    assert not (ROOT / "offramp").exists(), "offramp is a namespace: it has no folder"


def test_tensorrt_brings_nothing_but_bindings() -> None:
    extra = pyproject()["project"]["optional-dependencies"]["trt"]
    names = {re.split(r"[<>=\[]", requirement)[0] for requirement in extra}
    assert names == {"tensorrt-cu13", "cuda-python"}


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
        name_of(file): len(file.read_text(encoding="utf-8").splitlines()) for file in sources(*rooms())
    }
    long = {name for name, lines in lengths.items() if lines > MAX_LINES}
    assert long - LONGER.keys() == set(), f"over {MAX_LINES} lines: split, or give the reason in LONGER"
    assert LONGER.keys() - long == set(), "no longer that long: take it out of LONGER"


def test_the_tree_in_the_docs_is_the_tree() -> None:
    assert structure_parts()[1] == tree(), f"the tree in {name_of(STRUCTURE)} is out of date: make tree"


def test_no_text_mentions_a_path_of_one_machine() -> None:
    wrong = [
        f"{name_of(file)}:{number} {line.strip()[:100]}"
        for file in text_files()
        for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if MACHINE_PATH.search(line)
    ]
    assert not wrong, "\n".join(wrong)


def main(arguments: list[str]) -> int:
    """Compare the tree in docs/structure.md with the folders, or rewrite it; 0 when they agree."""
    if arguments not in ([], ["--write"]):
        print("usage: python tests/test_house.py [--write]", file=sys.stderr)
        return 2
    before, block, after = structure_parts()
    if block == tree():
        return 0
    if not arguments:
        print(f"{name_of(STRUCTURE)}: the tree is out of date; make tree rewrites it", file=sys.stderr)
        return 1
    STRUCTURE.write_text(f"{before}{BEGIN}\n{tree()}\n{END}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
