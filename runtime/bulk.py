"""Answer the rows of large files with Ray Data, and AnswerBatches for pipelines of other programs."""

from __future__ import annotations

import io
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from offramp.runtime.answers_cli import write_answers
from offramp.runtime.bulk_files import (
    Chunk,
    Job,
    check_inputs,
    chunk_lines,
    chunks_of,
    failed_rows,
    input_files,
    table_lines,
    write_rows,
)
from offramp.runtime.bundle.manifest import (
    CLASSIFICATION,
    EMBEDDING,
    MULTI_LABEL,
    REGRESSION,
    TOKENS,
    ImageInput,
    Manifest,
)
from offramp.runtime.engines.threads import usable_cores
from offramp.runtime.errors import BadSetting
from offramp.runtime.inputs.lines import Line
from offramp.runtime.loading import load_row_session
from offramp.runtime.output import Output, job_name
from offramp.runtime.row_session import WINDOW
from offramp.runtime.run_stats import RunStats
from offramp.runtime.termination import Terminated, Termination

if TYPE_CHECKING:  # of the extra ray: imported where they are used
    import pyarrow as pa
    from numpy.typing import NDArray
    from ray.data import Dataset

BATCH_SIZE = 32
ROWS_PER_FILE = (
    4096  # whole windows of the default batch size, so that answers are those of ee-run on the file
)
LEAST_BLOCKS = 1000  # tasks into which Ray cuts a large job; a task is repeated if its worker dies
OBJECT_STORE = 200_000_000  # bytes of a local Ray; texts and answers do not go through it
SECONDS_OF_PROGRESS = 5.0


class _Collected(Output):
    """Keeps the objects that it is to write."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO())
        self.values: list[dict[str, object]] = []

    def write(self, value: Mapping[str, Any], *, flush: bool = False) -> None:
        """Keep an object, without the number of its line."""
        self.values.append({name: entry for name, entry in value.items() if name != "line"})


class AnswerBatches:
    """Answers batches of rows in an actor of Ray Data; made for Dataset.map_batches, see answer_dataset.

    Opens the bundle once. bundle: a folder, or a bundle on a hub, as each node sees it. column: the texts; a
    column "text_b", if there is one, has the second texts of pairs. threads: of the session; the actor has
    one CPU. options: of load(). Raises the errors of load(), and BadSetting for a bundle that generates text
    or reads images.
    """

    def __init__(
        self,
        bundle: str | PathLike[str],
        *,
        column: str = "text",
        threads: int | None = 1,
        batch_size: int = BATCH_SIZE,
        **options: Any,
    ) -> None:
        self.column = column
        self._session = load_row_session(bundle, threads=threads, batch_size=batch_size, **options)
        if isinstance(self.manifest.input, ImageInput):
            self._session.close()
            raise BadSetting(f"{bundle} reads images: bulk jobs are for bundles that read text")

    @property
    def manifest(self) -> Manifest:
        """The manifest of the bundle."""
        return self._session.manifest

    def __call__(self, batch: pa.Table) -> pa.Table:
        """The batch with the fields of the answers as further columns; see answer_schema.

        Raises BadSetting if the batch is no Arrow table, has no column of texts, or has a column with the
        name of a field.
        """
        import pyarrow as pa

        if not isinstance(batch, pa.Table):
            raise BadSetting(
                f'map_batches: AnswerBatches reads Arrow tables; add batch_format="pyarrow", '
                f"this batch is of type {type(batch).__name__}"
            )
        schema = answer_schema(self.manifest)
        if taken := sorted({*schema.names} & {*batch.column_names}):
            raise BadSetting(f"column {taken[0]!r}: an answer has a field of this name; rename the column")
        answers = self.answers(table_lines(batch, self.column))
        columns = pa.Table.from_pylist(answers, schema=schema)
        for name in schema.names:
            batch = batch.append_column(schema.field(name), columns.column(name))
        return batch

    def answers(self, lines: Iterable[Line]) -> list[dict[str, object]]:
        """The fields of the answer or error of each line, as ee-run writes them, without its number."""
        output = _Collected()
        # Rows for which the network computes infinity are errors, which numpy need not report, too.
        with np.errstate(invalid="ignore"):
            write_answers(self._session, iter(lines), output, RunStats(), Termination(), sets=False)
        return output.values


def answer_schema(manifest: Manifest) -> pa.Schema:
    """The fields of a bundle's answers as columns; "error" is null for a row with an answer."""
    import pyarrow as pa

    text, number, integer = pa.string(), pa.float64(), pa.int32()
    label = [("label", text), ("score", number)]
    entity = [("entity_group", text), ("score", number), ("word", text), ("start", integer), ("end", integer)]
    of_task = {
        CLASSIFICATION: label,
        MULTI_LABEL: [
            ("labels", pa.list_(pa.struct(label))),
            ("scores", pa.struct([(name, number) for name in manifest.labels])),
        ],
        TOKENS: [("entities", pa.list_(pa.struct(entity)))],
        REGRESSION: [("value", number)],
        EMBEDDING: [("embedding", pa.list_(pa.float32()))],
    }[manifest.kind]
    of_walk = [("exit", integer), ("depth", integer), ("ms", number), ("windows", integer)]
    return pa.schema([*of_task, *of_walk, ("truncated", pa.bool_()), ("error", text)])


def answer_dataset(
    dataset: Dataset,
    bundle: str | PathLike[str],
    *,
    column: str = "text",
    actors: int | None = None,
    batch_size: int = BATCH_SIZE,
    **options: Any,
) -> Dataset:
    """A Ray dataset with the fields of the answers as further columns; see AnswerBatches for the arguments.

    actors: each takes one CPU of the cluster; None is all CPUs but one. One CPU stays free for the task that
    reads the dataset: without it actors would wait for rows, and the task for a CPU, for ever. Raises
    BadSetting for more actors than that.
    """
    from ray.data import ActorPoolStrategy

    return dataset.map_batches(
        AnswerBatches,
        fn_constructor_args=[_for_workers(bundle)],
        fn_constructor_kwargs={"column": column, "batch_size": batch_size, **options},
        batch_size=batch_size * WINDOW,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=number_of_actors(actors, cluster_cpus(), "a task that reads rows")),
        num_cpus=1,
    )


def cluster_cpus() -> int:
    """The number of CPUs that the Ray cluster of this process has now; starts Ray if it does not run."""
    import ray

    if not ray.is_initialized():
        ray.init()
    return int(ray.cluster_resources().get("CPU", 0))


def number_of_actors(actors: int | None, cpus: int, reader: str | None = None) -> int:
    """The number of actors, each with one CPU; None is all CPUs but one, and at least one.

    reader: what else needs a CPU, if anything. Raises BadSetting if there are not as many CPUs.
    """
    free = cpus - (reader is not None)
    number = max(1, cpus - 1) if actors is None else actors
    if number > free:
        needs = "each takes one" if reader is None else f"each takes one, and {reader} takes another"
        cure = f"ask for {free} or fewer" if free >= 1 else "start Ray with more CPUs"
        raise BadSetting(f"{number} actors: the cluster has {cpus} CPUs, of which {needs}; {cure}")
    return number


class AnswerChunks:
    """Answers chunks of input files in an actor of Ray Data, and writes a file for each.

    A chunk that is answered twice, because a worker died, is written twice under one name. base: the folder
    at which relative paths of chunks start.
    """

    def __init__(self, base: str, out: str, options: BulkOptions) -> None:
        self._base, self._out, self._options = base, out, options
        self._answer = AnswerBatches(
            options.bundle, column=options.column, batch_size=options.batch_size, **options.load
        )

    def __call__(self, batch: dict[str, NDArray[np.generic]]) -> dict[str, list[int]]:
        """Answer the chunks of a batch; gives the rows and errors of each."""
        names = list(batch)
        counts: dict[str, list[int]] = {"rows": [], "failed": []}
        for values in zip(*(batch[name].tolist() for name in names), strict=True):
            chunk = Chunk(**dict(zip(names, values, strict=True)))
            path = os.path.join(self._out, chunk.name)
            if not os.path.exists(path):  # else it was written before the worker died that had this batch
                lines, kept = chunk_lines(chunk, self._base, self._options.column, self._options.keep)
                rows: list[dict[str, object]] = []
                for number, answer in enumerate(self._answer.answers(lines)):
                    key = {"file": chunk.source, "row": chunk.first + number}
                    error = {"error": answer.pop("error")} if "error" in answer else {}
                    rows.append({**error, **key, **kept.row(number), **answer})
                write_rows(path, rows, answer_schema(self._answer.manifest), kept.schema)
            counts["rows"].append(chunk.rows)
            counts["failed"].append(failed_rows(path))
        return counts


@dataclass(frozen=True)
class BulkOptions:
    """What decides the answers of a job, and how they are written.

    bundle: as the workers open it. keep: columns of the input that each row of the output has, too. load:
    options of load().
    """

    bundle: str
    column: str = "text"
    keep: tuple[str, ...] = ()
    format: str = "json"
    rows_per_file: int = ROWS_PER_FILE
    batch_size: int = BATCH_SIZE
    load: Mapping[str, Any] = field(default_factory=dict)


def answer_files(
    sources: Sequence[str],
    out: str,
    options: BulkOptions,
    *,
    address: str | None = None,
    actors: int | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> tuple[int, int]:
    """Answer every row of files and folders into the folder `out`; gives the numbers of rows and of errors.

    address: of a Ray cluster; None for the one that this process uses already, else for Ray on this machine.
    actors: each takes a CPU; None is all CPUs but one. report: told of the progress in lines. A job that was
    stopped goes on. SIGTERM raises Terminated. Raises BadSetting, the errors of load(), OSError for input
    that cannot be read, and OutputFailed.
    """
    # It runs no segment. Its threads are those of this process, which may have a global pool.
    check = AnswerBatches(options.bundle, threads=None, lazy=True, **options.load)
    files, names = input_files(sources, out), answer_schema(check.manifest).names
    check_inputs(files, options.column, options.keep, names, one_type=options.format == "parquet")
    facts = {name: value for name, value in asdict(options).items() if name not in ("bundle", "load")}
    job = Job(out, files, {"bundle": job_name([repr(check.manifest)]), **facts, **options.load})
    chunks = [chunk for n, file in enumerate(files) for chunk in chunks_of(n, file, options)]
    counts = job.counts()
    if counts is not None:
        report(f"{out}: complete already: {counts[0]} rows, {counts[1]} with errors")
        return counts
    left, rows, failed = job.split(chunks)
    if rows:
        report(f"{out}: {rows} rows are answered already")
    if left:
        with _cluster(address):
            size = min(number_of_actors(actors, cluster_cpus()), len(left))
            with Termination() as termination:  # here, because Ray sets a handler of its own when it starts
                total, started, noted = sum(chunk.rows for chunk in chunks), time.perf_counter(), rows
                next_report = started + SECONDS_OF_PROGRESS
                for count in termination.lines(_answered(left, out, options, size)):
                    rows, failed = rows + count["rows"], failed + count["failed"]
                    now = time.perf_counter()
                    if now >= next_report or rows == total:
                        rate = (rows - noted) / (now - started)
                        report(f"{rows} of {total} rows, {failed} with errors; {rate:.0f} rows/s")
                        next_report = now + SECONDS_OF_PROGRESS
                if termination.requested:
                    raise Terminated
    job.complete(chunks, rows, failed)
    return rows, failed


def _answered(left: Sequence[Chunk], out: str, options: BulkOptions, actors: int) -> Iterator[dict[str, int]]:
    """Let actors answer chunks; gives the counts of each when it is written."""
    import ray.data
    from ray.data import ActorPoolStrategy

    blocks = min(len(left), max(LEAST_BLOCKS, 20 * actors))
    counts = ray.data.from_items([asdict(chunk) for chunk in left], override_num_blocks=blocks).map_batches(
        AnswerChunks,
        fn_constructor_args=[
            os.getcwd(),
            os.path.abspath(out),
            replace(options, bundle=_for_workers(options.bundle)),
        ],
        batch_size=1,
        batch_format="numpy",
        compute=ActorPoolStrategy(size=actors),
        num_cpus=1,
    )
    yield from counts.iter_rows()


def _for_workers(bundle: str | PathLike[str]) -> str:
    """A reference to a bundle that does not depend on the current folder."""
    return os.path.abspath(bundle) if os.path.isdir(bundle) else os.fspath(bundle)


@contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """Connect to a Ray cluster, or start Ray on this machine, without its messages; end that afterwards."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else a local Ray reports its use to its makers
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its files still have what it calls errors
    import ray
    import ray.data

    context, logger = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    before = context.enable_progress_bars, logger.level
    context.enable_progress_bars = False
    logger.setLevel(logging.CRITICAL)  # errors are raised
    started = not ray.is_initialized()
    try:
        if started and address is None:
            ray.init(
                "local",
                num_cpus=usable_cores(),
                object_store_memory=OBJECT_STORE,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        elif started:
            try:
                ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
            except (ConnectionError, ValueError) as problem:
                raise BadSetting(
                    f"--ray-address {address}: no Ray cluster answers there: {problem}"
                ) from problem
        yield
    finally:
        context.enable_progress_bars, level = before
        logger.setLevel(level)
        if started:
            ray.shutdown()
