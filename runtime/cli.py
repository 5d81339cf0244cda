"""Command ee-run: read lines or images, and write one JSON line for each."""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, cast

import click

if TYPE_CHECKING:  # heavy modules are imported when the command runs, so that --help is instant
    from offramp.runtime.classifier import Answer, Classifier
    from offramp.runtime.errors import ItemError
    from offramp.runtime.generator import TextGenerator
    from offramp.runtime.inputs.lines import Line
    from offramp.runtime.inputs.text import Item
    from offramp.runtime.row_session import RowAnswer, RowSession
    from offramp.runtime.run_stats import RunStats
    from offramp.runtime.session import Session

# A test compares these with their sources.
ENGINES, DEVICES, PROVIDERS, FORMATS, EXIT_KV, LONG_TEXTS = (
    ("ort", "trt"),
    ("cpu", "cuda"),
    ("cuda", "tensorrt"),
    ("auto", "text", "json"),
    ("deferred", "propagate"),
    ("cut", "windows"),
)
AT_LEAST_1 = click.IntRange(min=1)
ALL_ANSWERED, SOME_FAILED, NOT_STARTED, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 130, 141

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
"messages" (of a chat) and optionally "max_new_tokens" and "stop" (a string or a list of
strings). On a terminal the text itself is printed as it comes; otherwise an answer:
{"text": "…", "tokens": 12, "depth": 30.0, "blocks_run": 31.5, "ms": 310.2, "first_ms": 41.0,
"tokens_per_s": 38.7}
  depth       mean depth, in blocks, at which tokens were predicted
  blocks_run  mean number of blocks run for a token, with drafts and tokens that had waited

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
the cosine of embeddings). For generated text: speculative (early exits draft, the full depth
verifies: the same text, sooner), skip (segments that a token runs), route (such a choice by
the prompt; an operating point sets it), and those for labels except quee, for every token.
Without --rule, --threshold or --point, the bundle's own rule is used.

\b
Exit codes:
  0    every line answered
  1    some lines had errors (each is marked in the output), or the run broke off
  2    could not start: wrong option, no or bad bundle, engine or device not available
  130  interrupted (Ctrl-C)
  141  the reader of the output closed the pipe
"""


@dataclass(frozen=True)
class RunOptions:
    """Options of command ee-run that are not options of load()."""

    batch_size: int
    format: str
    warm_up: bool
    max_new_tokens: int
    stats: bool
    sets: bool = False


@click.command(help=HELP)
@click.argument("sources", metavar="[INPUT]...", nargs=-1)
@click.option("--bundle", default="bundle/", metavar="DIR", show_default=True, help="The bundle to walk.")
@click.option(
    "--engine", type=click.Choice(ENGINES), default="ort", show_default=True, help="What runs the graphs."
)
@click.option(
    "--device", type=click.Choice(DEVICES), help="Where it runs them.  [default: cpu for ort, cuda for trt]"
)
@click.option(
    "--provider",
    type=click.Choice(PROVIDERS),
    help="What ort uses on a GPU: its own CUDA kernels, or TensorRT through ort.  [default: cuda]",
)
@click.option(
    "--cuda-graphs", is_flag=True, help="On a GPU, launch a step as one CUDA graph once its shape was seen."
)
@click.option("--variant", help="Precision of the segments, such as int8; the bundle lists its own.")
@click.option("--rule", help="The rule that decides where to exit; see above.")
@click.option("--threshold", type=float, help="The rule's one number; see above.")
@click.option(
    "--point", metavar="NAME", help="An operating point of the bundle: sets rule, threshold and variant."
)
@click.option(
    "--batch-size", type=AT_LEAST_1, default=1, show_default=True, help="Rows walked together at most."
)
@click.option("--threads", type=AT_LEAST_1, help="Threads of the engine.  [default: one for each core]")
@click.option(
    "--format", type=click.Choice(FORMATS), default="auto", show_default=True, help="What INPUT is."
)
@click.option(
    "--warm-up",
    is_flag=True,
    help="Open and run every segment once before the first line is read; otherwise a segment is opened when "
    "a row first reaches it, and that row waits.",
)
@click.option(
    "--max-new-tokens",
    type=AT_LEAST_1,
    default=64,
    show_default=True,
    help="Tokens of a generated text at most.",
)
@click.option(
    "--exit-kv",
    type=click.Choice(EXIT_KV),
    default="deferred",
    show_default=True,
    help="For generated text, the cache of a token behind its exit: deferred, the token waits and runs the "
    "segments when a later token goes deeper; propagate, keys and values made from the hidden state of its "
    "exit.",
)
@click.option(
    "--long",
    "long_texts",
    type=click.Choice(LONG_TEXTS),
    default="cut",
    show_default=True,
    help="What becomes of texts that are longer than the network reads; see above.",
)
@click.option(
    "--sets", is_flag=True, help="Add the calibrated probability and the set of labels to every answer."
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
    **load_options: Any,
) -> None:
    """Command ee-run; its help is HELP."""
    options = RunOptions(batch_size, format, warm_up, max_new_tokens, stats, sets)
    try:
        code = _run(sources or ("-",), bundle, options, load_options)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:
        # Buffered output cannot be written any more; without this the interpreter reports that when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = PIPE_CLOSED
    sys.exit(code)


def _run(sources: Sequence[str], bundle: str, options: RunOptions, load_options: dict[str, Any]) -> int:
    from offramp.runtime.bundle.manifest import CLASSIFICATION, GENERATION, ImageInput
    from offramp.runtime.errors import BadSetting, OfframpError
    from offramp.runtime.inputs.lines import PROMPTS, TEXTS, read_images, read_lines
    from offramp.runtime.loading import load

    started = False
    try:
        with ExitStack() as stack:
            loaded = load(bundle, batch_size=options.batch_size, lazy=True, **load_options)
            session: Session[Any] = stack.enter_context(loaded)
            generates = session.manifest.kind == GENERATION
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
            if options.warm_up:
                session.warm_up(batch=options.batch_size)
            started = True
            if generates:
                return _generate(cast("TextGenerator", loaded), lines, options)
            return _answer_rows(cast("RowSession[RowAnswer]", loaded), lines, options)
    except BrokenPipeError:
        raise
    except OfframpError as problem:
        click.echo(f"ee-run: {problem}", err=True)
    except OSError as problem:
        cure = "name a file of lines, or - for standard input"
        place = problem.filename or " ".join(sources)
        click.echo(f"ee-run: {place}: {problem.strerror or problem}; {cure}", err=True)
    return SOME_FAILED if started else NOT_STARTED


def _generate(session: TextGenerator, lines: Iterator[Line], options: RunOptions) -> int:
    from offramp.runtime.generate_cli import write_answers

    out = sys.stdout.buffer
    failed, report = write_answers(
        session, lines, out, max_new_tokens=options.max_new_tokens, as_it_comes=sys.stdout.isatty()
    )
    out.flush()
    if options.stats:
        facts = [f"{name:10s} {value}" for name, value in _facts(session).items()]
        click.echo("\n".join([report, *facts]), err=True)
    return SOME_FAILED if failed else ALL_ANSWERED


def _answer_rows(session: RowSession[RowAnswer], lines: Iterator[Line], options: RunOptions) -> int:
    from offramp.runtime.run_stats import RunStats

    stats = RunStats()
    _write_answers(session, lines, stats, each=options.batch_size == 1, sets=options.sets)
    if options.stats:
        manifest = session.manifest
        click.echo(stats.report(len(manifest.segments), manifest.blocks, _facts(session)), err=True)
    return SOME_FAILED if stats.failed else ALL_ANSWERED


def _facts(session: Session[Any]) -> dict[str, str]:
    """Rule, variant, engine and device that were really used, as text by name."""
    rule, engine = session.rule, session.engine
    rule_text = " ".join([rule.name, *(f"{name}={value:g}" for name, value in rule.parameters.items())])
    facts = {"rule": rule_text, "variant": session.variant, "engine": engine.name, "device": engine.device}
    return facts | dict(engine.facts)


def _open(source: str) -> AbstractContextManager[IO[bytes]]:
    return nullcontext(sys.stdin.buffer) if source == "-" else open(source, "rb")


def _write_answers(
    session: RowSession[RowAnswer], lines: Iterator[Line], stats: RunStats, *, each: bool, sets: bool
) -> None:
    """Write one JSON object for every line, in order; each: flush after every object."""
    from offramp.runtime.bundle.manifest import ImageInput

    images = isinstance(session.manifest.input, ImageInput)
    pending: deque[Line] = deque()  # lines that were read and are not written yet: two windows at most

    def items() -> Iterator[Item]:
        for line in lines:
            if line.problem is not None and not pending:
                _write(_error_object(line, line.problem, stats, images), flush=each)
                continue
            pending.append(line)
            if line.problem is None:
                yield line.item

    for answer in session.answers(items()):
        line = pending.popleft()
        objects = [_object(line, answer, stats, images, sets=sets)]
        while pending and pending[0].problem is not None:
            line = pending.popleft()
            objects.append(_error_object(line, str(line.problem), stats, images))
        for number, value in enumerate(objects, 1):
            _write(value, flush=number == len(objects) and (each or not pending))
    sys.stdout.buffer.flush()


def _object(
    line: Line, answer: RowAnswer | ItemError, stats: RunStats, images: bool, *, sets: bool
) -> dict[str, Any]:
    """The JSON object of an answer."""
    from offramp.runtime.errors import ItemError

    if isinstance(answer, ItemError):
        return _error_object(line, answer.message, stats, images)
    stats.add(answer.exit, answer.depth, answer.seconds)
    value: dict[str, Any] = {"file": line.name} if images else {}
    value |= answer.as_json()
    if sets:
        value |= _sets(cast("Answer", answer))  # _run refused the option for other tasks
    value |= {"exit": answer.exit, "depth": answer.depth, "ms": round(1e3 * answer.seconds, 3)}
    if answer.windows > 1:
        value["windows"] = answer.windows
    return value | {"truncated": True} if answer.truncated or line.cut else value


def _sets(answer: Answer) -> dict[str, Any]:
    """The fields that option --sets adds; none for an answer without calibration, as of several windows."""
    if answer.calibrated is None or answer.label_set is None:
        return {}
    return {"calibrated": round(answer.calibrated, 6), "set": list(answer.label_set)}


def _error_object(line: Line, problem: str, stats: RunStats, images: bool) -> dict[str, Any]:
    stats.failed += 1
    return {"error": problem, "line": line.number} | ({"file": line.name} if images and line.name else {})


def _write(value: dict[str, Any], *, flush: bool = False) -> None:
    """Write a JSON line as bytes, so that the output is UTF-8 in every encoding of the terminal."""
    out: IO[bytes] = sys.stdout.buffer
    out.write(json.dumps(value, ensure_ascii=False).encode("utf-8") + b"\n")
    if flush:
        out.flush()


if __name__ == "__main__":
    main()
