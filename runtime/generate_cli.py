"""ee-run on a bundle that generates: prompts in, JSON lines out, or on a terminal the text itself."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import IO, Any

from offramp.runtime.classifier import Session
from offramp.runtime.errors import BadInput
from offramp.runtime.generator import Piece, Writer
from offramp.runtime.inputs.lines import Line

KNOWN = ("max_new_tokens", "stop")  # what a JSON line may wish beside its prompt


def write_answers(
    session: Session, lines: Iterator[Line], out: IO[bytes], *, most: int, as_it_comes: bool
) -> tuple[int, str]:
    """Answer every prompt before the next is read; gives how many lines had errors, and a report.

    most: tokens of an answer whose line does not say. as_it_comes: plain text, piece by piece.
    """
    failed = answers = tokens = blocks = ran = 0
    started = time.perf_counter()
    for line in lines:
        try:
            if line.problem is not None:
                raise BadInput(line.problem)
            prompt, wishes = _wishes(line, most)
            pieces = _shown(session.generate(prompt, **wishes), out if as_it_comes else None)
        except BadInput as problem:
            failed += 1
            _write(out, {"error": str(problem), "line": line.number})
            continue
        said = [piece for piece in pieces if piece.token >= 0]
        answers, tokens, blocks = answers + 1, tokens + len(said), blocks + sum(p.depth for p in said)
        ran += sum(p.ran for p in said)
        if not as_it_comes:
            _write(out, _answer(pieces, said))
    rate = tokens / max(time.perf_counter() - started, 1e-9)
    told = [f"answers    {answers}, {failed} with errors", f"tokens     {tokens} ({rate:.1f}/s)"]
    if tokens:
        depth, each = blocks / tokens, ran / tokens
        told.append(f"mean depth {depth:.2f} of {session.manifest.blocks}, {each:.2f} blocks run a token")
    return failed, "\n".join([*told, *_drafts(session)])


def _drafts(session: Session) -> list[str]:
    """What became of drafts, a line an exit that made some."""
    drafting = session.drafting if isinstance(session, Writer) else None
    if drafting is None:
        return []
    lines = [f"undrafted  {drafting.rounds[0]} steps without a draft"]
    for exit, offered in drafting.offered.items():
        if offered:
            rounds, right = drafting.rounds[exit], drafting.accepted[exit] / offered
            lines.append(f"exit {exit:<5} {offered} drafts in {rounds} rounds, {right:.1%} right")
    return lines


def _wishes(line: Line, most: int) -> tuple[Any, dict[str, Any]]:
    """What a line has for a prompt and what it wishes, as Session.generate takes them."""
    others = dict(line.others or {})
    prompt: Any = line.text
    if not line.text and not isinstance(prompt := others.pop("messages", None), list):
        raise BadInput(f"messages: expected a list of them, found {prompt!r:.40}")
    count, stop = others.pop("max_new_tokens", most), others.pop("stop", [])
    if others:
        raise BadInput(f"{next(iter(others))!r}: a line has prompt or messages, {' and '.join(KNOWN)}")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise BadInput(f"max_new_tokens: expected a whole number from 1, found {count!r:.40}")
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(word, str) and word for word in stop):
        raise BadInput(f"stop: expected a string or a list of strings, found {stop!r:.40}")
    return prompt, {"max_new_tokens": count, "stop": stop}


def _shown(pieces: Iterator[Piece], out: IO[bytes] | None) -> list[Piece]:
    found = []
    for piece in pieces:
        found.append(piece)
        if out is not None:
            out.write(piece.text.encode("utf-8"))
            out.flush()
    if out is not None:
        out.write(b"\n")
    return found


def _answer(pieces: list[Piece], said: list[Piece]) -> dict[str, Any]:
    seconds = pieces[-1].seconds
    return {
        "text": "".join(piece.text for piece in pieces),
        "tokens": len(said),
        "depth": round(sum(piece.depth for piece in said) / len(said), 3),
        "ran": round(sum(piece.ran for piece in said) / len(said), 3),
        "ms": round(1e3 * seconds, 3),
        "first_ms": round(1e3 * pieces[0].seconds, 3),
        "tokens_per_s": round(len(said) / max(seconds, 1e-9), 3),
    }


def _write(out: IO[bytes], value: dict[str, Any]) -> None:
    out.write(json.dumps(value, ensure_ascii=False).encode("utf-8") + b"\n")
    out.flush()
