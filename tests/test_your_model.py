"""docs/your-model.md: every block is run, in order, on a tiny fine-tuned model."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)

pytestmark = pytest.mark.slow  # seven commands, each of which imports torch


def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.classifier_folder(tmp_path / "my-finetuned")
    (tmp_path / "traffic.txt").write_text("".join(row["text"] + "\n" for row in tiny.rows(60, 5)))
    tiny.data_folder(tmp_path / "data")
    (tmp_path / "data" / "test.jsonl").rename("test.jsonl")
    (tmp_path / "export").symlink_to(ROOT / "export")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    blocks = BLOCK.findall((ROOT / "docs" / "your-model.md").read_text(encoding="utf-8"))
    assert len(blocks) == 7
    printed = ""
    for language, code in blocks:
        if language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(code, "docs/your-model.md", "exec"), {})
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
    assert "exit_agreement" in printed and '"label": "positive"' in printed
