"""Command ee-run --ray: answer the rows of large files with Ray Data."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any, NoReturn

import click

from offramp.runtime import shared_options as shared
from offramp.runtime.termination import Terminated, Termination

# A test compares these with their sources.
ALL_ANSWERED, SOME_FAILED, NOT_STARTED, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143
FORMATS = ("json", "parquet")
BATCH_SIZE, ROWS_PER_FILE = 32, 4096
MAX_ROWS_PER_FILE = 1 << 20
OPTION = "--ray"

HELP = """Answer every row of each INPUT with Ray Data, on all CPUs of this machine or of a cluster.

\b
INPUT is a Parquet file (.parquet), a file of JSON lines (.jsonl, .ndjson or .json), or a folder of
them. On a cluster every node must see INPUT, the folder of --out and the bundle at the same paths.

\b
The folder of --out gets files of up to --rows-per-file rows, in the order of the input files and
their rows. Each row has:
  file, row   the input file, and the number of the row in it, counted from 1
  the columns of --keep, as they were
  the fields of the answer, as ee-run writes them; or "error", where ee-run would write one

\b
A job that was stopped, also by kill -9 or by a machine that was lost, goes on when the same command
is run again: files that are complete are kept, and rows of a file that is not are answered again.
Another number of actors, or another cluster, may continue it; other options are refused. A file
appears under its name when it is complete; _complete.json appears when the job is.

\b
Exit codes are those of ee-run:
  0    every row answered          130  interrupted (Ctrl-C)
  1    some rows had errors, or    143  ended by SIGTERM
       the job broke off
  2    not started: option, input, bundle or cluster cannot be used
"""


class RunCommand(click.Command):
    """Command ee-run; with --ray among its words it is `command` of this module."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """The context of the command that the words ask for."""
        if OPTION not in args:
            return super().make_context(info_name, args, parent, **extra)
        words = [word for word in args if word != OPTION]
        return command.make_context(f"{info_name} {OPTION}", words, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command of a context."""
        return super().invoke(ctx) if ctx.command is self else ctx.command.invoke(ctx)


@click.command(help=HELP)
@click.argument("sources", metavar="INPUT...", nargs=-1, required=True)
@click.option("--out", required=True, metavar="DIR", help="Folder of the answers.")
@click.option("--bundle", default="bundle/", metavar="DIR", show_default=True, help="As in ee-run.")
@click.option("--column", default="text", show_default=True, help="Column or key of the texts.")
@click.option("--keep", multiple=True, metavar="COLUMN", help="Write this column, too; may be repeated.")
@click.option(
    "--format", type=click.Choice(FORMATS), default="json", show_default=True, help="JSON lines or Parquet."
)
@click.option(
    "--rows-per-file",
    type=click.IntRange(1, MAX_ROWS_PER_FILE),
    default=ROWS_PER_FILE,
    show_default=True,
    help="Most rows of a file of --out, and of what is answered again if a worker is lost.",
)
@click.option(
    "--ray-address",
    metavar="ADDRESS",
    help="A Ray cluster: HOST:PORT, or auto.  [default: start Ray on this machine, for this job]",
)
@click.option(
    "--actors", type=click.IntRange(1), help="Sessions, each with one CPU.  [default: CPUs minus one]"
)
@shared.variant()
@shared.rule()
@shared.threshold()
@shared.point()
@shared.batch_size(default=BATCH_SIZE)
@shared.long_texts()
@shared.require_signature()
def command(sources: tuple[str, ...], out: str, **given: Any) -> None:
    """Command ee-run --ray; its help is HELP."""
    try:
        import pyarrow.parquet  # noqa: F401
        import ray.data  # noqa: F401
    except ImportError as problem:
        _refuse(f"{OPTION} needs the extra ray ({problem.name} is missing): pip install 'offramp[ray]'")
    try:
        # Ray prints what happens to workers on standard output.
        with Termination(), redirect_stdout(sys.stderr):
            sys.exit(_run(sources, out, given))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Terminated:
        sys.exit(TERMINATED)


def _run(sources: Sequence[str], out: str, given: Mapping[str, Any]) -> int:
    from ray.exceptions import RayError

    from offramp.runtime.bulk import BulkOptions, answer_files
    from offramp.runtime.errors import BadBundle, BadSetting, BundleNotFound, EngineUnavailable, OfframpError
    from offramp.runtime.hub.reference import PREFIX
    from offramp.runtime.hub.resolve import resolve_bundle

    load_names = ("variant", "rule", "threshold", "point", "long_texts", "require_signature")
    started = False

    def report(line: str) -> None:
        nonlocal started
        started = True
        click.echo(f"ee-run: {line}", err=True)

    try:
        bundle = given["bundle"]
        if os.fspath(resolve_bundle(bundle, command=True)) != bundle:  # of a hub: each node pulls it
            bundle = PREFIX + bundle.removeprefix(PREFIX)
        load = {name: given[name] for name in load_names}
        if load["require_signature"] is not None:
            load["require_signature"] = os.path.abspath(load["require_signature"])
        options = BulkOptions(
            bundle,
            given["column"],
            given["keep"],
            given["format"],
            given["rows_per_file"],
            given["batch_size"],
            load,
        )
        _, failed = answer_files(
            sources,
            out,
            options,
            address=given["ray_address"],
            actors=given["actors"],
            report=report,
        )
        return SOME_FAILED if failed else ALL_ANSWERED
    except (BadBundle, BundleNotFound, EngineUnavailable, BadSetting) as problem:
        click.echo(f"ee-run: {problem}", err=True)
        return NOT_STARTED
    except RayError as problem:
        click.echo(f"ee-run: {_reason(problem)}", err=True)
        return SOME_FAILED
    except OfframpError as problem:
        click.echo(f"ee-run: {problem}", err=True)
        return SOME_FAILED if started else NOT_STARTED
    except OSError as problem:
        click.echo(
            f"ee-run: {problem.filename or ' '.join(sources)}: {problem.strerror or problem}", err=True
        )
        return NOT_STARTED


def _reason(problem: Exception) -> str:
    """One line that tells why a job broke off: the error of a worker, without Ray's report around it."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    for line in reversed(lines):
        name, _, message = line.partition(": ")
        if message and name.startswith("offramp."):
            return message
    errors = [line for line in lines if re.match(r"(?!ray\.)[\w.]+(Error|Exception): ", line)]
    return [*lines, type(problem).__name__, *errors][-1]


def _refuse(message: str) -> NoReturn:
    click.echo(f"ee-run: {message}", err=True)
    sys.exit(NOT_STARTED)


if __name__ == "__main__":
    command()
