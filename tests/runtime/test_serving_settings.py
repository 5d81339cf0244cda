"""Budgets and audits of ee-serve: what requests may name, what is held, and what /metrics tells of it."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from serving import CLASSIFY, Server, serving
from tiny_bundles import CLASSIFIER, EMBEDDING, GENERATOR, REGRESSION, bundle_with_points, texts

from offramp.runtime import load_classifier
from offramp.runtime.audit import AuditOptions
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import StepCosts
from offramp.runtime.errors import BadSetting, SessionClosed
from offramp.runtime.inputs.text import items_to_rows
from offramp.runtime.serving import settings as settings_module
from offramp.runtime.serving.models import Models
from offramp.runtime.serving.scheduler import BACKGROUND_QUEUE, RowOptions, Scheduler
from offramp.runtime.serving.settings import MOST_BUDGETS, TooManyBudgets, Wanted, WatchOptions

ALL = AuditOptions(1.0)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_with_points(tmp_path_factory.mktemp("points"), guaranteed=True)


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Server]:
    with serving(bundle, f"plain={CLASSIFIER}", f"vectors={EMBEDDING}") as opened:
        yield opened


def figures(server: Server) -> dict[str, float]:
    """The figures of /metrics by name and labels."""
    lines = [line for line in server.ask("/metrics")[1].splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def wait_for(server: Server, name: str, least: float) -> dict[str, float]:
    """The figures, once one of them is at least this."""
    end = time.monotonic() + 20
    while (now := figures(server))[name] < least:
        assert time.monotonic() < end, now
        time.sleep(0.01)
    return now


def depth_of(server: Server, texts: list[str], size: int = 60, asked: Any = None) -> float:
    """The mean depth of texts as a share of all four blocks, asked in requests of `size` texts."""
    depths = list[int]()
    for start in range(0, len(texts), size):
        results = server.results({"input": texts[start : start + size]} | (asked or {}))
        depths += [result["depth"] for result in results]
    return sum(depths) / len(depths) / 4


# budgets


@pytest.mark.slow
def test_a_budget_of_requests_is_held_over_all_of_them(server: Server) -> None:
    given = texts(1200, seed=5)
    asked = {"model": "bundle", "budget_depth": 0.6}
    assert depth_of(server, given, asked=asked) == pytest.approx(0.6, rel=0.05)
    at = 'model="bundle",of="mean",setting="budget_depth 0.6",unit="depth"'
    now = figures(server)
    assert now[f"offramp_budget_target{{{at}}}"] == 0.6
    assert now[f"offramp_budget_mean{{{at}}}"] == pytest.approx(0.6, rel=0.05)
    shares = [value for name, value in now.items() if "offramp_budget_point_share" in name]
    assert sum(shares) == pytest.approx(1.0) and len(shares) == 4


@pytest.mark.slow
def test_rows_of_several_requests_at_once_share_a_budget(bundle: Path) -> None:
    watch = WatchOptions(budget_window=200)
    with serving(bundle, watch=watch) as server:
        given = texts(1200, seed=6)
        callers = [
            threading.Thread(target=depth_of, args=(server, given[start::4], 1, {"budget_depth": 0.5}))
            for start in range(4)
        ]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        (setting,) = [s for s in server.models.rows(None).settings.all() if s.budget is not None]
        assert setting.budget is not None
        report = setting.budget.report()
    assert report.rows == 1200 and report.mean == pytest.approx(0.5, rel=0.05)


def test_a_budget_of_milliseconds_goes_to_full_depth_if_there_is_time_for_it(server: Server) -> None:
    asked = {"model": "bundle", "budget_ms": 10_000.0}
    depth_of(server, texts(60), 20, asked)
    assert depth_of(server, texts(40), asked=asked) == 1.0


def test_a_budget_uses_points_that_guarantee_a_risk(server: Server, bundle: Path) -> None:
    limits = {p.name: p.guarantee.limit for p in open_bundle(bundle).manifest.points if p.guarantee}
    setting = server.models.rows("bundle").settings.find(Wanted(budget_depth=0.9, max_risk=limits["gate-3"]))
    assert setting.budget is not None
    assert [point.name for point in setting.budget.points] == ["gate-3", "full depth"]


def test_rows_of_a_budget_keep_a_depth_that_is_asked_as_well(server: Server) -> None:
    asked = {"model": "bundle", "budget_depth": 0.9, "max_depth": 1}
    assert depth_of(server, texts(30), asked=asked) == 0.25


@pytest.mark.slow
def test_rows_that_name_a_point_do_not_count_for_the_servers_budget(bundle: Path) -> None:
    with serving(bundle, watch=WatchOptions(budget_depth=0.6)) as server:
        server.results({"input": texts(20), "point": "gate-1"})
        server.results({"input": texts(10)})
        server.results({"input": texts(10), "budget_depth": 0.6})  # the same budget
        rows = figures(server)['offramp_budget_rows_total{model="bundle",setting="budget_depth 0.6"}']
    assert rows == 20


def test_embeddings_refuse_a_budget_without_points_by_its_field(server: Server) -> None:
    status, answer, _ = server.ask(
        "/v1/embeddings", {"model": "vectors", "input": "good film", "budget_depth": 0.5}
    )
    assert status == 400
    assert re.match(
        "budget_depth 0.5: it needs two points of rule .*; write points with ee-calibrate",
        answer["error"]["message"],
    )


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "two budgets": ({"budget_ms": 3.0, "budget_depth": 0.5}, "budget_ms and budget_depth: give one of them"),
    "a point": ({"point": "gate-1", "budget_ms": 3.0}, "point and budget_ms: give one of them"),
    "too little": (
        {"budget_depth": 0.1},
        "budget_depth 0.1: gate-1, the cheapest point allowed, was measured at a mean of 0.250 of the "
        "blocks; give at least that",
    ),
    "over 1": ({"budget_depth": 1.5}, "budget_depth: Input should be less than or equal to 1"),
    "none": ({"budget_ms": 0.0}, "budget_ms: Input should be greater than 0"),
    "a text": ({"budget_ms": "fast"}, "budget_ms: Input should be a valid number"),
    "no points": ({"model": "plain", "budget_depth": 0.5}, "budget_depth 0.5: it needs two points of rule"),
    "a risk that no point keeps": (
        {"budget_depth": 0.5, "max_risk": 0.01},
        "with a guarantee of at most 0.01, and there is full depth; write points with ee-calibrate --risk",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_budget_that_cannot_be_held_is_refused_by_its_field(server: Server, name: str) -> None:
    asked, reason = BAD[name]
    status, answer, _ = server.ask(CLASSIFY, {"model": "bundle", "input": "good film"} | asked)
    assert status == 400 and reason in answer["error"]["message"], answer


def test_budgets_are_described(server: Server) -> None:
    fields = server.ask("/openapi.json")[1]["components"]["schemas"]["ClassifyRequest"]["properties"]
    assert "over all rows that ask for the same" in fields["budget_ms"]["description"]
    assert fields["budget_depth"]["description"]


@pytest.mark.slow
def test_more_budgets_than_the_server_holds_are_refused_until_one_rests(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(bundle, watch=WatchOptions(budget_depth=0.9)) as server:
        for number in range(MOST_BUDGETS):
            server.results({"input": "good film", "budget_depth": 0.5 + number / 100})
        asked = {"input": "good film", "budget_depth": 0.8}
        status, answer, headers = server.ask(CLASSIFY, asked)
        assert status == 429 and answer["error"]["type"] == "too_many_budgets"
        assert "ask for one of: budget_depth 0.5, budget_depth 0.51" in answer["error"]["message"]
        assert 500 < int(headers["retry-after"]) <= 600
        server.results({"input": "good film", "budget_depth": 0.9})  # the server's own needs no place
        monkeypatch.setattr(settings_module, "BUDGET_REST", 0.0)
        server.results(asked)
        names = [setting.name for setting in server.models.rows(None).settings.all()]
    assert "budget_depth 0.8" in names and "budget_depth 0.5" not in names


def test_budgets_that_differ_in_the_seventh_digit_are_one(server: Server) -> None:
    settings = server.models.rows("bundle").settings
    assert settings.find(Wanted(budget_depth=0.75)) is settings.find(Wanted(budget_depth=0.75000001))


def test_a_row_that_is_refused_is_not_waited_for(bundle: Path) -> None:
    models = Models({"bundle": bundle}, scheduling={"queue": 1}, watch=WatchOptions(budget_depth=0.6))
    models.open()
    model = models.rows(None)
    (row,) = items_to_rows(model.session._reader, ["good film"])
    model.scheduler.close()
    with pytest.raises(SessionClosed):
        model.scheduler.submit(row, model.options(Wanted()))
    assert model.settings.own._open == 0
    models.close()


@pytest.mark.slow
def test_a_budget_that_is_exceeded_is_told_once(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    watch = WatchOptions(budget_depth=0.26, budget_window=20)
    with load_classifier(bundle) as session:
        answer = session("good film")
    with serving(bundle, watch=watch) as server, caplog.at_level(logging.WARNING, "offramp.serve"):
        setting = server.models.rows(None).settings.own
        assert setting.budget is not None
        (row,) = items_to_rows(server.models.rows(None).session._reader, ["good film"])
        for _ in range(60):  # rows that are harder than any that were measured
            ended = setting.options().ended
            assert ended is not None
            ended(row, replace(answer, depth=4))
    (line,) = [json.loads(record.message) for record in caplog.records]
    assert (line["warning"], line["model"]) == ("BudgetExceeded", "bundle")
    assert line["setting"] == "budget_depth 0.26" and "was not held" in line["message"]


# audits


@pytest.mark.slow
def test_audited_rows_are_compared_with_full_depth(bundle: Path) -> None:
    given = texts(40, seed=7)
    with load_classifier(bundle) as session:
        early = [answer.label for answer in session.map(given)]
    with load_classifier(bundle, rule="never") as session:
        full = [answer.label for answer in session.map(given)]
    expected = sum(a != b for a, b in zip(early, full, strict=True)) / len(given)
    with serving(bundle, watch=WatchOptions(audit=ALL)) as server:
        server.results({"input": given})
        at = '{model="bundle",setting="gate-1"}'
        now = wait_for(server, f"offramp_audit_audited_total{at}", len(given))
    assert now[f"offramp_audit_rows_total{at}"] == len(given)
    assert now[f"offramp_audit_disagreement{at}"] == pytest.approx(expected)
    low, high = (now[f"offramp_audit_disagreement_{end}{at}"] for end in ("low", "high"))
    assert 0 <= low < expected <= high <= 1
    assert now['offramp_audit_drift{model="bundle",setting="gate-1",test="disagreement"}'] == 0
    assert sum(v for name, v in now.items() if name.startswith("offramp_audit_exits{")) == len(given)
    calibration = [v for name, v in now.items() if name.startswith("offramp_audit_calibration_exits{")]
    assert calibration == list(open_bundle(bundle).manifest.points[0].exit_rows)
    assert sum(v for name, v in now.items() if name.startswith("offramp_answers_total{")) == len(given)


@pytest.mark.slow
def test_every_point_that_requests_name_is_audited_by_its_own_promise(bundle: Path) -> None:
    with serving(bundle, watch=WatchOptions(audit=ALL)) as server:
        server.results({"input": texts(10), "point": "gate-3"})
        now = wait_for(server, 'offramp_audit_audited_total{model="bundle",setting="gate-3"}', 10)
        point = open_bundle(bundle).manifest.points[2]
    assert point.guarantee is not None
    assert now['offramp_audit_limit{model="bundle",setting="gate-3"}'] == pytest.approx(point.guarantee.limit)


@pytest.mark.slow
def test_rows_whose_depth_is_limited_are_not_audited(bundle: Path) -> None:
    with serving(bundle, watch=WatchOptions(audit=ALL)) as server:
        server.results({"input": texts(10), "point": "gate-3", "max_depth": 1})
        assert figures(server)['offramp_audit_rows_total{model="bundle",setting="gate-3"}'] == 0


@pytest.mark.slow
def test_drift_is_told_and_walks_rows_to_the_end(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    watch = WatchOptions(audit=AuditOptions(1.0, 0.05, "full-depth"))
    given = texts(200, seed=8)
    with load_classifier(bundle, rule="never") as session:
        full = [answer.label for answer in session.map(given[:40])]
    with serving(bundle, watch=watch) as server, caplog.at_level(logging.WARNING, "offramp.serve"):
        for start in range(0, 200, 20):
            server.results({"input": given[start : start + 20]})
        at = '{model="bundle",setting="gate-1"}'
        now = wait_for(server, f"offramp_audit_full_depth{at}", 1)
        results = server.results({"input": given[:40]})
        assert {result["depth"] for result in results} == {4} and [r["label"] for r in results] == full
        assert {r["depth"] for r in server.results({"input": texts(30), "point": "gate-2"})} != {4}
    assert now['offramp_audit_drift{model="bundle",setting="gate-1",test="disagreement"}'] == 1
    lines = [json.loads(record.message) for record in caplog.records]
    (line,) = [line for line in lines if line["setting"] == "gate-1"]
    assert line["warning"] == "DriftWarning" and "disagree with full depth" in line["message"]


@pytest.mark.slow
def test_a_budget_is_audited_and_released_by_drift(bundle: Path) -> None:
    watch = WatchOptions(budget_depth=0.5, audit=AuditOptions(1.0, 0.05, "full-depth"))
    with serving(bundle, watch=watch) as server:
        for start in range(0, 200, 20):
            server.results({"input": texts(200, seed=9)[start : start + 20]})
        wait_for(server, 'offramp_audit_full_depth{model="bundle",setting="budget_depth 0.5"}', 1)
        assert depth_of(server, texts(20)) == 1.0


@pytest.mark.slow
def test_the_answer_is_given_before_its_audit(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(bundle, watch=WatchOptions(audit=ALL)) as server:
        engine = server.models.rows(None).session.engine
        step, open_ = engine.step, threading.Event()

        def held(segment: int, variant: int, state: Any) -> Any:
            assert segment < 2 or open_.wait(20)  # rows of gate-1 leave before
            return step(segment, variant, state)

        monkeypatch.setattr(engine, "step", held)
        results = server.results({"input": ["the film was good"]})
        assert results[0]["exit"] == 1
        at = '{model="bundle",setting="gate-1"}'
        assert figures(server)[f"offramp_audit_audited_total{at}"] == 0
        open_.set()
        wait_for(server, f"offramp_audit_audited_total{at}", 1)


@pytest.mark.slow
def test_a_server_without_budgets_and_audits_has_no_figures_of_them(server: Server) -> None:
    with serving(CLASSIFIER) as plain:
        names = figures(plain)
    assert not any(name.startswith(("offramp_budget", "offramp_audit")) for name in names)


REFUSED: dict[str, tuple[Path, dict[str, Any], dict[str, Any], str]] = {
    "a budget of a generator": (GENERATOR, {"budget_depth": 0.5}, {}, "model x generates text: a budget is"),
    "an audit of a generator": (GENERATOR, {"audit": ALL}, {}, "model x generates text: an audit is"),
    "an audit of numbers": (
        REGRESSION,
        {"audit": ALL},
        {},
        "model x: audit: answers of regression have no disagreement",
    ),
    "an audit without a promise": (
        CLASSIFIER,
        {"audit": ALL},
        {},
        "model x: audit: no disagreement is promised",
    ),
    "a budget without points": (
        CLASSIFIER,
        {"budget_ms": 5.0},
        {},
        "model x: budget_ms 5: it needs two points",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bundle_that_cannot_be_watched_is_not_opened(name: str) -> None:
    folder, watch, options, reason = REFUSED[name]
    with pytest.raises(BadSetting, match=reason):
        Models({"x": folder}, options, watch=WatchOptions(**watch)).open()


def test_a_point_contradicts_the_budget_of_the_server(bundle: Path) -> None:
    with pytest.raises(BadSetting, match="point: a budget moves among points; leave it out"):
        Models({"x": bundle}, {"point": "gate-1"}, watch=WatchOptions(budget_depth=0.5)).open()


def test_a_risk_without_a_budget_is_refused() -> None:
    with pytest.raises(BadSetting, match="max_risk is for a budget: give budget_ms or budget_depth"):
        WatchOptions(max_risk=0.1)


def test_a_window_that_is_too_short_is_refused_at_the_start() -> None:
    with pytest.raises(BadSetting, match="budget_window 5: expected 20 rows or more"):
        WatchOptions(budget_window=5)


# savings


@pytest.mark.slow
def test_saved_blocks_and_time_are_counted(tmp_path: Path) -> None:
    folder = bundle_with_points(tmp_path)
    manifest = open_bundle(folder).manifest
    steps: dict[str, tuple[float, ...]] = dict.fromkeys(manifest.variants, (1.0, 2.0, 4.0))
    priced = replace(manifest, costs={"ms": StepCosts(16, steps)})
    (folder / "manifest.json").write_text(priced.to_json(), encoding="utf-8")
    with serving(folder) as server:
        results = server.results({"input": texts(40), "point": "gate-3"})
        now = figures(server)
    assert now['offramp_blocks_saved_total{model="bundle"}'] == sum(4 - result["depth"] for result in results)
    saved = sum({1: 6.0, 2: 4.0, 3: 0.0}[result["exit"]] for result in results) / 1e3
    assert now['offramp_seconds_saved_total{model="bundle"}'] == pytest.approx(saved) and saved > 0


@pytest.mark.slow
def test_a_bundle_without_measured_costs_has_no_saved_time() -> None:
    with serving(CLASSIFIER) as server:
        results = server.results({"input": texts(40)})
        now = figures(server)
    blocks = open_bundle(CLASSIFIER).manifest.blocks
    saved = sum(blocks - result["depth"] for result in results)
    assert now['offramp_blocks_saved_total{model="tiny_bundle"}'] == saved
    assert not any(name.startswith("offramp_seconds_saved") for name in now)


# rows for which nobody waits


def test_background_rows_are_walked_and_not_counted(bundle: Path) -> None:
    with load_classifier(bundle) as session:
        counted: list[Any] = []
        scheduler = Scheduler(session, observe=lambda answer, seconds: counted.append(answer))
        (row,) = items_to_rows(session._reader, ["the film was good"])
        future = scheduler.submit_background(row, RowOptions(*session.full_depth("fp32")))
        assert future is not None and future.result(20).depth == 4
        assert scheduler.accepted == scheduler.under_way == 0 and counted == []
        scheduler.close()


def test_background_rows_that_wait_are_limited_and_dropped_at_the_end(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load_classifier(bundle) as session:
        gate, step = threading.Event(), session.engine.step

        def held(segment: int, variant: int, state: Any) -> Any:
            assert gate.wait(20)
            return step(segment, variant, state)

        monkeypatch.setattr(session.engine, "step", held)
        scheduler = Scheduler(session)
        (row,) = items_to_rows(session._reader, ["the film was good"])
        options = RowOptions(*session.draw())
        answered = scheduler.submit(row, options)
        futures = [scheduler.submit_background(row, options) for _ in range(BACKGROUND_QUEUE + 9)]
        assert futures[-1] is None and futures[0] is not None
        closing = threading.Thread(target=scheduler.close)
        closing.start()
        time.sleep(0.05)
        gate.set()
        closing.join(20)
        assert answered.result(0).label and not closing.is_alive()
        assert all(future is None or future.done() for future in futures)
        assert scheduler.submit_background(row, options) is None


def test_too_many_budgets_state_when_to_ask_again() -> None:
    assert TooManyBudgets("budget_depth 0.5: no place", 3.5).retry_after == 3.5


# the command


def start(*words: str) -> subprocess.Popen[str]:
    program = [sys.executable, "-m", "offramp.runtime.serving.cli", *words, "--port", "0"]
    return subprocess.Popen(program, stderr=subprocess.PIPE, text=True)


def ask(port: int, method: str, path: str, value: Any = None) -> str:
    """The text of an answer, which must not be an error."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
        body = None if value is None else json.dumps(value)
        connection.request(method, path, body, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        assert reply.status == 200
        return reply.read().decode()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_the_command_watches_and_writes_warnings_to_its_log(bundle: Path) -> None:
    process = start(str(bundle), "--budget-depth", "0.5", "--audit", "1", "--audit-limit", "0.05", "--quiet")
    assert process.stderr is not None
    port = int(process.stderr.readline().split("http://127.0.0.1:")[1].partition("/")[0])
    for at in range(0, 160, 20):
        ask(port, "POST", CLASSIFY, {"input": texts(160, seed=9)[at : at + 20]})
    drift = 'offramp_audit_drift{model="bundle",setting="budget_depth 0.5",test="disagreement"} 1.0'
    end = time.monotonic() + 20
    while drift not in ask(port, "GET", "/metrics"):
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in errors
    (line,) = [json.loads(line) for line in errors.splitlines() if line.startswith("{")]
    assert (line["warning"], line["setting"]) == ("DriftWarning", "budget_depth 0.5")


@pytest.mark.slow
def test_the_command_refuses_options_that_contradict_each_other(bundle: Path) -> None:
    process = start(str(bundle), "--audit-limit", "0.1")
    _, errors = process.communicate(timeout=60)
    assert (
        process.returncode == 2 and "give audit, a share of the rows" in errors and "Traceback" not in errors
    )
