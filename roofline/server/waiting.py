"""Waiting in the event loop: for several answers at once, and for a client that may leave.

Whatever is waited for ends when its waiter stops, so that no request outlives its reader.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Message

from roofline.async_llm import RequestStream
from roofline.doors.outputs import RequestOutput

News = list[tuple[int, RequestOutput]]  # which prompt, and its answers so far

_T = TypeVar("_T")


async def updates(prompts: Sequence[RequestStream], pulse_s: float) -> AsyncGenerator[News, None]:
    """What prompts that run at once bring, as it comes; nothing when `pulse_s` brought nothing."""
    pending = {_next(stream): index for index, stream in enumerate(prompts)}
    try:
        while pending:
            done, _ = await asyncio.wait(
                pending, timeout=pulse_s, return_when=asyncio.FIRST_COMPLETED
            )
            news: News = []
            for task in done:
                index, output = pending.pop(task), task.result()
                if output is not None:
                    news.append((index, output))
                    pending[_next(prompts[index])] = index
            if news or not done:
                yield news
    finally:
        await _end(pending)
        for stream in prompts:
            await stream.aclose()


async def until_gone(receive: Callable[[], Awaitable[Message]], work: Awaitable[_T]) -> _T:
    """Await `work`; if the client leaves first it is cancelled, and ClientDisconnect raised.

    The request's body must have been read.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_departure(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        await _end((working, leaving))


def _next(stream: RequestStream) -> "asyncio.Future[RequestOutput | None]":
    return asyncio.ensure_future(anext(stream, None))


async def _departure(receive: Callable[[], Awaitable[Message]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(tasks: Iterable["asyncio.Future[Any]"]) -> None:
    """Cancel what still runs, and hear of nothing that it raised."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
