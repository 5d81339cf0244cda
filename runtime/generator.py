"""A session over a decoder's bundle: prompts in, text out, token by token."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from offramp.runtime.bundle.files import Bundle
from offramp.runtime.bundle.manifest import RuleSpec, TextInput
from offramp.runtime.classifier import Session
from offramp.runtime.engines.ort import imported
from offramp.runtime.engines.ort_decoder import DecoderEngine
from offramp.runtime.engines.threads import claim
from offramp.runtime.errors import BadBundle, BadSetting
from offramp.runtime.generate import Chooser, Token, Way, generate
from offramp.runtime.inputs.chat import Message, chat_of
from offramp.runtime.rules.speculative import Drafting
from offramp.runtime.ways import choose_rule, way_of

MOST = 64  # tokens of an answer where nothing else is wished


@dataclass(frozen=True)
class Piece:
    """What one more token adds to the text, which may be nothing yet.

    depth, ran, drafted: see generate.Token. seconds: from the start of the prompt until it was there. token
    -1: none, the end of what was held back.
    """

    text: str
    token: int
    depth: int
    seconds: float
    ran: int = 0
    drafted: bool = False


class Writer(Session):
    """Generates text; made by load() of a decoder's bundle. Any thread may call it: texts take turns, token
    by token.
    """

    def __init__(
        self, bundle: Bundle, engine: DecoderEngine, variant: str, rule: RuleSpec, way: Way | Chooser
    ) -> None:
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
        unlike: Any = engine
        super().__init__(bundle, unlike, unlike, RuleSpec("never", {}), variant, 1)
        self.rule, self._folder = rule, bundle.folder
        self._writes, self._way, self._chat = engine, way, chat_of(bundle)

    def continued(self, text: str) -> list[int]:
        """Token ids of a text that goes on from another."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    @property
    def longest(self) -> int:
        """Tokens that the network reads, prompt and answer together."""
        reads = self.manifest.input
        assert isinstance(reads, TextInput)
        return reads.longest

    @property
    def decoder(self) -> DecoderEngine:
        """What runs the graphs."""
        return self._writes

    @property
    def way(self) -> Way | Chooser:
        """How tokens behind the first come about."""
        return self._way

    @property
    def folder(self) -> Path:
        """The bundle's."""
        return self._folder

    @property
    def drafting(self) -> Drafting | None:
        """What became of drafts so far, where the rule makes some."""
        return self._way if isinstance(self._way, Drafting) else None

    def generate(
        self, prompt: str | Sequence[Message], max_new_tokens: int = MOST, stop: Sequence[str] = ()
    ) -> Iterator[Piece]:
        """The likeliest continuation of a prompt, piece by piece, as it is made.

        prompt: a text, or messages {role, content}, which the bundle's chat template makes one of. It ends at
        a token that the bundle names (which gives an empty piece), before the first of `stop` in the text,
        after max_new_tokens, or where the network reads no further. Raises BadInput for what is neither or is
        too long, BadSetting where there is no template, SessionClosed.
        """
        if max_new_tokens < 1:
            raise BadSetting(f"max_new_tokens {max_new_tokens}: expected 1 or more")
        ids = self.ids_of(prompt)
        tokens = generate(self._writes, ids, max_new_tokens, way=self._way)
        return self._pieces(tokens, [word for word in stop if word])

    def ids_of(self, prompt: str | Sequence[Message]) -> list[int]:
        """Token ids of a prompt; raises as generate does."""
        if isinstance(prompt, str):
            return list(self._tokenizer.encode(prompt).ids)
        # A template writes the marks of beginnings and ends itself.
        return list(self._tokenizer.encode(self._chat(prompt), add_special_tokens=False).ids)

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
                took = time.perf_counter() - started
                if token is None:
                    yield Piece(said[shown:end], -1, 0, took)
                else:
                    yield Piece(said[shown:end], token.id, token.depth, took, token.ran, token.drafted)
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
                ids = [0] * min(length, reads.longest - 1)
                for _ in generate(self._writes, ids, 2, stop=(), way=self._way):
                    pass


def open_writer(
    bundle: Bundle,
    wishes: Mapping[str, Any],
    *,
    variant: str | None,
    rule: str | RuleSpec | None,
    threshold: float | None,
    point: str | None,
    cache: str,
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
    spec = choose_rule(bundle.manifest, rule, threshold, point)
    way = way_of(bundle, spec, cache)  # before seconds go into opening graphs
    ort = imported("cpu")
    engine = DecoderEngine(ort, bundle, variant, claim(ort, threads, global_pool), share)
    return Writer(bundle, engine, variant, spec, way)
