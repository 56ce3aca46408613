"""The asynchronous door: many prompts at once in one event loop, each a stream of its own.

The engine steps in a thread of its own; text is made and outputs grow in the event loop's thread.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from types import TracebackType
from typing import Any, Self, Unpack

from roofline.config import EngineConfig
from roofline.doors.door import ChatOptions, Door, Messages, Prompt
from roofline.doors.engine_thread import EngineThread
from roofline.doors.generation import Generation
from roofline.doors.outputs import RequestOutput
from roofline.errors import EngineError, RequestError, UsageError, shown
from roofline.request import SamplingParams, TokenOutput


class AsyncLLM(Door):
    """A model loaded and ready, for one event loop. Options are those of `EngineConfig`.

    Loading blocks: make it before the loop has other work, or in `asyncio.to_thread`. Close it when
    done: the engine's thread keeps the model until then.
    """

    def _start(self, model: str, config: EngineConfig) -> None:
        super()._start(model, config)
        self._alive: dict[str, _Live] = {}  # by request id
        self._loop: asyncio.AbstractEventLoop | None = None  # that of the first stream
        self._closed = False
        self._thread = EngineThread(
            self._engine, partial(self._in_loop, self._take), partial(self._in_loop, self._fail)
        )

    def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, priority: int = 0
    ) -> "RequestStream":
        """Complete a prompt (text or token ids), yielding its output when it has grown.

        It is one object that grows: a slow reader finds more in it, and nothing waits for a
        reader. What is wrong with the request is raised when the first output is asked for.
        """
        return self._stream(lambda: prompt, sampling_params, priority)

    def chat(
        self,
        messages: Messages,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        **options: Unpack[ChatOptions],
    ) -> "RequestStream":
        """Answer a conversation, written out by the model's chat template; else as `generate`."""
        return self._stream(lambda: self._chat_ids(messages, options), sampling_params, priority)

    def close(self) -> None:
        """End every stream with an error, when the running step is done, and free the memory."""
        if not self._closed:
            self._closed = True
            self._thread.close()
            self._close()
            self._in_loop(self._fail, EngineError("the model was closed"))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _stream(
        self, prompt: Callable[[], Prompt], params: SamplingParams | None, priority: int
    ) -> "RequestStream":
        number = next(self._numbers)
        params = self.default_sampling_params() if params is None else params
        if not isinstance(params, SamplingParams):
            raise RequestError(f"sampling_params is {shown(params)}; it must be SamplingParams")
        return RequestStream(
            lambda: self._generation(number, prompt(), params, priority), self._submit, self._drop
        )

    def _submit(self, generation: Generation) -> "_Live":
        """Hand requests to the engine, for the event loop that runs."""
        if self._closed:
            raise UsageError("this AsyncLLM is closed; load the model again to use it")
        loop = asyncio.get_running_loop()
        if self._loop is not None and self._loop is not loop and not self._loop.is_closed():
            raise UsageError("this AsyncLLM serves another event loop; make one for each")
        self._loop = loop
        live = _Live(generation, loop)
        self._alive |= {request.request_id: live for request in generation.requests}
        self._thread.add(generation.requests)
        return live

    def _drop(self, generation: Generation) -> None:
        """Forget a generation and end what is alive of it; from any thread."""
        for request in generation.requests:
            self._forget(request.request_id)

    def _forget(self, request_id: str) -> None:
        """The engine ends the request if it has not: a stop string is not known to it."""
        if self._alive.pop(request_id, None) is not None:
            self._thread.abort(request_id)

    def _in_loop(self, take: Callable[[Any], None], news: object) -> None:
        """Have the event loop take what the engine's thread brings."""
        loop = self._loop
        if loop is None:
            return
        try:
            loop.call_soon_threadsafe(take, news)
        except RuntimeError:  # it is closed: nobody is left to hear
            for live in list(self._alive.values()):
                if live.loop is loop:
                    self._drop(live.generation)

    def _take(self, outputs: list[TokenOutput]) -> None:
        for new in outputs:
            live = self._alive.get(new.request_id)
            if live is None:  # it was dropped while the step ran
                continue
            live.generation.take(new)
            live.news.set()
            if live.generation.ended(new.request_id):
                self._forget(new.request_id)

    def _fail(self, cause: BaseException) -> None:
        """End every stream with an error."""
        for request_id, live in list(self._alive.items()):
            live.generation.abort(request_id)
            live.failure = cause
            live.news.set()
            self._forget(request_id)


class _Live:
    """A generation in the engine, as its stream sees it."""

    def __init__(self, generation: Generation, loop: asyncio.AbstractEventLoop) -> None:
        self.generation, self.loop = generation, loop
        self.news = asyncio.Event()  # the output has grown, or will not
        self.failure: BaseException | None = None


class RequestStream(AsyncIterator[RequestOutput]):
    """The growing output of one request, each time it has grown since it was last taken.

    Closed, cancelled or forgotten, it ends the request at once.
    """

    def __init__(
        self,
        prepare: Callable[[], Generation],
        submit: Callable[[Generation], _Live],
        drop: Callable[[Generation], None],
    ) -> None:
        self._over = False
        self._live: _Live | None = None
        self._prepare, self._submit, self._drop = prepare, submit, drop
        self._reading = asyncio.Lock()

    async def __anext__(self) -> RequestOutput:
        async with self._reading:  # readers, should there be several, take turns
            try:
                return await self._next()
            except BaseException:  # at its end, failed or cancelled: nobody reads on
                self._close()
                raise

    async def aclose(self) -> None:
        """End the request, at any moment; a reader that waits is told that this was all."""
        self._close()

    def __del__(self) -> None:
        self._close()

    def _close(self) -> None:
        self._over = True
        if self._live is not None:
            self._drop(self._live.generation)
            self._live.news.set()

    async def _next(self) -> RequestOutput:
        if self._over:
            raise StopAsyncIteration
        if self._live is None:
            generation = await asyncio.to_thread(self._prepare)  # text or templates may be long
            if self._over:
                raise StopAsyncIteration
            self._live = self._submit(generation)
        live = self._live
        await live.news.wait()
        live.news.clear()
        if live.failure is not None:
            reason = " ".join(f"{type(live.failure).__name__}: {live.failure}".split())
            raise EngineError(f"this answer is lost: {reason}") from live.failure
        if self._over:
            raise StopAsyncIteration
        self._over = live.generation.output.finished
        return live.generation.output
