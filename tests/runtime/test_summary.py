"""Summaries and progress: panels, plain text and JSON; bars on terminals, lines of phases elsewhere."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import stat
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from tiny_bundles import CLASSIFIER, texts

from offramp.runtime import progress
from offramp.runtime.hub import push
from offramp.runtime.summary import (
    CommandOutput,
    Summary,
    can_write,
    command_line,
    free_path,
    may_colour,
    output_options,
    show,
)
from offramp.runtime.tuning import calibrate

LONG = "risk at most 0.05 with confidence 0.99, 61.2 % of the computation saved"
SUMMARY = Summary(
    "Bundle calibrated",
    [("bundle", "my bundle/"), ("point default", LONG)],
    {"bundle": "my bundle/", "rows": 3},
    ("ee-run", "--bundle", "my bundle/"),
)


class Terminal(io.TextIOWrapper):
    """A stream that says it is a terminal, of an encoding."""

    def __init__(self, encoding: str = "utf-8") -> None:
        self.bytes = io.BytesIO()
        super().__init__(self.bytes, encoding=encoding, write_through=True)

    def isatty(self) -> bool:
        """True."""
        return True

    @property
    def text(self) -> str:
        """What was written."""
        return self.bytes.getvalue().decode(self.encoding)


@pytest.fixture(autouse=True)
def usual_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of a terminal with colours, 80 columns wide."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_a_panel_is_a_box_within_the_columns(columns: int) -> None:
    box = SUMMARY.panel(columns).partition("\nNext:")[0].splitlines()
    assert {len(line) for line in box} == {len(box[0])} and len(box[0]) <= min(columns, 80)
    words = " ".join(line.strip("│ ") for line in box[1:-1]).split()
    assert "".join(LONG.split()) in "".join(words)


def test_wide_characters_take_two_columns() -> None:
    box = Summary("Bundle", [("bundle", "模型"), ("file", "e\u0301")], {}).panel().splitlines()
    assert len(box[1]) == len(box[0]) - 2 and len(box[2]) == len(box[0]) + 1


def test_the_next_command_is_one_line_that_a_shell_reads() -> None:
    line = SUMMARY.panel(30).splitlines()[-1].strip()
    assert shlex.split(line)[1:] == ["--bundle", "my bundle/"]


def test_control_characters_of_a_name_do_not_reach_the_terminal() -> None:
    summary = Summary("Bundle", [("bundle", "a\x1b[2Jb\n")], {})
    assert "\x1b" not in summary.panel() and "a\\x1b[2Jb\\n" in summary.plain()


def test_ascii_panels_have_ascii_alone() -> None:
    assert SUMMARY.panel(ascii_only=True).isascii() and SUMMARY.panel(ascii_only=True).startswith("+- ")


def test_a_terminal_without_utf8_gets_ascii() -> None:
    terminal = Terminal("ascii")
    show(Summary("Bundle", [("bundle", "modèle")], {}), terminal)
    assert terminal.text.startswith("+-") and "mod\\xe8le" in terminal.text


def test_a_terminal_gets_a_coloured_panel() -> None:
    terminal = Terminal()
    show(SUMMARY, terminal)
    assert "╭" in terminal.text and "\x1b[1m" in terminal.text


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_colours_can_be_turned_off(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    terminal = Terminal()
    show(SUMMARY, terminal)
    assert not may_colour(terminal) and "\x1b" not in terminal.text and "╭" in terminal.text


def test_a_file_gets_plain_lines() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    show(SUMMARY, stream)
    lines = stream.buffer.getvalue().decode().splitlines()
    assert lines[:2] == ["Bundle calibrated", "  bundle         my bundle/"]
    assert shlex.split(lines[-1].removeprefix("Next: "))[1:] == ["--bundle", "my bundle/"]


def test_without_a_stream_nothing_is_shown() -> None:
    show(SUMMARY, None)
    assert not may_colour(None) and not can_write("é", Terminal("ascii"))


def test_a_command_that_is_not_on_the_path_is_named_by_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "ee-run"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(program.with_name("python")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    assert command_line(["ee-run", "a b"]) == f"{os.path.join('bin', 'ee-run')} 'a b'"
    monkeypatch.setenv("PATH", str(program.parent))
    assert command_line(["ee-run"]) == "ee-run"


def test_a_free_path_is_the_first_where_nothing_is(tmp_path: Path) -> None:
    assert free_path(tmp_path / "bundle") == tmp_path / "bundle"
    for name in ("bundle", "bundle-2"):
        (tmp_path / name).mkdir()
    assert free_path(tmp_path / "bundle") == tmp_path / "bundle-3"


@click.command()
@output_options
def _command(quiet: bool, as_json: bool) -> None:
    output = CommandOutput(quiet, as_json)
    with output.progress():
        progress.note("a note")
        for _ in progress.track(range(3), "reading", unit="batch"):
            pass
    output.table("a table")
    output.finish(SUMMARY, "a line")


def _run(*words: str) -> Result:
    return CliRunner().invoke(_command, list(words))


def test_standard_output_of_a_pipe_is_the_result_alone() -> None:
    done = _run()
    assert done.stdout == "a table\na line\n"
    assert done.stderr.startswith("a note\nreading: 3 batches in ") and "Bundle calibrated" in done.stderr


def test_json_is_one_object_and_nothing_else() -> None:
    done = _run("--json")
    assert json.loads(done.stdout) == SUMMARY.as_json() and done.stdout.count("\n") == 1
    assert "Bundle calibrated" not in done.stderr


def test_quiet_writes_nothing() -> None:
    assert _run("--quiet").output == ""


def test_quiet_and_json_write_the_object_alone() -> None:
    assert json.loads(_run("--quiet", "--json").output)["rows"] == 3


def test_a_terminal_gets_the_panel_in_place_of_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    CommandOutput().finish(SUMMARY, "a line")
    assert "╭" in terminal.text and "a line" not in terminal.text


@pytest.mark.parametrize("columns", ["40", "60", "100"])
def test_a_bar_fits_the_terminal(monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(progress, "_REDRAW", 0.0)
    terminal = Terminal("ascii")
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.progress("joint", 300, done=100) as phase:
        for _ in range(200):
            phase.note = "loss 0.5240"
            phase.advance()
    drawn = click.unstyle(terminal.text.replace("\x1b[?25l", "").replace("\x1b[?25h", ""))
    lines = [line.rstrip() for line in drawn.replace("\n", "\r").split("\r")]
    assert any("joint" in line and "300/300" in line for line in lines)
    assert any("loss 0.5240" in line for line in lines)
    assert max(map(len, lines)) <= int(columns)


def test_the_line_of_a_phase_has_its_note(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress("joint", 2, done=1) as phase:
        phase.advance()
        phase.note = "loss 0.5"
    assert capsys.readouterr().err.startswith("joint: 1 step in 0.") and phase.done == 1


def test_a_phase_that_fails_writes_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OSError), progress.progress("joint", 2):
        raise OSError
    assert capsys.readouterr().err == ""


def test_a_phase_within_a_phase_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress("outer", 1):
        for _ in progress.track([1, 2], "inner"):
            pass
    assert "inner" not in capsys.readouterr().err


def test_processes_beside_the_main_one_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress("joint", 1, shown=False) as phase:
        phase.advance()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (59.96, "1 min 00 s"), (245, "4 min 05 s"), (7800, "2 h 10 min")],
)
def test_times_are_in_fitting_units(seconds: float, text: str) -> None:
    assert progress.format_seconds(seconds) == text


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CLASSIFIER, tmp_path / "my bundle"))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.txt"
    file.write_text("".join(f"{text}\n" for text in texts(12)), encoding="utf-8")
    return file


def _calibrate(bundle: Path, rows: Path, *words: str) -> Result:
    return CliRunner().invoke(calibrate.main, [str(rows), "--bundle", str(bundle), *words])


@pytest.mark.slow
def test_calibrate_writes_the_points_as_json(bundle: Path, rows: Path) -> None:
    done = _calibrate(bundle, rows, "--json")
    value = json.loads(done.stdout)
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    assert (value["points"], value["rule"], value["rows"]) == (manifest["points"], manifest["rule"], 12)
    assert shlex.split(value["next"])[1:] == ["--bundle", str(bundle), "--stats"]


@pytest.mark.slow
def test_quiet_calibrate_writes_warnings_alone(bundle: Path, rows: Path) -> None:
    done = _calibrate(bundle, rows, "--quiet")
    assert done.exit_code == 0 and done.stdout == ""
    assert done.stderr == f"{rows} has no labels: points are chosen by agreement with full depth\n"


def test_calibrate_ends_with_the_figures_of_its_points(bundle: Path, rows: Path) -> None:
    done = _calibrate(bundle, rows)
    assert done.stdout.startswith("point ") and "Bundle calibrated" not in done.stdout
    assert "point full     agreement 100.00 %, 0.0 % of the computation saved" in done.stderr


def test_calibrate_states_what_is_guaranteed(bundle: Path, rows: Path) -> None:
    rows.write_text("".join(f"{text}\n" for text in texts(60, seed=3)), encoding="utf-8")
    done = _calibrate(bundle, rows, "--risk", "0.3", "--confidence", "0.9")
    assert done.exit_code == 0, done.output
    assert "point default  disagreement at most 0.3 with confidence 0.9, " in done.stderr


@pytest.mark.parametrize("command", [calibrate.main, push.main])
def test_commands_have_the_options(command: click.Command) -> None:
    assert {"--quiet", "--json"} <= {name for option in command.params for name in option.opts}
