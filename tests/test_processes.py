"""docs/processes.md: its files are run as they stand, by gunicorn, as a server of asyncio, and as scripts."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from documents import BLOCK, ROOT
from tiny_bundles import CLASSIFIER

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork"),
]
DOCUMENT = (ROOT / "docs" / "processes.md").read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the document's files and a bundle."""
    shutil.copytree(CLASSIFIER, tmp_path / "bundle")
    for _, code in BLOCK.findall(DOCUMENT):
        name = code.splitlines()[0].removeprefix("# ")
        (tmp_path / name).write_text(code)
    return tmp_path


def run(folder: Path, file: str) -> str:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", file]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


def test_document_has_the_files_that_are_run_here(folder: Path) -> None:
    files = {path.name for path in folder.glob("*.py")}
    assert files == {"app.py", "asgi.py", "workers.py", "threads.py"}


def test_workers_of_every_kind_give_the_same_labels(folder: Path) -> None:
    lines = run(folder, "workers.py").splitlines()
    assert len(lines) == 3 and len(set(lines)) == 1 and lines[0].count("'") == 4


def test_threads_and_asyncio_give_the_same_labels(folder: Path) -> None:
    assert run(folder, "threads.py") == ""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(port: int, text: str) -> dict[str, Any]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/", data=text.encode())
    with urllib.request.urlopen(request, timeout=20) as answer:
        return dict(json.loads(answer.read()))


@pytest.mark.parametrize("threads", ["", ", threads=1"], ids=["default threads", "one thread"])
@pytest.mark.parametrize("line", re.findall(r"^    .*(gunicorn .*)$", DOCUMENT, re.MULTILINE))
def test_gunicorn_answers_from_all_workers_and_ends(folder: Path, line: str, threads: str) -> None:
    """Each worker answers, and ends by itself at SIGTERM: gunicorn kills one that hangs after 30 seconds."""
    pytest.importorskip("gunicorn")
    app = folder / "app.py"
    code = app.read_text().replace('load("bundle/")', f'load("bundle/"{threads or ", threads=2"})')
    app.write_text(code.replace('{"label"', '{"pid": __import__("os").getpid(), "label"'))
    port, log = free_port(), folder / "log"
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-m", *line.split()]
    command += ["--bind", f"127.0.0.1:{port}", "--log-file", str(log)]
    with subprocess.Popen(command, cwd=folder) as server:
        try:
            answers = ask_all(port, server)
        finally:
            server.send_signal(signal.SIGTERM)
            started = time.monotonic()
            status = server.wait(60)
    assert len({answer["pid"] for answer in answers}) == 2 and server.pid not in {a["pid"] for a in answers}
    assert len({(answer["label"], round(answer["score"], 6)) for answer in answers}) == 1
    assert status == 0 and time.monotonic() - started < 20, log.read_text()
    assert not re.search("ERROR|CRITICAL|SIGKILL|SIGABRT|terminate called", log.read_text()), log.read_text()


def ask_all(port: int, server: subprocess.Popen[bytes]) -> list[dict[str, Any]]:
    """Ask until two processes have answered."""
    answers: list[dict[str, Any]] = []
    until = time.monotonic() + 60
    while len({answer["pid"] for answer in answers}) < 2 and time.monotonic() < until:
        assert server.poll() is None, "the server has ended"
        try:
            answers.append(ask(port, "a good film"))
        except OSError:  # it does not listen yet
            time.sleep(0.1)
    return answers


# It calls the application as a server of the ASGI specification does; uvicorn itself is not needed.
ASGI_SERVER = """
import asyncio, json
import asgi

received = [
    {"type": "http.request", "body": b"a good ", "more_body": True},
    {"type": "http.request", "body": b"film", "more_body": False},
]
sent = []

async def receive():
    return received.pop(0)

async def send(message):
    sent.append(message)

asyncio.run(asgi.application({"type": "http"}, receive, send))
asgi.session.close()
assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
print(json.dumps([sent[0]["status"], json.loads(sent[1]["body"])]))
"""


def test_application_of_uvicorn_answers(folder: Path) -> None:
    (folder / "server.py").write_text(ASGI_SERVER)
    status, answer = json.loads(run(folder, "server.py"))
    assert status == 200 and {"label", "score"} == set(answer)
