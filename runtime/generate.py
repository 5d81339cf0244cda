"""Generation: one token after another, each with the depth at which it was said."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from offramp.runtime.engines.decoder import DecoderEngine
from offramp.runtime.errors import BadInput


@dataclass(frozen=True)
class Token:
    """A token that was generated; depth: blocks that were run for it."""

    id: int
    depth: int


def generate(
    engine: DecoderEngine, ids: Sequence[int], most: int, stop: Sequence[int] | None = None
) -> Iterator[Token]:
    """The likeliest token each time, at full depth, until one of `stop` (None: the bundle's own; the token is
    given too), `most` tokens, or the end of what the network reads.

    Raises BadInput for a prompt without tokens or one that is too long.
    """
    facts = engine.manifest.decoder
    assert facts is not None
    if not len(ids):
        raise BadInput("the prompt has no token")
    ends = set(facts.stop if stop is None else stop)
    cache, segments, depth = engine.cache(), range(len(engine.manifest.segments)), engine.manifest.blocks
    given: Sequence[int] = ids
    for _ in range(most):
        if cache.length and cache.length + len(given) > cache.longest:
            return
        state = engine.begin(given, cache)
        for segment in segments:
            engine.step(segment, state)
        token = int(engine.logits(state).argmax())
        engine.keep(state)
        yield Token(token, depth)
        if token in ends:
            return
        given = [token]
