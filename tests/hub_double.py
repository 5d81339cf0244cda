"""A model hub on a local port: the endpoints that pulling and pushing a bundle use, and faults on demand.

Repositories, commits and large files are kept in memory. Graphs are large files: the hub redirects to a
second port for them, as real hubs do to the servers of their storage.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_double"  # the one that may read private repositories and write
RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
INFO = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/revision/(?P<revision>[^/]+)")
PREUPLOAD = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)")
COMMIT = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)")
BRANCH = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<branch>[^/]+)")
BATCH = re.compile(r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
STORED = re.compile(r"/stored/(?P<oid>[0-9a-f]{64})")


class Request(NamedTuple):
    """A request that a port of the double received."""

    port: str  # "hub" or "storage"
    method: str
    path: str
    token: str | None


@dataclass
class Repository:
    """Commits with all their files, and branches and tags by name."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)  # of the commits, in their order

    def commit(self, branch: str, files: dict[str, bytes], message: str = "") -> str:
        """Add a commit on a branch; returns its id."""
        self.messages.append(message)
        text = repr((len(self.commits), sorted(files), self.branches))
        oid = hashlib.sha1(text.encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        return oid


@dataclass
class HubDouble:
    """The state of a hub, and what it does wrong.

    changed: bytes that are sent instead of a file's, by its name. endless: names of files that are sent
    without an end. broken: how often the connection still breaks off in the middle of a file, by its name.
    status: answer everything with this. wrong_commit: the commit that is stated for every file.
    """

    url: str = ""
    storage_url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    changed: dict[str, bytes] = field(default_factory=dict)
    endless: set[str] = field(default_factory=set)
    broken: dict[str, int] = field(default_factory=dict)
    status: int = 0
    wrong_commit: str | None = None
    sent: int = 0  # bytes of bodies

    def files(self, repository: str, branch: str = "main") -> dict[str, bytes]:
        """The files of the last commit on a branch."""
        at = self.repositories[repository]
        return at.commits[at.branches[branch]]


def is_large(path: str) -> bool:
    """Whether the double keeps a file in its storage and not in the commit."""
    return path.endswith(".onnx")


class _Handler(BaseHTTPRequestHandler):
    hub: HubDouble
    port: str
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two packets; the second would wait 40 ms

    def log_message(self, format: str, *arguments: object) -> None:
        """Print nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        authorization = self.headers.get("Authorization")
        token = authorization.removeprefix("Bearer ") if authorization else None
        path = urlsplit(self.path).path
        self.hub.requests.append(Request(self.port, self.command, path, token))
        body = self._body()
        with suppress(BrokenPipeError, ConnectionResetError):  # the client may read no more than it needs
            if self.hub.status:
                self._send(self.hub.status, b"", {"X-Error-Message": "the double was told so"})
            elif self.port == "storage":
                self._storage(path, body)
            else:
                self._hub(path, body, token)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _storage(self, path: str, body: bytes) -> None:
        match = STORED.fullmatch(path)
        assert match is not None, path
        if self.command == "PUT":
            assert hashlib.sha256(body).hexdigest() == match["oid"]
            self.hub.stored[match["oid"]] = body
            return self._send(200, b"")
        name = dict(pair.split("=") for pair in urlsplit(self.path).query.split("&"))["name"]
        self._send_file(name, self.hub.stored[match["oid"]], {})

    def _hub(self, path: str, body: bytes, token: str | None) -> None:
        if path == "/api/repos/create":
            return self._create(json.loads(body), token)
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        routes = {
            RESOLVE: self._resolve,
            INFO: self._info,
            PREUPLOAD: self._preupload,
            COMMIT: self._commit,
            BRANCH: self._branch,
            BATCH: self._batch,
        }
        pattern = next((pattern for pattern in routes if pattern.fullmatch(path)), None)
        if pattern is None or (match := pattern.fullmatch(path)) is None:
            return self._error(404, "", f"the double has no {path}")
        facts = {name: unquote(text) for name, text in match.groupdict().items()}
        repository = self.hub.repositories.get(facts["repo"])
        if repository is None or (repository.private and token != TOKEN):
            return self._error(404 if token == TOKEN else 401, "RepoNotFound", "Repository not found")
        if self.command == "POST" and token != TOKEN:
            return self._error(403, "", "you have no right to write")
        revision = facts.get("revision", "main")
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        routes[pattern](repository, commit, facts, body)

    def _create(self, asked: dict[str, Any], token: str | None) -> None:
        if token != TOKEN:
            return self._error(401, "", "Invalid username or password.")
        name = f"{asked['organization']}/{asked['name']}"
        there = name in self.hub.repositories
        if not there:
            private = asked.get("private") is True or asked.get("visibility") == "private"
            self.hub.repositories[name] = Repository(private)
            self.hub.repositories[name].commit("main", {".gitattributes": b"*.onnx filter=lfs\n"})
        self._json({"url": f"{self.hub.url}/{name}"}, 409 if there else 200)

    def _resolve(self, repository: Repository, commit: str, facts: dict[str, str], body: bytes) -> None:
        data, name = repository.commits[commit].get(facts["path"]), facts["path"]
        named = {"X-Repo-Commit": self.hub.wrong_commit or commit}
        if data is None:
            return self._error(404, "EntryNotFound", "Entry not found", named)
        if not is_large(name):
            return self._send_file(name, data, named)
        oid = hashlib.sha256(data).hexdigest()
        self.hub.stored[oid] = data
        place = f"{self.hub.storage_url}/stored/{oid}?name={name}"
        linked = {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{oid}"', "Location": place}
        self._send(302, b"", named | linked)

    def _info(self, repository: Repository, commit: str, facts: dict[str, str], body: bytes) -> None:
        self._json(
            {"_id": "1", "id": facts["repo"], "sha": commit, "private": repository.private, "tags": []}
        )

    def _preupload(self, repository: Repository, commit: str, facts: dict[str, str], body: bytes) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if is_large(file["path"]) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._json({"files": files})

    def _batch(self, repository: Repository, commit: str, facts: dict[str, str], body: bytes) -> None:
        objects = []
        for file in json.loads(body)["objects"]:
            place = {"href": f"{self.hub.storage_url}/stored/{file['oid']}"}
            actions = {} if file["oid"] in self.hub.stored else {"actions": {"upload": place}}
            objects.append({"oid": file["oid"], "size": file["size"], **actions})
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, repository: Repository, commit: str, facts: dict[str, str], body: bytes) -> None:
        files, message = dict(repository.commits[commit]), ""
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
            elif operation["key"] == "header":
                message = value["summary"]
        oid = repository.commit(facts["revision"], files, message)
        self._json(
            {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{facts['repo']}/commit/{oid}"}
        )

    def _branch(self, repository: Repository, commit: str, facts: dict[str, str], body: bytes) -> None:
        there = facts["branch"] in repository.branches
        repository.branches.setdefault(facts["branch"], commit)
        self._json({}, 409 if there else 200)

    def _send_file(self, name: str, data: bytes, headers: dict[str, str]) -> None:
        """Send a file, or the part that is asked for, or what a fault of the double makes of it."""
        data = self.hub.changed.get(name, data)
        headers |= {"ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        if self.command == "HEAD":
            return self._send(200, data, headers)
        if name in self.hub.endless:
            return self._send_endless(headers)
        begin = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        broken = self.hub.broken.get(name, 0) > 0
        if broken:
            self.hub.broken[name] -= 1
        self._send(206 if begin else 200, data[begin:], headers, half=broken)

    def _send_endless(self, headers: dict[str, str]) -> None:
        self.send_response(200)
        for key, value in (headers | {"Transfer-Encoding": "chunked"}).items():
            self.send_header(key, value)
        self.end_headers()
        for _ in range(1 << 14):  # 1 GiB, if the client reads it
            self.wfile.write(b"10000\r\n" + bytes(1 << 16) + b"\r\n")
            self.hub.sent += 1 << 16
        self.wfile.write(b"0\r\n\r\n")

    def _send(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, *, half: bool = False
    ) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if half:
            body, self.close_connection = body[: len(body) // 2], True
        if self.command != "HEAD":
            self.wfile.write(body)
            self.hub.sent += len(body)

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        codes = {"X-Error-Code": code} if code else {}
        self._send(status, b"", {"X-Error-Message": message, **codes, **(headers or {})})


@contextmanager
def running_hub() -> Iterator[HubDouble]:
    """Context manager that runs a hub without repositories on two free ports of this machine."""
    hub = HubDouble()
    servers = []
    for port in ("hub", "storage"):
        handler = type("Handler", (_Handler,), {"hub": hub, "port": port})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        servers.append(server)
    hub.url, hub.storage_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def connect(
    monkeypatch: pytest.MonkeyPatch, hub: HubDouble, cache: Path, *, token: str | None = None
) -> None:
    """Point huggingface_hub in this process at a double, with a cache of its own and this token alone.

    The library reads HF_ENDPOINT and its like when it is imported, which another test may have done before.
    """
    from huggingface_hub import close_session, constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + template)
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    close_session()  # connections to another test's ports


def environment(hub: HubDouble, home: Path) -> dict[str, str]:
    """Environment variables with which a new process uses a double, and this folder as its HF_HOME."""
    names = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    inherited = {name: text for name, text in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return inherited | names
