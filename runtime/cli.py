"""Command ee-run: read lines or images, and write one JSON line for each."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, TextIO, cast

import click

from offramp.runtime import shared_options as shared
from offramp.runtime.bulk_cli import RunCommand
from offramp.runtime.generation_options import generation_options, take_sampling
from offramp.runtime.termination import Terminated, Termination

if TYPE_CHECKING:  # heavy modules are imported when the command runs, so that --help is instant
    from offramp.runtime.classifier import Classifier
    from offramp.runtime.generator import TextGenerator
    from offramp.runtime.inputs.lines import Line
    from offramp.runtime.output import Output
    from offramp.runtime.row_session import RowAnswer, RowSession
    from offramp.runtime.sampling import Sampling
    from offramp.runtime.session import Session

# A test compares these with their sources.
PROVIDERS, FORMATS = ("cuda", "tensorrt"), ("auto", "text", "json")
ALL_ANSWERED, SOME_FAILED, NOT_STARTED, INTERRUPTED, PIPE_CLOSED, TERMINATED = 0, 1, 2, 130, 141, 143

HELP = """Answer every line of INPUT (a file, or - for standard input, the default) with one JSON line; with a
bundle for images, answer every image file that is named.

\b
INPUT is plain text, one text a line, or JSON lines: objects with "text" and, for pairs,
"text_b" (other keys are ignored). The first line that is not empty decides: JSON lines if
it begins with "{". Give --format text for texts that begin so.

\b
Images: name files, as in images/*.jpg, or a list of them: a .txt or .lst file of paths, a
.jsonl file of objects with "image" (relative paths start at the list's folder), or - for a
list on standard input. Each answer names its "file".

\b
An answer:  {"label": "positive", "score": 0.98, "exit": 3, "depth": 3, "ms": 4.1}
  score  probability of the label at the exit where the walk ended
  exit   that exit, counted from 1; depth: blocks of the network that were run
  ms     wall time of the walk; with --batch-size over 1 it includes waiting for other rows
With --sets, at a point that ee-calibrate --coverage measured, it has two more fields:
  calibrated  probability of the label that holds on data like that of the calibration
  set         labels, the likeliest first, among which the right one is with that coverage
Bundles of other tasks answer with other fields in place of label and score:
  several labels   "labels": [{"label": "joy", "score": 0.9}], "scores": {"joy": 0.9, "fear": 0.1}
  labels of words  "entities": [{"entity_group": "PER", "score": 0.98, "word": "Ada Lovelace",
                   "start": 0, "end": 12}]; start and end count characters
  a number         "value": 3.2
  an embedding     "embedding": [0.012345, -0.5, 0.25]
  labels are those that reach their thresholds, scores the probabilities of all labels
A line that cannot be answered keeps its place:  {"error": "empty line", "line": 7}
  These are images that cannot be read; empty lines; lines that are not UTF-8; in JSON lines,
  anything but an object with a string "text", and lines over 256 KiB; half of a surrogate
  pair.
Text that is longer than the network reads is cut and marked "truncated": true. With --long
windows it is walked in overlapping windows, and "windows" says how many there were: labels are
those of their mean logits, a number or an embedding is the mean of theirs, and a word is
labelled in the window in which it is farthest from an edge.

\b
Bundles that generate text: INPUT is prompts, one a line, or JSON lines with "prompt" or
"messages" (of a chat; "tools", "chat_template", a name, and "chat_template_kwargs" are for its
template) and optionally "max_new_tokens", "stop" (one or more strings) and, with underscores, the
options from --temperature to --logprobs, "frequency_penalty" and "presence_penalty". On a terminal
the text itself is printed as it comes, without --logprobs and --batch-size; otherwise an answer:
{"text": "…", "tokens": 12, "depth": 30.0, "blocks_run": 31.5, "ms": 310.2, "first_ms": 41.0,
"tokens_per_s": 38.7, "ended": "stop", "repeated_tokens": 0}
  depth       mean depth, in blocks, at which tokens were predicted
  blocks_run  mean number of blocks run for a token, with drafts and tokens that had waited
  ended       "stop", "length" or "context"; repeated_tokens: at the end, if it is a loop
With a temperature it has the "seed" that gives this text again, with --logprobs a list "logprobs" of
{"token": 7, "text": " good", "logprob": -0.4, "top_logprobs": […]}, one for each token.

\b
With batch size 1 every answer is written before the next line is read. Larger batches
read up to 16 batches ahead, sort 8 by length while 8 are walked, and write the answers in
the order of the lines. Memory does not grow with the number of lines.

\b
Rules and what --threshold means: gate (exit where P(exit) is above), max_probability
(exit where it reaches), entropy (at most, 0..1), margin (top minus second reaches),
patience (exits in a row that agree with the one before), patience_confident (entropy
below; the operating point sets the number of exits in a row), fixed (the exit's number),
never, quee (the errors that a full walk may cost: exits or changes precision, by error
forecasts). For several labels and labels of words: all of these but patience and quee, on the
least certain decision of a row. For numbers and embeddings: gate, fixed, never, and settled
(the answer changed by at most this since the exit before: the difference of numbers, 1 minus
the cosine of embeddings). For generated text: speculative (early exits or repeated passages
draft, the full depth verifies: the same text, sooner; speculative:lookup for the latter alone),
skip (so many segments, or skip:-3-7 all but these), select (those whose controllers give P(run)
above), route (a choice by the prompt; an operating point sets it), and, for every token, those for
labels except quee.
Without --rule, --threshold or --point, the bundle's own rule is used.

\b
Options --budget-* and --audit watch the stream: see docs/budgets.md. Their warnings are on
standard error, their reports among those of --stats.

\b
Exit codes:
  0    every line answered
  1    some lines had errors (each is marked in the output), or the run broke off, as with a
       full disk
  2    wrong option, no or bad bundle, engine or device not available; in most cases before the
       first answer, but a segment's file is opened when a row first reaches it
  130  interrupted (Ctrl-C)
  141  the reader of the output closed the pipe
  143  ended by SIGTERM, after the rows that were being walked were answered and written
Every line of the output is complete, whatever ended the run but kill -9 and a full disk.

\b
Jobs: --out FILE writes to FILE.<hash>.partial, which becomes FILE when all lines are answered.
The same command with --resume continues after the answers that are there, also after kill -9,
with the answers of a run that was not interrupted. The hash is of the bundle, the name of the
input and the options: with others, or without --resume, the partial file is refused.
"""


@dataclass(frozen=True)
class RunOptions:
    """Options of command ee-run that are not options of load()."""

    batch_size: int
    format: str
    warm_up: bool
    max_new_tokens: int
    sampling: dict[str, Any]  # the fields of Sampling that were given
    stats: bool
    sets: bool = False
    out: str | None = None
    resume: bool = False


@click.command(help=HELP, cls=RunCommand)
@click.argument("sources", metavar="[INPUT]...", nargs=-1)
@click.option(
    "--bundle",
    default="bundle/",
    metavar="DIR",
    show_default=True,
    help="The bundle to walk: a folder, or hub:user/name or user/name@revision of a model hub (docs/hub.md).",
)
@shared.engine(help="What runs the graphs.")
@shared.device(help="Where it runs them.  [default: cpu for ort, cuda for trt]")
@click.option(
    "--provider",
    type=click.Choice(PROVIDERS),
    help="What ort uses on a GPU: its own CUDA kernels, or TensorRT through ort.  [default: cuda]",
)
@click.option(
    "--cuda-graphs", is_flag=True, help="On a GPU, launch a step as one CUDA graph once its shape was seen."
)
@shared.variant(help="Precision of the segments, such as int8; the bundle lists its own.")
@shared.rule(help="The rule that decides where to exit; see above.")
@shared.threshold(help="The rule's one number; see above.")
@shared.point(help="An operating point of the bundle: sets rule, threshold and variant.")
@shared.batch_size(default=1, help="Rows walked together at most.")
@shared.threads(help="Threads of the engine.  [default: one for each core that the process may use]")
@click.option(
    "--format", type=click.Choice(FORMATS), default="auto", show_default=True, help="What INPUT is."
)
@click.option(
    "--warm-up",
    is_flag=True,
    help="Open and run every segment once before the first line is read; otherwise a segment is opened when "
    "a row first reaches it, and that row waits.",
)
@generation_options
@shared.long_texts(help="What becomes of texts that are longer than the network reads; see above.")
@shared.require_signature()
@shared.budget_ms(
    help="Hold this time of an answer, by moving among the operating points of the rule (docs/budgets.md)."
)
@shared.budget_depth()
@shared.budget_of(help="What of them is held over a window.  [default: mean]")
@shared.budget_window(help="Rows over which it is held.  [default: 1000]")
@shared.max_risk(
    help="Let a budget use only points that guarantee a risk of at most this (ee-calibrate --risk)."
)
@shared.audit(
    help="Walk this share of the rows to the end as well, in the background, and warn if answers disagree "
    "with full depth more than the point promises, or if rows leave at other exits than calibration rows."
)
@shared.audit_limit()
@shared.on_drift(
    help="What follows once the disagreement is above its limit: warn, or walk all rows to the end.  "
    "[default: warn]"
)
@click.option(
    "--sets", is_flag=True, help="Add the calibrated probability and the set of labels to every answer."
)
@click.option(
    "--out",
    metavar="FILE",
    help="Write the answers to a new file, which gets this name when all lines are answered.",
)
@click.option(
    "--resume", is_flag=True, help="Go on with the file of --out, if the same command was interrupted before."
)
@click.option(
    "--ray",
    is_flag=True,
    expose_value=False,
    help="Answer many rows with Ray, with options of its own: see ee-run --ray --help.",
)
@click.option(
    "--stats", is_flag=True, help="At the end, on standard error: exits, times, and what really ran."
)
def main(
    sources: tuple[str, ...],
    bundle: str,
    batch_size: int,
    format: str,
    warm_up: bool,
    max_new_tokens: int,
    stats: bool,
    sets: bool,
    out: str | None,
    resume: bool,
    **load_options: Any,
) -> None:
    """Command ee-run; its help is HELP."""
    sampling = take_sampling(load_options)
    options = RunOptions(batch_size, format, warm_up, max_new_tokens, sampling, stats, sets, out, resume)
    try:
        with Termination() as termination:
            if resume:
                _check_resume(out, load_options)
            code = _run(sources or ("-",), bundle, options, load_options, termination)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Terminated:
        code = TERMINATED
    except BrokenPipeError:
        # Buffered output cannot be written any more; without this the interpreter reports that when it ends.
        from offramp.runtime.output import discard_standard_output

        discard_standard_output()
        code = PIPE_CLOSED
    sys.exit(code)


def _check_resume(out: str | None, load_options: dict[str, Any]) -> None:
    """Raise UsageError if answers cannot be those of a run that was not interrupted."""
    if out is None:
        raise click.UsageError("--resume continues the file of --out: name it, too")
    for name in ("budget_ms", "budget_depth"):
        if load_options[name] is not None:
            option = f"--{name.replace('_', '-')}"
            raise click.UsageError(
                f"--resume: with {option} answers depend on the rows before; leave one of them out"
            )
    if load_options["on_drift"] == "full-depth":
        raise click.UsageError(
            "--resume: with --on-drift full-depth answers depend on the rows before; leave one of them out"
        )


def _run(
    sources: Sequence[str],
    bundle: str,
    options: RunOptions,
    load_options: dict[str, Any],
    termination: Termination,
) -> int:
    from offramp.runtime.bundle.manifest import CLASSIFICATION, GENERATION, ImageInput
    from offramp.runtime.errors import BadBundle, BadSetting, EngineUnavailable, OfframpError, OutputFailed
    from offramp.runtime.hub.resolve import resolve_bundle
    from offramp.runtime.inputs.lines import PROMPTS, TEXTS, read_images, read_lines
    from offramp.runtime.loading import load
    from offramp.runtime.output import discard_standard_output
    from offramp.runtime.sampling import Sampling

    started = False
    try:
        with ExitStack() as stack:
            with _warnings_as_lines():
                folder = resolve_bundle(bundle, command=True)
            loaded = load(folder, batch_size=options.batch_size, lazy=True, global_pool=True, **load_options)
            session: Session[Any] = stack.enter_context(loaded)
            generates = session.manifest.kind == GENERATION
            if options.sampling and not generates:
                option = next(iter(options.sampling)).replace("_", "-")
                raise BadSetting(f"--{option}: it is for bundles that generate text; leave it out")
            sampling = Sampling(**options.sampling)
            if options.sets and session.manifest.kind != CLASSIFICATION:
                task = session.manifest.task
                raise BadSetting(f"--sets: they are for bundles that classify, not for {task}; leave it out")
            if options.sets and cast("Classifier", loaded).calibration is None:
                raise BadSetting(
                    "--sets: the answers of this rule and variant are not calibrated; measure a point with "
                    "ee-calibrate --coverage 0.95 and walk at it"
                )
            if isinstance(session.manifest.input, ImageInput):
                lines = read_images(sources, options.format)
            elif len(sources) > 1:
                raise BadSetting(f"{bundle} reads text: name one INPUT, not {len(sources)}")
            else:
                stream = stack.enter_context(_open(sources[0]))
                lines = read_lines(stream, options.format, PROMPTS if generates else TEXTS)
            output = stack.enter_context(_open_output(session, sources, options, load_options))
            if options.warm_up:
                session.warm_up(batch=options.batch_size)
            started = True
            if generates:
                generator = cast("TextGenerator", loaded)
                failed = _generate(generator, lines, output, options, sampling, termination)
            else:
                row_session = cast("RowSession[RowAnswer]", loaded)
                failed = _answer_rows(row_session, lines, output, options, termination)
            if termination.requested:
                return TERMINATED
            output.complete()
            return SOME_FAILED if failed or output.failed else ALL_ANSWERED
    except BrokenPipeError:
        raise
    except (BadBundle, EngineUnavailable, BadSetting) as problem:  # also when a row first reaches a file
        click.echo(f"ee-run: {problem}", err=True)
        return NOT_STARTED
    except OutputFailed as problem:
        if options.out is None:
            discard_standard_output()
        click.echo(f"ee-run: {problem}", err=True)
    except OfframpError as problem:
        click.echo(f"ee-run: {problem}", err=True)
    except OSError as problem:
        cure = "name a file of lines, or - for standard input"
        place = problem.filename or " ".join(sources)
        click.echo(f"ee-run: {place}: {problem.strerror or problem}; {cure}", err=True)
    return SOME_FAILED if started else NOT_STARTED


def _generate(
    session: TextGenerator,
    lines: Iterator[Line],
    output: Output,
    options: RunOptions,
    sampling: Sampling,
    termination: Termination,
) -> int:
    """Answer all prompts; returns the number of lines with errors."""
    from offramp.runtime.generate_cli import write_answers

    is_streamed = options.batch_size == 1 and options.out is None and sampling.logprobs is None
    failed, report = write_answers(
        session,
        termination.lines(output.skip(lines, 1)),
        output,
        max_new_tokens=options.max_new_tokens,
        as_it_comes=is_streamed and sys.stdout.isatty(),
        batch_size=options.batch_size,
        sampling=sampling,
    )
    if options.stats:
        facts = [f"{name:10s} {value}" for name, value in _facts(session).items()]
        click.echo("\n".join([report, *facts]), err=True)
    return failed


def _answer_rows(
    session: RowSession[RowAnswer],
    lines: Iterator[Line],
    output: Output,
    options: RunOptions,
    termination: Termination,
) -> int:
    """Answer all rows; returns the number of lines with errors."""
    import numpy as np

    from offramp.runtime.answers_cli import window_of, write_answers
    from offramp.runtime.run_stats import RunStats

    stats, left = RunStats(), output.skip(lines, window_of(options.batch_size))
    # Rows for which the network computes infinity are errors, which numpy need not report, too.
    with _warnings_as_lines(), np.errstate(invalid="ignore"):
        write_answers(session, left, output, stats, termination, sets=options.sets)
        reports = session.reports()  # finishes the audits, which may warn
    if options.stats:
        manifest, facts = session.manifest, _facts(session) | reports
        click.echo(stats.report(len(manifest.segments), manifest.blocks, facts), err=True)
    return stats.failed


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Print warnings about the rows that are walked as lines of this command, without a place in its code."""
    from offramp.runtime.errors import RunWarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, RunWarning):
            click.echo(f"ee-run: {message}", err=True)
        else:
            usual(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        warnings.simplefilter("always", RunWarning)
        usual, warnings.showwarning = warnings.showwarning, show
        yield


def _facts(session: Session[Any]) -> dict[str, str]:
    """Rule, variant, engine and device that were really used, as text by name."""
    rule, engine = session.rule, session.engine
    facts = {"rule": rule.text, "variant": session.variant, "engine": engine.name, "device": engine.device}
    return facts | dict(engine.facts)


def _open(source: str) -> AbstractContextManager[IO[bytes]]:
    from offramp.runtime.inputs.lines import standard_input

    return nullcontext(standard_input()) if source == "-" else open(source, "rb")


def _open_output(
    session: Session[Any], sources: Sequence[str], options: RunOptions, load_options: dict[str, Any]
) -> Output:
    """Standard output, or the file of option --out."""
    from offramp.runtime.output import FileOutput, job_name, standard_output

    if options.out is None:
        return standard_output()
    chosen = {name: value for name, value in load_options.items() if name != "threads"} | options.sampling
    answers = (options.batch_size, options.format, options.max_new_tokens, options.sets)
    return FileOutput(
        options.out,
        job_name([repr(session.manifest), list(sources), chosen, answers]),
        resume=options.resume,
    )


if __name__ == "__main__":
    main()
