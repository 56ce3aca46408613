"""A Hugging Face hub on this machine, as far as fetching models goes, with faults to order."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """One commit, and what the hub does to those who ask for it."""

    files: dict[str, bytes]
    refs: set[str] = field(default_factory=lambda: {"main"})
    token: str | None = None  # that a request must bring
    gated: bool = False  # files are for those who were let in: nobody
    status: int = 200  # otherwise the answer to everything
    failing: set[str] = field(default_factory=set)  # files answered with 500
    cut_at: dict[str, int] = field(default_factory=dict)  # bytes of a file until, once, it breaks
    stalled: dict[str, int] = field(default_factory=dict)  # bytes of a file until silence

    @property
    def commit(self) -> str:
        """A hash of all there is, as git has one."""
        digest = hashlib.sha1()
        for name, data in sorted(self.files.items()):
            digest.update(name.encode() + b"\0" + data)
        return digest.hexdigest()


class Hub:
    """Repositories by name, and the requests that came: method, path, Range."""

    def __init__(self) -> None:
        self.endpoint = ""
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.closing = threading.Event()

    def add(self, name: str, files: dict[str, bytes], **faults: Any) -> Repository:
        """Put up a repository, or another commit of it."""
        self.repositories[name] = Repository(files, **faults)
        return self.repositories[name]

    def add_folder(self, name: str, folder: Path, **faults: Any) -> Repository:
        """Put up the files of a folder."""
        paths = [path for path in folder.rglob("*") if path.is_file()]
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        return self.add(name, files, **faults)

    def fetched(self) -> list[str]:
        """The files whose contents were asked for since the last call."""
        paths = [path for method, path, _ in self.requests if method == "GET" and _FILE.match(path)]
        self.requests.clear()
        return [path.split("/resolve/")[1].split("/", 1)[1] for path in paths]


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    hub = Hub()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, hub)) as server:
        server.daemon_threads = True
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            hub.closing.set()
            server.shutdown()
            thread.join()


_API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?")
_FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, *arguments: Any) -> None:
        self.hub = hub
        super().__init__(*arguments)

    def do_GET(self) -> None:
        """Answer, whatever is asked."""
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, path, self.headers["Range"]))
        asked = _FILE.fullmatch(path) or _API.fullmatch(path)
        repository = self.hub.repositories.get(asked["repo"]) if asked else None
        if asked is None or repository is None:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif repository.status != 200:
            self._send(repository.status, b"login here" if repository.status == 201 else b"")
        elif repository.token and self.headers["Authorization"] != f"Bearer {repository.token}":
            self._send(401, b"", {"X-Error-Message": "Invalid username or password."})
        elif unquote(asked["revision"] or "main") not in {*repository.refs, repository.commit}:
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif "name" in asked.re.groupindex:
            self._send_file(repository, unquote(asked["name"]))
        else:
            self._send(200, json.dumps(_info(asked["repo"], repository)).encode())

    do_HEAD = do_GET  # noqa: N815 (http.server's name)

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""

    def _send_file(self, repository: Repository, name: str) -> None:
        data = repository.files.get(name)
        if repository.gated:
            self._send(403, b"", {"X-Error-Code": "GatedRepo"})
        elif data is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        elif name in repository.failing and self.command == "GET":
            self._send(500, b"")
        else:
            headers = {"ETag": f'"{_blob_id(data)}"', "X-Repo-Commit": repository.commit}
            start, status = 0, 200
            if wanted := self.headers["Range"]:
                start, status = int(wanted.removeprefix("bytes=").removesuffix("-")), 206
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            breaks = None
            if self.command == "GET":
                breaks = repository.cut_at.pop(name, repository.stalled.get(name))
            self._send(status, data[start:], headers, breaks)
            if breaks is not None:
                if name in repository.stalled:
                    self.hub.closing.wait()
                self.close_connection = True

    def _send(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        end: int | None = None,
    ) -> None:
        """Answer with a body, of which only the bytes before `end` are sent."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:end])
            self.wfile.flush()


def _info(name: str, repository: Repository) -> dict[str, Any]:
    siblings = [
        {"rfilename": file, "size": len(data), "blobId": _blob_id(data)}
        for file, data in repository.files.items()
    ]
    return {"id": name, "sha": repository.commit, "siblings": siblings, "tags": []}


def _blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
