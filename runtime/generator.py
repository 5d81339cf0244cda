"""TextGenerator, the session of a bundle that generates text from prompts, token by token."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from offramp.runtime.batching import MOST_TEXTS, TEXTS, DecodingLoop
from offramp.runtime.bundle.files import Bundle
from offramp.runtime.bundle.manifest import TextInput
from offramp.runtime.decoding import Token, decode
from offramp.runtime.engines.base import Engine
from offramp.runtime.errors import BadInput, BadSetting, ItemError, SessionForked, WrongTask
from offramp.runtime.inputs.chat import ChatTemplate, Message
from offramp.runtime.inputs.text import encode_prompt
from offramp.runtime.rules.base import Rule
from offramp.runtime.rules.speculative import SpeculativeRule
from offramp.runtime.sampling import Sampling
from offramp.runtime.sequence import TokenSequence
from offramp.runtime.session import Session
from offramp.runtime.text_batch import TextBatch
from offramp.runtime.text_chunks import AnswerText, TextChunk

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_NEW_TOKENS = 64  # tokens of an answer at most, by default


class TextGenerator(Session[TokenSequence]):
    """A session that generates text; load() returns it for a decoder's bundle.

    Texts of several threads are generated in turn, token by token.
    """

    usage = "this bundle generates text: call generate(prompt), one prompt after another"

    def __init__(
        self, bundle: Bundle, engine: Engine[TokenSequence], tokenizer: Tokenizer, rule: Rule, variant: str
    ) -> None:
        super().__init__(bundle, engine, rule, variant)
        assert isinstance(self.manifest.input, TextInput) and self.manifest.decoder is not None
        self._tokenizer = tokenizer
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
        sampling: Sampling | None = None,
        template: str | None = None,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> Iterator[TextChunk]:
        """Generate a continuation of a prompt, one chunk for each token: the most probable one by default.

        prompt: a text, or messages {role, content}, from which the bundle's chat template makes a text.
        sampling: how tokens are chosen; None: the most probable one at each position.
        template, template_arguments: for messages, the name of a chat template and further values for it,
        such as tools or enable_thinking; see ChatTemplate. The answer ends at a stop token of the bundle
        (with an empty chunk), before the first of `stop` (a string or several) in the text, after
        max_new_tokens, or at the longest sequence of the network. Raises BadInput for other prompts and for
        prompts that are too long, BadSetting if there is no template, SessionClosed.
        """
        words = _checked_stop(max_new_tokens, stop)
        ids = self.encode_prompt(prompt, template=template, template_arguments=template_arguments)
        tokens = self.tokens(ids, max_new_tokens, sampling=sampling)
        return self._chunks(tokens, words)

    def generate_many(
        self,
        prompts: Iterable[str | Sequence[Message]],
        max_new_tokens: int = MAX_NEW_TOKENS,
        stop: str | Sequence[str] = (),
        *,
        batch_size: int = TEXTS,
        sampling: Sampling | None = None,
        template: str | None = None,
        template_arguments: Mapping[str, Any] | None = None,
        prefix_cache: bool = True,
    ) -> Iterator[tuple[int, TextChunk | ItemError]]:
        """Generate continuations of many prompts at once, up to `batch_size`, whose tokens share steps.

        Gives the number of a prompt (0-based) with each chunk of its text, in the order in which they come;
        an ItemError takes the place of a text that cannot be generated. prompts: read one by one, when there
        is a place. The other arguments are those of generate, for every prompt; with a seed, prompt number n
        has the seed `seed + n`. prefix_cache: see open_batch. Raises BadSetting, SessionClosed.
        """
        words = _checked_stop(max_new_tokens, stop)
        batch = self.open_batch(batch_size, prefix_cache=prefix_cache)
        options = {"template": template, "template_arguments": template_arguments}
        return self._many(batch, prompts, batch_size, max_new_tokens, words, sampling, options)

    def open_batch(self, batch_size: int = TEXTS, *, prefix_cache: bool = True) -> TextBatch:
        """Open a batch of at most `batch_size` texts, which prompts can join at any time; see TextBatch.

        prefix_cache: whether a prompt that begins with the tokens of an earlier one reads their cache, so
        that they are not run again.
        """
        is_count = isinstance(batch_size, int) and not isinstance(batch_size, bool)
        if not is_count or not 1 <= batch_size <= MOST_TEXTS:
            raise BadSetting(f"batch_size {batch_size!r:.40}: expected a whole number, 1 to {MOST_TEXTS}")
        loop = DecodingLoop(
            self.engine,
            [self._bound_rule],
            self.manifest,
            self._variant_number,
            limit=batch_size,
            prefix_cache=prefix_cache,
        )
        return TextBatch(partial(self.walking, self._forks), loop, self._tokenizer, self._stop_ids)

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

    def token_text(self, id: int) -> str:
        """The text that a token adds to an answer, a special one its name; U+FFFD: part of a character."""
        once, twice = (self._tokenizer.decode([id] * count, skip_special_tokens=False) for count in (1, 2))
        return str(twice[len(once) :])  # the first token of a text can lose its space

    def tokens(
        self,
        ids: Sequence[int],
        max_new_tokens: int,
        stop_ids: Collection[int] | None = None,
        *,
        sampling: Sampling | None = None,
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
            None if sampling is None else sampling.sampler(ids),
        )
        forks = self._forks
        while True:
            with self.walking(forks):
                token = next(tokens, None)
            if token is None:
                return
            yield token

    @contextmanager
    def walking(self, forks: int) -> Iterator[None]:
        """Context in which the engine is the caller's alone.

        forks: of the process, as the session counted them when the text began. Raises SessionClosed, and
        SessionForked if the process was forked since then.
        """
        with self._lock:
            self._check_open()
            if self._forks != forks:
                raise SessionForked(
                    "the process was forked while this text was generated; call generate again"
                )
            yield

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
        answer = AnswerText(self._tokenizer, self._stop_ids, stop)
        for token in tokens:
            chunk = answer.chunk(token)
            yield chunk
            if chunk.ended != token.ended:  # at a stop string
                return

    def _many(
        self,
        batch: TextBatch,
        prompts: Iterable[str | Sequence[Message]],
        batch_size: int,
        max_new_tokens: int,
        stop: Sequence[str],
        sampling: Sampling | None,
        template: Mapping[str, Any],
    ) -> Iterator[tuple[int, TextChunk | ItemError]]:
        """See generate_many; template: keywords of encode_prompt."""
        source, numbers = enumerate(prompts), dict[int, int]()  # numbers of prompts, by those of their texts
        # If it is left before the end, caches are freed with the batch: garbage collection may take no lock.
        while True:
            while len(numbers) < batch_size and (item := next(source, None)) is not None:
                number, prompt = item
                try:
                    ids = self.encode_prompt(prompt, **template)
                except BadInput as problem:
                    yield number, ItemError(number, str(problem))
                    continue
                text = batch.add(ids, max_new_tokens, stop, _numbered(sampling, number))
                numbers[text] = number
            if not numbers:
                batch.close()
                return
            for text, result in batch.advance():
                number = numbers[text]
                if isinstance(result, Exception):
                    if not isinstance(result, BadInput):
                        raise result
                    del numbers[text]
                    yield number, ItemError(number, str(result))
                    continue
                if result.ended is not None:
                    del numbers[text]
                yield number, result


def _checked_stop(max_new_tokens: int, stop: str | Sequence[str]) -> list[str]:
    """The stop strings as a list; raises BadSetting for a wrong max_new_tokens or stop."""
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise BadSetting(f"max_new_tokens {max_new_tokens!r:.40}: expected a whole number, 1 or more")
    words = [stop] if isinstance(stop, str) else stop
    if not isinstance(words, Sequence) or not all(isinstance(word, str) for word in words):
        raise BadSetting(f"stop {stop!r:.40}: expected a string or a list of strings")
    return [word for word in words if word]


def _numbered(sampling: Sampling | None, number: int) -> Sampling | None:
    """The sampling of one of many prompts: with a seed of its own if there is one."""
    if sampling is None or sampling.seed is None:
        return sampling
    return replace(sampling, seed=(sampling.seed + number) % 2**64)
