"""Thread pools, each in a process of its own, and the number of threads that limits and affinity allow."""

import json
import re
import subprocess
import sys
from pathlib import Path
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


@pytest.mark.slow
@GLOBAL
def test_global_pool_is_made_once_and_then_used_by_all() -> None:
    """Sessions of the application open before it, and beside it on the pool."""
    first, again, default, other_size, fitted = lines_of("""
other_session()
lines += [facts_of(threads=2, global_pool=True), facts_of(global_pool=True), facts_of(), facts_of(threads=1)]
options = ort.SessionOptions()
threads.share_global_pool(options)
other_session(options)
lines.append("fits")
""")
    assert (first["pool"], first["threads"], first["answers"]) == ("global", "2", True)
    assert again == default == first
    assert "has a global pool of 2 threads" in other_size and "leave threads out" in other_size
    assert fitted == "fits"


@pytest.mark.slow
def test_sessions_of_the_application_open_by_default_after_load() -> None:
    several, single = lines_of("""
for options in ({"threads": 2}, {"threads": 1}):
    lines.append(facts_of(**options))
    other_session()
""")
    assert (several["pool"], several["threads"], several["answers"]) == (
        "one a session, not spinning",
        "2",
        True,
    )
    assert (single["pool"], single["answers"]) == ("none, one thread", True)


@pytest.mark.slow
@GLOBAL
@pytest.mark.parametrize("global_pool", [False, True])
def test_pool_of_the_application_is_used(global_pool: bool) -> None:
    *refused, used = lines_of(f"""
ort.set_global_thread_pool_sizes(2, 1)
options = ort.SessionOptions()
options.use_per_session_threads = False
other_session(options)
for options in ({{"threads": 2}}, {{"threads": 1}}, {{}}):
    lines.append(facts_of(global_pool={global_pool}, **options))
""")
    assert len(refused) == 2 and all("leave threads" in message for message in refused)
    assert used["threads"] == "the application's" and used["answers"]


@pytest.mark.slow
def test_pools_do_not_spin_where_there_is_no_global_pool() -> None:
    (facts,) = lines_of("""
if hasattr(ort, "set_global_thread_pool_sizes"):
    del ort.set_global_thread_pool_sizes
lines.append(facts_of(threads=2, global_pool=True))
""")
    pattern = r"one a session, not spinning \(onnxruntime .* has no global pool\)"
    assert re.fullmatch(pattern, facts["pool"]) and facts["answers"]


def test_usable_cores_are_at_least_one() -> None:
    assert threads.usable_cores() >= 1


def write_files(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


V2, V1 = "sys/fs/cgroup/", "sys/fs/cgroup/cpu,cpuacct/"
OWN = "proc/self/cgroup"
LIMITED: dict[str, tuple[dict[str, str], int]] = {
    "no files": ({}, 8),
    "version 2, container": ({OWN: "0::/\n", V2 + "cpu.max": "200000 100000\n"}, 2),
    "version 2, no limit": ({OWN: "0::/\n", V2 + "cpu.max": "max 100000\n"}, 8),
    "version 2, rounded up": ({OWN: "0::/\n", V2 + "cpu.max": "150000 100000\n"}, 2),
    "version 2, less than a CPU": ({OWN: "0::/\n", V2 + "cpu.max": "10000 100000\n"}, 1),
    "version 2, more than there are": ({OWN: "0::/\n", V2 + "cpu.max": "9900000 100000\n"}, 8),
    "version 2, nested": (
        {
            OWN: "0::/pods/one\n",
            V2 + "pods/cpu.max": "max 100000\n",
            V2 + "pods/one/cpu.max": "300000 100000\n",
        },
        3,
    ),
    "version 2, limit of a parent": (
        {
            OWN: "0::/pods/one\n",
            V2 + "pods/cpu.max": "200000 100000",
            V2 + "pods/one/cpu.max": "max 100000\n",
        },
        2,
    ),
    "version 2, group above the namespace": ({OWN: "0::/../x\n", V2 + "x/cpu.max": "300000 100000"}, 3),
    "version 2, damaged": ({OWN: "0::/\n", V2 + "cpu.max": "fast\n"}, 8),
    "version 2, no list of groups": ({V2 + "cpu.max": "200000 100000"}, 2),
    "version 1, container": (
        {
            OWN: "5:memory:/docker/a\n4:cpu,cpuacct:/docker/a\n",
            V1 + "cpu.cfs_quota_us": "250000\n",
            V1 + "cpu.cfs_period_us": "100000\n",
        },
        3,
    ),
    "version 1, nested": (
        {
            OWN: "4:cpu,cpuacct:/jobs/a\n",
            V1 + "jobs/a/cpu.cfs_quota_us": "50000\n",
            V1 + "jobs/a/cpu.cfs_period_us": "25000\n",
            V1 + "cpu.cfs_quota_us": "-1\n",
            V1 + "cpu.cfs_period_us": "100000\n",
        },
        2,
    ),
    "version 1, no limit": (
        {OWN: "4:cpu:/\n", V1 + "cpu.cfs_quota_us": "-1\n", V1 + "cpu.cfs_period_us": "100000\n"},
        8,
    ),
    "version 1, mounted as cpu": (
        {
            OWN: "4:cpu,cpuacct:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        1,
    ),
    "both versions": (
        {
            OWN: "4:cpu,cpuacct:/\n0::/\n",
            V1 + "cpu.cfs_quota_us": "400000\n",
            V1 + "cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/unified/cpu.max": "max 100000\n",
        },
        4,
    ),
}


@pytest.mark.parametrize("name", LIMITED)
def test_cpu_limits_of_control_groups_set_the_number_of_threads(name: str, tmp_path: Path) -> None:
    files, count = LIMITED[name]
    write_files(tmp_path, files)
    assert threads.usable_cores(tmp_path, cpus=range(8)) == count


def test_affinity_and_hyper_threads_set_the_number_of_threads(tmp_path: Path) -> None:
    topology = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    write_files(tmp_path, {topology.format(cpu): f"{cpu % 4},{cpu % 4 + 4}\n" for cpu in range(8)})
    assert threads.usable_cores(tmp_path, cpus=range(8)) == 4
    assert threads.usable_cores(tmp_path, cpus=[1, 5]) == 1
    assert threads.usable_cores(tmp_path, cpus=[1, 2]) == 2
