"""A stranger's check: ten public names from each room, drawn at random, each with its signature and sentence.

    python tests/names_sample.py --seed 1 --count 10

Somebody who has not read the files should understand each name from its line.
"""

from __future__ import annotations

import argparse
import ast
import random
from collections.abc import Iterator
from pathlib import Path

from test_house import first_sentence, name_of, parsed, rooms, sources

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def public(body: list[ast.stmt], owner: str = "") -> Iterator[tuple[str, Definition]]:
    """(dotted name, node) of public functions, classes and their public methods, in the order of the file."""
    for node in body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield f"{owner}{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{owner}{node.name}.")


def signature(name: str, node: Definition) -> str:
    """The name with its arguments and what it returns, or with its base classes."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {name}({bases})" if bases else f"class {name}"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{name}({ast.unparse(node.args)}){returns}"


def line(file: Path, name: str, node: Definition) -> str:
    """Signature, place and the first sentence of the docstring."""
    docstring = ast.get_docstring(node)
    sentence = first_sentence(docstring) if docstring else "(no docstring)"
    return f"{signature(name, node)}\n    {name_of(file)}:{node.lineno}\n    {sentence}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="Of the draw; another seed draws other names.")
    parser.add_argument("--count", type=int, default=10, help="Names from each room.")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    for room in rooms():
        names = [(file, *definition) for file in sources(room) for definition in public(parsed(file).body)]
        print(f"== {room}: {min(options.count, len(names))} of {len(names)} public names\n")
        for file, name, node in sorted(
            draw.sample(names, min(options.count, len(names))), key=lambda n: n[:2]
        ):
            print(line(file, name, node))
        print()


if __name__ == "__main__":
    main()
