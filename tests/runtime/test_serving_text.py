"""ee-serve with a bundle that generates text: completions and chats, whole and as they come."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from serving import Server, serving
from tiny_bundles import CLASSIFIER, GENERATOR

from offramp.runtime import load_generator

COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT = "the film was"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(GENERATOR, f"labels={CLASSIFIER}") as opened:
        yield opened


@pytest.fixture(scope="module")
def expected() -> str:
    with load_generator(GENERATOR) as session:
        return "".join(chunk.text for chunk in session.generate(PROMPT, 12))


def events(server: Server, path: str, value: Any) -> list[Any]:
    """The objects of a streamed answer, which must end as OpenAI's do."""
    status, text, headers = server.ask(path, value | {"stream": True})
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    parts = [part.removeprefix("data: ") for part in text.split("\n\n") if part]
    assert parts.pop() == "[DONE]"
    return [json.loads(part) for part in parts]


def test_a_prompt_is_continued_as_by_the_session(server: Server, expected: str) -> None:
    status, answer, _ = server.ask(COMPLETE, {"prompt": PROMPT, "max_tokens": 12})
    assert status == 200 and answer["object"] == "text_completion"
    (choice,) = answer["choices"]
    assert choice["text"] == expected and choice["finish_reason"] in ("length", "stop")
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    walk = answer["offramp"]
    assert walk.keys() == {"depth", "blocks_run", "ms", "first_ms", "ended", "repeated_tokens"}
    assert walk["ended"] == choice["finish_reason"]


def test_a_streamed_text_is_the_same(server: Server, expected: str) -> None:
    asked = {"prompt": PROMPT, "max_tokens": 12, "stream_options": {"include_usage": True}}
    *parts, last, usage = events(server, COMPLETE, asked)
    assert "".join(part["choices"][0]["text"] for part in parts) == expected
    assert last["choices"][0]["finish_reason"] in ("length", "stop")
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] <= 12
    assert len({part["id"] for part in (*parts, last, usage)}) == 1


def test_a_text_ends_before_a_stop_string(server: Server, expected: str) -> None:
    word = expected.split()[1]
    asked = {"prompt": PROMPT, "max_tokens": 12, "stop": word}
    (choice,) = server.ask(COMPLETE, asked)[1]["choices"]
    assert choice["text"] == expected[: expected.index(word)] and choice["finish_reason"] == "stop"


def test_most_tokens_end_a_text(server: Server) -> None:
    answer = server.ask(COMPLETE, {"prompt": PROMPT, "max_tokens": 2})[1]
    assert answer["usage"]["completion_tokens"] == 2
    assert answer["choices"][0]["finish_reason"] == "length"


def test_a_chat_is_answered(server: Server) -> None:
    pytest.importorskip("jinja2")
    messages = [{"role": "user", "content": "was it good"}]
    with load_generator(GENERATOR) as session:
        expected = "".join(chunk.text for chunk in session.generate(messages, 6))
    asked = {"messages": messages, "max_completion_tokens": 6}
    status, answer, _ = server.ask(CHAT, asked)
    assert status == 200 and answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": expected}
    *parts, last = events(server, CHAT, asked)
    assert parts[0]["object"] == "chat.completion.chunk"
    assert parts[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(part["choices"][0]["delta"]["content"] for part in parts) == expected
    assert last["choices"][0]["delta"] == {}


BAD: dict[str, tuple[str, Any, str]] = {
    "temperature": (COMPLETE, {"prompt": "a", "temperature": 0.7}, "temperature"),
    "several answers": (COMPLETE, {"prompt": "a", "n": 2}, "n: "),
    "unknown field": (COMPLETE, {"prompt": "a", "logprobs": 3}, "logprobs"),
    "unknown stream option": (COMPLETE, {"prompt": "a", "stream_options": {"x": True}}, "'x' is not known"),
    "too long": (COMPLETE, {"prompt": "film " * 5000}, "tokens"),
    "no messages": (CHAT, {"messages": []}, "messages"),
    "content of parts": (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "content[0]"),
    "a classifier": (COMPLETE, {"prompt": "a", "model": "labels"}, "ask /v1/classify"),
    "text of a generator": ("/v1/classify", {"input": "a"}, "ask /v1/completions"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_request_is_refused_before_anything_is_sent(server: Server, name: str, stream: bool) -> None:
    path, value, reason = BAD[name]
    status, answer, _ = server.ask(
        path, value | ({"stream": True} if stream and path != "/v1/classify" else {})
    )
    assert status == 400 and reason in answer["error"]["message"]


def test_texts_at_the_same_time_are_each_their_own(server: Server, expected: str) -> None:
    def ask(number: int) -> str:
        prompt = PROMPT if number % 2 else "a plot"
        text: str = server.ask(COMPLETE, {"prompt": prompt, "max_tokens": 12})[1]["choices"][0]["text"]
        return text

    with ThreadPoolExecutor(6) as pool:
        replies = list(pool.map(ask, range(12)))
    assert set(replies[1::2]) == {expected} and len(set(replies[::2])) == 1


def test_a_full_queue_answers_429() -> None:
    with serving(GENERATOR, scheduling={"queue": 1}) as server, ThreadPoolExecutor(2) as pool:
        model = server.models.text(None)
        with model.session._lock:  # no token is computed
            first = pool.submit(server.ask, COMPLETE, {"prompt": PROMPT, "max_tokens": 3})
            while not model.accepted:
                time.sleep(0.002)
            assert server.ask(COMPLETE, {"prompt": PROMPT})[0] == 429
        assert first.result()[0] == 200


def test_a_caller_that_goes_away_ends_its_text(server: Server) -> None:
    model = server.models.text(None)
    body = json.dumps({"prompt": PROMPT, "max_tokens": 100, "stream": True})
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)) as connection:
        connection.request("POST", COMPLETE, body, {"Content-Type": "application/json"})
        connection.getresponse().read(10)
    end = time.monotonic() + 20
    while model.accepted:
        assert time.monotonic() < end
        time.sleep(0.005)


def test_closing_finishes_texts(tmp_path: Path) -> None:
    with serving(GENERATOR) as server, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.ask, COMPLETE, {"prompt": PROMPT, "max_tokens": 20})
        while not server.models.text(None).accepted and not asked.done():
            time.sleep(0.001)
    assert asked.result()[0] == 200
