"""ee-run with a bundle that generates text: read prompts, write JSON lines or, on a terminal, plain text."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import click

from offramp.runtime.decoding import STOP
from offramp.runtime.errors import BadInput, BadSetting
from offramp.runtime.generator import TextGenerator
from offramp.runtime.inputs.lines import Line
from offramp.runtime.output import Output
from offramp.runtime.rules.speculative import source_name
from offramp.runtime.sampling import LOWEST_LOGPROB, Sampling
from offramp.runtime.text_chunks import TextChunk, repeated_tokens

OPTIONS = ("max_new_tokens", "stop")  # keys that a JSON line may have in addition to its prompt
SAMPLING_OPTIONS = tuple(field.name for field in fields(Sampling))  # and these
CHAT_OPTIONS = ("tools", "chat_template", "chat_template_kwargs")  # and in addition to its messages
AHEAD = 16  # times the batch size: lines that are read before the oldest of them is answered, at most


def write_answers(
    session: TextGenerator,
    lines: Iterator[Line],
    out: Output,
    *,
    max_new_tokens: int,
    as_it_comes: bool,
    sampling: Sampling | None = None,
    batch_size: int = 1,
) -> tuple[int, str]:
    """Answer prompts in the order of the lines; returns the number of lines with errors, and a report.

    max_new_tokens, sampling: for lines that do not set them; with a seed, the line with number n has the seed
    seed + n - 1. as_it_comes: write plain text, chunk by chunk. If answers end in a loop (see
    repeated_tokens), a line on stderr says at the end how many. batch_size: texts that are generated at once;
    more than one cannot be written as they come.
    """
    failed = answers = tokens = depth = blocks_run = loops = 0
    started = time.perf_counter()
    common = sampling or Sampling()
    if batch_size > 1 and not as_it_comes:
        replies = _together(session, lines, max_new_tokens, common, batch_size)
    else:
        shown = out if as_it_comes else None
        replies = _one_by_one(session, lines, max_new_tokens, common, shown)
    for reply in replies:
        if reply.problem is not None:
            failed += 1
            out.write({"error": str(reply.problem), "line": reply.line.number}, flush=True)
            continue
        chunks = reply.chunks
        answer = _answer(session, chunks, reply.sampling)
        answers, tokens = answers + 1, tokens + len(chunks)
        depth += sum(chunk.depth for chunk in chunks)
        blocks_run += sum(chunk.blocks_run for chunk in chunks)
        loops += answer["repeated_tokens"] > 0
        if not as_it_comes:
            out.write(answer, flush=True)
    if loops:
        click.echo(
            f"ee-run: {loops} of {answers} answers end in a loop, the same tokens again and again until the "
            "limit; see repeated_tokens in docs/decoders.md",
            err=True,
        )
    rate = tokens / max(time.perf_counter() - started, 1e-9)
    report = [f"answers    {answers}, {failed} with errors", f"tokens     {tokens} ({rate:.1f}/s)"]
    if tokens:
        means = depth / tokens, blocks_run / tokens
        report.append(
            f"mean depth {means[0]:.2f} of {session.manifest.blocks}, {means[1]:.2f} blocks run a token"
        )
    return failed, "\n".join([*report, *_draft_lines(session)])


@dataclass
class _Reply:
    """A line and its answer: chunks, or the error in their place; whether all of it is there."""

    line: Line
    sampling: Sampling
    chunks: list[TextChunk] = field(default_factory=list)
    problem: BadInput | None = None
    is_done: bool = False


def _one_by_one(
    session: TextGenerator,
    lines: Iterator[Line],
    max_new_tokens: int,
    sampling: Sampling,
    out: Output | None,
) -> Iterator[_Reply]:
    """Answer each line before the next one is read, and write its chunks to `out`, if given, as they come."""
    for line in lines:
        reply = _Reply(line, sampling)
        try:
            prompt, options = _options(line, max_new_tokens, sampling)
            reply.sampling = options["sampling"]
            reply.chunks = _collect(session.generate(prompt, **options), out)
        except BadInput as problem:
            reply.problem = problem
        yield reply


def _together(
    session: TextGenerator, lines: Iterator[Line], max_new_tokens: int, sampling: Sampling, batch_size: int
) -> Iterator[_Reply]:
    """Answer up to `batch_size` lines at once; gives the answers in the order of the lines.

    A line is read when there is a place for it. Answers that are complete wait for earlier lines: not more
    than AHEAD batches of them, so that memory does not grow with the number of lines.
    """
    batch, pending, texts = session.open_batch(batch_size), deque[_Reply](), dict[int, _Reply]()
    has_more = True
    while True:
        while has_more and len(texts) < batch_size and len(pending) < AHEAD * batch_size:
            if (line := next(lines, None)) is None:
                has_more = False
                break
            pending.append(reply := _Reply(line, sampling))
            try:
                prompt, options = _options(line, max_new_tokens, sampling)
                reply.sampling, stop = options.pop("sampling"), options.pop("stop")
                count = options.pop("max_new_tokens")
                ids = session.encode_prompt(prompt, **options)
            except BadInput as problem:
                reply.problem, reply.is_done = problem, True
                continue
            texts[batch.add(ids, count, stop, reply.sampling)] = reply
        while pending and pending[0].is_done:
            yield pending.popleft()
        if not pending and not has_more:
            batch.close()
            return
        for number, result in batch.advance():
            reply = texts[number]
            if isinstance(result, BadInput):
                reply.problem = result
            elif isinstance(result, Exception):
                raise result
            else:
                reply.chunks.append(result)
            if reply.problem is not None or reply.chunks[-1].ended is not None:
                reply.is_done = True
                del texts[number]


def _draft_lines(session: TextGenerator) -> list[str]:
    """Lines of the report about drafts, one for each source that made drafts."""
    stats = session.draft_stats
    if stats is None:
        return []
    lines = [f"undrafted  {stats.rounds[0]} steps without a draft"]
    for source, offered in stats.offered.items():
        if offered:
            rounds, accepted = stats.rounds[source], stats.accepted[source] / offered
            name = f"{source_name(source):10}"
            lines.append(f"{name} {offered} drafts in {rounds} rounds, {accepted:.1%} accepted")
    return lines


def _options(line: Line, max_new_tokens: int, sampling: Sampling) -> tuple[Any, dict[str, Any]]:
    """The prompt and options of a line for TextGenerator.generate; raises BadInput for unknown options."""
    if line.problem is not None:
        raise BadInput(line.problem)
    keys = dict(line.others or {})
    prompt: Any = line.text
    if not line.text and not isinstance(prompt := keys.pop("messages", None), list):
        raise BadInput(f"messages: expected a list of them, found {prompt!r:.40}")
    count, stop = keys.pop("max_new_tokens", max_new_tokens), keys.pop("stop", [])
    given = {name: keys.pop(name) for name in SAMPLING_OPTIONS if name in keys}
    chat: dict[str, Any] = {}
    if not line.text:
        arguments = keys.pop("chat_template_kwargs", None) or {}
        if not isinstance(arguments, dict):
            raise BadInput(f"chat_template_kwargs: expected an object, found {arguments!r:.40}")
        if (tools := keys.pop("tools", None)) is not None:
            arguments = {**arguments, "tools": tools}
        template = keys.pop("chat_template", None)
        if not isinstance(template, (str, type(None))):
            raise BadInput(f"chat_template: expected the name of a template, found {template!r:.40}")
        chat = {"template": template, "template_arguments": arguments}
    elif for_messages := [key for key in CHAT_OPTIONS if key in keys]:
        raise BadInput(f"{for_messages[0]}: it is for messages, and this line has a prompt")
    if keys:
        raise BadInput(
            f"{next(iter(keys))!r}: a line has prompt or messages, {' and '.join(OPTIONS)}; "
            f"{', '.join(SAMPLING_OPTIONS)}; with messages also {', '.join(CHAT_OPTIONS)}"
        )
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise BadInput(f"max_new_tokens: expected a whole number from 1, found {count!r:.40}")
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(word, str) and word for word in stop):
        raise BadInput(f"stop: expected a string or a list of strings, found {stop!r:.40}")
    chosen = _sampling(given, sampling, line.number)
    return prompt, {"max_new_tokens": count, "stop": stop, "sampling": chosen, **chat}


def _sampling(given: dict[str, Any], default: Sampling, number: int) -> Sampling:
    """The sampling of a line: its own fields, and the default for the others; see write_answers."""
    given = {name: value for name, value in given.items() if value is not None}
    if default.seed is not None:
        given.setdefault("seed", (default.seed + number - 1) % 2**64)
    try:
        return replace(default, **given).seeded()
    except BadSetting as problem:
        raise BadInput(str(problem)) from None


def _collect(chunks: Iterator[TextChunk], out: Output | None) -> list[TextChunk]:
    """Collect all chunks, and write each to `out`, if given, as soon as it exists."""
    collected = []
    for chunk in chunks:
        collected.append(chunk)
        if out is not None:
            out.write_text(chunk.text, flush=True)
    if out is not None:
        out.write_text("\n", flush=True)
    return collected


def _answer(session: TextGenerator, chunks: Sequence[TextChunk], sampling: Sampling) -> dict[str, Any]:
    seconds, tokens, ended = chunks[-1].seconds, len(chunks), chunks[-1].ended
    answer = {
        "text": "".join(chunk.text for chunk in chunks),
        "tokens": tokens,
        "depth": round(sum(chunk.depth for chunk in chunks) / tokens, 3),
        "blocks_run": round(sum(chunk.blocks_run for chunk in chunks) / tokens, 3),
        "ms": round(1e3 * seconds, 3),
        "first_ms": round(1e3 * chunks[0].seconds, 3),
        "tokens_per_s": round(tokens / max(seconds, 1e-9), 3),
        "ended": ended,
        "repeated_tokens": 0 if ended == STOP else repeated_tokens([chunk.token for chunk in chunks]),
    }
    if sampling.is_drawn:
        answer["seed"] = sampling.seed
    if sampling.logprobs is not None:
        answer["logprobs"] = [_logprobs(session, chunk, sampling.logprobs) for chunk in chunks]
    return answer


def _logprobs(session: TextGenerator, chunk: TextChunk, count: int) -> dict[str, Any]:
    """The log-probability of a token and, if they were asked for, of the most probable ones."""
    assert chunk.logprob is not None
    value = _with_logprob(session, chunk.token, chunk.logprob)
    if count:
        value["top_logprobs"] = [_with_logprob(session, *pair) for pair in chunk.top_logprobs]
    return value


def _with_logprob(session: TextGenerator, id: int, logprob: float) -> dict[str, Any]:
    return {"token": id, "text": session.token_text(id), "logprob": round(max(logprob, LOWEST_LOGPROB), 6)}
