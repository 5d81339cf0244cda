"""benchmarks/soak.py: threads count answers, and a wrong one is reported."""

from __future__ import annotations

import time

import pytest
from tiny_bundles import CLASSIFIER

from offramp.benchmarks.soak import Soak, resident_bytes

pytestmark = pytest.mark.slow


def test_threads_get_right_answers() -> None:
    soak = Soak(CLASSIFIER, 4)
    soak.start()
    until = time.monotonic() + 20
    while min(soak.counts) < 20 and not soak.wrong and time.monotonic() < until:
        time.sleep(0.01)
    soak.stop()
    assert not soak.wrong and min(soak.counts) >= 20 and resident_bytes() > 10**6


def test_wrong_answer_is_reported() -> None:
    soak = Soak(CLASSIFIER, 2)
    soak.expected = [(label, exit, score + 0.1) for label, exit, score in soak.expected]
    soak.start()
    until = time.monotonic() + 20
    while not soak.wrong and time.monotonic() < until:
        time.sleep(0.01)
    soak.stop()
    assert soak.wrong and "expected" in soak.wrong[0]


def test_error_of_a_thread_is_reported() -> None:
    soak = Soak(CLASSIFIER, 1)
    soak.session.close()
    soak.start()
    time.sleep(1)
    soak.stop()
    assert "SessionClosed" in soak.wrong[0] or "BadBundle" in soak.wrong[0]
