"""Thread pools, each in a process of its own: a process can make its global pool only once."""

import json
import re
import subprocess
import sys
from typing import Any

import onnxruntime
import pytest
from tiny_bundles import CLASSIFIER

from offramp.runtime.engines import threads

BEFORE = f"""
import json, sys
BUNDLE = {str(CLASSIFIER)!r}
from offramp.runtime import *
from offramp.runtime.engines import threads
import onnxruntime as ort

def other_session(*options):
    ort.InferenceSession(BUNDLE + "/stem.onnx", *options, providers=["CPUExecutionProvider"])

def facts_of(**options):
    try:
        session = load(BUNDLE, **options)
    except EngineUnavailable as problem:
        return str(problem)
    return dict(session.engine.facts) | {{"answers": session("good film").exit > 0}}

lines = []
"""
GLOBAL = pytest.mark.skipif(
    not hasattr(onnxruntime, "set_global_thread_pool_sizes"), reason="this onnxruntime has no global pool"
)


def lines_of(code: str) -> list[Any]:
    """What code appends to `lines`, in a process of its own that writes nothing on standard error."""
    code = BEFORE + code + "\nprint(json.dumps(lines))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0 and not result.stderr, result.stderr
    return list(json.loads(result.stdout))


@GLOBAL
def test_first_session_makes_the_global_pool() -> None:
    """Sessions of the application open before it, and beside it on the pool."""
    first, again, other_size, fitted = lines_of("""
other_session()
lines += [facts_of(threads=2), facts_of(), facts_of(threads=1)]
options = ort.SessionOptions()
threads.share_global_pool(options)
other_session(options)
lines.append("fits")
""")
    assert (first["pool"], first["threads"], first["answers"]) == ("global", "2", True)
    assert again == first
    assert "already walks on a global pool of 2 threads" in other_size and "leave both out" in other_size
    assert fitted == "fits"


def test_process_can_keep_its_own_pools() -> None:
    """With global_pool=False or one thread, sessions of the application open as ever."""
    unshared, single = lines_of("""
for options in ({"global_pool": False}, {"threads": 1}):
    lines.append(facts_of(**options))
    other_session()
""")
    assert (unshared["pool"], unshared["answers"]) == ("one a session, not spinning", True)
    assert (single["pool"], single["answers"]) == ("none, one thread", True)


@GLOBAL
def test_pool_of_the_application_is_used() -> None:
    *refused, used = lines_of("""
ort.set_global_thread_pool_sizes(2, 1)
options = ort.SessionOptions()
options.use_per_session_threads = False
other_session(options)
for options in ({"threads": 2}, {"threads": 1}, {"global_pool": False}, {}):
    lines.append(facts_of(**options))
""")
    assert len(refused) == 3 and all("leave threads" in message for message in refused)
    assert used["threads"] == "the application's" and used["answers"]


def test_pools_do_not_spin_where_there_is_no_global_pool() -> None:
    (facts,) = lines_of("""
if hasattr(ort, "set_global_thread_pool_sizes"):
    del ort.set_global_thread_pool_sizes
lines.append(facts_of(threads=2))
""")
    pattern = r"one a session, not spinning \(onnxruntime .* has no global pool\)"
    assert re.fullmatch(pattern, facts["pool"]) and facts["answers"]


def test_usable_cores_are_at_least_one() -> None:
    assert threads.usable_cores() >= 1
