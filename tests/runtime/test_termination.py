"""SIGTERM: no further line is read, what is being walked is finished, and every line written is complete."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_bundles import CLASSIFIER, GENERATOR, texts

from offramp.runtime import cli
from offramp.runtime.termination import Terminated, Termination

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
COMMAND = [sys.executable, "-m", "offramp.runtime.cli", "--bundle"]
PIPES: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_signal_before_the_lines_are_read_is_raised() -> None:
    with pytest.raises(Terminated), Termination():
        terminate()


def test_signal_while_a_line_is_answered_ends_the_lines() -> None:
    answered = []
    with Termination() as termination:
        for number in termination.lines(iter(range(5))):
            if number == 2:
                terminate()
            answered.append(number)
        assert termination.requested
    assert answered == [0, 1, 2]


def test_signal_while_the_source_is_read_ends_the_lines() -> None:
    def source() -> Iterator[int]:
        yield 1
        terminate()
        yield 2

    with Termination() as termination:
        assert list(termination.lines(source())) == [1]


def test_handler_of_the_application_comes_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Termination():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
@pytest.mark.parametrize("bundle", [CLASSIFIER, GENERATOR], ids=lambda path: path.name)
def test_run_that_waits_for_a_line_ends(bundle: Path) -> None:
    process = subprocess.Popen([*COMMAND, str(bundle), "--max-new-tokens", "2"], **PIPES)
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    process.stdin.write(b"good film\n")
    process.stdin.flush()
    json.loads(process.stdout.readline())
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == cli.TERMINATED
    assert (process.stdout.read(), process.stderr.read()) == (b"", b"")
    for pipe in (process.stdin, process.stdout, process.stderr):
        pipe.close()


@pytest.mark.parametrize("size", [pytest.param("1", marks=pytest.mark.slow), "4"])
def test_run_that_walks_ends_with_complete_lines(tmp_path: Path, size: str) -> None:
    source = tmp_path / "texts.txt"
    rows = texts(200) * 100
    source.write_text("".join(f"{text}\n" for text in rows))
    process = subprocess.Popen([*COMMAND, str(CLASSIFIER), "--batch-size", size, str(source)], **PIPES)
    assert process.stdout is not None
    first = process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    rest, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (cli.TERMINATED, b"")
    written = (first + rest).splitlines(keepends=True)
    assert 1 <= len(written) < len(rows) and all(line.endswith(b"}\n") for line in written)
    assert [set(json.loads(line)) >= {"label", "ms"} for line in written] == [True] * len(written)


@pytest.mark.slow
def test_run_with_a_file_goes_on_after_the_signal(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    command = [*COMMAND, str(CLASSIFIER), "--out", str(path)]
    process = subprocess.Popen(command, **PIPES)
    assert process.stdin is not None
    process.stdin.write(b"good film\n")
    process.stdin.flush()
    while not (partial := list(tmp_path.glob("*.partial"))) or not partial[0].stat().st_size:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == cli.TERMINATED and not path.exists()
    process.communicate()
    done = subprocess.run([*command, "--resume"], input=b"good film\nbad\n")
    assert done.returncode == cli.ALL_ANSWERED and len(path.read_text().splitlines()) == 2
