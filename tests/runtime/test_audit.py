"""Audits: what they compare with, what they count and report, and that answers are not changed by them."""

from __future__ import annotations

import json
import os
import threading
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from tiny_bundles import (
    CLASSIFIER,
    EMBEDDING,
    GENERATOR,
    MULTI_LABEL,
    REGRESSION,
    TOKENS,
    bundle_with_points,
    texts,
)

from offramp.runtime import BadSetting, DriftWarning, RunWarning, cli, load, load_classifier, load_row_session
from offramp.runtime.audit import MOST_WAITING, Audit, AuditOptions, AuditPlan, plan_audit
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import Guarantee, Manifest, RuleSpec

PLAN = AuditPlan(1.0, 0.05, "audit_limit", "warn", 0)
GATE = RuleSpec("gate", {"threshold": 0.5})


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_with_points(tmp_path_factory.mktemp("points"))


@pytest.fixture(scope="module")
def guaranteed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_with_points(tmp_path_factory.mktemp("guaranteed"), guaranteed=True)


@pytest.fixture
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def counted(losses: list[float], plan: AuditPlan = PLAN) -> Audit[float]:
    """An audit of rows with these losses, all of which are drawn; each is finished before the next."""
    audit = Audit[float](plan, lambda loss: loss)
    for loss in losses:
        audit.observe(loss, 1)
        audit.report()
    return audit


# what an audit compares with


def with_guarantee(manifest: Manifest, **facts: Any) -> Manifest:
    point = manifest.points[0]
    promise = replace(Guarantee("disagreement", 0.02, 0.95, 300, 0.0, 0.01, "clopper-pearson"), **facts)
    return replace(manifest, points=(replace(point, guarantee=promise), *manifest.points[1:]))


def test_the_limit_is_that_of_the_points_guarantee(bundle: Path) -> None:
    manifest = with_guarantee(open_bundle(bundle).manifest)
    plan = plan_audit(manifest, manifest.rule, "fp32", AuditOptions(0.1))
    assert (plan.limit, plan.source) == (0.02, "guarantee of gate-1")
    assert plan.exit_rows == manifest.points[0].exit_rows


def test_the_limit_names_the_point_itself_before_the_default(bundle: Path) -> None:
    manifest = with_guarantee(open_bundle(bundle).manifest)
    default = replace(manifest.points[0], name="default")
    changed = replace(manifest, points=(default, *manifest.points))
    assert plan_audit(changed, manifest.rule, "fp32", AuditOptions(0.1)).source == "guarantee of gate-1"


def test_a_given_limit_replaces_that_of_the_point(bundle: Path) -> None:
    manifest = with_guarantee(open_bundle(bundle).manifest)
    plan = plan_audit(manifest, manifest.rule, "fp32", AuditOptions(0.1, 0.3))
    assert (plan.limit, plan.source) == (0.3, "audit_limit")


def test_without_a_guarantee_the_limit_is_the_end_of_the_measured_interval(bundle: Path) -> None:
    manifest = open_bundle(bundle).manifest
    point = replace(manifest.points[0], measured={"agreement": 97.0, "low": 95.0, "high": 98.0})
    plan = plan_audit(replace(manifest, points=(point,)), point.rule, "fp32", AuditOptions(0.1))
    assert plan.limit == pytest.approx(0.05) and plan.source == "measured for gate-1"


def test_an_accuracy_promises_no_disagreement(bundle: Path) -> None:
    manifest = open_bundle(bundle).manifest
    point = replace(manifest.points[0], measured={"accuracy": 97.0, "low": 95.0, "high": 98.0})
    changed = replace(manifest, points=(point,))
    with pytest.raises(
        BadSetting, match=r"no disagreement is promised \(gate-1\).*ee-calibrate --risk.*audit_limit"
    ):
        plan_audit(changed, point.rule, "fp32", AuditOptions(0.1))
    risky = with_guarantee(changed, risk="error_increase")
    with pytest.raises(BadSetting, match="no disagreement is promised"):
        plan_audit(risky, point.rule, "fp32", AuditOptions(0.1))


def test_a_setting_that_is_no_point_needs_a_limit_and_compares_no_exits(bundle: Path) -> None:
    manifest = open_bundle(bundle).manifest
    with pytest.raises(BadSetting, match="no operating point of this rule and variant"):
        plan_audit(manifest, GATE, "fp32", AuditOptions(0.1))
    plan = plan_audit(manifest, GATE, "fp32", AuditOptions(0.1, 0.1))
    assert plan.exit_rows == () and "ee-calibrate writes them" in plan.not_compared


def test_full_depth_is_not_audited_but_that_of_another_variant_is(bundle: Path) -> None:
    manifest, never = open_bundle(bundle).manifest, RuleSpec("never", {})
    with pytest.raises(BadSetting, match="all rows are walked to the end"):
        plan_audit(manifest, never, "fp32", AuditOptions(0.1, 0.1))
    assert plan_audit(manifest, never, "int8", AuditOptions(0.1, 0.1)).limit == 0.1


def test_a_budget_is_audited_by_the_largest_guarantee_of_its_points(bundle: Path) -> None:
    manifest = open_bundle(bundle).manifest
    plan = plan_audit(manifest, GATE, "fp32", AuditOptions(0.1), [0.02, 0.01, 0.0])
    assert plan.limit == 0.02 and plan.not_compared == "a budget moves among points"
    with pytest.raises(BadSetting, match="give max_risk, or audit_limit"):
        plan_audit(manifest, GATE, "fp32", AuditOptions(0.1), [0.02, None])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ((None, 0.1), "give audit, a share of the rows"),
        ((0.0,), "audit 0"),
        ((1.5,), r"audit 1\.5"),
        ((0.1, 1.0), "audit_limit 1"),
        ((0.1, None, "stop"), "on_drift 'stop'"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(options: tuple[Any, ...], text: str) -> None:
    with pytest.raises(BadSetting, match=text):
        AuditOptions(*options)


def test_tasks_without_disagreement_are_refused_by_name() -> None:
    with pytest.raises(BadSetting, match="answers of regression have no disagreement"):
        load(REGRESSION, rule="fixed", threshold=1, audit=0.1, audit_limit=0.1)
    with pytest.raises(BadSetting, match="generates text: an audit is for bundles"):
        load(GENERATOR, audit=0.1)


# what it counts


def test_it_warns_once_when_the_lower_end_passes_the_limit() -> None:
    with pytest.warns(
        DriftWarning, match=r"disagree with full depth more than 5\.00% \(audit_limit\)"
    ) as caught:
        audit = counted([0.0] * 20 + [1.0] * 40)
    assert len(caught) == 1
    report = audit.report()
    assert report.exceeded_at is not None and 20 < report.exceeded_at < 40
    assert not report.full_depth and report.audited == report.rows == 60 and report.low > 0.05


@pytest.mark.slow
def test_rows_within_the_limit_raise_no_alarm(no_warnings: None) -> None:
    random = np.random.default_rng(0)
    report = counted([float(value) for value in random.random(500) < 0.02]).report()
    assert report.exceeded_at is None and report.low < 0.02 < report.high
    assert "within it" in str(report)


def test_at_full_depth_no_more_rows_are_drawn() -> None:
    calls: list[int] = []
    audit = Audit[float](replace(PLAN, on_drift="full-depth"), lambda loss: loss, lambda: calls.append(1))
    with pytest.warns(DriftWarning, match="walked to the end from here on"):
        for _ in range(100):
            audit.observe(1.0, 1)
            audit.report()
    report = audit.report()
    assert calls == [1] and report.full_depth and report.audited == report.exceeded_at
    assert report.rows == 100 and "at full depth since" in str(report)


def test_exits_that_differ_from_the_calibrations_are_reported_once() -> None:
    audit = Audit[float](replace(PLAN, share=1e-9, exit_rows=(300, 100)), lambda loss: loss)
    with pytest.warns(DriftWarning, match="rows leave at other exits than the calibration rows") as caught:
        for _ in range(200):
            audit.observe(0.0, 2)
    report = audit.report()
    assert len(caught) == 1 and report.exits_changed_at is not None and report.exits_changed_at < 40
    assert report.calibration_exits == (300, 100) and "exits differ" in str(report)


def test_texts_of_several_windows_are_left_out_of_the_exits(no_warnings: None) -> None:
    audit = Audit[float](replace(PLAN, share=1e-9, exit_rows=(300, 100)), lambda loss: loss)
    for _ in range(200):
        audit.observe(0.0, 2, windows=3)
    assert audit.report().exits == (0, 0)


def test_the_share_of_drawn_rows_is_the_one_asked_for(no_warnings: None) -> None:
    audit = Audit[float](replace(PLAN, share=0.1), lambda loss: loss)
    for _ in range(3000):
        audit.observe(0.0, 1)
    assert 240 < audit.report().audited < 360


def test_rows_wait_while_an_audit_runs_and_none_is_lost(no_warnings: None) -> None:
    start = threading.Event()

    def loss(item: float) -> float:
        start.wait(10)
        return item

    audit = Audit[float](PLAN, loss)
    for _ in range(MOST_WAITING):
        audit.observe(0.0, 1)  # returns at once, though no audit has ended
    start.set()
    for _ in range(3 * MOST_WAITING):
        audit.observe(0.0, 1)
    assert audit.report().audited == 4 * MOST_WAITING


def test_closing_drops_what_waits(no_warnings: None) -> None:
    start, begun = threading.Event(), threading.Event()

    def loss(item: float) -> float:
        begun.set()
        start.wait(10)
        return item

    audit = Audit[float](PLAN, loss)
    for _ in range(5):
        audit.observe(0.0, 1)
    begun.wait(10)
    closing = threading.Thread(target=audit.close)
    closing.start()
    while audit._waiting:
        pass
    start.set()
    closing.join()
    assert audit.report().audited == 1


def test_an_audit_that_fails_is_counted_and_warned_about() -> None:
    def loss(item: float) -> float:
        raise MemoryError("no more")

    audit = Audit[float](PLAN, loss)
    with pytest.warns(RunWarning, match="could not be walked to the end: no more"):
        audit.observe(0.0, 1)
        report = audit.report()
    assert report.failed == 1 and report.audited == 0 and "1 audits failed" in str(report)


# sessions


@pytest.mark.parametrize("size", [1, 8])
def test_answers_are_those_without_an_audit(guaranteed: Path, size: int, no_warnings: None) -> None:
    items = texts(100, seed=7)
    with load_classifier(guaranteed, point="gate-3") as session:
        plain = [(answer.label, answer.exit) for answer in session.map(items, size)]
    with load_classifier(guaranteed, point="gate-3", audit=0.3) as session:
        audited = [(answer.label, answer.exit) for answer in session.map(items, size)]
        report = session.audit_report()
    assert plain == audited and report.rows == 100 and 15 < report.audited < 45


@pytest.mark.slow
def test_the_disagreement_is_that_with_full_depth(guaranteed: Path, no_warnings: None) -> None:
    items = texts(150, seed=8)
    with load_classifier(guaranteed, rule="never") as session:
        full = [answer.label for answer in session.map(items)]
    with load_classifier(guaranteed, point="gate-3", audit=1.0) as session:
        labels = [session(item).label for item in items]
        report = session.audit_report()
    assert report.audited == 150
    assert report.disagreement == pytest.approx(np.mean([a != b for a, b in zip(labels, full, strict=True)]))
    assert sum(report.exits) == 150


@pytest.mark.slow
def test_another_variant_is_compared_with_the_default_one(guaranteed: Path, no_warnings: None) -> None:
    items = texts(60, seed=9)
    with load_classifier(guaranteed, rule="never") as session:
        full = [answer.label for answer in session.map(items, 1)]
    with load_classifier(guaranteed, rule="never", variant="int8", audit=1.0, audit_limit=0.9) as session:
        labels = [session(item).label for item in items]
        report = session.audit_report()
    assert report.disagreement == pytest.approx(np.mean([a != b for a, b in zip(labels, full, strict=True)]))


def test_on_drift_rows_are_walked_to_the_end(bundle: Path) -> None:
    options: dict[str, object] = {"audit": 1.0, "audit_limit": 0.01, "on_drift": "full-depth"}
    with (
        load_classifier(bundle, point="gate-1", **options) as session,
        pytest.warns(DriftWarning, match="disagree with full depth"),
    ):
        answers = list(session.map(texts(200, seed=10), 1))
        report = session.audit_report()
    assert report.full_depth and report.exceeded_at is not None
    assert report.exits_changed_at is None  # of rows before that moment
    assert answers[0].exit == 1 and {answer.exit for answer in answers[-50:]} == {3}


def test_on_drift_a_budget_gives_way(guaranteed: Path) -> None:
    options: dict[str, object] = {"audit": 1.0, "audit_limit": 0.01, "on_drift": "full-depth"}
    with load_classifier(guaranteed, budget_depth=0.3, budget_window=50, **options) as session:
        with pytest.warns(RunWarning) as caught:
            answers = list(session.map(texts(200, seed=11), 1))
            session.audit_report()
        assert {answer.exit for answer in answers[-50:]} == {3}
        assert session.budget_report().exceeded > 0
    messages = "\n".join(str(entry.message) for entry in caught)
    assert "disagree with full depth" in messages and "the audit has set rows to full depth" in messages


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "rule"),
    [(MULTI_LABEL, "fixed"), (TOKENS, "fixed"), (EMBEDDING, "fixed")],
    ids=lambda x: str(x)[-8:],
)
def test_other_tasks_are_audited_by_their_own_loss(path: Path, rule: str) -> None:
    items = texts(40, seed=12)
    with load_row_session(path, rule=rule, threshold=1, audit=1.0, audit_limit=0.99) as session:
        for item in items:
            session(item)
        at_first = session.audit_report()
    assert at_first.audited == 40 and 0 < at_first.disagreement <= 1
    with load_row_session(path, rule=rule, threshold=3, audit=1.0, audit_limit=0.99) as session:
        for item in items:
            session(item)
        assert session.audit_report().disagreement == 0


def test_a_long_text_is_audited_by_its_joined_windows(guaranteed: Path) -> None:
    long = " ".join(texts(20))
    with load_classifier(
        guaranteed, point="gate-1", audit=1.0, audit_limit=0.99, long_texts="windows"
    ) as session:
        answer = session(long)
        report = session.audit_report()
    with load_classifier(guaranteed, rule="never", long_texts="windows") as session:
        full = session(long)
    assert answer.windows > 1 and report.disagreement == float(answer.label != full.label)
    assert sum(report.exits) == 0


def test_many_threads_lose_no_row(guaranteed: Path, no_warnings: None) -> None:
    with load_classifier(guaranteed, point="gate-3", audit=0.5) as session:
        items = texts(40, seed=13)
        threads = [threading.Thread(target=lambda: [session(item) for item in items]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        report = session.audit_report()
    assert report.rows == 160 and 50 < report.audited < 110


def test_closing_a_session_ends_its_audits(guaranteed: Path) -> None:
    session = load_classifier(guaranteed, point="gate-3", audit=1.0)
    for item in texts(20):
        session(item)
    session.close()
    session.close()
    assert threading.active_count() == 1 or all("prefetch" not in t.name for t in threading.enumerate())
    assert session.audit_report().rows == 20


def test_a_session_without_an_audit_has_no_report() -> None:
    with load_classifier(CLASSIFIER) as session, pytest.raises(BadSetting, match="there is no audit"):
        session.audit_report()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_starts_without_the_rows_of_its_parent() -> None:
    audit = Audit[float](PLAN, lambda loss: loss)
    audit._running = True  # as in a child, in which the thread does not exist
    audit._waiting.extend([0.0] * MOST_WAITING)
    audit.after_fork()
    audit.observe(0.0, 1)
    assert audit.report().audited == 1


# ee-run


def run(path: Path, *options: str, rows: int = 200) -> tuple[int, list[dict[str, Any]], list[str]]:
    data = "\n".join(texts(rows, seed=14)) + "\n"
    result = CliRunner().invoke(cli.main, ["--bundle", str(path), *options], input=data.encode())
    assert isinstance(result.exception, (SystemExit, type(None))), result.exception
    return (
        result.exit_code,
        [json.loads(line) for line in result.stdout.splitlines()],
        result.stderr.splitlines(),
    )


@pytest.mark.slow
def test_ee_run_reports_the_audit_and_the_budget(guaranteed: Path) -> None:
    code, objects, lines = run(
        guaranteed, "--audit", "0.5", "--audit-limit", "0.9", "--point", "gate-3", "--stats"
    )
    assert code == cli.ALL_ANSWERED and len(objects) == 200
    (line,) = (line for line in lines if line.startswith("audit "))
    assert "of 200 rows, disagreement" in line and "limit 90.00% (audit_limit): within it" in line
    _, _, lines = run(guaranteed, "--budget-depth", "0.8", "--budget-window", "100", "--stats")
    (line,) = (line for line in lines if line.startswith("budget "))
    assert "mean depth 0.8: mean 0." in line and "of 2 windows" in line


@pytest.mark.slow
def test_ee_run_warns_in_one_line(guaranteed: Path) -> None:
    options = ("--audit", "1", "--audit-limit", "0.01", "--point", "gate-1")
    code, objects, lines = run(guaranteed, *options)
    assert code == cli.ALL_ANSWERED and len(objects) == 200
    assert len(lines) == 1 and lines[0].startswith("ee-run: audit: answers disagree with full depth")


def test_ee_run_refuses_what_load_refuses(guaranteed: Path) -> None:
    code, objects, lines = run(guaranteed, "--budget-depth", "0.01")
    assert code == cli.NOT_STARTED and not objects and "the cheapest point allowed" in lines[0]
