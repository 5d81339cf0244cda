"""Errors as answers, in OpenAI's form: {"error": {"message": …, "type": …}}; each has one status."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from offramp.runtime.errors import BadInput, BadSetting, OfframpError, SessionClosed
from offramp.runtime.serving.limits import LOG
from offramp.runtime.serving.models import UnknownModel
from offramp.runtime.serving.scheduler import DeadlinePassed, QueueFull, ThreadEnded
from offramp.runtime.serving.settings import TooManyBudgets


class ErrorReply(NamedTuple):
    """What a caller gets in place of an answer. kind: "type" of its JSON, by which /metrics counts it."""

    status: int
    kind: str
    message: str
    headers: Mapping[str, str] = {}

    def as_json(self) -> dict[str, Any]:
        """The JSON object."""
        return {"error": {"message": self.message, "type": self.kind}}


def reply_to(problem: Exception) -> ErrorReply:
    """The reply to a request that an error ended.

    The message of an error of the server may name its files, so that the caller gets the type alone, and the
    log has the rest: of errors that are none of offramp's, whoever raises them again must write it.
    """
    if isinstance(problem, (QueueFull, TooManyBudgets)):
        kind = "queue_full" if isinstance(problem, QueueFull) else "too_many_budgets"
        return ErrorReply(429, kind, str(problem), _retry_after(problem.retry_after))
    if isinstance(problem, DeadlinePassed):
        return ErrorReply(504, "deadline_passed", str(problem))
    if isinstance(problem, SessionClosed):
        return ErrorReply(503, "closing", "the server is closing; ask again", _retry_after(1.0))
    if isinstance(problem, ThreadEnded):
        return ErrorReply(503, "engine", str(problem))
    if isinstance(problem, UnknownModel):
        return ErrorReply(404, "unknown_model", str(problem))
    if isinstance(problem, (BadInput, BadSetting)):
        return ErrorReply(400, "bad_request", str(problem))
    if isinstance(problem, OfframpError):
        LOG.error("%s: %s", type(problem).__name__, problem)
    return ErrorReply(500, "engine", f"{type(problem).__name__}: see the log of the server")


def _retry_after(seconds: float) -> dict[str, str]:
    return {"Retry-After": str(max(1, -int(-seconds // 1)))}
