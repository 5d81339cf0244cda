"""A session over a decoder's bundle: prompts in, text out, token by token."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from offramp.runtime.bundle import Bundle
from offramp.runtime.engines.decoder import DecoderEngine
from offramp.runtime.engines.ort import imported
from offramp.runtime.engines.threads import claim
from offramp.runtime.errors import BadBundle, BadInput, BadSetting
from offramp.runtime.generate import Token, generate
from offramp.runtime.manifest import RuleSpec, TextInput
from offramp.runtime.session import Session

MOST = 64  # tokens of an answer where nothing else is wished


@dataclass(frozen=True)
class Piece:
    """What one more token adds to the text, which may be nothing yet; depth: blocks run for it. seconds: from
    the start of the prompt until it was there. token -1: none, the end of what was held back.
    """

    text: str
    token: int
    depth: int
    seconds: float


class Writer(Session):
    """Generates text; made by load() of a decoder's bundle. One prompt at a time, any thread."""

    def __init__(self, bundle: Bundle, engine: DecoderEngine, variant: str) -> None:
        from tokenizers import Tokenizer  # here: `import offramp.runtime` stays light

        manifest = bundle.manifest
        assert isinstance(manifest.input, TextInput)  # the manifest was checked
        data = bundle.read(manifest.input.tokenizer)
        try:
            self._tokenizer: Tokenizer = Tokenizer.from_str(data.decode("utf-8"))
        except Exception as problem:  # tokenizers raises bare Exception
            path = bundle.folder / manifest.input.tokenizer
            raise BadBundle(f"{path}: not a tokenizer that `tokenizers` reads: {problem}") from problem
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        # Neither engine nor reader are those of a classifier; what would use them is refused below.
        never: Any = RuleSpec("never", {})
        unlike: Any = engine
        super().__init__(bundle, unlike, unlike, never, variant, 1)
        self._writes = engine

    def generate(self, prompt: str, max_new_tokens: int = MOST, stop: Sequence[str] = ()) -> Iterator[Piece]:
        """The likeliest continuation of a prompt, piece by piece, as it is made.

        It ends at a token that the bundle names (which gives an empty piece), before the first of `stop` in
        the text, after max_new_tokens, or where the network reads no further. Raises BadInput for what is no
        text or is too long, SessionClosed.
        """
        if not isinstance(prompt, str):
            raise BadInput(f"expected a string, found {prompt!r:.60}")
        if max_new_tokens < 1:
            raise BadSetting(f"max_new_tokens {max_new_tokens}: expected 1 or more")
        ids = self._tokenizer.encode(prompt).ids
        return self._pieces(generate(self._writes, ids, max_new_tokens), [word for word in stop if word])

    def _pieces(self, tokens: Iterator[Token], stop: Sequence[str]) -> Iterator[Piece]:
        facts = self.manifest.decoder
        assert facts is not None
        started, ids, shown = time.perf_counter(), list[int](), 0
        held = max((len(word) for word in stop), default=1) - 1  # characters that may begin one of them
        while True:
            with self._lock:
                self._check_open()
                token = next(tokens, None)
            over = token is None or token.id in facts.stop
            if token is not None and not over:
                ids.append(token.id)
            said = self._tokenizer.decode(ids, skip_special_tokens=True)
            if not over:
                said = said.rstrip("\ufffd")  # the first bytes of a character whose others are to come
            found = [at for word in stop if (at := said.find(word)) >= 0]
            end = min(found) if found else len(said) if over else max(shown, len(said) - held)
            if token is not None or end > shown:
                number, depth = (-1, 0) if token is None else (token.id, token.depth)
                yield Piece(said[shown:end], number, depth, time.perf_counter() - started)
            if found or over:
                return
            shown = end

    def __call__(self, text: Any, text_b: str | None = None) -> NoReturn:
        """Not of decoders: see generate."""
        raise BadSetting("this bundle generates text: call generate(prompt)")

    def map(self, items: Any, batch_size: int | None = None) -> NoReturn:
        """Not of decoders: see generate."""
        raise BadSetting("this bundle generates text: call generate(prompt), one prompt after another")

    def at_full_depth(self, items: Any, variant: str | None = None) -> NoReturn:
        """Not of decoders."""
        raise BadSetting("this bundle generates text: it has no exits that classify")

    def encode(self, text: Any, text_b: str | None = None) -> NoReturn:
        """Not of decoders: see generate."""
        raise BadSetting("this bundle generates text: call generate(prompt)")

    def warm_up(self, lengths: Sequence[int] = (16,), batch: int = 1) -> None:
        """Run a prompt of each of these lengths (tokens) and one token more."""
        reads = self.manifest.input
        assert isinstance(reads, TextInput)
        for length in lengths:
            with self._lock:
                self._check_open()
                for _ in generate(self._writes, [0] * min(length, reads.longest - 1), 2, stop=()):
                    pass


def open_writer(
    bundle: Bundle,
    wishes: Mapping[str, Any],
    *,
    variant: str | None,
    threads: int | None,
    global_pool: bool,
    share: bool,
) -> Writer:
    """The session of a decoder's bundle; wishes: the others of load(), which have to be its defaults.

    Raises BadSetting for a wish that decoders do not know, and what load() raises.
    """
    for name, (wish, usual) in wishes.items():
        if wish != usual:
            raise BadSetting(f"{name} {wish}: a bundle that generates text does not know this wish yet")
    known = bundle.manifest.variants
    variant = known[0] if variant is None else variant
    if variant not in known:
        raise BadSetting(f"variant {variant!r} is not in {bundle.folder}; it offers: {', '.join(known)}")
    ort = imported("cpu")
    return Writer(
        bundle, DecoderEngine(ort, bundle, variant, claim(ort, threads, global_pool), share), variant
    )
