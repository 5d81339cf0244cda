"""ee-serve over real connections: what requests get, and how bad ones are refused."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import http.client
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from serving import CLASSIFY, Server, futures_of, serving, wait_until
from tiny_bundles import CLASSIFIER, EMBEDDING, bundle_with_points, texts

from offramp.runtime import load
from offramp.runtime.bundle.manifest import RuleSpec
from offramp.runtime.errors import BadBundle, BadSetting
from offramp.runtime.serving.cli import bind, main
from offramp.runtime.serving.models import ServedModel, Wanted, names_of

KEY = "a-key-of-sixteen-or-more"
WEB = Path(__file__).resolve().parents[2] / "web"
posix = pytest.mark.skipif(sys.platform == "win32", reason="signals")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    points = bundle_with_points(tmp_path_factory.mktemp("points"), guaranteed=True)
    with serving(CLASSIFIER, f"points={points}", f"vectors={EMBEDDING}", body=200_000, items=64) as opened:
        yield opened


class Gate:
    """Holds the engine of a model between two steps, until it is opened."""

    def __init__(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        engine = server.models.rows(None).session.engine
        self._open, step = threading.Event(), engine.step

        def held(segment: int, variant: int, state: Any) -> Any:
            assert self._open.wait(20)
            return step(segment, variant, state)

        monkeypatch.setattr(engine, "step", held)

    def open(self) -> None:
        self._open.set()


def test_a_text_is_answered_as_by_the_session(server: Server) -> None:
    with load(CLASSIFIER) as session:
        expected = session("a warm and good film")
    (result,) = server.results({"input": "a warm and good film"})
    assert (result["label"], result["exit"], result["depth"]) == (
        expected.label,
        expected.exit,
        expected.depth,
    )
    assert result["score"] == pytest.approx(expected.score, abs=1e-5) and result["ms"] > 0


def test_a_list_is_answered_in_its_order(server: Server) -> None:
    given = texts(40)
    with load(CLASSIFIER) as session:
        expected = [answer.label for answer in session.map(given)]
    assert [result["label"] for result in server.results({"input": given})] == expected


def test_pairs_are_read_together(server: Server) -> None:
    with load(CLASSIFIER) as session:
        expected = session("good film", "bad plot")
    results = server.results({"input": [{"text": "good film", "text_b": "bad plot"}, {"text": "good film"}]})
    assert results[0]["score"] == pytest.approx(expected.score, abs=1e-5)
    assert results[1]["score"] != results[0]["score"]


@pytest.mark.slow
def test_requests_at_the_same_time_get_their_own_answers(server: Server) -> None:
    given = texts(60, seed=2)
    with load(CLASSIFIER) as session:
        expected = [session(text).label for text in given]
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda text: server.results({"input": text})[0]["label"], given))
    assert replies == expected


def test_a_bad_item_of_a_list_keeps_its_place(server: Server) -> None:
    results = server.results({"input": ["good film", "\udc00", "bad film"]})
    assert "label" in results[0] and "label" in results[2]
    assert list(results[1]) == ["error"]


def test_rows_are_walked_at_the_point_of_their_request(server: Server) -> None:
    given = texts(40)
    depths = {
        point: sum(r["depth"] for r in server.results({"model": "points", "input": given, "point": point}))
        for point in ("gate-1", "gate-3")
    }
    assert depths["gate-1"] != depths["gate-3"]


def test_the_risk_of_a_request_chooses_the_cheapest_point_that_keeps_it(server: Server) -> None:
    points = {p.name: p for p in server.models.rows("points").manifest.points if p.guarantee is not None}
    cheapest = min(points.values(), key=lambda point: point.measured["mean_exit"])
    assert cheapest.guarantee is not None
    given = texts(40)
    by_risk = server.results({"model": "points", "input": given, "max_risk": cheapest.guarantee.limit})
    by_point = server.results({"model": "points", "input": given, "point": cheapest.name})
    assert [r["exit"] for r in by_risk] == [r["exit"] for r in by_point]


def test_the_depth_of_a_request_is_kept(server: Server) -> None:
    given = texts(30)
    asked = {"model": "points", "point": "gate-3", "input": given}
    unlimited = [result["depth"] for result in server.results(asked)]
    assert set(unlimited) >= {1, 4}
    for limit, reached in ((1, 1), (2, 1), (3, 3), (9, 4)):  # exits are after blocks 1, 3 and 4
        depths = [result["depth"] for result in server.results(asked | {"max_depth": limit})]
        assert depths == [min(depth, reached) for depth in unlimited]


BAD_REQUESTS: dict[str, tuple[Any, str]] = {
    "no JSON": (b"{", "JSON"),
    "10^5 deep": (b'{"input":' + b"[" * 10**5, "JSON|parsing"),
    "no object": ([1], "expected a JSON object"),
    "no input": ({}, "input: Field required"),
    "unknown field": ({"input": "a", "imput": "b"}, "imput: Extra inputs are not permitted"),
    "a number as text": ({"input": 3}, "input"),
    "an empty list": ({"input": []}, "input"),
    "too many items": ({"input": ["a"] * 65}, "65 items; this server takes 64"),
    "half of a surrogate pair": ({"input": "\ud800"}, "surrogate"),
    "unknown point": ({"input": "a", "point": "other"}, "operating point 'other' is not in this bundle"),
    "a risk without guarantee": ({"input": "a", "max_risk": 0.1}, "points of this bundle guarantee: none"),
    "point and risk": ({"input": "a", "point": "x", "max_risk": 0.1}, "give one of them"),
    "risk beyond 1": ({"input": "a", "max_risk": 2}, "max_risk"),
    "depth 0": ({"input": "a", "max_depth": 0}, "max_depth"),
    "time 0": ({"input": "a", "timeout_ms": 0}, "timeout_ms"),
    "an image for a text": ({"input": {"image": "AAAA"}}, "reads texts"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_is_refused_by_name(server: Server, name: str) -> None:
    value, reason = BAD_REQUESTS[name]
    status, answer, _ = server.ask(CLASSIFY, value)
    assert status == 400 and answer["error"]["type"] == "bad_request"
    assert any(part in answer["error"]["message"] for part in reason.split("|")), answer


def test_unknown_models_and_paths_are_not_found(server: Server) -> None:
    status, answer, _ = server.ask(CLASSIFY, {"input": "a", "model": "other"})
    assert status == 404 and "this server has tiny_bundle, points, vectors" in answer["error"]["message"]
    assert server.ask("/v2/classify")[0] == 404
    assert server.ask(CLASSIFY)[0] == 405


def test_a_request_of_too_many_bytes_is_refused(server: Server) -> None:
    status, answer, _ = server.ask(CLASSIFY, {"input": "a" * 200_001})
    assert status == 413 and "more than 200000 bytes" in answer["error"]["message"]
    chunks = (b"a" * 50_000 for _ in range(5))  # without a length
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    with contextlib.closing(connection):
        connection.request("POST", CLASSIFY, chunks, {"Content-Type": "application/json"})
        assert connection.getresponse().status == 413


def test_embeddings_have_the_form_of_openais_api(server: Server) -> None:
    with load(EMBEDDING) as session:
        expected = session("good film").embedding
    status, answer, _ = server.ask("/v1/embeddings", {"model": "vectors", "input": ["good film", "bad"]})
    assert status == 200 and answer["object"] == "list" and answer["usage"]["prompt_tokens"] > 0
    assert [entry["index"] for entry in answer["data"]] == [0, 1]
    np.testing.assert_allclose(answer["data"][0]["embedding"], expected, atol=1e-5)
    coded = {"model": "vectors", "input": "good film", "encoding_format": "base64"}
    data = server.ask("/v1/embeddings", coded)[1]["data"][0]["embedding"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(data), "<f4"), expected, atol=1e-5)


def test_embeddings_of_a_classifier_are_refused(server: Server) -> None:
    status, answer, _ = server.ask("/v1/embeddings", {"input": "good film"})
    assert status == 400 and "its task is" in answer["error"]["message"]


def test_models_are_described(server: Server) -> None:
    _, answer, _ = server.ask("/v1/models")
    first, points, _ = answer["data"]
    assert (first["id"], first["labels"]) == ("tiny_bundle", ["negative", "positive"])
    assert points["points"][0].keys() >= {"name", "rule", "variant", "measured", "risk", "confidence"}


def test_probes_and_descriptions_answer(server: Server) -> None:
    assert [server.ask(path)[0] for path in ("/healthz", "/readyz", "/openapi.json")] == [200] * 3
    assert CLASSIFY in server.ask("/openapi.json")[1]["paths"]


def test_one_text_is_walked_with_every_step(server: Server) -> None:
    with load(CLASSIFIER) as session:
        expected = session("a warm and good film")
        full, _ = session.at_full_depth(["a warm and good film"])
    _, answer, _ = server.ask("/v1/walk", {"input": "a warm and good film"})
    steps = answer["steps"]
    assert [(step["segment"], step["variant"]) for step in steps] == list(expected.steps)
    np.testing.assert_allclose(steps[-1]["logits"], full.logits[0, expected.exit - 1], atol=1e-4)
    assert all(step["ms"] > 0 for step in steps) and 0 <= steps[0]["gate"] <= 1
    deep = server.ask("/v1/walk", {"input": "a warm and good film", "full_depth": "fp32"})[1]["steps"]
    np.testing.assert_allclose([step["logits"] for step in deep], full.logits[0], atol=1e-4)
    assert server.ask("/v1/walk", {"input": "a", "full_depth": "fp8"})[0] == 400
    assert server.ask("/v1/walk", {"input": "a", "model": "vectors"})[0] == 400


def test_the_page_is_served_with_a_policy_and_nothing_beside_it(server: Server) -> None:
    status, _, headers = server.ask("/demo")
    assert status == 307 and headers["location"] == "/demo/index.html?server=1"
    status, text, headers = server.ask("/demo/index.html?server=1")
    assert status == 200 and "page.js" in text
    assert "script-src 'self' 'sha256-" in headers["content-security-policy"]
    assert server.ask("/demo/page.js")[2]["content-type"].startswith("text/javascript")
    assert server.ask("/demo/manifest.json?model=points")[1]["labels"] == ["negative", "positive"]
    for name in ("package.json", "..%2fREADME.md", "%2e%2e/pyproject.toml", "tests/page.mjs", "run.mjs"):
        assert server.ask(f"/demo/{name}")[0] == 404


@pytest.mark.slow
def test_metrics_count_answers_refusals_and_requests() -> None:
    with serving(CLASSIFIER) as server:
        exits = [result["exit"] for result in server.results({"input": texts(30)})]
        server.ask(CLASSIFY, {})
        server.ask("/nowhere/else")
        text = server.ask("/metrics")[1]
    for exit in set(exits):
        assert f'offramp_answers_total{{exit="{exit}",model="tiny_bundle"}} {exits.count(exit):.1f}' in text
    assert 'offramp_refused_total{reason="bad_request"} 1.0' in text
    assert 'offramp_request_seconds_count{path="/v1/classify",status="200"} 1.0' in text
    assert 'path="other",status="404"' in text and "nowhere" not in text


@pytest.mark.slow
def test_requests_need_one_of_the_keys() -> None:
    with serving(CLASSIFIER, keys=frozenset({KEY, "another-key-of-a-user"})) as server:
        asked = {"input": "good film"}
        assert server.ask(CLASSIFY, asked)[0] == 401
        assert server.ask(CLASSIFY, asked, {"Authorization": "Bearer a-key-of-nobody-else"})[0] == 401
        assert server.ask(CLASSIFY, asked, {"Authorization": f"Bearer {KEY}"})[0] == 200
        assert server.ask(CLASSIFY, asked, {"X-Api-Key": KEY})[0] == 200
        assert server.ask("/metrics")[0] == 401 and server.ask("/healthz")[0] == 200


@pytest.mark.slow
def test_the_page_needs_no_key_but_what_it_shows_does() -> None:
    with serving(CLASSIFIER, keys=frozenset({KEY})) as server:
        pages = ("/demo", "/demo/index.html?server=1", "/demo/page.js", "/demo/style.css")
        assert [server.ask(path)[0] for path in pages] == [307, 200, 200, 200]
        others = ("/demo/manifest.json", "/demo/x/page.js", "/demo/..%2fv1/models.js", "/demo.html")
        assert [server.ask(path)[0] for path in others] == [401] * len(others)
        assert server.ask("/v1/walk", {"input": "good film"})[0] == 401
        assert server.ask("/demo/manifest.json", headers={"Authorization": f"Bearer {KEY}"})[0] == 200


PAGE_WITH_KEYS = """
const [address, ...keys] = process.argv.slice(1);
const ask = globalThis.fetch;
globalThis.fetch = (place, options) => ask(new URL(place, address), options); // as the page does
const { openRemote } = await import("./remote.js");
const refused = [];
const bundle = await openRemote(null, async (wasRefused) => (refused.push(wasRefused), keys.shift()));
const { label } = await bundle.walk("a warm and good film", {});
console.log(JSON.stringify({ refused, left: keys.length, label }));
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node")
def test_the_page_asks_for_a_key_until_the_server_takes_it() -> None:
    with load(CLASSIFIER) as session:
        expected = session("a warm and good film").label
    with serving(CLASSIFIER, keys=frozenset({KEY})) as server:
        address = f"http://127.0.0.1:{server.port}/demo/index.html"
        words = ["node", "--input-type=module", "-e", PAGE_WITH_KEYS]
        given = [address, "not-the-key-of-anyone", "clé \u2026", KEY, "left"]
        done = subprocess.run(words + given, cwd=WEB, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"refused": [False, True, True], "left": 1, "label": expected}


@pytest.mark.slow
def test_a_full_queue_answers_429_and_when_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(CLASSIFIER, scheduling={"queue": 4}) as server, ThreadPoolExecutor(2) as pool:
        gate = Gate(server, monkeypatch)
        first = pool.submit(server.results, {"input": ["good film"] * 3})
        wait_until(lambda: server.models.rows(None).scheduler.accepted == 3)
        status, answer, headers = server.ask(CLASSIFY, {"input": ["good film"] * 2})
        assert status == 429 and answer["error"]["type"] == "queue_full"
        assert int(headers["retry-after"]) >= 1
        gate.open()
        assert len(first.result()) == 3
        wait_until(lambda: server.models.rows(None).scheduler.accepted == 0)
        assert len(server.results({"input": ["good film"] * 4})) == 4


@pytest.mark.slow
def test_what_is_refused_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(CLASSIFIER, scheduling={"queue": 2}) as server, ThreadPoolExecutor(1) as pool:
        gate = Gate(server, monkeypatch)
        first = pool.submit(server.results, {"input": ["good film"] * 2})
        wait_until(lambda: server.models.rows(None).scheduler.accepted == 2)
        with monkeypatch.context() as patched:
            patched.setattr(server.models.rows(None).session, "read", lambda items: 1 / 0)
            assert server.ask(CLASSIFY, {"input": "good film"})[0] == 429
        gate.open()
        assert len(first.result()) == 2


@pytest.mark.slow
def test_an_answer_that_is_late_is_504(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(CLASSIFIER) as server:
        gate = Gate(server, monkeypatch)
        status, answer, _ = server.ask(CLASSIFY, {"input": "good film", "timeout_ms": 30})
        gate.open()
        assert status == 504 and answer["error"]["type"] == "deadline_passed"


@pytest.mark.slow
def test_rows_of_a_caller_that_goes_away_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(CLASSIFIER) as server:
        gate, scheduler = Gate(server, monkeypatch), server.models.rows(None).scheduler
        futures = futures_of(server, monkeypatch)
        with server.send(CLASSIFY, {"input": texts(20)}):
            wait_until(lambda: scheduler.accepted == 20)
        wait_until(lambda: [future.cancelled() for future in futures] == [True] * 20)
        gate.open()
        wait_until(lambda: scheduler.accepted == 0)
        assert 'status="200"' not in server.ask("/metrics")[1], "somebody was answered"


@pytest.mark.slow
def test_a_changed_bundle_is_opened_anew(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(CLASSIFIER, folder)
    with serving(folder) as server:
        assert server.models.reload() == []
        before = server.models.rows(None).session
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["labels"] = ["bad", "good"]
        (folder / "manifest.json").write_text(json.dumps(manifest))
        assert server.models.reload() == ["bundle"]
        assert server.results({"input": "good film"})[0]["label"] in ("bad", "good")
        with pytest.raises(Exception, match="closed"):
            before("good film")


@pytest.mark.slow
def test_a_request_that_meets_a_closed_bundle_is_answered_by_the_new_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with serving(CLASSIFIER) as server:
        before, after = server.models.rows(None), server.models._open("tiny_bundle")
        before.scheduler.close()
        submit = before.scheduler.submit

        def replaced(*arguments: Any) -> Any:
            server.models._models["tiny_bundle"] = after
            return submit(*arguments)

        monkeypatch.setattr(before.scheduler, "submit", replaced)
        assert server.results({"input": "good film"})[0]["label"]
        before.close()


@pytest.mark.slow
def test_a_server_without_its_walker_is_neither_healthy_nor_ready() -> None:
    with serving(CLASSIFIER) as server:
        server.models.rows(None).scheduler.close()
        assert [server.ask(path)[0] for path in ("/healthz", "/readyz")] == [503, 503]


def test_a_rule_that_plans_its_depth_refuses_another_limit(server: Server) -> None:
    model = server.models.rows("points")
    assert isinstance(model, ServedModel)
    planned = dataclasses.replace(model.manifest.points[0], name="planned", rule=RuleSpec("quee", {}))
    manifest = dataclasses.replace(model.manifest, points=(*model.manifest.points, planned))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(model.session, "manifest", manifest)
        patched.setattr(model.session, "add_point", lambda point: (0, 0))
        with pytest.raises(BadSetting, match="rule quee plans how deep a row goes by itself"):
            model.options(Wanted(point="planned", max_depth=3))


@pytest.mark.slow
def test_a_bundle_that_became_bad_leaves_the_one_of_before(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(CLASSIFIER, folder)
    with serving(folder) as server:
        (folder / "manifest.json").write_text("{")
        with pytest.raises(BadBundle):
            server.models.reload()
        assert server.results({"input": "good film"})[0]["label"]


def test_small_answers_are_sent_at_once() -> None:
    """asyncio sets TCP_NODELAY only for sockets that name their protocol; else a body waits for 40 ms."""
    with bind("127.0.0.1", 0) as listening:
        assert listening.proto == socket.IPPROTO_TCP


def test_names_of_bundles(tmp_path: Path) -> None:
    first, second, other = (tmp_path / name for name in ("a/b", "d/e", "x/b"))
    for folder in (first, second, other):
        folder.mkdir(parents=True)
    assert names_of([str(first), f"c={second}"]) == {"b": first, "c": second}
    with pytest.raises(BadSetting, match=f"the name 'b' is taken by {first}; write NAME={other}"):
        names_of([str(first), str(other)])


def start(*words: str) -> subprocess.Popen[str]:
    program = [sys.executable, "-m", "offramp.runtime.serving.cli", *words]
    return subprocess.Popen(program, stderr=subprocess.PIPE, text=True)


REFUSED: dict[str, tuple[list[str], str]] = {
    "no bundle": (["nowhere/"], "nowhere"),
    "any address without keys": (
        [str(CLASSIFIER), "--host", "0.0.0.0"],
        "give --api-keys FILE, or --without-keys",
    ),
    "a point that is not there": ([str(CLASSIFIER), "--point", "other"], "operating point 'other'"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_a_server_that_cannot_start_says_why(name: str) -> None:
    words, reason = REFUSED[name]
    process = start(*words, "--port", "0")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and reason in errors and "Traceback" not in errors


@pytest.mark.slow
def test_a_port_that_is_taken_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process = start(str(CLASSIFIER), "--port", str(taken.getsockname()[1]))
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and "cannot listen at" in errors and "Traceback" not in errors


def test_a_file_without_usable_keys_is_refused(tmp_path: Path) -> None:
    for text, reason in ((b"", "it has no key"), (b"short\n", "5 characters"), (b"\xff\xfe\x00", "as text")):
        file = tmp_path / "keys"
        file.write_bytes(text)
        result = CliRunner().invoke(main, [str(CLASSIFIER), "--api-keys", str(file)])
        assert result.exit_code == 2 and reason in result.stderr


@pytest.mark.slow
@posix
def test_sigterm_answers_what_was_accepted_and_ends() -> None:
    process = start(str(CLASSIFIER), "--port", "0")
    assert process.stderr is not None
    address = process.stderr.readline()
    port = int(address.split("http://127.0.0.1:")[1].partition("/")[0])
    answers = list[int]()

    def ask() -> None:
        body = json.dumps({"input": texts(200)})
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
            connection.request("POST", CLASSIFY, body, {"Content-Type": "application/json"})
            answers.append(len(json.loads(connection.getresponse().read())["results"]))

    caller = threading.Thread(target=ask)
    caller.start()
    time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    caller.join()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and answers == [200] and "Traceback" not in errors
    assert '"path": "/v1/classify", "status": 200' in errors
    assert not any(text in errors for text in texts(200) if len(text) > 20), "a text of a request in the log"
