"""ee-run as a process: lines in, lines out, exit codes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from offramp.runtime import cli, engines, load, ways
from offramp.runtime.inputs import lines

TINY = Path(__file__).parents[1] / "data" / "tiny_bundle"
RUN = [sys.executable, "-m", "offramp.runtime.cli", "--bundle", str(TINY)]


def run(*options: str, data: bytes = b"", bundle: Path = TINY) -> tuple[int, list[dict], str]:
    command = [*RUN[:4], str(bundle), *options]
    done = subprocess.run(command, input=data, capture_output=True, timeout=60)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr.decode()


def test_a_file_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "input.txt"
    path.write_bytes("good film\nnaïve plot\n".encode())
    code, out, err = run(str(path))
    assert (code, len(out), err) == (0, 2, "")
    assert list(out[0]) == ["label", "score", "exit", "depth", "ms"]


def test_standard_input_is_the_default() -> None:
    assert run(data=b"good film\n")[1][0]["label"] == run("-", data=b"good film\n")[1][0]["label"]


def test_the_answers_are_those_of_a_session() -> None:
    with load(TINY) as opened:
        expected = [opened("good film"), opened("bad", "the plot")]
    data = b'{"text": "good film"}\n{"text": "bad", "text_b": "the plot"}\n'
    _, out, _ = run(data=data)
    assert [(o["label"], o["exit"], o["depth"]) for o in out] == [
        (a.label, a.exit, a.depth) for a in expected
    ]


BAD = b"good film\n\nba\xff\n" + b"very " * 200 + b"\nlast\n"


@pytest.mark.parametrize("size", ["1", "2", "8"])
def test_lines_keep_their_places(size: str) -> None:
    code, out, _ = run("--batch-size", size, data=BAD)
    assert code == cli.SOME_FAILED
    assert out[1] == {"error": "empty line", "line": 2}
    assert out[2]["line"] == 3 and "not UTF-8" in out[2]["error"]
    assert out[3]["truncated"] is True and "truncated" not in out[0]
    assert len(out) == 5 and "label" in out[4]


def test_json_lines_that_are_none() -> None:
    code, out, _ = run(data=b'{"text": "good"}\n{bad\n{"text": "bad"}\n')
    assert code == cli.SOME_FAILED
    assert out[1]["line"] == 2 and "not JSON" in out[1]["error"] and "label" in out[2]


def test_text_that_begins_with_a_brace() -> None:
    assert run("--format", "text", data=b"{good\n")[0] == 0
    assert run(data=b"{good\n")[0] == cli.SOME_FAILED


def test_nothing_in_nothing_out() -> None:
    assert run() == (0, [], "")


def test_what_cannot_start(tmp_path: Path) -> None:
    for code, out, err in (
        run(bundle=tmp_path / "none"),
        run(str(tmp_path / "none.txt")),
        run(str(tmp_path)),
        run("--rule", "luck"),
        run("--point", "default", "--rule", "never"),
        run("--variant", "int4"),
        run("--engine", "trt"),
    ):
        assert (code, out) == (cli.NOT_STARTED, [])
        assert err.startswith("ee-run: ") and err.count("\n") == 1
    assert run("--engine", "tpu")[0] == run("--batch-size", "0")[0] == cli.NOT_STARTED


def test_a_changed_bundle_cannot_start(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TINY, tmp_path / "bundle"))
    (folder / "stem.onnx").write_bytes(b"x")
    code, _, err = run(bundle=folder, data=b"good\n")
    assert code == cli.NOT_STARTED and "stem.onnx" in err


def test_what_no_row_reaches_is_opened_by_warm_up_alone(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TINY, tmp_path / "bundle"))
    (folder / "segment_02.onnx").write_bytes(b"x")
    first = ("--rule", "fixed", "--threshold", "1")
    assert run(*first, bundle=folder, data=b"good\n")[0] == cli.ALL_ANSWERED
    code, out, err = run(*first, "--warm-up", bundle=folder, data=b"good\n")
    assert code == cli.NOT_STARTED and not out and "segment_02.onnx" in err
    code, out, err = run("--rule", "never", bundle=folder, data=b"good\n")
    assert code == cli.SOME_FAILED and not out and "segment_02.onnx" in err


def test_rule_threshold_variant_and_point() -> None:
    assert run("--rule", "fixed", "--threshold", "2", data=b"good\n")[1][0]["exit"] == 2
    assert run("--rule", "never", "--variant", "int8", data=b"good\n")[1][0]["exit"] == 3
    assert run("--point", "fast", data=b"good\n")[0] == 0


def test_stats_say_what_really_ran() -> None:
    _, _, err = run(
        "--stats", "--threads", "1", "--rule", "never", "--batch-size", "4", data=b"good\n\nbad\n"
    )
    for line in (
        "exit   3         2  100.0%",
        "mean depth 4.00 of 4",
        "engine     ort",
        "device     cpu",
        "threads    1",
    ):
        assert line in err
    assert "2 (" in err and "1 with errors" in err and "p95" in err and "pool" in err


def test_an_answer_is_written_before_the_next_line_is_read() -> None:
    process = subprocess.Popen(RUN, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    for line, key in ((b"good film\n", b"label"), (b"\n", b"error"), (b"bad\n", b"label")):
        process.stdin.write(line)
        process.stdin.flush()
        assert key in process.stdout.readline()  # would wait for ever if the answer were kept back
    process.stdin.close()
    assert process.wait(10) == cli.SOME_FAILED
    process.stdout.close()


def test_a_reader_that_goes_away() -> None:
    process = subprocess.Popen(RUN, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    process.stdin.write(b"good film\n")
    process.stdin.flush()
    process.stdout.readline()
    process.stdout.close()
    process.stdin.write(b"bad\n" * 10)
    process.stdin.close()
    assert process.wait(10) == cli.PIPE_CLOSED
    assert process.stderr.read() == b""
    process.stderr.close()


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c() -> None:
    process = subprocess.Popen(
        RUN,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell starts its background jobs with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    process.stdin.write(b"good film\n")
    process.stdin.flush()
    process.stdout.readline()
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == cli.INTERRUPTED
    assert b"Traceback" not in process.stderr.read()
    for pipe in (process.stdin, process.stdout, process.stderr):
        pipe.close()


def test_output_is_utf8_whatever_the_terminal_says() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(RUN, input="naïve\n".encode(), capture_output=True, env=environment)
    assert done.returncode == 0 and done.stderr == b""


def test_help_names_every_exit_code_and_choice() -> None:
    done = subprocess.run([*RUN[:3], "--help"], capture_output=True, text=True, check=True)
    for code in (0, 1, 2, 130, 141):
        assert f"\n  {code} " in done.stdout.replace("    ", "  ")
    for name in ("gate", "max_probability", "entropy", "margin", "patience", "fixed", "never"):
        assert name in done.stdout


def test_the_command_repeats_what_light_imports_cannot_tell() -> None:
    assert tuple(engines.ENGINES) == cli.ENGINES
    assert ways.CACHES == cli.CACHES
    assert engines.DEVICES == cli.DEVICES
    assert lines.FORMATS == cli.FORMATS
