"""Where answers are written: complete lines, files of runs that were interrupted, full disks."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tiny_bundles import CLASSIFIER, GENERATOR, texts

from offramp.runtime import cli
from offramp.runtime.errors import BadSetting, OutputFailed
from offramp.runtime.inputs.lines import Line
from offramp.runtime.output import FileOutput, Output, job_name

COMMAND = [sys.executable, "-m", "offramp.runtime.cli", "--bundle", str(CLASSIFIER)]
FULL = Path("/dev/full")


def lines(count: int) -> Any:
    return iter([Line(number, f"text {number}") for number in range(1, count + 1)])


def run(*options: str, data: bytes = b"", bundle: Path = CLASSIFIER) -> tuple[int, str]:
    """Exit code and standard error."""
    result = CliRunner().invoke(cli.main, ["--bundle", str(bundle), *options], input=data)
    assert isinstance(result.exception, (SystemExit, type(None))), result.exception
    return result.exit_code, result.stderr


def objects(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file without times, which no two runs share."""
    values = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in each.items() if not key.endswith(("ms", "_s"))} for each in values]


def partials(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.name}.*.partial"))


def test_error_of_the_system_names_the_output() -> None:
    class Full(io.BytesIO):
        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    with pytest.raises(OutputFailed, match=r"answers\.jsonl: the answers cannot be written: No space left"):
        Output(Full(), "answers.jsonl").write({"label": "a"}, flush=True)


def test_file_has_its_name_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with FileOutput(str(path), "a1", resume=False) as output:
        output.write({"label": "ä"})
        assert not path.exists()
        output.complete()
        assert path.read_text(encoding="utf-8") == '{"label": "ä"}\n'
    assert not partials(path)


def test_error_keeps_what_was_written_under_the_other_name(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with pytest.raises(KeyError), FileOutput(str(path), "a1", resume=False) as output:
        output.write({"label": "a"})
        raise KeyError
    assert not path.exists() and partials(path)[0].read_text() == '{"label": "a"}\n'


@pytest.mark.parametrize(("window", "kept"), [(1, 3), (2, 2), (3, 3), (4, 0)], ids=lambda value: str(value))
def test_resumed_file_keeps_whole_windows_of_whole_lines(tmp_path: Path, window: int, kept: int) -> None:
    path = tmp_path / "answers.jsonl"
    whole = ['{"label": "a"}\n', '{"error": "empty line", "line": 2}\n', '{"label": "c"}\n']
    Path(f"{path}.a1.partial").write_text("".join(whole) + '{"label')
    with FileOutput(str(path), "a1", resume=True) as output:
        left = output.skip(lines(5), window)
        assert [line.number for line in left] == list(range(kept + 1, 6))
        assert (output.kept, output.failed) == (kept, min(1, kept // 2))
        output.write({"label": "new"})
        output.complete()
    assert path.read_text() == "".join(whole[:kept]) + '{"label": "new"}\n'


def test_resume_of_nothing_begins(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with FileOutput(str(path), "a1", resume=True) as output:
        assert [line.number for line in output.skip(lines(2), 1)] == [1, 2]


def test_shorter_input_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    Path(f"{path}.a1.partial").write_text('{"label": "a"}\n' * 3)
    with (
        FileOutput(str(path), "a1", resume=True) as output,
        pytest.raises(BadSetting, match="answers to 3 lines, and the input has 2"),
    ):
        output.skip(lines(2), 1)
    assert partials(path)[0].read_text() == '{"label": "a"}\n' * 3, "nothing is lost"


@pytest.mark.parametrize(
    ("there", "resume", "problem"),
    [
        ("answers.jsonl", False, "it exists already"),
        ("answers.jsonl", True, "it exists already"),
        ("answers.jsonl.a1.partial", False, "add --resume"),
        ("answers.jsonl.b2.partial", False, "another bundle, input or options"),
        ("answers.jsonl.b2.partial", True, "another bundle, input or options"),
    ],
)
def test_file_that_stands_in_the_way_is_refused(
    tmp_path: Path, there: str, resume: bool, problem: str
) -> None:
    (tmp_path / there).write_text("{}\n")
    with pytest.raises(BadSetting, match=problem):
        FileOutput(str(tmp_path / "answers.jsonl"), "a1", resume=resume)
    assert (tmp_path / there).read_text() == "{}\n"


@pytest.mark.skipif(os.name == "nt", reason="no fcntl")
def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    path = str(tmp_path / "answers.jsonl")
    with (
        FileOutput(path, "a1", resume=False),
        pytest.raises(BadSetting, match="another run writes"),
    ):
        FileOutput(path, "a1", resume=True)


def test_folder_that_is_missing_is_an_error_of_the_output(tmp_path: Path) -> None:
    with pytest.raises(OutputFailed, match="it cannot be opened: No such file"):
        FileOutput(str(tmp_path / "none" / "answers.jsonl"), "a1", resume=False)


def test_jobs_differ_by_every_fact() -> None:
    assert job_name(["a", {"point": "fast"}]) == job_name(["a", {"point": "fast"}])
    assert len({job_name(facts) for facts in (["a", 1], ["a", 2], ["b", 1], ["a", None])}) == 4


def test_command_writes_the_file_and_nothing_on_standard_output(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    result = CliRunner().invoke(
        cli.main, ["--bundle", str(CLASSIFIER), "--out", str(path)], input=b"good\n\nbad\n"
    )
    assert (result.exit_code, result.stdout) == (cli.SOME_FAILED, "")
    assert ["label" in value for value in objects(path)] == [True, False, True]


@pytest.mark.parametrize("size", ["1", "2"])
def test_command_resumes_with_the_answers_of_one_run(tmp_path: Path, size: str) -> None:
    data = "".join(f"{text}\n" for text in texts(70)).encode().replace(b"cold", b"\xff")
    options = ("--batch-size", size, "--rule", "max_probability", "--threshold", "0.6")
    assert run(*options, "--out", str(tmp_path / "one"), data=data)[0] == cli.SOME_FAILED
    path = tmp_path / "two"
    with pytest.MonkeyPatch.context() as patch:  # a run that breaks off, by a full disk
        patch.setattr(Output, "write_text", _fail_after(Output.write_text, 40))
        code, errors = run(*options, "--out", str(path), data=data)
    assert code == cli.SOME_FAILED and "cannot be written: No space left" in errors
    before = len(partials(path)[0].read_text().splitlines())
    assert 30 < before < 70
    assert run(*options, "--out", str(path), data=data)[0] == cli.NOT_STARTED
    assert run("--out", str(path), "--resume", data=data)[0] == cli.NOT_STARTED
    assert run(*options, "--out", str(path), "--resume", data=data)[0] == cli.SOME_FAILED
    assert objects(path) == objects(tmp_path / "one") and not partials(path)


def _fail_after(method: Any, count: int) -> Any:
    """A method that writes what it is given, and raises OutputFailed after some calls."""
    calls = iter(range(count))

    def write(self: Any, *values: Any, **options: Any) -> None:
        method(self, *values, **options)
        if next(calls, None) is None:
            raise OutputFailed("answers: the answers cannot be written: No space left on device")

    return write


def test_errors_of_the_first_run_set_the_exit_code_of_the_second(tmp_path: Path) -> None:
    path, data = tmp_path / "answers", b"\ngood\n"
    assert run("--out", str(path), data=data)[0] == cli.SOME_FAILED
    (partial,) = [path.rename(f"{path}.{_job_of(path, data)}.partial")]
    partial.write_text('{"error": "empty line", "line": 1}\n')
    assert run("--out", str(path), "--resume", data=data)[0] == cli.SOME_FAILED
    assert len(objects(path)) == 2


def _job_of(path: Path, data: bytes) -> str:
    """The name of the job of a run, read off the partial file that a missing line leaves behind."""
    beside = path.with_name("beside")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileOutput, "complete", _fail_after(Output.flush, 0))
        run("--out", str(beside), data=data)
    (partial,) = partials(beside)
    partial.unlink()
    return partial.name.split(".")[1]


@pytest.mark.slow
def test_command_resumes_generated_text(tmp_path: Path) -> None:
    data, options = b"the film\n\na good plot\nwas\n", ("--max-new-tokens", "4")
    assert run(*options, "--out", str(tmp_path / "one"), data=data, bundle=GENERATOR)[0] == cli.SOME_FAILED
    path = tmp_path / "two"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileOutput, "complete", _fail_after(Output.flush, 0))
        run(*options, "--out", str(path), data=data, bundle=GENERATOR)
    (partial,) = partials(path)
    partial.write_bytes(b"".join(partial.read_bytes().splitlines(keepends=True)[:2]) + b'{"te')
    assert run(*options, "--out", str(path), "--resume", data=data, bundle=GENERATOR)[0] == cli.SOME_FAILED
    assert objects(path) == objects(tmp_path / "one") and len(objects(path)) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "name it, too"),
        (("--out", "x", "--budget-ms", "5"), "with --budget-ms answers depend"),
        (("--out", "x", "--budget-depth", "0.5"), "with --budget-depth answers depend"),
        (("--out", "x", "--audit", "0.1", "--on-drift", "full-depth"), "with --on-drift full-depth answers"),
    ],
)
def test_resume_that_would_not_give_the_same_answers_is_refused(
    options: tuple[str, ...], message: str
) -> None:
    code, errors = run("--resume", *options, data=b"good\n")
    assert code == cli.NOT_STARTED and message in errors


@pytest.mark.slow
@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")
@pytest.mark.parametrize("bundle", [CLASSIFIER, GENERATOR], ids=lambda path: path.name)
def test_full_disk_blames_the_output(bundle: Path) -> None:
    command = [*COMMAND, "--bundle", str(bundle), "--max-new-tokens", "2"]
    with FULL.open("wb") as full:
        done = subprocess.run(command, input=b"good\n", stdout=full, stderr=subprocess.PIPE)
    message = done.stderr.decode()
    assert done.returncode == cli.SOME_FAILED and message.count("\n") == 1, message
    assert "standard output: the answers cannot be written: No space left on device" in message


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="shells of POSIX")
@pytest.mark.parametrize(
    ("closed", "message"),
    [("<&-", "standard input is closed: name a file"), (">&-", "standard output is closed")],
)
def test_closed_stream_is_one_line(closed: str, message: str) -> None:
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", *COMMAND], input=b"good\n", capture_output=True
    )
    assert done.returncode == cli.NOT_STARTED and done.stdout == b""
    assert message in done.stderr.decode() and done.stderr.count(b"\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="kill -9")
@pytest.mark.parametrize("size", ["1", "4"])
def test_killed_runs_lose_and_double_no_row(tmp_path: Path, size: str) -> None:
    """Kill -9 at random moments; more of them: OFFRAMP_KILLS=200 pytest -m slow -k killed."""
    kills, chance = int(os.environ.get("OFFRAMP_KILLS", "8")), random.Random(int(size))
    source, path, plain = (tmp_path / name for name in ("texts.txt", "answers.jsonl", "plain.jsonl"))
    source.write_text("".join(f"{text}\n" for text in texts(300 * kills)))
    command = [*COMMAND, "--batch-size", size, str(source)]
    subprocess.run([*command, "--out", str(plain)], check=True)
    sizes = [0]  # of the partial file after each kill
    while not path.exists():
        process = subprocess.Popen([*command, "--out", str(path), "--resume"])
        if len(sizes) <= kills:
            while process.poll() is None and size_of(path) <= sizes[-1]:
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.05))
            process.send_signal(signal.SIGKILL)
            sizes.append(size_of(path))
        process.wait()
    assert len(set(sizes)) > 3, "kills should hit a run that writes"
    assert objects(path) == objects(plain) and not partials(path)


def size_of(path: Path) -> int:
    """Bytes of the partial file of a run."""
    return sum(partial.stat().st_size for partial in partials(path))
