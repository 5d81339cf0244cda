"""kill -9 at random moments of ee-train, ee-split and ee-calibrate; tests/killed.py does more of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "killed.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks of a process with torch")
def test_killed_commands_leave_nothing_half_written() -> None:
    command = [sys.executable, str(SCRIPT), "--moments", "10"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert sum(int(line.split()[0]) for line in result.stdout.splitlines()) == 10
