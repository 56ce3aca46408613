import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, cast

import pytest
from starlette.requests import ClientDisconnect

from roofline.async_llm import RequestStream
from roofline.errors import EngineError
from roofline.server.waiting import until_gone, updates


class Scripted:
    """Says what it is told to, one output each time it is let; knows whether it was closed."""

    def __init__(self, *script: Any, every_s: float = 0) -> None:
        self.script, self.every_s = [*script], every_s
        self.closed = self.cancelled = False

    def __aiter__(self) -> "Scripted":
        return self

    async def __anext__(self) -> Any:
        try:
            await asyncio.sleep(self.every_s)
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        if not self.script:
            raise StopAsyncIteration
        said = self.script.pop(0)
        if isinstance(said, BaseException):
            raise said
        return said

    async def aclose(self) -> None:
        self.closed = True


def merged(*streams: Scripted, pulse_s: float = 60.0) -> Any:
    return updates([cast("RequestStream", stream) for stream in streams], pulse_s)


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run in a loop where an exception nobody hears is a failure."""
    unheard: list[Any] = []

    async def whole() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, about: unheard.append(about))
        await main()

    asyncio.run(whole())
    assert unheard == []


def test_every_prompt_is_heard_to_its_end() -> None:
    streams = [Scripted("a", "b"), Scripted(), Scripted("c")]

    async def main() -> None:
        heard = [each async for news in merged(*streams) for each in news]
        assert sorted(heard) == [(0, "a"), (0, "b"), (2, "c")]

    run(main)
    assert all(stream.closed for stream in streams)


def test_nothing_for_a_while_is_told() -> None:
    async def main() -> None:
        news = [each async for each in merged(Scripted("a", every_s=0.5), pulse_s=0.01)]
        assert [] in news and [(0, "a")] in news

    run(main)


def test_one_failure_ends_all() -> None:
    streams = [Scripted("a", every_s=60), Scripted(EngineError("lost")), Scripted(EngineError("x"))]

    async def main() -> None:
        with pytest.raises(EngineError):
            async for _ in merged(*streams):
                pass

    run(main)
    assert streams[0].cancelled and all(stream.closed for stream in streams)


def test_who_stops_reading_ends_all() -> None:
    streams = [Scripted("a", "b"), Scripted("c", every_s=60)]

    async def main() -> None:
        reading = merged(*streams)
        assert await anext(reading) == [(0, "a")]
        await reading.aclose()

    run(main)
    assert streams[1].cancelled and all(stream.closed for stream in streams)


def leaves_after(seconds: float) -> Callable[[], Awaitable[Any]]:
    messages = [{"type": "http.request"}, {"type": "http.disconnect"}]

    async def receive() -> dict[str, str]:
        if len(messages) == 1:
            await asyncio.sleep(seconds)
        return messages.pop(0)

    return receive


def test_work_ends_when_its_client_leaves() -> None:
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    async def main() -> None:
        with pytest.raises(ClientDisconnect):
            await until_gone(leaves_after(0.01), work())
        assert ended.is_set()

    run(main)


def test_work_done_is_returned_and_an_error_raised() -> None:
    async def fails() -> None:
        raise EngineError("lost")

    async def main() -> None:
        assert await until_gone(leaves_after(60), asyncio.sleep(0, "done")) == "done"
        with pytest.raises(EngineError):
            await until_gone(leaves_after(60), fails())

    run(main)
