"""Clients that users have already talk to ee-serve: OpenAI's own, and code that encodes sentences."""

from __future__ import annotations

import base64
import json
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from serving import Server, serving
from tiny_bundles import CLASSIFIER, EMBEDDING, GENERATOR, texts

from offramp.runtime import load, load_generator

openai = pytest.importorskip("openai")

KEY = "a-key-of-sixteen-or-more"
PROMPT = "the film was"
MESSAGES: list[Any] = [{"role": "user", "content": "was it good"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(GENERATOR, f"vectors={EMBEDDING}", f"labels={CLASSIFIER}", keys=frozenset({KEY})) as opened:
        yield opened


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Any]:
    with client_of(server) as opened:
        yield opened


def client_of(server: Server, key: str = KEY) -> Any:
    """OpenAI's client of a server; it asks once."""
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key=key, max_retries=0)


# text


def test_a_completion_has_its_text_reason_and_tokens(client: Any) -> None:
    with load_generator(GENERATOR) as session:
        chunks = list(session.generate(PROMPT, 5))
        prompt_tokens = len(session.encode_prompt(PROMPT))
    answer = client.completions.create(model="tiny_generator", prompt=PROMPT, max_tokens=5)
    assert answer.choices[0].text == "".join(chunk.text for chunk in chunks)
    assert answer.choices[0].finish_reason == "length" and answer.object == "text_completion"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt_tokens, 5)
    assert answer.usage.total_tokens == prompt_tokens + 5
    assert abs(answer.created - time.time()) < 60


def test_a_streamed_completion_is_the_same_and_ends_with_its_tokens(client: Any) -> None:
    asked = {"model": "tiny_generator", "prompt": PROMPT, "max_tokens": 6}
    whole = client.completions.create(**asked)
    *parts, last = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    assert parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert all(part.usage is None for part in parts) and last.choices == []
    assert last.usage == whole.usage


@pytest.mark.slow
def test_a_chat_is_answered(client: Any) -> None:
    pytest.importorskip("jinja2")
    with load_generator(GENERATOR) as session:
        expected = "".join(chunk.text for chunk in session.generate(MESSAGES, 6))
        prompt_tokens = len(session.encode_prompt(MESSAGES))
    answer = client.chat.completions.create(
        model="tiny_generator", messages=MESSAGES, max_completion_tokens=6, temperature=0
    )
    message = answer.choices[0].message
    assert (message.role, message.content) == ("assistant", expected)
    assert answer.usage.prompt_tokens == prompt_tokens


def test_a_streamed_chat_is_the_same(client: Any) -> None:
    pytest.importorskip("jinja2")
    asked = {"model": "tiny_generator", "messages": MESSAGES, "max_tokens": 6}
    whole = client.chat.completions.create(**asked)
    parts = list(client.chat.completions.create(**asked, stream=True))
    assert parts[0].choices[0].delta.role == "assistant"
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text == whole.choices[0].message.content
    assert parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_a_drawn_completion_is_that_of_its_seed(client: Any) -> None:
    asked = {"model": "tiny_generator", "prompt": PROMPT, "max_tokens": 12, "temperature": 1.0, "top_p": 0.9}
    more = {"extra_body": {"top_k": 30, "min_p": 0.01, "repetition_penalty": 1.1}}
    texts = [client.completions.create(**asked, **more, seed=seed).choices[0].text for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_penalties_of_the_api_are_honoured(client: Any) -> None:
    asked = {"model": "tiny_generator", "prompt": PROMPT, "max_tokens": 40}
    plain = client.completions.create(**asked, frequency_penalty=0, presence_penalty=0).choices[0].text
    assert plain == client.completions.create(**asked).choices[0].text
    assert (
        client.completions.create(**asked, frequency_penalty=2, presence_penalty=2).choices[0].text != plain
    )


def test_logprobs_of_a_completion(client: Any) -> None:
    answer = client.completions.create(model="tiny_generator", prompt=PROMPT, max_tokens=5, logprobs=3)
    choice = answer.choices[0]
    logprobs = choice.logprobs
    assert len(logprobs.tokens) == 5 and logprobs.text_offset[0] == 0
    for place, token in zip(logprobs.text_offset, logprobs.tokens, strict=True):
        assert choice.text[place:].strip().startswith(token.strip())
    for token, logprob, top in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert top[token] == logprob == max(top.values()) < 0 and len(top) == 3


def test_logprobs_of_a_chat(client: Any) -> None:
    pytest.importorskip("jinja2")
    asked = {"model": "tiny_generator", "messages": MESSAGES, "max_tokens": 5, "seed": 1, "temperature": 1.0}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=4).choices[0]
    content = whole.logprobs.content
    assert "".join(entry.token for entry in content).strip() == whole.message.content.strip()
    assert all(bytes(entry.bytes).decode() == entry.token for entry in content)
    assert all(len(entry.top_logprobs) == 4 and entry.logprob < 0 for entry in content)
    parts = client.chat.completions.create(**asked, logprobs=True, top_logprobs=4, stream=True)
    choices = [part.choices[0] for part in parts]
    streamed = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    assert streamed == content
    assert (
        client.chat.completions.create(**asked, logprobs=True).choices[0].logprobs.content[0].top_logprobs
        == []
    )
    assert client.chat.completions.create(**asked).choices[0].logprobs is None


def test_the_asynchronous_client_streams(server: Server) -> None:
    import asyncio

    async def ask() -> str:
        address = f"http://127.0.0.1:{server.port}/v1"
        async with openai.AsyncOpenAI(base_url=address, api_key=KEY, max_retries=0) as client:
            stream = await client.completions.create(
                model="tiny_generator", prompt=PROMPT, max_tokens=4, stream=True
            )
            return "".join([part.choices[0].text async for part in stream])

    with load_generator(GENERATOR) as session:
        expected = "".join(chunk.text for chunk in session.generate(PROMPT, 4))
    assert asyncio.run(ask()) == expected


# models and errors


@contextmanager
def not_there() -> Iterator[None]:
    """Expects the client's error for a model that the server does not have."""
    reason = "model 'other': this server has tiny_generator, vectors, labels"
    with pytest.raises(openai.APIStatusError, match=reason) as refused:
        yield
    assert (refused.value.status_code, type(refused.value).__name__) == (404, "NotFoundError")


def test_models_are_listed_and_found_by_name(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny_generator", "vectors", "labels"]
    model = client.models.retrieve("labels")
    assert (model.id, model.object, model.owned_by) == ("labels", "model", "offramp")
    assert model.created > 0
    with not_there():
        client.models.retrieve("other")


def test_an_unknown_model_is_not_found(client: Any) -> None:
    with not_there():
        client.completions.create(model="other", prompt=PROMPT)
    with not_there():
        client.chat.completions.create(model="other", messages=MESSAGES, stream=True)


def test_a_wrong_key_is_an_authentication_error(server: Server) -> None:
    with (
        client_of(server, "another-key-of-sixteen") as client,
        pytest.raises(openai.AuthenticationError, match="send an API key"),
    ):
        client.models.list()


@pytest.mark.slow
def test_a_full_server_is_a_rate_limit_error() -> None:
    with (
        serving(GENERATOR, scheduling={"queue": 1}) as server,
        client_of(server) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        asked = {"model": "tiny_generator", "prompt": PROMPT, "max_tokens": 3}
        model = server.models.text(None)
        with model.session._lock:  # no token is computed
            first = pool.submit(client.completions.create, **asked)
            while not model.accepted:
                time.sleep(0.002)
            with pytest.raises(openai.RateLimitError) as refused:
                client.completions.create(**asked)
        assert int(refused.value.response.headers["retry-after"]) >= 1
        assert first.result().usage.completion_tokens == 3


@pytest.mark.slow
def test_the_client_asks_again_when_a_full_server_has_room() -> None:
    with serving(GENERATOR, scheduling={"queue": 1}) as server, ThreadPoolExecutor(2) as pool:
        address = f"http://127.0.0.1:{server.port}/v1"
        model, asked = server.models.text(None), {"model": "tiny_generator", "prompt": PROMPT}
        with openai.OpenAI(base_url=address, api_key="none", max_retries=3) as client:
            with model.session._lock:
                first = pool.submit(client.completions.create, **asked, max_tokens=2)
                while not model.accepted:
                    time.sleep(0.002)
                second = pool.submit(client.completions.create, **asked, max_tokens=2)
                time.sleep(0.1)
            assert first.result().choices[0].text == second.result().choices[0].text


REFUSED: dict[str, dict[str, Any]] = {
    "temperature": {"prompt": PROMPT, "temperature": 200},
    "best_of": {"prompt": PROMPT, "best_of": 3},
    "n": {"prompt": PROMPT, "n": 2},
    "prompt": {"prompt": [PROMPT, PROMPT]},
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_the_server_lacks_is_refused_by_its_field(client: Any, field: str) -> None:
    with pytest.raises(openai.BadRequestError, match=f"{field}"):
        client.completions.create(model="tiny_generator", **REFUSED[field])


# embeddings


def vectors(given: Sequence[str]) -> NDArray[np.float32]:
    """What the session of the bundle gives for some texts."""
    session: Any
    with load(EMBEDDING) as session:
        return np.array([answer.embedding for answer in session.map(given)], np.float32)


def test_the_client_asks_for_base64_by_default_and_reads_it(client: Any) -> None:
    given = texts(5, seed=3)
    answer = client.embeddings.create(model="vectors", input=given)
    assert [entry.index for entry in answer.data] == list(range(5))
    np.testing.assert_allclose([entry.embedding for entry in answer.data], vectors(given), atol=1e-5)


def test_base64_holds_every_bit_and_a_list_the_same_numbers(client: Any) -> None:
    coded = client.embeddings.create(model="vectors", input="good film", encoding_format="base64")
    plain = client.embeddings.create(model="vectors", input="good film", encoding_format="float")
    numbers = np.frombuffer(base64.b64decode(coded.data[0].embedding), "<f4")
    np.testing.assert_allclose(numbers, plain.data[0].embedding, atol=1e-6)


def test_usage_counts_the_tokens_that_were_read(client: Any) -> None:
    session: Any
    with load(EMBEDDING) as session:
        tokens = sum(row.length for row in session.read(["good film", "a warm plot"]))
    usage = client.embeddings.create(model="vectors", input=["good film", "a warm plot"]).usage
    assert (usage.prompt_tokens, usage.total_tokens) == (tokens, tokens)


def test_dimensions_are_those_of_the_bundle(client: Any) -> None:
    size = vectors(["good film"]).shape[1]
    answer = client.embeddings.create(model="vectors", input="good film", dimensions=size)
    assert len(answer.data[0].embedding) == size
    with pytest.raises(openai.BadRequestError, match=f"dimensions 3: .* have {size} numbers .* leave it out"):
        client.embeddings.create(model="vectors", input="good film", dimensions=3)


def test_embeddings_of_a_classifier_are_refused(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="its task is text-classification; ask /v1/classify"):
        client.embeddings.create(model="labels", input="good film")


def test_fields_of_offramp_go_beside_those_of_openai(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match=r"budget_depth 0\.5: it needs two points"):
        client.embeddings.create(model="vectors", input="a", extra_body={"budget_depth": 0.5})
    with pytest.raises(openai.BadRequestError, match="operating point 'other' is not in this bundle"):
        client.embeddings.create(model="vectors", input="a", extra_body={"point": "other"})


class RemoteEncoder:
    """What programs have that encode sentences: encode() of texts gives an array [texts, size]."""

    def __init__(self, address: str, model: str, key: str, batch_size: int = 16) -> None:
        self._address, self._model, self._key, self._batch_size = address, model, key, batch_size

    def encode(self, sentences: str | Sequence[str]) -> NDArray[np.float32]:
        """The vectors of sentences, or that of one."""
        if isinstance(sentences, str):
            vector: NDArray[np.float32] = self.encode([sentences])[0]
            return vector
        starts = range(0, len(sentences), self._batch_size)
        return np.concatenate([self._batch(sentences[start : start + self._batch_size]) for start in starts])

    def _batch(self, sentences: Sequence[str]) -> NDArray[np.float32]:
        asked = {"model": self._model, "input": list(sentences), "encoding_format": "base64"}
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        request = urllib.request.Request(self._address, json.dumps(asked).encode(), headers)
        with urllib.request.urlopen(request, timeout=20) as reply:
            data = json.load(reply)["data"]
        return np.stack([np.frombuffer(base64.b64decode(entry["embedding"]), "<f4") for entry in data])


def test_an_encoder_gives_the_vectors_of_the_session(server: Server) -> None:
    encoder = RemoteEncoder(f"http://127.0.0.1:{server.port}/v1/embeddings", "vectors", KEY)
    given = texts(40, seed=4)
    encoded = encoder.encode(given)
    np.testing.assert_allclose(encoded, vectors(given), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(encoded, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(encoder.encode(given[0]), encoded[0], atol=1e-5)


@pytest.mark.slow
def test_encoders_of_several_threads_get_their_own_vectors(server: Server) -> None:
    encoder = RemoteEncoder(f"http://127.0.0.1:{server.port}/v1/embeddings", "vectors", KEY, batch_size=4)
    given = [texts(12, seed=seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        encoded = list(pool.map(encoder.encode, given))
    for mine, right in zip(encoded, map(vectors, given), strict=True):
        np.testing.assert_allclose(mine, right, atol=1e-5)
