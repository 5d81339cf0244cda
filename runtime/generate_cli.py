"""ee-run with a bundle that generates text: read prompts, write JSON lines or, on a terminal, plain text."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import click

from offramp.runtime.decoding import STOP
from offramp.runtime.errors import BadInput
from offramp.runtime.generator import TextChunk, TextGenerator, repeated_tokens
from offramp.runtime.inputs.lines import Line
from offramp.runtime.output import Output

OPTIONS = ("max_new_tokens", "stop")  # keys that a JSON line may have in addition to its prompt
CHAT_OPTIONS = ("tools", "chat_template", "chat_template_kwargs")  # and in addition to its messages


def write_answers(
    session: TextGenerator, lines: Iterator[Line], out: Output, *, max_new_tokens: int, as_it_comes: bool
) -> tuple[int, str]:
    """Answer prompts one after another; returns the number of lines with errors, and a report.

    max_new_tokens: limit for lines that do not set it. as_it_comes: write plain text, chunk by chunk. If
    answers end in a loop (see repeated_tokens), a line on stderr says at the end how many.
    """
    failed = answers = tokens = depth = blocks_run = loops = 0
    started = time.perf_counter()
    for line in lines:
        try:
            if line.problem is not None:
                raise BadInput(line.problem)
            prompt, options = _options(line, max_new_tokens)
            chunks = _collect(session.generate(prompt, **options), out if as_it_comes else None)
        except BadInput as problem:
            failed += 1
            out.write({"error": str(problem), "line": line.number}, flush=True)
            continue
        answer = _answer(chunks)
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


def _draft_lines(session: TextGenerator) -> list[str]:
    """Lines of the report about drafts, one for each exit that made drafts."""
    stats = session.draft_stats
    if stats is None:
        return []
    lines = [f"undrafted  {stats.rounds[0]} steps without a draft"]
    for exit, offered in stats.offered.items():
        if offered:
            rounds, accepted = stats.rounds[exit], stats.accepted[exit] / offered
            lines.append(f"exit {exit:<5} {offered} drafts in {rounds} rounds, {accepted:.1%} accepted")
    return lines


def _options(line: Line, max_new_tokens: int) -> tuple[Any, dict[str, Any]]:
    """The prompt and options of a line for TextGenerator.generate; raises BadInput for unknown options."""
    keys = dict(line.others or {})
    prompt: Any = line.text
    if not line.text and not isinstance(prompt := keys.pop("messages", None), list):
        raise BadInput(f"messages: expected a list of them, found {prompt!r:.40}")
    count, stop = keys.pop("max_new_tokens", max_new_tokens), keys.pop("stop", [])
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
            f"{next(iter(keys))!r}: a line has prompt or messages, {' and '.join(OPTIONS)}; with messages "
            f"also {', '.join(CHAT_OPTIONS)}"
        )
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise BadInput(f"max_new_tokens: expected a whole number from 1, found {count!r:.40}")
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(word, str) and word for word in stop):
        raise BadInput(f"stop: expected a string or a list of strings, found {stop!r:.40}")
    return prompt, {"max_new_tokens": count, "stop": stop, **chat}


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


def _answer(chunks: Sequence[TextChunk]) -> dict[str, Any]:
    seconds, tokens, ended = chunks[-1].seconds, len(chunks), chunks[-1].ended
    return {
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
