"""export/split.py is ee-split, run from a checkout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "export" / "split.py"


@pytest.mark.slow
def test_the_script_is_the_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "--segments" in done.stdout


def test_the_script_without_offramp_says_what_to_install(tmp_path: Path) -> None:
    # -S: no site-packages, -I: no PYTHONPATH; what is left is a Python that never saw an install
    done = subprocess.run(
        [sys.executable, "-S", "-I", SCRIPT], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "pip install -e '.[export,cpu]'" in done.stderr and done.stderr.count("\n") == 1
