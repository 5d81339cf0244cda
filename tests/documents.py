"""Run the code blocks of a document, in order, as a user would type them."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from test_docs import entry_points

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Their imports take seconds: they run in the test's own process, which has imported torch once.
HEAVY = {"ee-train", "ee-split"}


def entry(command: str) -> click.Command:
    """The click command behind ee-NAME."""
    module, _, function = entry_points()[command].partition(":")
    value = getattr(import_module(module), function)
    assert isinstance(value, click.Command)
    return value


def run_heavy(words: list[str]) -> str:
    """Run a command of HEAVY in this process; gives its stdout.

    A training chooses its precision, whatever other trainings of this process chose before or choose later.
    """
    from accelerate.state import AcceleratorState  # imports torch

    AcceleratorState._reset_state(reset_partial_state=True)
    result = CliRunner().invoke(entry(words[0]), words[1:])
    AcceleratorState._reset_state(reset_partial_state=True)
    assert result.exit_code == 0, f"{shlex.join(words)}\n{result.output}\n{result.exception!r}"
    return result.stdout


def run_heavy_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands of HEAVY that code under test starts by subprocess.run run in this process."""
    real_run = subprocess.run

    def run(command: list[str], **rest: Any) -> Any:
        name = Path(command[0]).name
        return run_heavy([name, *command[1:]]) if name in HEAVY else real_run(command, **rest)

    monkeypatch.setattr(subprocess, "run", run)


def run_blocks(document: str, folder: Path) -> tuple[int, str]:
    """Run every block of docs/DOCUMENT in a folder, which is the current one.

    Gives the number of blocks, and all that they print on stdout.
    """
    (folder / "export").symlink_to(ROOT / "export")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    blocks = BLOCK.findall((ROOT / "docs" / document).read_text(encoding="utf-8"))
    printed = ""
    for language, code in blocks:
        if language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(code, f"docs/{document}", "exec"), {})
            printed += out.getvalue()
            continue
        for line in code.splitlines():
            words = shlex.split(line)
            if words[0] in HEAVY:
                printed += run_heavy(words)
                continue
            done = subprocess.run(
                words,
                env=os.environ | {"PATH": path},
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, f"{line}\n{done.stderr}"
            printed += done.stdout
    return len(blocks), printed
