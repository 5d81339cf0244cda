"""Files of bulk jobs: which are input, what is kept of them, and folders that several runs write."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pyarrow", reason="the extra ray")

import pyarrow as pa
import pyarrow.parquet as pq

from offramp.runtime import bulk_files
from offramp.runtime.bulk_files import COMPLETE, JOB, Job, check_inputs, chunk_lines, chunks_of, input_files
from offramp.runtime.errors import BadSetting, OutputFailed

ANSWER = pa.schema([("label", pa.string()), ("error", pa.string())])


@dataclass(frozen=True)
class Options:
    """How files are cut into chunks, and what is written."""

    rows_per_file: int = 4096
    format: str = "json"


def names_of(folder: Path, out: Path | None = None) -> list[str]:
    """The input files of a folder, by their paths in it."""
    files = input_files([str(folder)]) if out is None else input_files([str(folder)], str(out))
    return [os.path.relpath(file, folder) for file in files]


def written(rows: list[dict[str, Any]], path: Path, kept: pa.Schema | None = None) -> str:
    bulk_files.write_rows(str(path), rows, ANSWER, kept)
    return path.read_text(encoding="utf-8")


def strict(text: str) -> Any:
    """A value of JSON as the standard has it, without NaN and Infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A folder with a file, and one in a folder in it."""
    (tmp_path / "rows" / "2024").mkdir(parents=True)
    for name in ("a.jsonl", "2024/b.jsonl"):
        (tmp_path / "rows" / name).write_text('{"text": "good"}\n', encoding="utf-8")
    return tmp_path / "rows"


def test_answers_in_a_folder_of_input_are_no_input(rows: Path) -> None:
    out = rows / "answers"
    before = names_of(rows, out)
    out.mkdir()
    (out / "00000-000000000001.jsonl").write_text('{"label": "positive"}\n', encoding="utf-8")
    assert names_of(rows, out) == before == ["2024/b.jsonl", "a.jsonl"]


def test_a_link_to_a_folder_is_read(rows: Path, tmp_path: Path) -> None:
    (rows / "2024").rename(tmp_path / "elsewhere")
    (rows / "2024").symlink_to(tmp_path / "elsewhere")
    assert names_of(rows) == ["2024/b.jsonl", "a.jsonl"]


def test_a_folder_is_read_once_under_its_own_name(rows: Path) -> None:
    (rows / "2023").symlink_to(rows / "2024")
    (rows / "2024" / "all").symlink_to(rows)
    assert names_of(rows) == ["2024/b.jsonl", "a.jsonl"]


def test_a_folder_that_cannot_be_read_is_an_error(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def closed(folder: str) -> Any:
        if os.path.basename(folder) == "2024":
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(PermissionError, match="2024"):
        names_of(rows)


@pytest.mark.parametrize("name", ["text", "text_b", "id"])
def test_a_column_that_is_there_twice_is_refused(name: str, tmp_path: Path) -> None:
    columns = ["text", "text_b", "id", name]
    file = str(tmp_path / "rows.parquet")
    pq.write_table(pa.table([pa.array(["good"])] * len(columns), names=columns), file)
    with pytest.raises(BadSetting, match=f"rows.parquet: it has several columns '{name}'"):
        check_inputs([file], "text", ["id"], ANSWER.names, one_type=False)


def test_half_of_a_surrogate_pair_is_kept_as_it_was(tmp_path: Path) -> None:
    line = r'{"text": "good", "id": "\ud800", "other": "\u00e9"}'
    file = tmp_path / "rows.jsonl"
    file.write_text(line + "\n", encoding="utf-8")
    (chunk,) = chunks_of(0, str(file), Options())
    _, kept = chunk_lines(chunk, "", "text", ["id", "other"])
    text = written([{"file": "rows.jsonl", "row": 1, **kept.row(0)}], tmp_path / "answers.jsonl")
    assert strict(text)["id"] == "\ud800" and strict(text)["other"] == "\u00e9"
    bulk_files.write_rows(str(tmp_path / "answers.parquet"), [dict(kept.row(0))], ANSWER, None)
    assert pq.read_table(tmp_path / "answers.parquet").column("id").to_pylist() == [r'"\ud800"']


def test_numbers_that_json_does_not_have_become_null(tmp_path: Path) -> None:
    rows = [{"file": "a", "row": 1, "value": float("nan"), "more": [{"a": float("-inf")}, (1.5, None)]}]
    (line,) = written(rows, tmp_path / "answers.jsonl").splitlines()
    assert strict(line) == {"file": "a", "row": 1, "value": None, "more": [{"a": None}, [1.5, None]]}


def test_bytes_become_text(tmp_path: Path) -> None:
    rows = [{"name": "h\u00e9".encode(), "other": b"\xff."}]
    assert strict(written(rows, tmp_path / "answers.jsonl")) == {"name": "h\u00e9", "other": r"\xff."}


def test_a_run_may_complete_the_job_that_another_run_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, fsync = tmp_path / "00000-000000000001.jsonl", os.fsync

    def other_run(handle: int) -> None:
        """It has written the file, and removes what is left."""
        fsync(handle)
        path.write_text("{}\n", encoding="utf-8")
        for partial in tmp_path.glob(".*.partial"):
            partial.unlink()

    monkeypatch.setattr(os, "fsync", other_run)
    assert written([{"label": "positive"}], path) == "{}\n"
    monkeypatch.setattr(os, "fsync", lambda handle: [entry.unlink() for entry in tmp_path.iterdir()])
    with pytest.raises(OutputFailed, match="cannot be written"):
        written([{"label": "positive"}], path)


def test_a_run_may_begin_the_job_that_another_run_begins(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, listdir = tmp_path / "answers", os.listdir

    def other_run(folder: str) -> list[str]:
        monkeypatch.undo()
        Job(str(out), [str(rows / "a.jsonl")], {"format": "json"})
        return listdir(folder)

    monkeypatch.setattr(os, "listdir", other_run)
    Job(str(out), [str(rows / "a.jsonl")], {"format": "json"})
    assert [path.name for path in out.iterdir()] == [JOB]


def test_a_job_that_was_killed_while_it_began_goes_on(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException):
        """Nothing of the process runs afterwards."""

    def killed(*paths: str) -> None:
        raise KilledError

    out, files = str(tmp_path / "answers"), [str(rows / "a.jsonl")]
    with monkeypatch.context() as patch:
        for name in ("replace", "remove"):
            patch.setattr(os, name, killed)
        with pytest.raises(KilledError):
            Job(out, files, {"format": "json"})
    Job(out, files, {"format": "json"}).complete([], 0, 0)
    assert sorted(os.listdir(out)) == sorted([JOB, COMPLETE])


def test_a_mark_that_cannot_be_written_is_an_error_of_the_output(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    job = Job(str(tmp_path / "answers"), [str(rows / "a.jsonl")], {})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputFailed, match=r"_complete\.json: it cannot be written: No space left"):
        job.complete([], 0, 0)
