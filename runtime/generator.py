"""TextGenerator, the session of a bundle that generates text from prompts, token by token."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from offramp.runtime.bundle.files import Bundle
from offramp.runtime.bundle.manifest import TextInput
from offramp.runtime.decoding import STOP, Token, decode
from offramp.runtime.engines.base import Engine
from offramp.runtime.errors import BadInput, BadSetting, SessionForked, WrongTask
from offramp.runtime.inputs.chat import ChatTemplate, Message
from offramp.runtime.inputs.text import encode_prompt, open_tokenizer
from offramp.runtime.rules.base import Rule
from offramp.runtime.rules.speculative import SpeculativeRule
from offramp.runtime.sequence import TokenSequence
from offramp.runtime.session import Session

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_NEW_TOKENS = 64  # tokens of an answer at most, by default
LEAST_COPIES, LEAST_LOOP = 3, 24  # of a loop at the end of an answer: copies of its tokens, and tokens in all


@dataclass(frozen=True)
class TextChunk:
    """The text that one token adds to an answer, which may be empty.

    token: its id. depth, blocks_run, drafted: see decoding.Token. seconds: from the start of the prompt until
    the chunk existed. ended: on the last chunk why the answer ended, None before: "stop" (a stop token of the
    bundle, or a stop string), "length" (max_new_tokens), "context" (the longest sequence of the network).
    """

    text: str
    token: int
    depth: int
    seconds: float
    blocks_run: int = 0
    drafted: bool = False
    ended: str | None = None


class TextGenerator(Session[TokenSequence]):
    """A session that generates text; load() returns it for a decoder's bundle.

    Texts of several threads are generated in turn, token by token.
    """

    usage = "this bundle generates text: call generate(prompt), one prompt after another"

    def __init__(self, bundle: Bundle, engine: Engine[TokenSequence], rule: Rule, variant: str) -> None:
        super().__init__(bundle, engine, rule, variant)
        assert isinstance(self.manifest.input, TextInput) and self.manifest.decoder is not None
        self._tokenizer = open_tokenizer(bundle, self.manifest.input)
        self._chat_prompt = ChatTemplate(bundle)
        self._stop_ids = frozenset(self.manifest.decoder.stop)
        self._longest = self.manifest.input.longest

    @property
    def longest(self) -> int:
        """Most tokens that the network can read, prompt and answer together."""
        return self._longest

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens of the bundle at which an answer ends."""
        return self._stop_ids

    @property
    def bound_rule(self) -> Rule:
        """The rule of the session; rule speculative keeps its statistics in it."""
        return self._bound_rule

    @property
    def draft_stats(self) -> SpeculativeRule | None:
        """Statistics of drafts so far: offered, accepted and rounds by exit; None for other rules."""
        return self._bound_rule if isinstance(self._bound_rule, SpeculativeRule) else None

    def generate(
        self,
        prompt: str | Sequence[Message],
        max_new_tokens: int = MAX_NEW_TOKENS,
        stop: str | Sequence[str] = (),
        *,
        template: str | None = None,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> Iterator[TextChunk]:
        """Generate the most probable continuation of a prompt, one chunk for each token.

        prompt: a text, or messages {role, content}, from which the bundle's chat template makes a text.
        template, template_arguments: for messages, the name of a chat template and further values for it,
        such as tools or enable_thinking; see ChatTemplate. The answer ends at a stop token of the bundle
        (with an empty chunk), before the first of `stop` (a string or several) in the text, after
        max_new_tokens, or at the longest sequence of the network. Raises BadInput for other prompts and for
        prompts that are too long, BadSetting if there is no template, SessionClosed.
        """
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise BadSetting(f"max_new_tokens {max_new_tokens!r:.40}: expected a whole number, 1 or more")
        words = [stop] if isinstance(stop, str) else stop
        if not isinstance(words, Sequence) or not all(isinstance(word, str) for word in words):
            raise BadSetting(f"stop {stop!r:.40}: expected a string or a list of strings")
        ids = self.encode_prompt(prompt, template=template, template_arguments=template_arguments)
        tokens = self.tokens(ids, max_new_tokens)
        return self._chunks(tokens, [word for word in words if word])

    def __call__(self, *items: object) -> NoReturn:
        """Raise WrongTask: a text generator is not called, see generate."""
        raise WrongTask(f"call: {self.usage}")

    @property
    def templates(self) -> tuple[str, ...]:
        """Names of the bundle's chat templates, "default" first if it has a default."""
        return self._chat_prompt.names

    def encode_prompt(
        self,
        prompt: str | Sequence[Message],
        *,
        template: str | None = None,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Convert a prompt to token ids; see generate, whose errors it raises."""
        if isinstance(prompt, str):
            if template is not None or template_arguments:
                raise BadInput(
                    "chat templates and their arguments are for messages, and the prompt is a text"
                )
            return encode_prompt(self._tokenizer, prompt)
        text = self._chat_prompt(prompt, template=template, arguments=template_arguments)
        # A chat template writes special tokens at beginnings and ends itself.
        return encode_prompt(self._tokenizer, text, special_tokens=False)

    @property
    def added_tokens(self) -> dict[int, str]:
        """Texts, by id, of the tokens that were added to the vocabulary, such as those that end a turn."""
        return {id: token.content for id, token in self._tokenizer.get_added_tokens_decoder().items()}

    def encode_continuation(self, text: str) -> list[int]:
        """Convert a text that continues another text to token ids, without special tokens."""
        return encode_prompt(self._tokenizer, text, special_tokens=False)

    def tokens(
        self, ids: Sequence[int], max_new_tokens: int, stop_ids: Collection[int] | None = None
    ) -> Iterator[Token]:
        """Generate tokens after a prompt given as ids; see decode(). stop_ids None: the bundle's."""
        stops = self._stop_ids if stop_ids is None else frozenset(stop_ids)
        tokens = decode(
            self.engine,
            self._bound_rule,
            self.manifest,
            self._variant_number,
            ids,
            max_new_tokens,
            stops,
        )
        forks = self._forks
        while True:
            with self._lock:
                self._check_open()
                if self._forks != forks:
                    raise SessionForked(
                        "the process was forked while this text was generated; call generate again"
                    )
                token = next(tokens, None)
            if token is None:
                return
            yield token

    def close(self) -> None:
        """Close the session, free its engine, and end the process of the chat template."""
        super().close()
        self._chat_prompt.close()

    def warm_up(self, lengths: Sequence[int] = (16,), batch: int = 1) -> None:
        """Run a prompt of each of these lengths (tokens) and a further token, to make later calls fast."""
        if bad := [length for length in lengths if length < 1]:
            raise BadSetting(f"length {bad[0]}: expected 1 or more")
        for length in lengths:
            for _ in self.tokens([0] * min(length, self._longest - 1), 2, ()):
                pass

    def _chunks(self, tokens: Iterator[Token], stop: Sequence[str]) -> Iterator[TextChunk]:
        text, emitted, started = _DecodedText(self._tokenizer), 0, time.perf_counter()
        held_back = (
            max((len(word) for word in stop), default=1) - 1
        )  # characters that may be the start of a stop string
        for token in tokens:
            is_over = token.ended is not None
            if token.id not in self._stop_ids:
                text.add(token.id)
            answer = text.all() if is_over else text.complete()
            stops = [at for word in stop if (at := answer.find(word, emitted)) >= 0]
            end = min(stops) if stops else len(answer) if is_over else max(emitted, len(answer) - held_back)
            seconds, ended = time.perf_counter() - started, STOP if stops else token.ended
            yield TextChunk(
                answer[emitted:end],
                token.id,
                token.depth,
                seconds,
                token.blocks_run,
                token.drafted,
                ended,
            )
            if stops:
                return
            emitted = end


def repeated_tokens(ids: Sequence[int]) -> int:
    """How many tokens at the end of an answer only repeat those before them; 0 if it does not end in a loop.

    An answer ends in a loop if its last tokens are LEAST_COPIES or more copies of the same tokens, of which
    one may be cut off at the end of the answer, and LEAST_LOOP tokens or more in all. The first copy does not
    count as repeated.
    """
    reverse, count = list(reversed(ids)), len(ids)
    # matches[shift]: so many tokens at the end equal those `shift` places before (Z-function of the reverse)
    matches, begin, end = [0] * count, 0, 0
    for shift in range(1, count):
        length = min(end - shift, matches[shift - begin]) if shift < end else 0
        while shift + length < count and reverse[length] == reverse[shift + length]:
            length += 1
        matches[shift] = length
        if shift + length > end:
            begin, end = shift, shift + length
    loops = (
        matches[size]
        for size in range(1, count // LEAST_COPIES + 1)
        if size + matches[size] >= max(LEAST_COPIES * size, LEAST_LOOP)
    )
    return max(loops, default=0)


class _DecodedText:
    """Decodes tokens one by one, each with the few tokens before it on which its text may depend.

    Decoding all tokens again for each new token takes time that grows with the square of the length.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._text = ""  # text of all tokens before self._end
        self._ids: list[int] = []
        self._begin = self._end = 0  # the last tokens that ended with a complete character

    def add(self, id: int) -> None:
        """Add a token."""
        self._ids.append(id)

    def complete(self) -> str:
        """The text so far, without the bytes of an incomplete last character."""
        new_text = self._new_text()
        if not new_text:
            return self._text  # the last token with text stays in the window: a space may depend on it
        if new_text.endswith("\ufffd"):
            return self._text + new_text.rstrip("\ufffd")
        self._text += new_text
        self._begin, self._end = self._end, len(self._ids)
        return self._text

    def all(self) -> str:
        """The text of all tokens so far."""
        return self._text + self._new_text()

    def _new_text(self) -> str:
        if self._end == len(self._ids):
            return ""
        known = self._decode(self._ids[self._begin : self._end])
        return self._decode(self._ids[self._begin :])[len(known) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)) if ids else ""
