"""Command ee: every program is a command of it, and it imports none that is not asked for."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import distribution

import pytest
from click.testing import CliRunner
from tiny_bundles import CLASSIFIER

from offramp.runtime import entry


def test_every_program_is_a_command() -> None:
    scripts = {script.name: script.value for script in distribution("offramp").entry_points}
    programs = {f"ee-{name}": program.function for name, program in entry.PROGRAMS.items()}
    assert scripts == programs | {"ee": "offramp.runtime.entry:main"}


@pytest.mark.slow
def test_help_lists_the_commands_and_imports_none() -> None:
    script = (
        "import sys\nfrom offramp.runtime import entry\n"
        "try:\n    entry.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print([n for n in sys.modules if n.startswith('offramp.') and n.endswith(('cli', 'bench', 'push'))])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
    assert all(f"  {name} " in done.stdout for name in entry.PROGRAMS)


def test_a_command_runs_as_its_program_does() -> None:
    result = CliRunner().invoke(entry.main, ["run", "--bundle", str(CLASSIFIER)], input=b"good film\n")
    assert result.exit_code == 0 and result.stdout.startswith('{"label": ')


def test_an_unknown_command_is_refused() -> None:
    result = CliRunner().invoke(entry.main, ["walk"])
    assert result.exit_code == 2 and "No such command 'walk'" in result.stderr


def test_a_command_without_its_extra_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(entry.PROGRAMS, "serve", entry.Program("offramp.nowhere:main", "answer"))
    result = CliRunner().invoke(entry.main, ["serve", "bundle/", "--port", "1"])
    assert result.exit_code == 1 and "docs/install.md lists what each command needs" in result.stderr


def test_shells_complete_names(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"_EE_COMPLETE": "bash_complete", "COMP_WORDS": "ee ca", "COMP_CWORD": "1"}
    result = CliRunner().invoke(entry.main, [], env=variables, prog_name="ee")
    assert "plain,calibrate" in result.stdout
