"""ee-serve with a bundle that generates text: errors of the engine, late texts, callers that go away."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from typing import Any

import pytest
from serving import Server, serving, wait_until
from tiny_bundles import GENERATOR

from offramp.runtime import load_generator
from offramp.runtime.serving import openai
from offramp.runtime.serving.generation import ServedGenerator
from offramp.runtime.serving.row_requests import CALLER_GONE
from offramp.runtime.text_chunks import TextChunk

HTTPException = pytest.importorskip("fastapi").HTTPException

pytestmark = pytest.mark.slow

COMPLETE = "/v1/completions"
PROMPT = "the film was"
ASKED = {"prompt": PROMPT, "max_tokens": 12}
STREAMED = ASKED | {"stream": True}


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(GENERATOR) as opened:
        yield opened


def fail_once(
    model: ServedGenerator, monkeypatch: pytest.MonkeyPatch, problem: Exception, steps: int
) -> None:
    """Let the engine raise in a step, once, after so many others."""
    engine, left = model.session.engine, [problem, *[None] * steps]
    step = engine.step

    def run(*arguments: Any) -> Any:
        if left and (raised := left.pop()) is not None:
            raise raised
        return step(*arguments)

    monkeypatch.setattr(engine, "step", run)


def parts_of(server: Server, value: Any) -> list[str]:
    """The data of the events of a stream."""
    status, text, _ = server.ask(COMPLETE, value)
    assert status == 200, text
    return [part.removeprefix("data: ") for part in text.split("\n\n") if part]


# errors of one text


def test_an_error_of_the_engine_ends_its_text_with_500(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_once(server.models.text(None), monkeypatch, RuntimeError("the engine failed"), 9)
    status, answer, _ = server.ask(COMPLETE, ASKED)
    error = {"message": "RuntimeError: see the log of the server", "type": "engine"}
    assert (status, answer) == (500, {"error": error})


def test_texts_are_generated_after_an_error_of_the_engine(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_once(server.models.text(None), monkeypatch, MemoryError(), 9)
    assert [server.ask(COMPLETE, ASKED)[0] for _ in range(2)] == [500, 200]
    assert server.ask("/healthz")[0] == 200 and server.models.text(None).accepted == 0


def test_an_error_of_a_stream_is_its_last_event(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_once(server.models.text(None), monkeypatch, RuntimeError("the engine failed"), 9)
    first, *_, last = parts_of(server, STREAMED)
    assert json.loads(first)["choices"]
    assert json.loads(last) == {
        "error": {"message": "RuntimeError: see the log of the server", "type": "engine"}
    }
    assert 'offramp_refused_total{reason="engine"} 1.0' in server.ask("/metrics")[1]


@pytest.mark.parametrize("asked", [ASKED, STREAMED], ids=["whole", "streamed"])
def test_the_log_has_the_traceback_of_an_error_that_nobody_expects(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, asked: Any
) -> None:
    fail_once(server.models.text(None), monkeypatch, KeyError("a wrong name"), 9)
    server.ask(COMPLETE, asked)
    wait_until(lambda: "KeyError: 'a wrong name'" in caplog.text)
    assert "Traceback" in caplog.text


def test_a_text_that_cannot_be_added_fails_alone(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    model = server.models.text(None)
    add, left = model._batch.add, [RuntimeError("no place")]

    def add_later(*arguments: Any) -> int:
        if left:
            raise left.pop()
        return add(*arguments)

    monkeypatch.setattr(model._batch, "add", add_later)
    assert [server.ask(COMPLETE, ASKED)[0] for _ in range(2)] == [500, 200]
    assert model.accepted == 0


# errors that end all


def fail_for_good(model: ServedGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    def advance() -> Any:
        raise AssertionError("the batch is broken")

    monkeypatch.setattr(model._batch, "advance", advance)


REASON = "an error (AssertionError) ended the thread that generates the texts of model tiny_generator"


def test_texts_that_wait_when_the_thread_ends_get_the_reason(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_for_good(server.models.text(None), monkeypatch)
    status, answer, _ = server.ask(COMPLETE, ASKED)
    assert status == 503 and answer["error"]["message"].startswith(REASON)


def test_texts_after_the_end_of_the_thread_are_refused_at_once(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = server.models.text(None)
    fail_for_good(model, monkeypatch)
    server.ask(COMPLETE, ASKED)
    monkeypatch.setattr(model.session, "encode_prompt", lambda prompt: 1 / 0)
    status, answer, headers = server.ask(COMPLETE, ASKED)
    assert status == 503 and answer["error"]["message"].startswith(REASON)
    assert "retry-after" not in headers and model.accepted == 0


def test_the_log_has_the_error_that_ended_the_thread(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fail_for_good(server.models.text(None), monkeypatch)
    server.ask(COMPLETE, ASKED)
    (record,) = (record for record in caplog.records if record.name == "offramp.serve")
    assert record.levelno == logging.ERROR and "AssertionError: the batch is broken" in caplog.text
    assert server.ask("/healthz")[0] == 503


# time


@contextmanager
def held_after(
    model: ServedGenerator, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> Iterator[threading.Event]:
    """Hold the thread of a model when a text has so many tokens, until the event is set."""
    go_on, take = threading.Event(), ServedGenerator._take_requests

    def late(generator: ServedGenerator) -> None:
        if any(request.tokens >= tokens for request in generator._requests.values()):
            assert go_on.wait(20)
        take(generator)

    monkeypatch.setattr(ServedGenerator, "_take_requests", late)
    try:
        yield go_on
    finally:
        go_on.set()


@pytest.mark.parametrize("asked", [ASKED, STREAMED], ids=["whole", "streamed"])
def test_a_text_without_a_token_in_time_is_504(asked: Any) -> None:
    with serving(GENERATOR, timeout=0.2) as server, server.models.text(None).session._lock:
        status, answer, _ = server.ask(COMPLETE, asked)
    assert status == 504 and answer["error"]["type"] == "deadline_passed"
    assert answer["error"]["message"].startswith("the text had no token in 200 ms: others are generated")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_text_that_has_begun_is_not_ended_by_the_time_of_the_server(
    monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    asked = ASKED | {"stream": stream}
    with serving(GENERATOR, timeout=0.5) as server:
        expected = server.ask(COMPLETE, ASKED)[1]["choices"][0]["text"]
        with held_after(server.models.text(None), monkeypatch, 3) as go_on:
            threading.Timer(1.5, go_on.set).start()
            if stream:
                *parts, last = parts_of(server, asked)
                assert last == "[DONE]"
                text = "".join(json.loads(part)["choices"][0]["text"] for part in parts)
            else:
                text = server.ask(COMPLETE, asked)[1]["choices"][0]["text"]
    assert text == expected


def test_a_text_that_is_not_finished_in_its_time_is_504(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with held_after(server.models.text(None), monkeypatch, 3):
        status, answer, _ = server.ask(COMPLETE, ASKED | {"timeout_ms": 300})
    assert status == 504 and "not finished in 300 ms; ask for fewer tokens" in answer["error"]["message"]


def test_a_stream_that_is_not_finished_in_its_time_ends_with_the_error(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with held_after(server.models.text(None), monkeypatch, 3):
        *parts, last = parts_of(server, STREAMED | {"timeout_ms": 1000})
    assert parts and json.loads(last)["error"]["type"] == "deadline_passed"


def test_a_text_that_is_late_makes_place(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(GENERATOR, scheduling={"texts": 1, "queue": 1}) as server:
        model = server.models.text(None)
        with held_after(model, monkeypatch, 3):
            assert server.ask(COMPLETE, ASKED | {"timeout_ms": 300})[0] == 504
        wait_until(lambda: model.accepted == 0)
        assert server.ask(COMPLETE, {"prompt": PROMPT, "max_tokens": 2})[0] == 200


def test_the_time_of_a_request_takes_the_place_of_the_servers() -> None:
    with serving(GENERATOR, timeout=0.1) as server, server.models.text(None).session._lock:
        status, answer, _ = server.ask(COMPLETE, ASKED | {"timeout_ms": 300})
    assert status == 504 and "not finished in 300 ms" in answer["error"]["message"]


def test_a_prompt_that_is_not_read_in_time_is_504(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    with serving(GENERATOR, timeout=0.2) as server:
        monkeypatch.setattr(server.models.text(None).session, "encode_prompt", lambda _: [go_on.wait(20)])
        status = server.ask(COMPLETE, ASKED)[0]
        go_on.set()
    assert status == 504


def test_a_prompt_that_is_read_stops_no_other_request(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, session = threading.Event(), server.models.text(None).session
    encode = session.encode_prompt

    def encode_late(prompt: str) -> list[int]:
        assert go_on.wait(20)
        return encode(prompt)

    monkeypatch.setattr(session, "encode_prompt", encode_late)
    with ThreadPoolExecutor(2) as pool:
        asked = pool.submit(server.ask, COMPLETE, ASKED)
        wait_until(lambda: server.models.text(None).accepted == 1)
        other = pool.submit(server.ask, "/healthz")
        wait_until(other.done)
        go_on.set()
        assert asked.result()[0] == 200


# callers that go away


def generated(server: Server) -> float:
    """The tokens that were generated, of /metrics."""
    name = 'offramp_generated_tokens_total{model="tiny_generator"} '
    lines = [line for line in server.ask("/metrics")[1].splitlines() if line.startswith(name)]
    return float(lines[0].removeprefix(name)) if lines else 0.0


def test_a_whole_text_of_a_caller_that_goes_away_ends_after_its_step(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = server.models.text(None)
    with held_after(model, monkeypatch, 3):
        with server.send(COMPLETE, ASKED | {"max_tokens": 50}):
            wait_until(lambda: any(request.tokens >= 3 for request in model._requests.values()))
        wait_until(lambda: all(request.is_abandoned for request in model._requests.values()))
    wait_until(lambda: model.accepted == 0)
    assert model.under_way == 0 and generated(server) < 12


@pytest.mark.parametrize("asked", [ASKED, STREAMED], ids=["whole", "streamed"])
def test_a_text_that_waits_for_its_first_token_is_dropped_if_its_caller_goes_away(
    server: Server, monkeypatch: pytest.MonkeyPatch, asked: Any
) -> None:
    model = server.models.text(None)
    with ThreadPoolExecutor(1) as pool, held_after(model, monkeypatch, 0):
        first = pool.submit(server.ask, COMPLETE, ASKED)  # its thread waits when it is in the batch
        wait_until(lambda: len(model._requests) == 1)
        with server.send(COMPLETE, asked):
            wait_until(lambda: len(model._arrived) == 1)
        wait_until(lambda: model._arrived[0].is_abandoned)
    assert first.result()[1]["usage"]["completion_tokens"] == generated(server)


@pytest.fixture
def opened_chunks(server: Server, monkeypatch: pytest.MonkeyPatch) -> list[AsyncGenerator[TextChunk, None]]:
    """The chunks of each text that is asked for, which nothing but the server closes while they are here."""
    model, opened = server.models.text(None), list[AsyncGenerator[TextChunk, None]]()
    chunks = model.chunks

    def open_chunks(*arguments: Any, **options: Any) -> AsyncGenerator[TextChunk, None]:
        opened.append(chunks(*arguments, **options))
        return opened[-1]

    monkeypatch.setattr(model, "chunks", open_chunks)
    return opened


def test_a_text_whose_caller_goes_away_when_its_first_chunk_comes_is_dropped(
    server: Server, opened_chunks: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def leave(_: Any, work: Any) -> Any:
        await work
        raise HTTPException(CALLER_GONE, "the caller went away")

    monkeypatch.setattr(openai, "cancel_if_caller_leaves", leave)
    model = server.models.text(None)
    with held_after(model, monkeypatch, 1):
        assert server.ask(COMPLETE, STREAMED)[0] == CALLER_GONE
        (request,) = model._requests.values()
        wait_until(lambda: request.is_abandoned)
    assert len(opened_chunks) == 1
    wait_until(lambda: model.accepted == 0)


def test_a_text_of_a_stream_that_sends_no_event_is_dropped(
    server: Server, opened_chunks: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def send_nothing(_: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    monkeypatch.setattr(openai.StreamingResponse, "stream_response", send_nothing)
    model = server.models.text(None)
    with held_after(model, monkeypatch, 1):
        assert server.ask(COMPLETE, STREAMED)[0] == 200
        (request,) = model._requests.values()
        wait_until(lambda: request.is_abandoned)
    assert len(opened_chunks) == 1
    wait_until(lambda: model.accepted == 0)


def test_a_caller_that_goes_away_is_counted_and_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "offramp.serve")
    with serving(GENERATOR, log=True) as server:
        model = server.models.text(None)
        with model.session._lock, server.send(COMPLETE, ASKED):
            wait_until(lambda: model.accepted == 1)
        wait_until(lambda: '"status": 499' in caplog.text)
        assert 'offramp_refused_total{reason="caller_gone"} 1.0' in server.ask("/metrics")[1]


def test_a_loop_that_ends_while_its_text_is_generated_ends_no_other_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def closed(*_: Any) -> None:
        raise RuntimeError("Event loop is closed")

    model = ServedGenerator("film", GENERATOR, load_generator(GENERATOR), queue=4, tag="")

    async def ask() -> None:
        async with aclosing(model.chunks(PROMPT, 12)) as chunks:
            await anext(chunks)
            loop = asyncio.get_running_loop()
            monkeypatch.setattr(loop, "call_soon_threadsafe", closed)  # between is_closed() and this call
            while model._requests:
                await asyncio.sleep(0.01)
            monkeypatch.undo()

    asyncio.run(asyncio.wait_for(ask(), 10))
    assert model.is_alive and model.accepted == 0
    model.close()


# bundles that are replaced


@pytest.fixture
def closed() -> ServedGenerator:
    model = ServedGenerator("film", GENERATOR, load_generator(GENERATOR), queue=4, tag="")
    model.close()
    return model


@pytest.mark.parametrize("asked", [ASKED, STREAMED], ids=["whole", "streamed"])
def test_a_text_of_a_bundle_that_was_just_replaced_is_generated_by_the_new_one(
    server: Server, closed: ServedGenerator, monkeypatch: pytest.MonkeyPatch, asked: Any
) -> None:
    expected = server.ask(COMPLETE, ASKED)[1]["choices"][0]["text"]
    find, before = server.models.text, [closed]
    monkeypatch.setattr(server.models, "text", lambda name: before.pop() if before else find(name))
    if asked is ASKED:
        assert server.ask(COMPLETE, asked)[1]["choices"][0]["text"] == expected
    else:
        *parts, last = parts_of(server, asked)
        assert last == "[DONE]"
        assert "".join(json.loads(part)["choices"][0]["text"] for part in parts) == expected


def test_a_text_of_a_bundle_that_is_closed_and_not_replaced_is_503(
    server: Server, closed: ServedGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.models, "text", lambda _: closed)
    status, answer, _ = server.ask(COMPLETE, ASKED)
    assert status == 503 and answer["error"]["type"] == "closing"
