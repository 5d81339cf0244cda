"""Run the code blocks of a document, in order, as a user would type them."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)


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
            done = subprocess.run(
                shlex.split(line),
                env=os.environ | {"PATH": path},
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, f"{line}\n{done.stderr}"
            printed += done.stdout
    return len(blocks), printed
