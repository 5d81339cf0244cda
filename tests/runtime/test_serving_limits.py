"""ee-serve: requests that do not fit, what is told of each limit, and pages that load nothing elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import pytest
from serving import CLASSIFY, Server, hold_engine, serving
from tiny_bundles import CLASSIFIER

from offramp.runtime.errors import BadBundle
from offramp.runtime.serving.cli import main
from offramp.runtime.serving.models import Wanted

pytestmark = pytest.mark.slow

WEB = Path(__file__).resolve().parents[2] / "web"
ELSEWHERE = re.compile(r"""(?:src|href|url)\s*[=(]\s*["']?(?:https?:)?//|https?://""")


def wait_for_rows(server: Server, count: int) -> None:
    while server.models.rows(None).scheduler.accepted != count:
        pass


def test_a_request_of_more_items_than_the_queue_is_refused_as_too_large() -> None:
    with serving(CLASSIFIER, scheduling={"queue": 4}) as server:
        status, answer, headers = server.ask(CLASSIFY, {"input": ["good film"] * 5})
    assert status == 400 and answer["error"]["type"] == "bad_request"
    assert "retry-after" not in headers


def test_an_error_of_the_engine_names_no_file_of_the_server(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*arguments: Any) -> Any:
        raise BadBundle(f"{CLASSIFIER}/segment_00.onnx: the graph failed")

    with serving(CLASSIFIER) as server:
        monkeypatch.setattr(server.models.rows(None).session.engine, "step", broken)
        status, answer, _ = server.ask("/v1/walk", {"input": "good film"})
    assert status == 500 and answer["error"]["message"] == "BadBundle: see the log of the server"
    assert "segment_00.onnx: the graph failed" in caplog.text


def test_the_refusal_of_a_large_request_names_the_limit_and_the_cure() -> None:
    with serving(CLASSIFIER, scheduling={"queue": 4}) as server:
        message = server.ask(CLASSIFY, {"input": ["good film"] * 5})[1]["error"]["message"]
    assert "5 items" in message and "accepts 4 rows at once (--queue)" in message
    assert "send 4 or fewer in a request, or start the server with a larger --queue" in message


def test_a_full_queue_names_the_rows_that_wait_without_those_of_the_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with serving(CLASSIFIER, scheduling={"queue": 4}) as server, ThreadPoolExecutor(1) as pool:
        go_on = hold_engine(server, monkeypatch)
        first = pool.submit(server.results, {"input": ["good film"] * 3})
        wait_for_rows(server, 3)
        status, answer, _ = server.ask(CLASSIFY, {"input": ["good film"] * 2})
        go_on.set()
        assert len(first.result()) == 3
    assert status == 429 and answer["error"]["message"].startswith("3 rows wait already; try again in")


def test_a_request_that_does_not_fit_beside_others_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(CLASSIFIER, scheduling={"queue": 4}) as server, ThreadPoolExecutor(1) as pool:
        go_on = hold_engine(server, monkeypatch)
        first = pool.submit(server.results, {"input": ["good film"] * 3})
        wait_for_rows(server, 3)
        with monkeypatch.context() as patched:
            patched.setattr(server.models.rows(None).session, "read", lambda items: 1 / 0)
            status = server.ask(CLASSIFY, {"input": ["good film"] * 2})[0]
        go_on.set()
        assert len(first.result()) == 3
    assert status == 429


def test_a_queue_that_fills_while_items_are_read_names_the_rows_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with serving(CLASSIFIER, scheduling={"queue": 4}) as server:
        go_on, model = hold_engine(server, monkeypatch), server.models.rows(None)
        read = model.session.read

        def read_late(items: Sequence[Any]) -> Any:
            for row in read(["a plot"] * 3):
                model.scheduler.submit(row, model.options(Wanted()))
            return read(items)

        with monkeypatch.context() as patched:
            patched.setattr(model.session, "read", read_late)
            status, answer, _ = server.ask(CLASSIFY, {"input": ["good film"] * 2})
        waiting = model.scheduler.accepted
        go_on.set()
    assert status == 429 and answer["error"]["message"].startswith(f"{waiting} rows wait already")
    assert waiting == 3


@pytest.fixture(scope="module")
def sent() -> dict[str, tuple[int, str]]:
    """Status and text of every page that a server gives, and of those that FastAPI has by itself."""
    pages = [f"/demo/{file.name}" for file in WEB.iterdir() if file.suffix in (".html", ".js", ".css")]
    with serving(CLASSIFIER) as server:
        paths = ("/docs", "/redoc", "/docs/oauth2-redirect", "/openapi.json", *pages)
        return {path: (status, str(text)) for path in paths for status, text, _ in [server.ask(path)]}


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/docs/oauth2-redirect"])
def test_pages_that_would_load_scripts_of_another_host_are_not_there(
    sent: dict[str, tuple[int, str]], path: str
) -> None:
    assert sent[path][0] == 404


def test_nothing_that_the_server_sends_refers_to_another_host(sent: dict[str, tuple[int, str]]) -> None:
    assert [path for path, (_, text) in sent.items() if ELSEWHERE.search(text)] == []


def test_the_command_tells_addresses_that_the_server_answers() -> None:
    words = [sys.executable, "-m", "offramp.runtime.serving.cli", str(CLASSIFIER), "--port", "0"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        addresses = re.findall(r"http://\S+", process.stderr.readline())
        try:
            replies = [urllib.request.urlopen(address, timeout=20).status for address in addresses]
        finally:
            process.kill()
            process.stderr.close()
    assert replies == [200, 200]


@pytest.mark.parametrize(
    ("name", "statuses"),
    [
        ("queue", ("429", "400")),
        ("max_bytes", ("413",)),
        ("max_items", ("400",)),
        ("timeout", ("408", "504")),
    ],
)
def test_the_help_of_a_limit_says_what_follows_when_it_is_passed(name: str, statuses: Sequence[str]) -> None:
    (option,) = (parameter for parameter in main.params if parameter.name == name)
    assert isinstance(option, click.Option) and option.help is not None
    assert [status for status in statuses if status not in option.help] == []


@pytest.mark.parametrize("path", [f"{CLASSIFY}/", "/v1/walk/", "/healthz/", "/demo/index.html/"])
def test_a_path_with_a_slash_behind_it_is_no_redirect_to_the_host_of_the_request(path: str) -> None:
    with serving(CLASSIFIER) as server:
        value = {"input": "good film"} if path.startswith("/v1") else None
        status, _, headers = server.ask(path, value, {"Host": "elsewhere.example"})
    assert status == 404 and "location" not in headers


def test_the_page_is_found_with_a_slash_behind_it() -> None:
    with serving(CLASSIFIER, keys=frozenset({"a-key-of-sixteen-or-more"})) as server:
        status, _, headers = server.ask("/demo/", headers={"Host": "elsewhere.example"})
    assert status == 307 and headers["location"] == "/demo/index.html?server=1"


# what is told of a request that cannot be read

HEADER = "body: expected a JSON object; send it with the header Content-Type: application/json"
UNREADABLE: dict[str, tuple[str, Any, int, str]] = {
    "another type of content": (CLASSIFY, b'{"input": "a"}', 400, HEADER),
    "no JSON": (CLASSIFY, b'{"input": }', 400, "body: not JSON at character 10: Expecting value"),
    "an empty list": (CLASSIFY, {"input": []}, 400, "input: List should have at least 1 item"),
    "an item of a list": (CLASSIFY, {"input": ["a", 3]}, 400, "input.1.str: Input should be a valid string"),
    "a field of an item": (
        CLASSIFY,
        {"input": {"text": "a", "text_b": 3}},
        400,
        "input.Pair.text_b: Input should be a valid string",
    ),
    "a field of one item of several": (
        CLASSIFY,
        {"input": ["a", {"text": "a", "text_b": 3}]},
        400,
        "input.1.Pair.text_b: Input should be a valid string",
    ),
    "a field of an image": (CLASSIFY, {"input": {"image": 3}}, 400, "input.Picture.image: Input should be a"),
    "an unknown field of an item": (
        CLASSIFY,
        {"input": {"text": "a", "text_c": "b"}},
        400,
        "input.Pair.text_c: Extra inputs are not permitted",
    ),
    "an unknown path": ("/health", None, 404, "there is no /health; /openapi.json lists the paths"),
    "another method": (CLASSIFY, None, 405, "GET /v1/classify: this path takes POST"),
}


@pytest.fixture(scope="module")
def classifier_server() -> Iterator[Server]:
    with serving(CLASSIFIER) as server:
        yield server


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_request_that_cannot_be_read_says_why(classifier_server: Server, name: str) -> None:
    path, value, expected, reason = UNREADABLE[name]
    kind = {"Content-Type": "text/plain"} if name == "another type of content" else None
    status, answer, _ = classifier_server.ask(path, value, kind)
    assert status == expected and answer["error"]["message"].startswith(reason)
