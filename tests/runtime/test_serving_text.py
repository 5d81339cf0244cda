"""ee-serve with a bundle that generates text: completions and chats, whole and as they come."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from serving import Server, serving
from tiny_bundles import CLASSIFIER, GENERATOR

from offramp.runtime import Sampling, SessionClosed, load_generator
from offramp.runtime.serving.generation import ServedGenerator

COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT = "the film was"
MESSAGES = [{"role": "user", "content": "was it good"}]


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


@pytest.mark.slow
def test_a_chat_is_answered(server: Server) -> None:
    pytest.importorskip("jinja2")
    messages = MESSAGES
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
    "temperature": (
        COMPLETE,
        {"prompt": "a", "temperature": -1},
        "temperature -1.0: expected a number from 0",
    ),
    "temperature as text": (COMPLETE, {"prompt": "a", "temperature": "1"}, "temperature: "),
    "top_p alone": (COMPLETE, {"prompt": "a", "top_p": 0.9}, "give temperature as well"),
    "frequency": (COMPLETE, {"prompt": "a", "frequency_penalty": 2.5}, "frequency_penalty 2.5: expected"),
    "logprobs": (COMPLETE, {"prompt": "a", "logprobs": 30}, "logprobs 30: expected a whole number, 0 to 20"),
    "logprobs of a chat": (CHAT, {"messages": MESSAGES, "logprobs": 3}, "logprobs"),
    "top_logprobs alone": (CHAT, {"messages": MESSAGES, "top_logprobs": 3}, "told with logprobs true"),
    "several answers": (COMPLETE, {"prompt": "a", "n": 2}, "n: "),
    "unknown field": (COMPLETE, {"prompt": "a", "best_of": 3}, "best_of"),
    "unknown stream option": (COMPLETE, {"prompt": "a", "stream_options": {"x": True}}, "'x' is not known"),
    "too long": (COMPLETE, {"prompt": "film " * 5000}, "tokens"),
    "no messages": (CHAT, {"messages": []}, "messages"),
    "content of parts": (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "content[0]"),
    "a classifier": (COMPLETE, {"prompt": "a", "model": "labels"}, "or name a model that generates text: "),
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


DRAWN = {"prompt": PROMPT, "max_tokens": 12, "temperature": 1, "top_k": 20, "min_p": 0.01}


def test_a_seed_gives_the_text_of_the_session(server: Server) -> None:
    sampling = Sampling(1.0, top_k=20, min_p=0.01, seed=5)
    with load_generator(GENERATOR) as session:
        expected = "".join(chunk.text for chunk in session.generate(PROMPT, 12, sampling=sampling))
    answer = server.ask(COMPLETE, DRAWN | {"seed": 5})[1]
    assert answer["choices"][0]["text"] == expected and answer["offramp"]["seed"] == 5
    streamed = "".join(part["choices"][0]["text"] for part in events(server, COMPLETE, DRAWN | {"seed": 5}))
    assert streamed == expected


def test_a_streamed_text_without_a_seed_tells_the_one_that_was_drawn(server: Server) -> None:
    *parts, last = events(server, COMPLETE, DRAWN)
    again = server.ask(COMPLETE, DRAWN | {"seed": last["offramp"]["seed"]})[1]
    assert again["choices"][0]["text"] == "".join(part["choices"][0]["text"] for part in parts)


def test_a_streamed_text_tells_its_walk_with_the_reason_of_its_end(server: Server) -> None:
    asked = {"prompt": PROMPT, "max_tokens": 12}
    whole = server.ask(COMPLETE, asked)[1]
    *parts, last, _ = events(server, COMPLETE, asked | {"stream_options": {"include_usage": True}})
    assert last["choices"][0]["finish_reason"] and last["offramp"].keys() == whole["offramp"].keys()
    assert last["offramp"]["depth"] == whole["offramp"]["depth"]
    assert not any("offramp" in part for part in parts)


def test_texts_without_a_seed_differ_and_tell_it(server: Server) -> None:
    replies = [server.ask(COMPLETE, DRAWN)[1] for _ in range(3)]
    texts = [reply["choices"][0]["text"] for reply in replies]
    assert len(set(texts)) > 1
    again = server.ask(COMPLETE, DRAWN | {"seed": replies[0]["offramp"]["seed"]})[1]
    assert again["choices"][0]["text"] == texts[0]


@pytest.mark.slow
def test_seeds_hold_while_other_texts_are_generated(server: Server) -> None:
    def ask(seed: int) -> str:
        text: str = server.ask(COMPLETE, DRAWN | {"seed": seed})[1]["choices"][0]["text"]
        return text

    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(ask, [1, 2, 3, 4] * 2))
    assert texts[:4] == texts[4:] == [ask(seed) for seed in (1, 2, 3, 4)]


def test_penalties_of_both_kinds_are_honoured(server: Server) -> None:
    asked = {"prompt": PROMPT, "max_tokens": 40}
    penalties = ({}, {"repetition_penalty": 2}, {"frequency_penalty": 2, "presence_penalty": 2})
    texts = [server.ask(COMPLETE, asked | penalty)[1]["choices"][0]["text"] for penalty in penalties]
    assert len(set(texts)) == 3


def test_logprobs_of_a_streamed_text_are_those_of_the_whole(server: Server) -> None:
    asked = {"prompt": PROMPT, "max_tokens": 8, "logprobs": 2, "stop": "nowhere in this text"}
    (choice,) = server.ask(COMPLETE, asked)[1]["choices"]
    whole = choice["logprobs"]
    assert len(whole["tokens"]) == 8 and "".join(whole["tokens"]).strip() == choice["text"].strip()
    parts = [part["choices"][0]["logprobs"] for part in events(server, COMPLETE, asked)]
    assert whole == {name: [value for part in parts if part for value in part[name]] for name in whole}


@pytest.mark.slow
def test_texts_at_the_same_time_are_each_their_own(server: Server, expected: str) -> None:
    def ask(number: int) -> str:
        prompt = PROMPT if number % 2 else "a plot"
        text: str = server.ask(COMPLETE, {"prompt": prompt, "max_tokens": 12})[1]["choices"][0]["text"]
        return text

    with ThreadPoolExecutor(6) as pool:
        replies = list(pool.map(ask, range(12)))
    assert set(replies[1::2]) == {expected} and len(set(replies[::2])) == 1


@pytest.mark.slow
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


LONG = {"prompt": PROMPT, "max_tokens": 1000}  # the network reads 64 tokens


def value_of(server: Server, figure: str) -> float:
    """The value of a figure in /metrics, with all of its labels; 0 if it is not there."""
    for line in server.ask("/metrics")[1].splitlines():
        name, _, value = line.rpartition(" ")
        if name == figure:
            return float(value)
    return 0.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ended", "asked"),
    [
        ("stop", LONG | {"stop": ["e", "a", "o"]}),
        ("length", {"prompt": PROMPT, "max_tokens": 2}),
        ("context", LONG),
    ],
)
def test_metrics_count_texts_by_why_they_ended(ended: str, asked: Any) -> None:
    with serving(GENERATOR) as server:
        assert server.ask(COMPLETE, asked)[1]["offramp"]["ended"] == ended
        assert value_of(server, f'offramp_texts_total{{ended="{ended}",model="tiny_generator"}}') == 1


@pytest.mark.slow
def test_metrics_count_the_tokens_of_prompts_and_texts() -> None:
    with serving(GENERATOR) as server:
        usage = [server.ask(COMPLETE, {"prompt": PROMPT, "max_tokens": n})[1]["usage"] for n in (2, 5)]
        for figure, field in (("prompt", "prompt_tokens"), ("generated", "completion_tokens")):
            value = value_of(server, f'offramp_{figure}_tokens_total{{model="tiny_generator"}}')
            assert value == sum(counts[field] for counts in usage)


@pytest.mark.slow
def test_metrics_have_the_seconds_of_a_text_with_its_wait() -> None:
    asked = {"prompt": PROMPT, "max_tokens": 3}
    with serving(GENERATOR) as server, ThreadPoolExecutor(1) as pool:
        model = server.models.text(None)
        with model.session._lock:  # no token is computed
            first = pool.submit(server.ask, COMPLETE, asked)
            while not model.accepted:
                time.sleep(0.002)
            time.sleep(0.2)
        assert first.result()[0] == 200
        assert value_of(server, 'offramp_text_seconds_count{model="tiny_generator"}') == 1
        assert value_of(server, 'offramp_text_seconds_sum{model="tiny_generator"}') > 0.2


@pytest.mark.slow
def test_metrics_count_the_tokens_alone_of_a_text_whose_caller_went_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with serving(GENERATOR) as server:
        model, forget = server.models.text(None), threading.Event()
        give_up = ServedGenerator._take_requests

        def held(generator: ServedGenerator) -> None:
            if any(request.tokens for request in generator._requests.values()):
                assert forget.wait(20)
                while not all(request.is_abandoned for request in generator._requests.values()):
                    time.sleep(0.002)
            give_up(generator)

        monkeypatch.setattr(ServedGenerator, "_take_requests", held)
        with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)) as connection:
            body = json.dumps(LONG | {"stream": True})
            connection.request("POST", COMPLETE, body, {"Content-Type": "application/json"})
            connection.getresponse().read(10)
        forget.set()
        end = time.monotonic() + 20
        while model.accepted:
            assert time.monotonic() < end
            time.sleep(0.005)
        assert 1 <= value_of(server, 'offramp_generated_tokens_total{model="tiny_generator"}') < 60
        assert "offramp_texts_total{" not in server.ask("/metrics")[1]


@pytest.mark.slow
def test_closing_finishes_texts(tmp_path: Path) -> None:
    with serving(GENERATOR) as server, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.ask, COMPLETE, {"prompt": PROMPT, "max_tokens": 20})
        while not server.models.text(None).accepted and not asked.done():
            time.sleep(0.001)
    assert asked.result()[0] == 200


def test_a_prompt_that_is_read_while_the_thread_of_the_texts_ends_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = load_generator(GENERATOR)
    model = ServedGenerator("film", GENERATOR, session, queue=4, tag="")
    begun, ends, answered = threading.Event(), threading.Event(), threading.Event()
    encode, close = session.encode_prompt, model._batch.close

    def encode_late(prompt: Any) -> list[int]:
        begun.set()
        assert ends.wait(20)
        return encode(prompt)

    def close_late() -> None:
        ends.set()
        answered.wait(2)
        close()

    async def ask() -> str:
        try:
            answer = [chunk.text async for chunk in model.chunks(PROMPT, 3)]
            return "".join(answer)
        except SessionClosed as problem:
            return str(problem)
        finally:
            answered.set()

    monkeypatch.setattr(session, "encode_prompt", encode_late)
    monkeypatch.setattr(model._batch, "close", close_late)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(asyncio.run, asyncio.wait_for(ask(), 10))
        assert begun.wait(20)
        model.close(finish=False)
        assert asked.result() == "the server is closing"
    assert model.accepted == 0
