"""ee-run --ray, AnswerBatches and ee-serve's application on Ray Serve, on one small local cluster."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_bundles
from click.testing import CliRunner, Result
from serving import CLASSIFY
from serving import serving as ee_serve

from offramp.runtime import bulk, bulk_cli, bulk_files, cli, load_classifier
from offramp.runtime.bulk import AnswerBatches, AnswerChunks, BulkOptions, answer_dataset, number_of_actors
from offramp.runtime.errors import BadSetting
from offramp.runtime.serving.limits import ServerLimits
from offramp.runtime.serving.metrics import Metrics
from offramp.runtime.serving.models import Models, names_of
from offramp.runtime.serving.ray import OpenBundles, read_options

pytestmark = [
    # Of ray's own modules: ray.serve when it is imported, ray.data when it makes its default options.
    pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field` is deprecated"),
    pytest.mark.filterwarnings("ignore:`use_push_based_shuffle` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`use_polars` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`use_arrow_tensor_v2` is deprecated:DeprecationWarning"),
]
BUNDLE = str(tiny_bundles.CLASSIFIER)
PORT, TIMEOUT = 18_231, 60.0
CPUS = 2
# A null, an empty line, a blank text, and a list that ends without a line end.
BAD_LINES = '{"text": null, "id": 60}\n\n{"text": " "}\n[1]'


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a Ray cluster of two CPUs on this machine."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    ray = pytest.importorskip("ray")
    ray.init(
        "local",
        num_cpus=CPUS,
        object_store_memory=200_000_000,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


def parquet(path: Path, texts: list[str | None], rows: int = 20) -> Path:
    """A Parquet file of texts, and numbers in column id; rows: of a row group."""
    table = pa.table({"text": pa.array(texts, pa.string()), "id": list(range(len(texts)))})
    pq.write_table(table, path, row_group_size=rows)
    return path


def json_lines(path: Path, texts: list[str], more: str = "") -> Path:
    """A file of JSON lines with texts and numbers, and further lines."""
    lines = [json.dumps({"text": text, "id": number}) + "\n" for number, text in enumerate(texts)]
    path.write_text("".join(lines) + more, encoding="utf-8")
    return path


def ee_run(*words: str | Path, bundle: str = BUNDLE) -> Result:
    """ee-run --ray in this process, on the cluster that it uses already."""
    return CliRunner().invoke(cli.main, ["--ray", "--bundle", bundle, *map(str, words)])


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of a folder of JSON lines, file by file."""
    files = sorted(folder.glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def without_time(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "ms"}


# Files, options and jobs: no cluster


@pytest.mark.parametrize("block", [3, 1 << 20])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("text", ["", "a", "a\n", "a\nbc\n\nd", "a\nbc\n\nd\n", "a\n\n\n\n\n\n", "\n" * 7])
def test_chunks_begin_where_lines_do(
    text: str, size: int, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk_files, "_BLOCK", block)
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    chunks = list(bulk_files.chunks_of(0, str(file), BulkOptions("", rows_per_file=size)))
    lines = text.splitlines(keepends=True)
    assert sum(chunk.rows for chunk in chunks) == len(lines)
    for number, chunk in enumerate(chunks):
        assert (chunk.first, chunk.rows) == (number * size + 1, len(lines[number * size :][:size]))
        assert text[chunk.offset :] == "".join(lines[number * size :])


@pytest.mark.parametrize("group", [1, 4, 10, 100])
@pytest.mark.parametrize("size", [1, 3, 4, 25, 100])
def test_chunks_of_parquet_are_the_rows_of_the_file(group: int, size: int, tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(25)]
    file = parquet(tmp_path / "rows.parquet", list(texts), group)
    read, kept = [], []
    for chunk in bulk_files.chunks_of(0, str(file), BulkOptions("", rows_per_file=size)):
        lines, columns = bulk_files.chunk_lines(chunk, "", "text", ["id"])
        read += [line.text for line in lines]
        kept += [columns.row(number)["id"] for number in range(len(lines))]
    assert (read, kept) == (texts, list(range(25)))


def test_constants_are_those_of_their_sources() -> None:
    names = ("ALL_ANSWERED", "SOME_FAILED", "NOT_STARTED", "INTERRUPTED", "TERMINATED")
    assert [getattr(bulk_cli, name) for name in names] == [getattr(cli, name) for name in names]
    assert (bulk_cli.BATCH_SIZE, bulk_cli.ROWS_PER_FILE) == (bulk.BATCH_SIZE, bulk.ROWS_PER_FILE)
    assert bulk.ROWS_PER_FILE % (bulk.BATCH_SIZE * bulk.WINDOW) == 0


def test_help_of_both_commands() -> None:
    assert "--ray " in CliRunner().invoke(cli.main, ["--help"]).output
    assert "--rows-per-file" in CliRunner().invoke(cli.main, ["--ray", "--help"]).output


@pytest.mark.slow
def test_without_ray_the_extra_is_named() -> None:
    code = "import sys; sys.modules['ray'] = None; from offramp.runtime.cli import main; main()"
    words = [sys.executable, "-c", code, "--ray", "rows.parquet", "--out", "answers"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tiny_bundles.DATA)
    assert done.returncode == cli.NOT_STARTED
    assert done.stderr.strip().endswith("pip install 'offramp[ray]'")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "words, message",
    [
        (["absent.jsonl"], "absent.jsonl: No such file"),
        (["rows.csv"], "rows.csv: expected a name that ends with .parquet"),
        (["rows.jsonl", "rows.jsonl"], "named twice"),
        (["rows.parquet", "--column", "review"], "no column 'review'; its columns: text, id"),
        (["rows.parquet", "--column", "id"], "column 'id' has values of type int64, not texts"),
        (["rows.parquet", "--keep", "label"], "--keep label: a row of the output has that name already"),
        (["rows.parquet", "rows.jsonl", "--keep", "id", "--format", "parquet"], "have other types than in"),
        (["rows.parquet", "--point", "absent"], "absent"),
        (["rows.parquet", "--bundle", "absent/"], "absent: no such folder"),
        (["empty"], "empty: this folder has no file .parquet"),
        (["broken.parquet"], "broken.parquet: it cannot be read as Parquet"),
    ],
)
def test_what_cannot_start_says_why_in_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    parquet(tmp_path / "rows.parquet", ["good film"])
    json_lines(tmp_path / "rows.jsonl", ["good film"])
    (tmp_path / "rows.csv").write_text("text\ngood film\n")
    (tmp_path / "broken.parquet").write_text("text\ngood film\n")
    (tmp_path / "empty").mkdir()
    done = ee_run("--out", "answers", *words)
    assert done.exit_code == cli.NOT_STARTED
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "answers").exists()


def test_a_folder_with_something_else_is_no_place_for_answers(tmp_path: Path) -> None:
    file = json_lines(tmp_path / "rows.jsonl", ["good film"])
    done = ee_run(file, "--out", tmp_path)
    assert done.exit_code == cli.NOT_STARTED
    assert "it is not empty" in done.stderr


def test_the_number_of_actors_leaves_a_cpu_for_the_task_that_reads() -> None:
    assert [number_of_actors(None, cpus) for cpus in (1, 2, 8)] == [1, 1, 7]
    assert number_of_actors(2, 2) == 2
    assert number_of_actors(None, 8, "a task") == 7
    with pytest.raises(BadSetting, match=r"2 actors: the cluster has 2 CPUs, .* ask for 1 or fewer"):
        number_of_actors(2, 2, "a task")
    with pytest.raises(BadSetting, match="start Ray with more CPUs"):
        number_of_actors(None, 1, "a task")
    with pytest.raises(BadSetting, match="3 actors: the cluster has 2 CPUs"):
        number_of_actors(3, 2)


@pytest.mark.parametrize(
    "bundle",
    [
        tiny_bundles.CLASSIFIER,
        tiny_bundles.MULTI_LABEL,
        tiny_bundles.TOKENS,
        tiny_bundles.REGRESSION,
        tiny_bundles.EMBEDDING,
    ],
)
def test_a_batch_gets_the_fields_of_every_task_as_columns(bundle: Path) -> None:
    answer = AnswerBatches(bundle, threads=None)
    batch = answer(pa.table({"text": ["good film", None, "bad plot"], "id": [1, 2, 3]}))
    rows = batch.to_pylist()
    assert batch.column("id").to_pylist() == [1, 2, 3]
    assert [row["error"] for row in rows] == [None, '"text": expected a string, found NoneType', None]
    for row, text in zip(rows[::2], ["good film", "bad plot"], strict=True):
        expected = without_time(answer.answers(bulk_files.table_lines(pa.table({"text": [text]}), "text"))[0])
        got = {name: row[name] for name in expected}
        if "embedding" in expected:  # float32 in the column
            assert got.pop("embedding") == pytest.approx(expected.pop("embedding"), abs=1e-6)
        assert got == expected


def test_a_batch_of_another_format_is_refused_with_the_cure() -> None:
    answer = AnswerBatches(BUNDLE, threads=None)
    with pytest.raises(BadSetting, match='add batch_format="pyarrow"'):
        answer({"text": ["good film"]})
    with pytest.raises(BadSetting, match="column 'label': an answer has a field of this name"):
        answer(pa.table({"text": ["good film"], "label": ["x"]}))


def test_bundles_that_generate_text_are_refused() -> None:
    with pytest.raises(BadSetting, match="generates text"):
        AnswerBatches(tiny_bundles.GENERATOR)


def in_this_process(file: Path, out: Path, options: BulkOptions) -> None:
    """What the actors of a job do, without Ray."""
    out.mkdir()
    chunks = [vars(chunk) for chunk in bulk_files.chunks_of(0, str(file), options)]
    batch = {name: np.array([chunk[name] for chunk in chunks]) for name in chunks[0]}
    AnswerChunks("", str(out), replace(options, load={"threads": None}))(batch)


def test_answers_as_parquet_have_one_type_in_all_files(tmp_path: Path) -> None:
    texts = [*tiny_bundles.texts(60), None]
    file, out = parquet(tmp_path / "rows.parquet", texts), tmp_path / "answers"
    in_this_process(file, out, BulkOptions(BUNDLE, keep=("id",), format="parquet", rows_per_file=20))
    table = pq.read_table(out)
    assert table.schema.names[:4] == ["file", "row", "id", "label"]
    assert table.column("row").to_pylist() == list(range(1, 62))
    assert table.column("id").to_pylist() == list(range(61))
    assert [error is None for error in table.column("error").to_pylist()] == [True] * 60 + [False]
    assert len({pq.read_schema(path) for path in out.iterdir()}) == 1


def test_what_is_kept_of_json_lines_is_json_text_in_parquet(tmp_path: Path) -> None:
    file, out = json_lines(tmp_path / "rows.jsonl", ["good", "bad"], BAD_LINES), tmp_path / "answers"
    in_this_process(file, out, BulkOptions(BUNDLE, keep=("id",), format="parquet"))
    assert pq.read_table(out).column("id").to_pylist() == ["0", "1", "60", "null", "null", "null"]


# Jobs on the cluster


@pytest.mark.slow
def test_a_job_gives_the_answers_of_ee_run_with_their_keys(cluster: str, tmp_path: Path) -> None:
    texts = tiny_bundles.texts(300)
    first = json_lines(tmp_path / "a.jsonl", texts, BAD_LINES)
    second = parquet(tmp_path / "b.parquet", [*texts[:40], None])
    # Two actors on two CPUs: no task that reads waits for a third.
    words = (first, second, "--out", tmp_path / "answers", "--rows-per-file", "256", "--keep", "id")
    done = ee_run(*words, "--actors", "2")
    assert (done.exit_code, done.stdout) == (cli.SOME_FAILED, "")
    assert "345 of 345 rows, 5 with errors" in done.stderr
    rows = rows_of(tmp_path / "answers")
    keys = [(str(first), n + 1) for n in range(304)] + [(str(second), n + 1) for n in range(41)]
    assert [(row.pop("file"), row.pop("row")) for row in rows] == keys
    assert [row.pop("id") for row in rows] == [*range(300), 60, None, None, None, *range(41)]
    plain = CliRunner().invoke(cli.main, ["--bundle", BUNDLE, "--batch-size", "32", str(first)])
    expected = [without_time(json.loads(line)) for line in plain.stdout.splitlines()]
    for row in expected:
        row.pop("line", None)
        if "error" in row:
            row["error"] = row["error"].removesuffix(f"; {bulk_files.TEXT_HINT}")
    assert [without_time(row) for row in rows[:304]] == expected
    assert rows[-1]["error"] == '"text": expected a string, found NoneType'
    check_that_a_job_is_not_another(words, second)


def check_that_a_job_is_not_another(words: tuple[str | Path, ...], file: Path) -> None:
    """Repeat a job that is complete: as it was, with other options, and with another input."""
    assert ee_run(*words).stderr.strip().endswith("complete already: 345 rows, 5 with errors")
    other = ee_run(*words, "--rule", "never", "--batch-size", "16")
    assert other.exit_code == cli.NOT_STARTED
    assert "it is of a job with other batch_size, rule;" in other.stderr
    parquet(file, ["good film"])
    assert "other inputs;" in ee_run(*words).stderr


def workers_of_this_cluster() -> list[int]:
    """Processes of Ray's actors, children of a child of this process."""
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes()
            above = re.search(r"PPid:\t(\d+)", (folder / "status").read_text())
            assert above is not None
            root = re.search(r"PPid:\t(\d+)", Path("/proc", above[1], "status").read_text())
        except (FileNotFoundError, ProcessLookupError):
            continue
        if words.startswith(b"ray::MapWorker") and root is not None and int(root[1]) == os.getpid():
            pids.append(int(folder.name))
    return pids


@pytest.fixture(scope="module")
def stopped(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """Words of a job of 6000 rows that SIGTERM ended, and its folder."""
    folder = tmp_path_factory.mktemp("job")
    file, out = json_lines(folder / "rows.jsonl", tiny_bundles.texts(6000)), folder / "answers"
    words = ["--bundle", BUNDLE, str(file), "--out", str(out), "--rows-per-file", "30"]
    command = [sys.executable, "-m", "offramp.runtime.cli", "--ray", "--ray-address", cluster, *words]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + TIMEOUT
    while not any(out.glob("*.jsonl")) and job.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    job.terminate()
    stdout, stderr = job.communicate(timeout=TIMEOUT)
    assert (job.returncode, stdout) == (cli.TERMINATED, ""), stderr
    return words, out


@pytest.mark.slow
def test_sigterm_leaves_whole_files_and_no_mark(stopped: tuple[list[str], Path]) -> None:
    _, out = stopped
    rows = rows_of(out)
    assert 0 < len(rows) < 6000
    assert len(rows) == 30 * len(list(out.glob("*.jsonl")))
    assert not (out / bulk_files.COMPLETE).exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_no_row_is_lost_or_doubled_if_a_worker_is_killed(stopped: tuple[list[str], Path]) -> None:
    words, out = stopped
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.jsonl")}
    killed: list[int] = []
    ended = threading.Event()

    def kill() -> None:
        while not killed and not ended.is_set():
            if len(list(out.glob("*.jsonl"))) > len(before):
                for pid in workers_of_this_cluster()[:1]:
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
            time.sleep(0.005)

    killer = threading.Thread(target=kill)
    killer.start()
    done = ee_run(*words, "--actors", "2")
    ended.set()
    killer.join()
    assert killed, "the job ended before a worker was killed"
    assert done.exit_code == cli.ALL_ANSWERED, done.stderr
    assert f"{30 * len(before)} rows are answered already" in done.stderr
    assert before.items() <= {path: path.stat().st_mtime_ns for path in out.glob("*.jsonl")}.items()
    rows = rows_of(out)
    assert [row["row"] for row in rows] == list(range(1, 6001))
    with load_classifier(BUNDLE) as session:
        labels = [answer.label for answer in session.map(tiny_bundles.texts(6000))]
    assert [row["label"] for row in rows] == labels
    assert list(out.glob(".*")) == []


@pytest.mark.slow
def test_an_error_of_a_worker_is_one_line(cluster: str, tmp_path: Path) -> None:
    file, out = json_lines(tmp_path / "rows.jsonl", ["good film"] * 8), tmp_path / "answers"
    bundle = tmp_path / "bundle"
    shutil.copytree(BUNDLE, bundle)
    (bundle / "segment_00.onnx").write_bytes(b"no graph")  # its hash is checked when a worker opens it
    done = ee_run(file, "--out", out, bundle=str(bundle))
    assert done.exit_code == cli.SOME_FAILED
    assert "segment_00.onnx" in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].startswith("ee-run: ")
    assert not (out / bulk_files.COMPLETE).exists()


@pytest.mark.slow
def test_a_pipeline_of_another_program_gets_answers(cluster: str, tmp_path: Path) -> None:
    import ray.data

    texts = tiny_bundles.texts(50)
    dataset = ray.data.read_parquet(str(parquet(tmp_path / "rows.parquet", list(texts))))
    with pytest.raises(BadSetting, match="2 actors: the cluster has 2 CPUs"):
        answer_dataset(dataset, BUNDLE, actors=2)
    rows = sorted(answer_dataset(dataset, BUNDLE, rule="never").take_all(), key=lambda row: row["id"])
    with load_classifier(BUNDLE, rule="never") as session:
        assert [row["label"] for row in rows] == [answer.label for answer in session.map(texts)]
    assert {row["exit"] for row in rows} == {3}


# Ray Serve


@pytest.fixture(scope="module")
def applications(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of Ray Serve with one bundle at /, and with two bundles, one at a time, at /two."""
    from ray import serve

    from offramp.runtime.serving.ray import app

    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text("0123456789abcdef\n")
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(app({"bundles": f"tiny={BUNDLE}", "max_replicas": "1"}), name="one", route_prefix="/")
    two = {"bundles": [f"tiny={BUNDLE}", str(tiny_bundles.MULTI_LABEL)], "bundles_per_replica": 1}
    serve.run(app({**two, "max_replicas": 1, "api_keys": str(keys)}), name="two", route_prefix="/two")
    yield f"http://127.0.0.1:{PORT}"
    serve.shutdown()


def ask(address: str, value: object = None, **headers: str) -> tuple[int, Any]:
    """Status and JSON (or text) of an answer."""
    data = None if value is None else json.dumps(value).encode()
    request = urllib.request.Request(address, data, {"content-type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as reply:
            status, text = reply.status, reply.read().decode()
    except urllib.error.HTTPError as problem:
        with problem:
            status, text = problem.code, problem.read().decode()
    return status, json.loads(text) if text.startswith("{") else text


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_times(entry) for name, entry in value.items() if name not in ("ms", "created")}
    return [without_times(entry) for entry in value] if isinstance(value, list) else value


@pytest.mark.slow
def test_ray_serve_answers_as_ee_serve_does(applications: str) -> None:
    requests: list[object] = [
        {"input": "a good film"},
        {"input": tiny_bundles.texts(20)},
        {"input": [{"text": "good", "text_b": "bad"}, "", "x" * 5000]},
        {"input": "good", "model": "tiny"},
        {"input": "good", "max_depth": 2},
        {"input": "good", "model": "absent"},
        {"input": "good", "point": "absent"},
        {"input": "good", "unknown": 1},
        {"input": ["good"] * 300},
        {"input": []},
    ]
    with ee_serve(f"tiny={BUNDLE}") as server:
        for request in requests:
            status, value, _ = server.ask(CLASSIFY, request)
            got = ask(f"{applications}{CLASSIFY}", request)
            assert (got[0], without_times(got[1])) == (status, without_times(value))
        for path in ("/v1/models", "/healthz", "/readyz", "/openapi.json"):
            status, value, _ = server.ask(path)
            got = ask(f"{applications}{path}")
            assert (got[0], without_times(got[1])) == (status, without_times(value))


@pytest.mark.slow
def test_a_replica_opens_the_bundle_that_a_header_names(applications: str) -> None:
    address, request = f"{applications}/two{CLASSIFY}", {"input": "good film"}
    key = {"authorization": "Bearer 0123456789abcdef"}
    for name in ("tiny", "multi_label", "tiny"):
        status, value = ask(address, request, serve_multiplexed_model_id=name, **key)
        assert (status, value["model"]) == (200, name)
    assert ask(address, request, **key)[1]["model"] == "tiny"
    status, value = ask(address, request, serve_multiplexed_model_id="absent", **key)
    assert (status, value["error"]["type"]) == (404, "unknown_model")
    assert "this server has tiny, multi_label" in value["error"]["message"]
    assert ask(address, request, serve_multiplexed_model_id="tiny")[0] == 401
    assert ask(f"{applications}/two/metrics", **key)[0] == 404


@pytest.mark.slow
def test_bundles_change_places_under_load_without_an_error(applications: str) -> None:
    address, key = f"{applications}/two{CLASSIFY}", {"authorization": "Bearer 0123456789abcdef"}
    results: list[tuple[str, int, Any]] = []

    def caller(name: str) -> None:
        for _ in range(10):
            status, value = ask(address, {"input": "good film"}, serve_multiplexed_model_id=name, **key)
            results.append((name, status, value))

    callers = [threading.Thread(target=caller, args=[name]) for name in ("tiny", "multi_label") * 2]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert len(results) == 40
    assert [(status, value["model"]) for _, status, value in results] == [(200, name) for name, *_ in results]


def open_bundles() -> tuple[OpenBundles, Models]:
    """The application of a replica, in this process."""
    metrics = Metrics()
    models = Models(names_of([BUNDLE]), {}, {}, metrics.answered)
    return OpenBundles(models, ServerLimits(log=False), metrics), models


def test_a_replica_whose_walk_has_ended_is_not_healthy() -> None:
    bundles, models = open_bundles()
    bundles.check()
    models.rows(None).scheduler.close()
    with pytest.raises(RuntimeError, match="model tiny_bundle: a thread has ended"):
        bundles.check()
    bundles.close()
    bundles.close()


def test_arguments_of_the_application() -> None:
    options = read_options({"bundles": f"a={BUNDLE} hub:user/b", "threads": "2", "ongoing_requests": "1.5"})
    assert options.bundles == (f"a={BUNDLE}", "hub:user/b")
    assert (options.threads, options.ongoing_requests) == (2, 1.5)
    with pytest.raises(BadSetting, match="thread: no such argument; there are bundles"):
        read_options({"bundles": BUNDLE, "thread": 2})
    with pytest.raises(BadSetting, match="threads=two: expected a number"):
        read_options({"bundles": BUNDLE, "threads": "two"})


def test_bundles_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFRAMP_BUNDLES", BUNDLE)
    assert read_options({}).bundles == (BUNDLE,)
    monkeypatch.delenv("OFFRAMP_BUNDLES")
    with pytest.raises(BadSetting, match="name bundles"):
        read_options({})


def test_keys_of_a_replica_are_checked(tmp_path: Path) -> None:
    file = tmp_path / "keys.txt"
    file.write_text("short\n")
    with pytest.raises(BadSetting, match="write keys of 16 characters or more"):
        read_options({"bundles": BUNDLE, "api_keys": str(file)}).limits  # noqa: B018
    file.write_text("0123456789abcdef\n\n")
    assert read_options({"bundles": BUNDLE, "api_keys": str(file)}).limits.keys == {"0123456789abcdef"}
