"""Figures of a server in the form that Prometheus reads."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from offramp.runtime.row_session import RowAnswer
from offramp.runtime.serving.generation import ServedGenerator
from offramp.runtime.serving.models import ServedModel

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
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

    def answered(self, model: str, answer: RowAnswer, seconds: float) -> None:
        """Count an answer; seconds: since its row was accepted."""
        self._exits.labels(model, str(answer.exit)).inc()
        self._blocks.labels(model).inc(answer.depth)
        self._seconds.labels(model).observe(seconds)

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
        return generate_latest(self._registry), CONTENT_TYPE_LATEST
