"""From a loaded model to a server that answers: the socket, and uvicorn's part of the job.

Signals end it: the first lets answers finish for a while, a second does not.
"""

import asyncio
import contextlib
import errno
import socket
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from roofline.errors import UsageError

_MAX_HEADER_BYTES = 16 << 10
_KEEP_ALIVE_S = 30
_HEAD_S = 30.0  # for a request's head, however slowly it comes
_DRAIN_S = 5  # for answers under way when it is told to stop


def bind(host: str, port: int) -> socket.socket:
    """Take an address, on which nobody listens yet; UsageError if it cannot be had."""
    with _told(host, port):
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
        except OSError:
            sock.close()
            raise
        return sock


def listen(sock: socket.socket) -> str:
    """Let clients connect, who are answered from now on; return the URL."""
    host, port = sock.getsockname()[:2]
    with _told(host, port):
        sock.listen()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def http_server(app: FastAPI) -> uvicorn.Server:
    """What `serve`s sockets until a signal comes, and raises that again when all is ended."""
    config = uvicorn.Config(
        app,
        http=_Connection,
        ws="none",
        lifespan="off",
        log_level="critical",  # errors are told by the routes
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_DRAIN_S,
    )
    return uvicorn.Server(config)


class _Connection(H11Protocol):
    """Closed when a request's head does not arrive in time; uvicorn itself would wait for ever."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._deadline = self.loop.call_later(_HEAD_S, transport.close)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:  # the head is there
            self._end_deadline()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(_HEAD_S, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_deadline()
        super().connection_lost(exc)

    def _end_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


@contextlib.contextmanager
def _told(host: str, port: int) -> Iterator[None]:
    """Tell in one line why an address cannot be had."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UsageError(
                f"port {port} on {host} is in use; choose another with --port, or 0 for any"
            ) from error
        raise UsageError(f"cannot listen on {host}, port {port}: {error.strerror}") from error
