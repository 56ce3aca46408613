"""A Hugging Face hub on this machine, as far as fetching models goes, with faults to order."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """One commit, and what the hub does to those who ask for it."""

    files: dict[str, bytes]
    refs: set[str] = field(default_factory=lambda: {"main"})
    token: str | None = None  # without which it is hidden, as a private one
    gated: bool = False  # its files are
    status: int | None = None  # answered to everything
    cut_at: dict[str, int] = field(default_factory=dict)  # bytes until a connection breaks, once
    refused: set[str] = field(default_factory=set)  # files answered with 500

    @property
    def commit(self) -> str:
        """A hash of all there is, as git has one."""
        digest = hashlib.sha1()
        for name, data in sorted(self.files.items()):
            digest.update(name.encode() + b"\0" + data)
        return digest.hexdigest()


class Hub:
    """The repositories by name, and every request that came."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, Range
        self.endpoint = ""

    def add(self, name: str, files: dict[str, bytes], **faults: Any) -> Repository:
        """Put up a repository."""
        self.repositories[name] = Repository(files, **faults)
        return self.repositories[name]

    def add_folder(self, name: str, folder: Path, **faults: Any) -> Repository:
        """Put up the files of a folder."""
        paths = [path for path in folder.rglob("*") if path.is_file()]
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        return self.add(name, files, **faults)

    def fetched(self) -> list[str]:
        """The files whose contents were asked for."""
        return [path.rsplit("/", 1)[1] for method, path, _ in self.requests if method == "FILE"]


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    hub = Hub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


_API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?")
_FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        file, api = _FILE.fullmatch(path), _API.fullmatch(path)
        kind = "FILE" if file and self.command == "GET" else self.command
        self.hub.requests.append((kind, unquote(path), self.headers["Range"]))
        match = file or api
        repository = self.hub.repositories.get(unquote(match[1])) if match else None
        if match is None or repository is None:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif repository.status is not None:
            self._send(repository.status, b"")
        elif repository.token and self.headers["Authorization"] != f"Bearer {repository.token}":
            self._send(401, b"", {"X-Error-Message": "Invalid username or password."})
        elif unquote(match[3 if api else 2] or "main") not in {
            *repository.refs,
            repository.commit,
        }:
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif api:
            body = _tree(repository) if api[2] == "tree" else _info(api[1], repository)
            self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})
        else:
            self._send_file(repository, unquote(match[3]))

    def _send_file(self, repository: Repository, name: str) -> None:
        if repository.gated:
            self._send(403, b"", {"X-Error-Code": "GatedRepo"})
        elif name not in repository.files:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        elif name in repository.refused and self.command == "GET":
            self._send(500, b"")
        else:
            data = repository.files[name]
            headers = {
                "ETag": f'"{_blob_id(data)}"',
                "X-Repo-Commit": repository.commit,
                "Accept-Ranges": "bytes",
            }
            start, status = 0, 200
            if asked := self.headers["Range"]:
                start, status = int(asked.removeprefix("bytes=").rstrip("-")), 206
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            cut = repository.cut_at.pop(name, None) if self.command == "GET" else None
            self._send(status, data[start:], headers, cut)

    def _send(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        cut: int | None = None,
    ) -> None:
        """Answer; with `cut`, hang up after so many bytes of the body."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True


def _info(name: str, repository: Repository) -> dict[str, Any]:
    siblings = [
        {"rfilename": file["path"], "size": file["size"], "blobId": file["oid"]}
        for file in _tree(repository)
    ]
    return {"id": name, "sha": repository.commit, "siblings": siblings, "tags": []}


def _tree(repository: Repository) -> list[dict[str, Any]]:
    return [
        {"type": "file", "path": name, "size": len(data), "oid": _blob_id(data)}
        for name, data in repository.files.items()
    ]


def _blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
