"""Figures of a server in the form that Prometheus reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from offramp.runtime.row_session import RowAnswer
from offramp.runtime.serving.generation import EndedText, ServedGenerator
from offramp.runtime.serving.models import ServedModel
from offramp.runtime.serving.settings import Setting

# 1 ms to 10 s, each at most 1.7 times the one before: a percentile that is read from them is off by less.
SECONDS = (
    *(0.001, 0.0015, 0.002, 0.003, 0.005, 0.007, 0.01, 0.015, 0.02, 0.03, 0.05, 0.07),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 7.0, 10.0),
)
# A text takes longer than a row: 10 ms to 500 s.
TEXT_SECONDS = (*SECONDS[6:], *(15.0, 20.0, 30.0, 50.0, 70.0, 100.0, 150.0, 200.0, 300.0, 500.0))
KNOWN_PATHS = (
    *("/v1/classify", "/v1/embeddings", "/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/walk"),
    *("/healthz", "/readyz", "/metrics"),
)


class Metrics:
    """Counts answers, refusals and requests; one for each application."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._exits = Counter("offramp_answers", "Answers by exit", ["model", "exit"], registry=registry)
        self._blocks = Counter("offramp_blocks_run", "Blocks that were run", ["model"], registry=registry)
        self._seconds = Histogram(
            "offramp_answer_seconds",
            "Seconds from accepting a row to its answer",
            ["model"],
            buckets=SECONDS,
            registry=registry,
        )
        self._texts = Counter(
            "offramp_texts", "Texts by why they ended", ["model", "ended"], registry=registry
        )
        self._prompt_tokens = Counter(
            "offramp_prompt_tokens", "Tokens of prompts of texts that ended", ["model"], registry=registry
        )
        self._generated_tokens = Counter(
            "offramp_generated_tokens", "Tokens of the texts that ended", ["model"], registry=registry
        )
        self._text_seconds = Histogram(
            "offramp_text_seconds",
            "Seconds from accepting a text to its end",
            ["model"],
            buckets=TEXT_SECONDS,
            registry=registry,
        )
        self._refused = Counter(
            "offramp_refused", "Requests not answered, by reason", ["reason"], registry=registry
        )
        self._requests = Histogram(
            "offramp_request_seconds",
            "Seconds of a request",
            ["path", "status"],
            buckets=SECONDS,
            registry=registry,
        )
        self._accepted = Gauge(
            "offramp_rows_accepted", "Rows accepted and not answered", ["model"], registry=registry
        )
        self._under_way = Gauge(
            "offramp_rows_under_way", "Rows whose walk has begun", ["model"], registry=registry
        )
        self._depth = Gauge("offramp_blocks", "Blocks of the network", ["model"], registry=registry)
        self._watched = _Watched()
        registry.register(self._watched)

    def answered(self, model: str, answer: RowAnswer | EndedText, seconds: float) -> None:
        """Count an answer, or a text that ended; seconds: since its row or text was accepted."""
        if isinstance(answer, EndedText):
            self._count_text(model, answer, seconds)
            return
        self._exits.labels(model, str(answer.exit)).inc()
        self._blocks.labels(model).inc(answer.depth)
        self._seconds.labels(model).observe(seconds)

    def _count_text(self, model: str, text: EndedText, seconds: float) -> None:
        """Count a text; of one whose caller went away, or that an error ended, the tokens alone."""
        self._prompt_tokens.labels(model).inc(text.prompt_tokens)
        self._generated_tokens.labels(model).inc(text.tokens)
        if text.ended is not None:
            self._texts.labels(model, text.ended).inc()
            self._text_seconds.labels(model).observe(seconds)

    def refused(self, reason: str) -> None:
        """Count a request that was not answered."""
        self._refused.labels(reason).inc()

    def requested(self, path: str, status: int, seconds: float) -> None:
        """Count a request; unknown paths are counted as one, or a caller could fill the memory with names."""
        self._requests.labels(path if path in KNOWN_PATHS else "other", str(status)).observe(seconds)

    def text(self, models: Sequence[ServedModel | ServedGenerator]) -> tuple[bytes, str]:
        """All figures, and the type of this text."""
        for model in models:
            self._accepted.labels(model.name).set(model.accepted)
            self._under_way.labels(model.name).set(model.under_way)
            self._depth.labels(model.name).set(model.manifest.blocks)
        self._watched.models = [model for model in models if isinstance(model, ServedModel)]
        return generate_latest(self._registry), CONTENT_TYPE_LATEST


class _Watched(Collector):
    """Figures that models hold themselves: savings, budgets and audits.

    They are read when they are asked for, so that settings that a server has given up are not among them.
    """

    def __init__(self) -> None:
        self.models: Sequence[ServedModel] = ()

    def describe(self) -> Iterator[Metric]:
        """Nothing, so that registering collects nothing."""
        yield from ()

    def collect(self) -> Iterator[Metric]:
        """Every figure of the models."""
        yield from self._savings()
        settings = [(model.name, setting) for model in self.models for setting in model.settings.all()]
        if any(setting.budget is not None for _, setting in settings):
            yield from _budgets(settings)
        if any(setting.audit is not None for _, setting in settings):
            yield from _audits(settings)

    def _savings(self) -> Iterator[Metric]:
        blocks = CounterMetricFamily(
            "offramp_blocks_saved", "Blocks that were not run, as rows left before them", labels=["model"]
        )
        seconds = CounterMetricFamily(
            "offramp_seconds_saved",
            "Seconds that full depth in the default variant takes longer, by the bundle's step costs",
            labels=["model"],
        )
        for model in self.models:
            blocks.add_metric([model.name], model.savings.blocks)
            if model.savings.milliseconds is not None:
                seconds.add_metric([model.name], model.savings.milliseconds / 1e3)
        yield blocks
        if seconds.samples:
            yield seconds


def _budgets(settings: Sequence[tuple[str, Setting]]) -> Iterator[Metric]:
    """What the budgets of some models held."""
    labels = ["model", "setting"]
    target = GaugeMetricFamily("offramp_budget_target", "Budget", labels=[*labels, "unit", "of"])
    mean = GaugeMetricFamily("offramp_budget_mean", "Mean of all its rows", labels=[*labels, "unit", "of"])
    rows = CounterMetricFamily("offramp_budget_rows", "Rows that it has counted", labels=labels)
    windows = CounterMetricFamily("offramp_budget_windows", "Complete windows of it", labels=labels)
    exceeded = CounterMetricFamily(
        "offramp_budget_windows_exceeded", "Windows in which it was not held", labels=labels
    )
    points = GaugeMetricFamily(
        "offramp_budget_point_share", "Share of its rows by operating point", labels=[*labels, "point"]
    )
    for model, setting in settings:
        if setting.budget is None:
            continue
        report, values = setting.budget.report(), [model, setting.name]
        target.add_metric([*values, report.unit, report.statistic], report.target)
        mean.add_metric([*values, report.unit, report.statistic], report.mean)
        rows.add_metric(values, report.rows)
        windows.add_metric(values, report.windows)
        exceeded.add_metric(values, report.exceeded)
        for point, share in report.shares.items():
            points.add_metric([*values, point], share)
    yield from (target, mean, rows, windows, exceeded, points)


def _audits(settings: Sequence[tuple[str, Setting]]) -> Iterator[Metric]:
    """What the audits of some models know."""
    labels = ["model", "setting"]
    rows = CounterMetricFamily("offramp_audit_rows", "Answers of which some are audited", labels=labels)
    audited = CounterMetricFamily(
        "offramp_audit_audited", "Rows that were compared with full depth", labels=labels
    )
    failed = CounterMetricFamily("offramp_audit_failed", "Audits that ended in an error", labels=labels)
    dropped = CounterMetricFamily(
        "offramp_audit_dropped", "Rows drawn for an audit while too many waited", labels=labels
    )
    disagreement = GaugeMetricFamily(
        "offramp_audit_disagreement", "Mean disagreement of audited rows (0 to 1)", labels=labels
    )
    low = GaugeMetricFamily(
        "offramp_audit_disagreement_low", "Lower end of its interval, which holds at all times", labels=labels
    )
    high = GaugeMetricFamily(
        "offramp_audit_disagreement_high",
        "Upper end of its interval, which holds at all times",
        labels=labels,
    )
    limit = GaugeMetricFamily("offramp_audit_limit", "Disagreement that is allowed", labels=labels)
    drift = GaugeMetricFamily(
        "offramp_audit_drift",
        "1 once the disagreement passed its limit, or exits differ from the calibration's",
        labels=[*labels, "test"],
    )
    deep = GaugeMetricFamily(
        "offramp_audit_full_depth", "1 once rows are walked to the end for that reason", labels=labels
    )
    exits = GaugeMetricFamily(
        "offramp_audit_exits",
        "Rows by exit, until they differ from the calibration's",
        labels=[*labels, "exit"],
    )
    calibration = GaugeMetricFamily(
        "offramp_audit_calibration_exits", "Calibration rows by exit", labels=[*labels, "exit"]
    )
    for model, setting in settings:
        if setting.audit is None:
            continue
        report, values = setting.audit.report(), [model, setting.name]
        rows.add_metric(values, report.rows)
        audited.add_metric(values, report.audited)
        failed.add_metric(values, report.failed)
        dropped.add_metric(values, setting.audit.dropped)
        disagreement.add_metric(values, report.disagreement)
        low.add_metric(values, report.low)
        high.add_metric(values, report.high)
        limit.add_metric(values, report.limit)
        drift.add_metric([*values, "disagreement"], float(report.exceeded_at is not None))
        deep.add_metric(values, float(report.full_depth))
        if report.not_compared:
            continue
        drift.add_metric([*values, "exits"], float(report.exits_changed_at is not None))
        for family, counts in ((exits, report.exits), (calibration, report.calibration_exits)):
            for number, count in enumerate(counts, 1):
                family.add_metric([*values, str(number)], count)
    yield from (rows, audited, failed, dropped, disagreement, low, high, limit, drift, deep)
    yield from (exits, calibration)
