"""ee-run: lines or images in, one JSON line out for each."""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import IO, TYPE_CHECKING, Any

import click

if TYPE_CHECKING:  # what is heavy is imported when the command runs, so that --help is instant
    from offramp.runtime.classifier import Answer, Session
    from offramp.runtime.inputs.lines import Line
    from offramp.runtime.inputs.text import Item
    from offramp.runtime.run_stats import Tally

ENGINES, DEVICES, PROVIDERS, FORMATS, CACHES = (
    ("ort", "trt"),
    ("cpu", "cuda"),
    ("cuda", "tensorrt"),
    ("auto", "text", "json"),
    ("deferred", "propagate"),
)  # a test holds these to their sources
AT_LEAST_1 = click.IntRange(min=1)
ALL_ANSWERED, SOME_FAILED, NOT_STARTED, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 130, 141

HELP = """Answer every line of INPUT (a file, or - for standard input, the default) with one JSON line; of a
bundle for images, every image file that is named.

\b
INPUT is plain text, one text a line, or JSON lines: objects with "text" and, for pairs,
"text_b" (other keys are ignored). Which of the two is decided by the first line that is
not empty: JSON lines if it begins with "{". Say --format text for texts that begin so.

\b
Images: name files, as in images/*.jpg, or a list of them: a .txt or .lst file of paths, a
.jsonl file of objects with "image" (paths are seen from the list's folder), or - for a
list on standard input. Each answer says which "file" it is about.

\b
An answer:  {"label": "positive", "score": 0.98, "exit": 3, "depth": 3, "ms": 4.1}
  score  probability of the label at the exit where the walk ended
  exit   that exit, counted from 1; depth: blocks of the network that were run
  ms     wall time of the walk; with --batch-size over 1 it includes waiting for neighbours
A line that cannot be answered keeps its place:  {"error": "empty line", "line": 7}
  images that cannot be read; empty lines; lines that are not UTF-8; in JSON lines, what is
  not an object with a string "text", and lines over 256 KiB. Half of a surrogate pair is no
  text either.
Text that is longer than the network reads is cut and marked "truncated": true.

\b
Bundles that generate text: INPUT is prompts, one a line, or JSON lines with "prompt" or
"messages" (of a chat) and, where wished, "max_new_tokens" and "stop" (a string or a list
of them). On a terminal the text itself, as it comes; else an answer:
{"text": "…", "tokens": 12, "depth": 30.0, "ran": 31.5, "ms": 310.2, "first_ms": 41.0, "tokens_per_s": 38.7}
  depth  mean number of blocks behind which tokens were said
  ran    mean number of blocks run a token, drafts and tokens that had waited included

\b
With batch size 1 every answer is written before the next line is read. Larger batches
read up to 16 batches ahead, sort 8 by length while 8 are walked, and write the answers in
the order of the lines. Memory does not grow with the number of lines.

\b
Rules and what --threshold means: gate (leave where P(exit) is above), max_probability
(reaches), entropy (at most, 0..1), margin (top minus second reaches), patience (exits in
a row that agree with the one before), patience_confident (entropy below, as many exits in
a row as the operating point says), fixed (the exit's number), never, quee (the errors that
a full walk may cost: leaves or changes precision, by forecast). Of bundles that generate
text: speculative (early exits draft, the full depth verifies: the same text, sooner), skip
(segments that a token runs), route (such a way by the prompt; a point sets it), and those
above but quee, asked of every token. Without --rule, --threshold or --point, the bundle's
own rule is used.

\b
Exit codes:
  0    every line answered
  1    some lines had errors (each is marked in the output), or the run broke off
  2    could not start: wrong option, no or bad bundle, engine or device not there
  130  interrupted (Ctrl-C)
  141  the reader of the output went away
"""


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
@click.option("--variant", help="Precision of the segments, such as int8; a bundle says which it has.")
@click.option("--rule", help="The rule that decides; see above.")
@click.option("--threshold", type=float, help="The rule's one number; see above.")
@click.option(
    "--point", metavar="NAME", help="An operating point of the bundle: sets rule, threshold and variant."
)
@click.option(
    "--batch-size", type=AT_LEAST_1, default=1, show_default=True, help="Rows walked together at most."
)
@click.option("--threads", type=AT_LEAST_1, help="Threads of the engine.  [default: one a core]")
@click.option(
    "--format", "form", type=click.Choice(FORMATS), default="auto", show_default=True, help="What INPUT is."
)
@click.option(
    "--warm-up",
    is_flag=True,
    help="Open and run every segment once before the first line is read; without it a segment is opened when "
    "a row first gets there, which that row waits for.",
)
@click.option(
    "--max-new-tokens", type=AT_LEAST_1, default=64, show_default=True, help="Of a generated text, at most."
)
@click.option(
    "--cache",
    type=click.Choice(CACHES),
    default="deferred",
    show_default=True,
    help="Of a generated text, where tokens leave early: have them wait until a token goes deeper, or leave "
    "keys and values made of the hidden state with which they left.",
)
@click.option("--stats", is_flag=True, help="At the end, on standard error: exits, times, what really ran.")
def main(
    sources: tuple[str, ...],
    bundle: str,
    batch_size: int,
    form: str,
    warm_up: bool,
    max_new_tokens: int,
    stats: bool,
    **wishes: Any,
) -> None:
    try:
        code = _run(sources or ("-",), bundle, batch_size, form, warm_up, max_new_tokens, stats, wishes)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:
        # What is still buffered can never be written; without this the interpreter complains about it at its
        # end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = PIPE_CLOSED
    sys.exit(code)


def _run(
    sources: Sequence[str],
    bundle: str,
    batch_size: int,
    form: str,
    warm_up: bool,
    most: int,
    stats: bool,
    wishes: dict[str, Any],
) -> int:
    from offramp.runtime.bundle.manifest import GENERATION, ImageInput
    from offramp.runtime.errors import BadSetting, OfframpError
    from offramp.runtime.inputs.lines import PROMPTS, TEXTS, read_images, read_lines
    from offramp.runtime.loading import load
    from offramp.runtime.run_stats import Tally

    code = NOT_STARTED
    try:
        with ExitStack() as stack:
            session = stack.enter_context(load(bundle, batch_size=batch_size, lazy=True, **wishes))
            if isinstance(session.manifest.input, ImageInput):
                lines = read_images(sources, form)
            elif len(sources) > 1:
                raise BadSetting(f"{bundle} reads text: name one INPUT, not {len(sources)}")
            else:
                names = PROMPTS if session.manifest.task == GENERATION else TEXTS
                lines = read_lines(stack.enter_context(_open(sources[0])), form, names)
            if warm_up:
                session.warm_up(batch=batch_size)
            if session.manifest.task == GENERATION:
                return _generate(session, lines, most, stats)
            tally = Tally()
            code = SOME_FAILED
            _answer(session, lines, tally, each=batch_size == 1)
            if stats:
                manifest = session.manifest
                told = tally.report(len(manifest.segments), manifest.blocks, _facts(session))
                click.echo(told, err=True)
            return SOME_FAILED if tally.failed else ALL_ANSWERED
    except BrokenPipeError:
        raise
    except OfframpError as problem:
        click.echo(f"ee-run: {problem}", err=True)
    except OSError as problem:
        cure = "name a file of lines, or - for standard input"
        where = problem.filename or " ".join(sources)
        click.echo(f"ee-run: {where}: {problem.strerror or problem}; {cure}", err=True)
    return code


def _generate(session: Session, lines: Iterator[Line], most: int, stats: bool) -> int:
    from offramp.runtime.generate_cli import write_answers

    out = sys.stdout.buffer
    failed, told = write_answers(session, lines, out, most=most, as_it_comes=sys.stdout.isatty())
    out.flush()
    if stats:
        ran = [f"{name:10s} {value}" for name, value in _facts(session).items()]
        click.echo("\n".join([told, *ran]), err=True)
    return SOME_FAILED if failed else ALL_ANSWERED


def _facts(session: Session) -> dict[str, str]:
    """What really ran."""
    rule, engine = session.rule, session.engine
    named = " ".join([rule.name, *(f"{name}={value:g}" for name, value in rule.parameters.items())])
    facts = {"rule": named, "variant": session.variant, "engine": engine.name, "device": engine.device}
    return facts | dict(engine.facts)


def _open(source: str) -> AbstractContextManager[IO[bytes]]:
    return nullcontext(sys.stdin.buffer) if source == "-" else open(source, "rb")


def _answer(session: Session, lines: Iterator[Line], tally: Tally, *, each: bool) -> None:
    """Write one object for every line, in order; each: let the reader have every one at once."""
    from offramp.runtime.bundle.manifest import ImageInput
    from offramp.runtime.errors import BadInput

    images = isinstance(session.manifest.input, ImageInput)
    waiting: deque[Line] = deque()  # lines that were read and are not written yet: two windows of map at most

    def items() -> Iterator[Item]:
        # A map that met an item which is no text is over: what was read ahead is handed to the next one.
        yield from [line.item for line in waiting if line.problem is None]
        for line in lines:
            if line.problem is not None and not waiting:
                _write(_failed(line, line.problem, tally, images), flush=each)
                continue
            waiting.append(line)
            if line.problem is None:
                yield line.item

    def written(found: Answer | str) -> None:
        line = waiting.popleft()
        if isinstance(found, str):
            out = _failed(line, found, tally, images)
        else:
            out = _found(line, found, tally, images)
        while waiting and waiting[0].problem is not None:
            _write(out)
            line = waiting.popleft()
            out = _failed(line, str(line.problem), tally, images)
        _write(out, flush=each or not waiting)

    unread = True
    while unread:
        try:
            for answer in session.map(items()):
                written(answer)
            unread = False
        except BadInput as problem:
            written(str(problem).partition(": ")[2])
    sys.stdout.buffer.flush()


def _failed(line: Line, problem: str, tally: Tally, images: bool) -> dict[str, Any]:
    tally.failed += 1
    return {"error": problem, "line": line.number} | ({"file": line.name} if images and line.name else {})


def _found(line: Line, answer: Answer, tally: Tally, images: bool) -> dict[str, Any]:
    tally.add(answer.exit, answer.depth, answer.seconds)
    out: dict[str, Any] = {"file": line.name} if images else {}
    out |= {"label": answer.label, "score": round(answer.score, 6)}
    out |= {"exit": answer.exit, "depth": answer.depth, "ms": round(1e3 * answer.seconds, 3)}
    return out | {"truncated": True} if answer.truncated or line.cut else out


def _write(answer: dict[str, Any], *, flush: bool = False) -> None:
    """Bytes: UTF-8 comes out whatever the terminal's encoding."""
    out: IO[bytes] = sys.stdout.buffer
    out.write(json.dumps(answer, ensure_ascii=False).encode("utf-8") + b"\n")
    if flush:
        out.flush()


if __name__ == "__main__":
    main()
