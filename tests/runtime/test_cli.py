"""ee-run: lines in, lines out, exit codes; as a process only where pipes and signals matter."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from tiny_bundles import CLASSIFIER, EMBEDDING, GENERATOR, MULTI_LABEL, REGRESSION, TOKENS

from offramp.runtime import (
    audit,
    budget,
    bulk_cli,
    cli,
    generation_options,
    load_classifier,
    load_row_session,
    row_session,
    shared_options,
)
from offramp.runtime.engines import base
from offramp.runtime.errors import ItemError
from offramp.runtime.inputs import lines
from offramp.runtime.inputs.text import LONG_TEXTS, TextReader
from offramp.runtime.rules import resolve
from offramp.runtime.serving import cli as serving_cli
from offramp.runtime.tuning import calibrate

COMMAND = [sys.executable, "-m", "offramp.runtime.cli", "--bundle", str(CLASSIFIER)]
PIPES: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)


def run(*options: str, data: bytes = b"", bundle: Path = CLASSIFIER) -> tuple[int, list[dict[str, Any]], str]:
    """Exit code, objects on standard output, and standard error."""
    result = CliRunner().invoke(cli.main, ["--bundle", str(bundle), *options], input=data)
    assert isinstance(result.exception, (SystemExit, type(None))), result.exception
    return result.exit_code, [json.loads(line) for line in result.stdout.splitlines()], result.stderr


def test_file_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "input.txt"
    path.write_bytes("good film\nnaïve plot\n".encode())
    code, objects, errors = run(str(path))
    assert (code, len(objects), errors) == (cli.ALL_ANSWERED, 2, "")
    assert list(objects[0]) == ["label", "score", "exit", "depth", "ms"]


def test_standard_input_is_the_default() -> None:
    assert run(data=b"good film\n")[1][0]["label"] == run("-", data=b"good film\n")[1][0]["label"]


def test_answers_are_those_of_a_session() -> None:
    with load_classifier(CLASSIFIER) as session:
        answers = [session("good film"), session("bad", "the plot")]
    data = b'{"text": "good film"}\n{"text": "bad", "text_b": "the plot"}\n'
    _, objects, _ = run(data=data)
    assert [(o["label"], o["score"], o["exit"], o["depth"]) for o in objects] == [
        (a.label, round(a.score, 6), a.exit, a.depth) for a in answers
    ]


BAD_LINES = b"good film\n\nba\xff\n" + b"very " * 200 + b"\nlast\n"


@pytest.mark.parametrize("size", ["1", "2", "8"])
def test_bad_lines_keep_their_places(size: str) -> None:
    code, objects, _ = run("--batch-size", size, data=BAD_LINES)
    assert code == cli.SOME_FAILED
    assert objects[1] == {"error": "empty line", "line": 2}
    assert objects[2]["line"] == 3 and "not UTF-8" in objects[2]["error"]
    assert objects[3]["truncated"] is True and "truncated" not in objects[0]
    assert len(objects) == 5 and "label" in objects[4]


@pytest.mark.parametrize("size", ["1", "4"])
def test_many_bad_lines_keep_their_places(size: str) -> None:
    texts = ["" if number % 7 in (0, 3, 4) else "good film" for number in range(150)]
    code, objects, _ = run("--batch-size", size, data="\n".join(texts).encode() + b"\n")
    assert code == cli.SOME_FAILED and len(objects) == 150
    for number, (text, value) in enumerate(zip(texts, objects, strict=True), 1):
        assert "label" in value if text else value == {"error": "empty line", "line": number}


def test_item_that_the_session_cannot_read_keeps_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as an image that is no image: the line is good, and the reader finds the problem."""
    read = TextReader.read

    def read_some(self: TextReader, items: Any) -> Any:
        rows = read(self, items)
        bad = [number for number, item in enumerate(items) if item and "bad" in item]
        return [
            ItemError(number, "cannot be read") if number in bad else row for number, row in enumerate(rows)
        ]

    monkeypatch.setattr(TextReader, "read", read_some)
    for size in ("1", "4"):
        code, objects, _ = run("--batch-size", size, data=b"good\nbad\n\ngood\nbad\n")
        assert code == cli.SOME_FAILED
        assert ["label" in value for value in objects] == [True, False, False, True, False]
        assert objects[1] == {"error": "cannot be read", "line": 2}
        assert objects[4] == {"error": "cannot be read", "line": 5}


def test_bad_json_line() -> None:
    code, objects, _ = run(data=b'{"text": "good"}\n{bad\n{"text": "bad"}\n')
    assert code == cli.SOME_FAILED
    assert objects[1]["line"] == 2 and "not JSON" in objects[1]["error"] and "label" in objects[2]


def test_format_text_reads_lines_that_begin_like_json() -> None:
    assert run("--format", "text", data=b"{good\n")[0] == cli.ALL_ANSWERED
    assert run(data=b"{good\n")[0] == cli.SOME_FAILED


def test_empty_input_gives_no_output() -> None:
    assert run() == (cli.ALL_ANSWERED, [], "")


def test_what_prevents_the_start_is_one_line(tmp_path: Path) -> None:
    for code, objects, errors in (
        run(bundle=tmp_path / "none"),
        run(str(tmp_path / "none.txt")),
        run(str(tmp_path)),
        run("--rule", "luck"),
        run("--rule", "speculative"),
        run("--point", "default", "--rule", "never"),
        run("--variant", "int4"),
        run("--exit-kv", "propagate"),
        run("--provider", "cuda", "--device", "cpu"),
        run("one.txt", "two.txt"),
    ):
        assert (code, objects) == (cli.NOT_STARTED, [])
        assert errors.startswith("ee-run: ") and errors.count("\n") == 1
    for options in ("--engine tpu", "--batch-size 0", "--exit-kv deep", "--max-new-tokens 0"):
        assert run(*options.split())[0] == cli.NOT_STARTED


@pytest.mark.parametrize("option", ["--batch-size", "--threads", "--max-new-tokens", "--budget-window"])
@pytest.mark.parametrize("number", ["1" + "0" * 19, "1" + "0" * 400, str((1 << 20) + 1)])
def test_huge_numbers_are_refused_in_one_line(option: str, number: str) -> None:
    code, objects, errors = run(option, number, data=b"good\n")
    assert code == cli.NOT_STARTED and not objects and "is not in the range 1<=x<=" in errors
    assert sum("Error" in line for line in errors.splitlines()) == 1


def test_changed_bundle_prevents_the_start(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(CLASSIFIER, tmp_path / "bundle"))
    (folder / "stem.onnx").write_bytes(b"x")
    code, _, errors = run(bundle=folder, data=b"good\n")
    assert code == cli.NOT_STARTED and "stem.onnx" in errors


def test_segment_that_no_row_reaches_is_opened_by_warm_up_alone(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(CLASSIFIER, tmp_path / "bundle"))
    (folder / "segment_02.onnx").write_bytes(b"x")
    first_exit = ("--rule", "fixed", "--threshold", "1")
    assert run(*first_exit, bundle=folder, data=b"good\n")[0] == cli.ALL_ANSWERED
    code, objects, errors = run(*first_exit, "--warm-up", bundle=folder, data=b"good\n")
    assert code == cli.NOT_STARTED and not objects and "segment_02.onnx" in errors
    code, objects, errors = run("--rule", "never", bundle=folder, data=b"good\n")
    assert code == cli.NOT_STARTED and not objects and "segment_02.onnx" in errors


def test_rule_threshold_variant_and_point() -> None:
    assert run("--rule", "fixed", "--threshold", "2", data=b"good\n")[1][0]["exit"] == 2
    assert run("--rule", "never", "--variant", "int8", data=b"good\n")[1][0]["exit"] == 3
    assert run("--point", "fast", data=b"good\n")[0] == cli.ALL_ANSWERED


@pytest.mark.slow
def test_sets_of_a_calibrated_point_are_written(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(CLASSIFIER, bundle)
    with load_classifier(CLASSIFIER) as session:
        names = session.labels
    rows = [{"text": "good film" if n % 2 else "bad plot", "label": names[n % len(names)]} for n in range(12)]
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [str(tmp_path / "dev.jsonl"), "--bundle", str(bundle), "--coverage", "0.9"]
    assert CliRunner().invoke(calibrate.main, words).exit_code == 0
    code, (answer,), _ = run("--sets", data=b"good film\n", bundle=bundle)
    assert code == cli.ALL_ANSWERED and 0 < answer["calibrated"] <= 1 and {*answer["set"]} <= {*names}
    assert "set" not in run(data=b"good film\n", bundle=bundle)[1][0]
    code, objects, errors = run("--sets", data=b"good film\n")
    assert (code, objects) == (cli.NOT_STARTED, []) and "ee-calibrate --coverage" in errors


TASKS: dict[Path, list[str]] = {
    MULTI_LABEL: ["labels", "scores"],
    TOKENS: ["entities"],
    REGRESSION: ["value"],
    EMBEDDING: ["embedding"],
}


@pytest.mark.parametrize("bundle", TASKS, ids=lambda path: path.name)
@pytest.mark.parametrize("size", ["1", "4"])
def test_answers_of_other_tasks_are_those_of_a_session(bundle: Path, size: str) -> None:
    data = b"good film\n\n" + b"very " * 200 + b"\nann, paris\n"
    code, objects, errors = run("--stats", "--batch-size", size, bundle=bundle, data=data)
    assert code == cli.SOME_FAILED and len(objects) == 4 and "3 (" in errors
    assert list(objects[0]) == [*TASKS[bundle], "exit", "depth", "ms"]
    assert objects[1] == {"error": "empty line", "line": 2} and objects[2]["truncated"] is True
    with load_row_session(bundle) as session:
        answer = session("ann, paris")
        assert objects[3]["exit"] == answer.exit
        if size == "1":
            assert {name: objects[3][name] for name in TASKS[bundle]} == answer.as_json()


def test_json_of_other_tasks_has_the_types_of_its_fields() -> None:
    (labels,), (tokens,), (number,), (vector,) = (run(bundle=path, data=b"ann\n")[1] for path in TASKS)
    assert all(set(label) == {"label", "score"} for label in labels["labels"])
    assert all(isinstance(score, float) for score in labels["scores"].values())
    names = ["entity_group", "score", "word", "start", "end"]
    assert [list(entity) for entity in tokens["entities"]] == [names] * len(tokens["entities"])
    assert isinstance(number["value"], float)
    assert vector["embedding"] == [round(value, 6) for value in vector["embedding"]]


@pytest.mark.parametrize("bundle", [*TASKS, GENERATOR], ids=lambda path: path.name)
def test_sets_are_refused_for_other_tasks(bundle: Path) -> None:
    code, objects, errors = run("--sets", bundle=bundle, data=b"good\n")
    assert (code, objects) == (cli.NOT_STARTED, [])
    assert re.search(r"--sets: they are for bundles that classify, not for [\w-]+; leave it out", errors)


@pytest.mark.parametrize("bundle", TASKS, ids=lambda path: path.name)
def test_long_texts_of_other_tasks_are_walked_in_windows(bundle: Path) -> None:
    code, (answer,), _ = run("--long", "windows", bundle=bundle, data=b"good " * 200 + b"\n")
    assert code == cli.ALL_ANSWERED and answer["windows"] > 2 and "truncated" not in answer


def test_a_pair_keeps_its_place_where_words_are_labelled() -> None:
    data = b'{"text": "ann"}\n{"text": "ann", "text_b": "paris"}\n{"text": "paris"}\n'
    code, objects, _ = run(bundle=TOKENS, data=data)
    assert code == cli.SOME_FAILED and "entities" in objects[0] and "entities" in objects[2]
    assert objects[1]["line"] == 2 and "not a pair" in objects[1]["error"]


def test_stats_name_what_ran() -> None:
    options = "--stats --rule fixed --threshold 3 --batch-size 4"
    _, _, errors = run(*options.split(), data=b"good\n\nbad\n")
    for line in (
        "exit   3         2  100.0%",
        "mean depth 4.00 of 4",
        "rule       fixed exit=3",
        "variant    fp32",
        "engine     ort",
        "device     cpu",
    ):
        assert line in errors
    for word in ("2 (", "1 with errors", "p95", "threads", "pool"):
        assert word in errors


@pytest.mark.slow
def test_answer_is_written_before_the_next_line_is_read() -> None:
    process = subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    for line, key in ((b"good film\n", b"label"), (b"\n", b"error"), (b"bad\n", b"label")):
        process.stdin.write(line)
        process.stdin.flush()
        assert key in process.stdout.readline()  # would wait for ever if the answer were kept back
    process.stdin.close()
    assert process.wait(10) == cli.SOME_FAILED
    process.stdout.close()


@pytest.mark.slow
def test_closed_output_ends_the_run_in_silence() -> None:
    process = subprocess.Popen(COMMAND, **PIPES)
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


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_interrupt_ends_the_run_without_a_traceback() -> None:
    # A shell starts its background jobs with SIGINT ignored, and children inherit that.
    process = subprocess.Popen(
        COMMAND, **PIPES, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
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


@pytest.mark.slow
def test_output_is_utf8_whatever_the_encoding_of_the_terminal() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = subprocess.run(COMMAND, input="naïve\n".encode(), capture_output=True, env=environment)
    assert result.returncode == cli.ALL_ANSWERED and result.stderr == b""


def test_long_texts_say_how_many_windows_were_walked() -> None:
    code, objects, _ = run("--long", "windows", data=b"good film\n" + b"good " * 200 + b"\n")
    assert code == cli.ALL_ANSWERED
    assert "windows" not in objects[0] and objects[1]["windows"] > 2 and "truncated" not in objects[1]


def test_help_names_every_exit_code_and_rule() -> None:
    help_text = CliRunner().invoke(cli.main, ["--help"]).stdout
    for code in (0, 1, 2, 130, 141):
        assert f"\n  {code} " in help_text.replace("    ", "  ")
    for name in resolve.RULES:
        assert name in help_text


def test_choices_equal_their_sources() -> None:
    assert tuple(base.ENGINES) == shared_options.ENGINES
    assert base.DEVICES == shared_options.DEVICES and base.PROVIDERS == cli.PROVIDERS
    assert resolve.EXIT_KV == generation_options.EXIT_KV
    assert LONG_TEXTS == shared_options.LONG_TEXTS
    assert lines.FORMATS == cli.FORMATS
    assert (budget.STATISTICS, audit.ON_DRIFT) == (shared_options.STATISTICS, shared_options.ON_DRIFT)
    assert shared_options.AT_LEAST_1.max == row_session.MAX_BATCH


@pytest.mark.parametrize("other", [bulk_cli.command, serving_cli.main], ids=["ee-run --ray", "ee-serve"])
def test_options_of_several_commands_take_the_same_values(other: click.Command) -> None:
    def taken(command: click.Command) -> dict[str, tuple[dict[str, object], object]]:
        options = (parameter for parameter in command.params if isinstance(parameter, click.Option))
        return {option.opts[0]: (option.type.to_info_dict(), option.metavar) for option in options}

    run, served = taken(cli.main), taken(other)
    shared = (run.keys() & served.keys()) - {"--format", "--out"}  # those of --ray are of files
    assert len(shared) > 5 and {name: run[name] for name in shared} == {name: served[name] for name in shared}
