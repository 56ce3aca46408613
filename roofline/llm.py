"""The Python door: `LLM(model).generate(prompts, SamplingParams())`, with vLLM's names and results.

The caller's own thread drives the engine, one thread at a time. What a prompt becomes and what
comes back is `doors/`.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

from roofline.config import EngineConfig
from roofline.doors.door import ChatOptions, Door, Messages, Prompt
from roofline.doors.generation import Generation
from roofline.doors.outputs import RequestOutput
from roofline.doors.progress import prompts_bar
from roofline.errors import RequestError, shown
from roofline.request import SamplingParams

Params = SamplingParams | Sequence[SamplingParams] | None


class LLM(Door):
    """A model loaded and ready. Options are those of `EngineConfig`; unknown ones are refused."""

    def _start(self, model: str, config: EngineConfig) -> None:
        super()._start(model, config)
        self._alive: dict[str, Generation] = {}  # by request id

    @overload
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        *,
        priority: Sequence[int] | None = None,
        use_tqdm: bool = False,
        stream: Literal[False] = False,
    ) -> list[RequestOutput]: ...

    @overload
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        *,
        priority: Sequence[int] | None = None,
        stream: Literal[True],
    ) -> Generator[RequestOutput]: ...

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        *,
        priority: Sequence[int] | None = None,
        use_tqdm: bool = False,
        stream: bool = False,
    ) -> list[RequestOutput] | Generator[RequestOutput]:
        """Complete prompts (text or token ids), in their order; `use_tqdm` shows how far it is.

        Text is text: a special token's name in it is spelled out, not obeyed. Everything is
        checked before anything runs. With `stream`, one prompt's output is yielded after every
        step that adds to it: one object that grows, so take what you need of it before the next.
        """
        asked = self._generations(_list_prompts(prompts), sampling_params, priority)
        if stream:
            return self._stream(asked, use_tqdm)
        with prompts_bar(len(asked), show=use_tqdm) as advance:
            for generation in self._run(asked):
                if generation.output.finished:
                    advance(generation.output)
        return [generation.output for generation in asked]

    @overload
    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: Params = None,
        *,
        use_tqdm: bool = False,
        stream: Literal[False] = False,
        **options: Unpack[ChatOptions],
    ) -> list[RequestOutput]: ...

    @overload
    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: Params = None,
        *,
        stream: Literal[True],
        **options: Unpack[ChatOptions],
    ) -> Generator[RequestOutput]: ...

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: Params = None,
        *,
        use_tqdm: bool = False,
        stream: bool = False,
        **options: Unpack[ChatOptions],
    ) -> list[RequestOutput] | Generator[RequestOutput]:
        """Answer a conversation or a list of them, written out by the model's chat template.

        The rest is as in `generate`. No text in a message becomes a special token.
        """
        prompts = [self._chat_ids(each, options) for each in _list_conversations(messages)]
        if stream:
            return self.generate(prompts, sampling_params, stream=True)
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def close(self) -> None:
        """Free the model's memory."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _generations(
        self, prompts: Sequence[Prompt], params: Params, priority: Sequence[int] | None
    ) -> list[Generation]:
        """Everything asked for, checked; nothing has reached the engine."""
        params = self.default_sampling_params() if params is None else params
        each = _spread("sampling_params", params, SamplingParams, len(prompts))
        priorities = _spread("priority", 0 if priority is None else priority, int, len(prompts))
        return [
            self._generation(next(self._numbers), prompt, own, rank)
            for prompt, own, rank in zip(prompts, each, priorities, strict=True)
        ]

    def _stream(self, asked: Sequence[Generation], use_tqdm: bool) -> Generator[RequestOutput]:
        if len(asked) != 1 or use_tqdm:
            raise RequestError(
                f"stream=True takes one prompt and no progress bar, not {len(asked)} prompts"
            )
        return (generation.output for generation in self._run(asked))

    def _run(self, asked: Sequence[Generation]) -> Iterator[Generation]:
        """Drive the engine until all asked are finished, yielding each one that has grown."""
        mine = {r.request_id for generation in asked for r in generation.requests}
        try:
            for generation in asked:
                for request in generation.requests:
                    self._engine.add(request)
                    self._alive[request.request_id] = generation
            while mine & self._alive.keys() or any(generation.has_news for generation in asked):
                for generation in asked:
                    if generation.has_news:
                        generation.has_news = False
                        yield generation
                if mine & self._alive.keys():
                    self._step()
        finally:
            for request_id in mine & self._alive.keys():
                self._drop(request_id)

    def _step(self) -> None:
        """Run one step; what it brings goes to whoever asked, this caller or another."""
        try:
            outputs = self._engine.step()
        except BaseException:  # the engine has ended every request, this caller's and others'
            for request_id, generation in self._alive.items():
                generation.abort(request_id)
            self._alive.clear()
            raise
        for output in outputs:
            generation = self._alive[output.request_id]
            generation.take(output)
            if generation.ended(output.request_id):
                self._drop(output.request_id)

    def _drop(self, request_id: str) -> None:
        """Forget a request; the engine ends it if it has not."""
        self._engine.abort(request_id)
        del self._alive[request_id]


def _list_prompts(prompts: Any) -> list[Prompt]:
    """The prompts in a list, where there may be one: a string, an object, or a list of ids."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise RequestError("prompts must be text, token ids, or a list of those")
    if prompts and all(isinstance(item, int) for item in prompts):
        return [prompts]
    return list(prompts)


def _list_conversations(messages: Any) -> list[Messages]:
    """The conversations in a list, where there may be one: a list of messages."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RequestError("messages must be a list of messages, or a list of such lists")
    return [messages] if isinstance(messages[0], Mapping) else list(messages)


def _spread(name: str, value: Any, kind: type, count: int) -> list[Any]:
    """One value for each prompt, from one for all or a list of as many."""
    if isinstance(value, kind):
        return [value] * count
    listed = list(value) if isinstance(value, Sequence) else []
    if len(listed) != count or not all(isinstance(item, kind) for item in listed):
        raise RequestError(
            f"{name} is {shown(value)}; it must be one {kind.__name__} for all prompts or "
            f"a list of {count}, one for each"
        )
    return listed
