"""Server-sent events: the bytes of a stream, and the response that sends them.

What the events say is in `answers`; errors in a stream are told in it, since its status is sent.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterable

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response as HTTPResponse
from starlette.types import Receive, Scope, Send

from roofline.errors import RooflineError
from roofline.server import envelope
from roofline.server.answers import Answers, Response
from roofline.server.waiting import News, until_gone

PULSE_S = 15.0  # proxies close a connection on which nothing comes
STALL_S = 30.0  # a client that takes nothing for so long has its answer ended
_PULSE = b": ping\n\n"  # a comment, which readers skip
_DONE = b"data: [DONE]\n\n"


async def events(
    answers: Answers, updates: AsyncGenerator[News, None]
) -> AsyncGenerator[bytes, None]:
    """The bytes of a stream as they come; what goes wrong before the first is raised."""
    started = False
    async with contextlib.aclosing(updates):
        try:
            async for news in updates:
                chunks = [chunk for each in news for chunk in answers.chunks(*each)]
                if chunks or not news:
                    started = True
                    yield _events(chunks) or _PULSE
        except RooflineError as error:
            if not started:
                raise
            yield b"data: " + envelope.of(error).body + b"\n\n" + _DONE
            return
        yield _events(answers.closing()) + _DONE


class EventStream(HTTPResponse):
    """A response of server-sent events, of which the first has come; it ends when its reader does.

    A slow reader finds more in each event; one that takes nothing for STALL_S is left.
    """

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes, None]) -> None:
        super().__init__(media_type="text/event-stream")
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"  # nginx would keep events back
        self._first, self._rest = first, rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; without an error if the client has left or stalls."""
        with contextlib.suppress(ClientDisconnect, TimeoutError):
            await until_gone(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        async with contextlib.aclosing(self._rest):
            await send(start)
            await _send_body(send, self._first)
            async for data in self._rest:
                await _send_body(send, data)
        await send({"type": "http.response.body"})


async def _send_body(send: Send, data: bytes) -> None:
    async with asyncio.timeout(STALL_S):
        await send({"type": "http.response.body", "body": data, "more_body": True})


def _events(chunks: Iterable[Response]) -> bytes:
    return b"".join(b"data: " + msgspec.json.encode(chunk) + b"\n\n" for chunk in chunks)
