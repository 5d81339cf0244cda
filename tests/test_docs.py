"""README size, options in docs/cli.md and reading lists in docs/structure.md agree with the code.

Also a command: `python tests/test_docs.py --write` renews the options in docs/cli.md.
"""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path

import click
import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
README, COMMANDS, STRUCTURE = (ROOT / name for name in ("README.md", "docs/cli.md", "docs/structure.md"))
BEGIN, END = "<!-- help: python tests/test_docs.py --write -->", "<!-- end of help -->"
MAX_LINES, MAX_WORDS = 130, 1000
LISTS = (
    "A text becomes an answer",
    "A prompt becomes text",
    "A checkpoint becomes a bundle",
    "Rows become a checkpoint",
)
MAX_FILES = 8
# Its import needs torch, which takes seconds.
SLOW = ("ee-compare",)


def entry_points() -> dict[str, str]:
    """Command -> "module:function", from pyproject.toml."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    scripts: dict[str, str] = settings["project"]["scripts"]
    return scripts


def help_text(command: str) -> str:
    """What `command --help` prints, 100 columns wide."""
    module, _, function = entry_points()[command].partition(":")
    entry: click.Command = getattr(import_module(module), function)
    settings = {**entry.context_settings, "terminal_width": 100, "max_content_width": 100}
    with click.Context(entry, info_name=command, **settings) as context:
        text = entry.get_help(context)
    return "\n".join(line.rstrip() for line in text.splitlines())


def documented() -> dict[str, str]:
    """Command -> its help text in docs/cli.md."""
    block = COMMANDS.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    return dict(re.findall(r"^### (ee[-\w]*)\n\n```\n(.*?)\n```$", block, re.MULTILINE | re.DOTALL))


def reading_list(title: str) -> list[str]:
    """Files of one numbered list of docs/structure.md, in order."""
    section = STRUCTURE.read_text(encoding="utf-8").partition(f"### {title}\n")[2].partition("\n#")[0]
    return re.findall(r"^\d+\. `([\w/.]+)`", section, re.MULTILINE)


def test_the_readme_is_short() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    assert len(text.split()) <= MAX_WORDS


def test_every_command_is_documented() -> None:
    assert sorted(documented()) == sorted(entry_points())


@pytest.mark.parametrize(
    "command",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in sorted(entry_points())],
)
def test_documented_options_are_those_of_the_command(command: str) -> None:
    # Without white space: versions of click break lines at other places.
    expected, written = help_text(command).split(), documented()[command].split()
    assert written == expected, "python tests/test_docs.py --write"


def test_reading_lists_name_existing_files_once() -> None:
    lists = {title: reading_list(title) for title in LISTS}
    files = [file for names in lists.values() for file in names]
    assert all(0 < len(names) <= MAX_FILES for names in lists.values()), lists
    assert [file for file in files if not (ROOT / file).is_file()] == []
    assert sorted(files) == sorted(set(files)), "a file is in two lists"


def test_links_between_documents_lead_to_files() -> None:
    broken = []
    for file in (README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))):
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", file.read_text(encoding="utf-8")):
            if "://" not in link and not (file.parent / link).exists():
                broken.append(f"{file.relative_to(ROOT)}: {link}")
    assert broken == []


def main(arguments: list[str]) -> int:
    """Write the help text of every command into docs/cli.md."""
    if arguments != ["--write"]:
        print("usage: python tests/test_docs.py --write", file=sys.stderr)
        return 2
    before, _, rest = COMMANDS.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    blocks = "\n\n".join(f"### {name}\n\n```\n{help_text(name)}\n```" for name in sorted(entry_points()))
    COMMANDS.write_text(f"{before}{BEGIN}\n\n{blocks}\n\n{END}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
