"""ee-serve with many texts at once: requests join between tokens, and leave when nobody waits."""

from __future__ import annotations

import http.client
import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from serving import Server, serving
from tiny_bundles import GENERATOR, GENERATOR_NATIVE, texts

from offramp.runtime import load_generator

pytestmark = pytest.mark.slow

COMPLETE = "/v1/completions"


def complete(server: Server, prompt: str, count: int, **fields: Any) -> Any:
    status, answer, _ = server.ask(COMPLETE, {"prompt": prompt, "max_tokens": count, **fields})
    assert status == 200, answer
    return answer["choices"][0]["text"]


@pytest.mark.parametrize(
    ("bundle", "texts_at_once"), [(GENERATOR, 3), (GENERATOR_NATIVE, 1), (GENERATOR_NATIVE, 3)]
)
def test_texts_of_many_requests_are_those_of_the_session(bundle: Path, texts_at_once: int) -> None:
    prompts = texts(20)
    with load_generator(bundle) as session:
        expected = [
            "".join(chunk.text for chunk in session.generate(prompt, 1 + number % 12))
            for number, prompt in enumerate(prompts)
        ]
    with serving(bundle, scheduling={"texts": texts_at_once}) as server, ThreadPoolExecutor(8) as pool:
        replies = pool.map(lambda n: complete(server, prompts[n], 1 + n % 12), range(20))
        assert list(replies) == expected
        assert server.models.text(None).accepted == 0


def test_no_more_texts_at_once_than_the_option_says() -> None:
    with serving(GENERATOR, scheduling={"texts": 2}) as server, ThreadPoolExecutor(6) as pool:
        model, seen = server.models.text(None), set[int]()
        asked = [pool.submit(complete, server, "a film", 40) for _ in range(6)]
        while not all(future.done() for future in asked):
            seen.add(model.under_way)
        assert max(seen) <= 2


def test_a_prompt_that_is_too_long_leaves_others_alone() -> None:
    with serving(GENERATOR) as server, ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(complete, server, "a film", 30) for _ in range(3)]
        status, answer, _ = server.ask(COMPLETE, {"prompt": "film " * 5000})
        assert status == 400 and "tokens" in answer["error"]["message"]
        assert len({future.result() for future in asked}) == 1


def test_a_caller_that_goes_away_makes_place() -> None:
    body = json.dumps({"prompt": "a film", "max_tokens": 50, "stream": True})
    with serving(GENERATOR, scheduling={"texts": 1}) as server:
        model = server.models.text(None)
        with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)) as connection:
            connection.request("POST", COMPLETE, body, {"Content-Type": "application/json"})
            connection.getresponse().read(10)
        assert complete(server, "a plot", 3)
        end = time.monotonic() + 20
        while model.accepted:
            assert time.monotonic() < end
            time.sleep(0.005)


def test_closing_without_finishing_ends_the_texts() -> None:
    with serving(GENERATOR) as server, ThreadPoolExecutor(2) as pool:
        model = server.models.text(None)
        asked = pool.submit(server.ask, COMPLETE, {"prompt": "a film", "max_tokens": 60})
        while not model.accepted and not asked.done():
            time.sleep(0.001)
        model.close(finish=False)
        assert asked.result()[0] in (200, 503) and not model.is_alive
        assert server.ask(COMPLETE, {"prompt": "a film"})[0] == 503
        assert server.ask("/healthz")[0] == 503
