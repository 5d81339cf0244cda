"""A process that is forked answers and ends, or refuses in one line; so do spawn and forkserver."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from tiny_bundles import CLASSIFIER, GENERATOR

from offramp.runtime import SessionForked, load_classifier, load_generator
from offramp.runtime.pipeline import BackgroundTask

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
BEFORE = f"""
import json, os, sys, threading, time
from offramp.runtime import load
from offramp.runtime.errors import OfframpError
CLASSIFIER, GENERATOR = {str(CLASSIFIER)!r}, {str(GENERATOR)!r}
TEXTS = ["a good film", "the plot was bad", "not at all warm"] * 5

def answers(session):
    return [session(text).label for text in TEXTS]

def tokens(session):
    return [chunk.token for chunk in session.generate("the film was", 5)]

def in_child(work):
    '''What work gives in a process that is forked, and its exit status; it ends as any interpreter does.'''
    reader, writer = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            value = work()
        except OfframpError as problem:
            value = f"{{type(problem).__name__}}: {{problem}}"
        os.write(writer, json.dumps(value).encode())
        sys.exit(0)
    os.close(writer)
    until = time.monotonic() + 30
    while time.monotonic() < until:
        process, status = os.waitpid(child, os.WNOHANG)
        if process:
            return json.loads(os.read(reader, 65536)), os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return "hangs", -9

"""


def result_of(code: str) -> Any:
    """The value of `result` that code leaves behind in a process of its own."""
    code = BEFORE + code + "\nprint(json.dumps(result))"
    # From Python 3.12 on a warning says that a process with threads forks, which is what is tested.
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return json.loads(done.stdout)


SCENARIOS = """
two, one, text = load(CLASSIFIER, threads=2), load(CLASSIFIER, threads=1), load(GENERATOR, threads=2)
rows, chunks = one.map(TEXTS * 10, batch_size=1), text.generate("the film", 5)
next(rows), next(chunks)

def graphs(session):
    return [graph.session for graphs in session.engine._open.values() for graph in graphs]

def kept_graphs(session):
    in_parent = {id(graph) for graph in graphs(session)}
    def work():
        answers(session)
        return sum(id(graph) in in_parent for graph in graphs(session)), len(graphs(session))
    return in_child(work)[0]

result = {
    "expected": [answers(two), answers(one)],
    "answers": [in_child(lambda: answers(session)) for session in (two, one)],
    "unused": in_child(lambda: 1),
    "closes": in_child(two.close),
    "child of a child": in_child(lambda: in_child(lambda: answers(two))),
    "text": [tokens(text), in_child(lambda: tokens(text))],
    "kept graphs": [kept_graphs(two), kept_graphs(one)],
    "rows": in_child(lambda: len(list(rows))),
    "chunks": in_child(lambda: len(list(chunks))),
    "in the parent": [answers(two), answers(one), len(list(rows)), len(list(chunks))],
}
"""


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """What children of one process give, by scenario: (value, exit status)."""
    return dict(result_of(SCENARIOS))


@pytest.mark.slow
def test_child_answers_and_ends(results: dict[str, Any]) -> None:
    assert results["answers"] == [[expected, 0] for expected in results["expected"]]


@pytest.mark.slow
def test_child_that_does_not_use_the_session_ends(results: dict[str, Any]) -> None:
    assert results["unused"] == [1, 0]


@pytest.mark.slow
def test_child_that_closes_the_session_ends(results: dict[str, Any]) -> None:
    assert results["closes"] == [None, 0]


@pytest.mark.slow
def test_child_of_a_child_answers(results: dict[str, Any]) -> None:
    assert results["child of a child"] == [[results["expected"][0], 0], 0]


@pytest.mark.slow
def test_child_generates_text(results: dict[str, Any]) -> None:
    expected, child = results["text"]
    assert child == [expected, 0] and len(expected) == 5


@pytest.mark.slow
def test_graphs_without_threads_stay_open_in_the_child(results: dict[str, Any]) -> None:
    """Their memory is shared with the parent: nothing is read again."""
    threaded, single = results["kept graphs"]
    assert single[0] == single[1] == 4
    assert threaded[0] == 0 < threaded[1]


@pytest.mark.slow
def test_rows_of_an_iterator_go_on_in_the_child(results: dict[str, Any]) -> None:
    assert results["rows"] == [149, 0]


@pytest.mark.slow
def test_text_of_the_parent_is_refused_in_the_child(results: dict[str, Any]) -> None:
    """Its cache belongs to graphs of the parent."""
    problem, status = results["chunks"]
    assert problem.startswith("SessionForked") and "call generate again" in problem and status == 0


@pytest.mark.slow
def test_parent_goes_on(results: dict[str, Any]) -> None:
    assert results["in the parent"] == [*results["expected"], 149, 4]


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(onnxruntime, "set_global_thread_pool_sizes"), reason="this onnxruntime has no global pool"
)
def test_session_on_a_global_pool_is_refused_in_the_child() -> None:
    (refused, status), (again, again_status), before, after = result_of("""
session = load(CLASSIFIER, threads=2, global_pool=True)
before = answers(session)
refused = [in_child(lambda: answers(session)), in_child(lambda: load(CLASSIFIER) and None)]
result = [*refused, before, answers(session)]
""")
    assert refused.startswith("SessionForked") and "leave global_pool out of load()" in refused
    assert again == refused and (status, again_status) == (0, 0) and after == before


@pytest.mark.slow
def test_forks_beside_threads_that_walk() -> None:
    """A fork waits until no session is in the middle of a walk."""
    results, other = result_of("""
session, done, other = load(CLASSIFIER, threads=2), threading.Event(), set()
expected = answers(session)
def walk():
    while not done.is_set():
        other.add(answers(session) == expected)
threads = [threading.Thread(target=walk) for _ in range(3)]
for thread in threads:
    thread.start()
results = [in_child(lambda: answers(session) == expected) for _ in range(8)]
done.set()
for thread in threads:
    thread.join()
result = [results, list(other)]
""")
    assert results == [[True, 0]] * 8 and other == [True]


@pytest.mark.slow
def test_import_of_onnxruntime_starts_no_thread_and_leaves_the_environment() -> None:
    """Its telemetry would; a process that is forked hangs at its end without that thread."""
    name, threads = result_of("""
import numpy
before = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0
load(CLASSIFIER, threads=1)
after = len(os.listdir("/proc/self/task")) if before else 0
result = [os.environ.get("ORT_DISABLE_TELEMETRY"), after - before]
""")
    assert (name, threads) == (None, 0)


def test_background_task_of_the_parent_is_refused() -> None:
    task: BackgroundTask[int, int] = BackgroundTask(lambda item: item, 1)
    task.join()
    task._result.clear()  # as in a child, in which its thread does not exist
    with pytest.raises(SessionForked, match="call map again"):
        task.result()


def test_engine_that_cannot_go_on_is_refused_at_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    with load_classifier(CLASSIFIER) as session:

        def refuse() -> None:
            raise SessionForked("opened on a GPU")

        monkeypatch.setattr(session.engine, "after_fork", refuse)
        session.after_fork()
        with pytest.raises(SessionForked, match="opened on a GPU"):
            session("good")


def test_closed_sessions_stay_closed() -> None:
    session = load_generator(GENERATOR)
    session.close()
    session.after_fork()
    with pytest.raises(RuntimeError, match="the session is closed"):
        next(session.generate("the film"))


MAIN = """
import multiprocessing, sys
from offramp.runtime import load

method, place = sys.argv[1:]
session = load({bundle!r}, threads=2) if place == "parent" else None

def open_session():
    global session
    if session is None:
        session = load({bundle!r}, threads=2)

def answer(text):
    return session(text).label

if __name__ == "__main__":
    context = multiprocessing.get_context(method)
    texts = ["a good film", "the plot was bad"] * 10
    with context.Pool(2, open_session) as pool:
        print(pool.map(answer, texts))
        pool.close()
        pool.join()
    open_session()
    print([answer(text) for text in texts])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "place"),
    [
        ("fork", "parent"),
        ("fork", "child"),
        ("spawn", "parent"),
        ("spawn", "child"),
        ("forkserver", "parent"),
        ("forkserver", "child"),
    ],
)
def test_workers_of_multiprocessing_answer_and_end(tmp_path: Path, method: str, place: str) -> None:
    """With spawn and forkserver the module is imported again: a session of its top level is another one."""
    script = tmp_path / "main.py"
    script.write_text(MAIN.format(bundle=str(CLASSIFIER)))
    command = [sys.executable, "-W", "ignore::DeprecationWarning", str(script), method, place]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
    workers, parent = done.stdout.splitlines()
    assert workers == parent and time.monotonic() - started < 50
