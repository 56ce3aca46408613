"""What the engine made, as OpenAI's objects: whole answers, and the chunks of a stream.

No HTTP, and no bytes: whoever sends an object encodes it.
"""

import abc
import collections
import dataclasses
import secrets
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from msgspec import UNSET, Struct, UnsetType

from roofline.doors.outputs import CompletionOutput, Logprob, RequestOutput
from roofline.errors import RequestError
from roofline.server.openai import StreamOptions
from roofline.tokenizer import Tokenizer

Logprobs = Sequence[Mapping[int, Logprob] | None]  # the token's own first; None for a text's first


class PromptTokensDetails(Struct):
    """Of the prompts' tokens, those whose KV was found in the prefix cache."""

    cached_tokens: int


class Usage(Struct):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class ChatMessage(Struct):
    """An answer in a conversation."""

    role: str
    content: str
    refusal: None = None


class ChatChoice(Struct):
    """A whole answer."""

    index: int
    message: ChatMessage
    logprobs: dict[str, Any] | None
    finish_reason: str | None


class ChatChunkChoice(Struct):
    """A piece of an answer."""

    index: int
    delta: dict[str, str]
    logprobs: dict[str, Any] | None
    finish_reason: str | None


class CompletionChoice(Struct):
    """A continuation, whole or a piece of it."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: str | None


Choice = ChatChoice | ChatChunkChoice | CompletionChoice


class Response(Struct):
    """What stands around choices; `usage` is left out unless it is set."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | UnsetType | None = UNSET


@dataclasses.dataclass(frozen=True)
class _Told:
    """What a choice says: all so far, or what is new."""

    index: int
    text: str
    token_ids: Sequence[int]
    logprobs: Logprobs | None  # of token_ids
    finish_reason: str | None

    def after(self, text: int, tokens: int) -> "_Told":
        """What it says after so many characters and tokens."""
        logprobs = None if self.logprobs is None else self.logprobs[tokens:]
        return dataclasses.replace(
            self, text=self.text[text:], token_ids=self.token_ids[tokens:], logprobs=logprobs
        )


class Answers(abc.ABC):
    """The answers to one HTTP request, whole or as they grow."""

    name: ClassVar[str]  # of a whole response
    chunk_name: ClassVar[str]
    id_prefix: ClassVar[str]

    def __init__(self, model: str, tokenizer: Tokenizer, options: StreamOptions | None) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._options = options or StreamOptions()
        self._id = f"{self.id_prefix}-{secrets.token_hex(16)}"
        self._created = int(time.time())
        self._outputs: dict[int, RequestOutput] = {}  # by prompt
        self._seen: dict[int, tuple[int, int]] = {}  # characters and tokens, by choice
        self._finished: set[int] = set()  # choices

    def whole(self, outputs: Sequence[RequestOutput]) -> Response:
        """The response to all prompts, finished."""
        self._outputs = dict(enumerate(outputs))
        told = [told for prompt in self._outputs for told in self._tell(prompt)]
        return self._response(self.name, [self._choice(choice) for choice in told], self.usage())

    def chunks(self, prompt: int, output: RequestOutput) -> Iterator[Response]:
        """What has been added to a prompt's answers since they were last given."""
        self._outputs[prompt] = output
        for told in self._tell(prompt):
            if told.index not in self._seen:
                self._seen[told.index] = 0, 0
                yield from self._opening(told.index)
            new = told.after(*self._seen[told.index])
            if told.index not in self._finished and (new.text or new.logprobs or new.finish_reason):
                self._seen[told.index] = len(told.text), len(told.token_ids)
                if told.finish_reason:
                    self._finished.add(told.index)
                yield self._chunk_response(self._piece(new))

    def closing(self) -> Iterator[Response]:
        """What a stream says after its last choice: the usage, if it was asked for."""
        if self._options.include_usage:
            yield self._response(self.chunk_name, [], self.usage())

    def usage(self) -> Usage:
        """Tokens of every prompt and choice so far."""
        outputs = self._outputs.values()
        read = sum(len(output.prompt_token_ids) for output in outputs)
        written = sum(self._written(own) for output in outputs for own in output.outputs)
        cached = sum(output.num_cached_tokens for output in outputs)
        return Usage(read, written, read + written, PromptTokensDetails(cached))

    def _tell(self, prompt: int) -> Iterator[_Told]:
        """All that each choice of a prompt says so far."""
        output = self._outputs[prompt]
        for own in output.outputs:
            if own.finish_reason == "error":  # no text that the grammar takes can follow
                raise RequestError(f"{own.stop_reason}", param="structured_outputs")
            index = prompt * len(output.outputs) + own.index
            yield _Told(index, own.text, own.token_ids, own.logprobs, own.finish_reason)

    def _written(self, own: CompletionOutput) -> int:
        """Tokens written for a choice."""
        return len(own.token_ids)

    def _opening(self, index: int) -> Iterator[Response]:
        """What a stream says of a choice before its text."""
        yield from ()

    @abc.abstractmethod
    def _choice(self, told: _Told) -> Choice:
        """A whole choice."""

    @abc.abstractmethod
    def _piece(self, told: _Told) -> Choice:
        """A choice's place in a chunk."""

    def _chunk_response(self, choice: Choice) -> Response:
        usage: Usage | UnsetType | None = UNSET
        if self._options.include_usage:
            usage = self.usage() if self._options.continuous_usage_stats else None
        return self._response(self.chunk_name, [choice], usage)

    def _response(
        self, name: str, choices: list[Choice], usage: Usage | UnsetType | None
    ) -> Response:
        return Response(self._id, name, self._created, self._model, choices, usage)

    def _token_bytes(self, token: int) -> bytes:
        """The bytes of a token; none of a padding row of the embedding, which has no text."""
        known = token < self._tokenizer.vocab_size
        return self._tokenizer.token_bytes(token) if known else b""


class ChatAnswers(Answers):
    """Of /v1/chat/completions."""

    name, chunk_name, id_prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(
        self, model: str, tokenizer: Tokenizer, options: StreamOptions | None, top_logprobs: int
    ) -> None:
        super().__init__(model, tokenizer, options)
        self._top_logprobs = top_logprobs

    def _opening(self, index: int) -> Iterator[Response]:
        delta = {"role": "assistant", "content": ""}
        yield self._chunk_response(ChatChunkChoice(index, delta, None, None))

    def _choice(self, told: _Told) -> ChatChoice:
        message = ChatMessage("assistant", told.text)
        return ChatChoice(told.index, message, self._logprobs(told), told.finish_reason)

    def _piece(self, told: _Told) -> ChatChunkChoice:
        delta = {"content": told.text} if told.text else {}
        return ChatChunkChoice(told.index, delta, self._logprobs(told), told.finish_reason)

    def _logprobs(self, told: _Told) -> dict[str, Any] | None:
        if told.logprobs is None:
            return None
        content = [self._token(found) for found in told.logprobs if found is not None]
        return {"content": content, "refusal": None}

    def _token(self, found: Mapping[int, Logprob]) -> dict[str, Any]:
        """A token, and those that were the likeliest in its place."""
        entries = [self._entry(token, known.logprob) for token, known in found.items()]
        ranks = [known.rank for known in found.values()]
        ranked = sorted(range(len(ranks)), key=ranks.__getitem__)
        top = [entries[position] for position in ranked[: self._top_logprobs]]
        return {**entries[0], "top_logprobs": top}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        data = self._token_bytes(token)
        return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}


class CompletionAnswers(Answers):
    """Of /v1/completions; with `echo`, each prompt's text begins its answers."""

    name = chunk_name = "text_completion"
    id_prefix = "cmpl"

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer,
        options: StreamOptions | None,
        *,
        hidden: Collection[int] = (),  # ids whose text is not shown
        echo: Sequence[str] | None = None,  # the text of every prompt
        echo_alone: bool = False,  # and nothing after it
    ) -> None:
        super().__init__(model, tokenizer, options)
        self._hidden, self._echo, self._echo_alone = hidden, echo, echo_alone
        self._offsets = collections.Counter[int]()  # characters before the next token, by choice

    def _tell(self, prompt: int) -> Iterator[_Told]:
        output = self._outputs[prompt]
        for told in super()._tell(prompt):
            if self._echo is None:
                yield told
                continue
            if not told.token_ids:  # the prompt's log-probabilities come with the first
                continue
            own = told.after(len(told.text), len(told.token_ids)) if self._echo_alone else told
            logprobs = None
            if own.logprobs is not None:
                logprobs = [*(output.prompt_logprobs or ()), *own.logprobs]
            yield _Told(
                told.index,
                self._echo[prompt] + own.text,
                [*output.prompt_token_ids, *own.token_ids],
                logprobs,
                "length" if self._echo_alone and told.finish_reason else told.finish_reason,
            )

    def _written(self, own: CompletionOutput) -> int:
        return 0 if self._echo_alone else super()._written(own)

    def _choice(self, told: _Told) -> CompletionChoice:
        return CompletionChoice(told.index, told.text, self._logprobs(told), told.finish_reason)

    _piece = _choice

    def _logprobs(self, told: _Told) -> dict[str, Any] | None:
        if told.logprobs is None:
            return None
        offsets: list[int] = []
        for token in told.token_ids:
            offsets.append(self._offsets[told.index])
            self._offsets[told.index] += self._characters(token)
        return {
            "tokens": [self._name(token) for token in told.token_ids],
            "token_logprobs": [
                found and next(iter(found.values())).logprob for found in told.logprobs
            ],
            "top_logprobs": [
                found and {self._name(token): known.logprob for token, known in found.items()}
                for found in told.logprobs
            ],
            "text_offset": offsets,
        }

    def _name(self, token: int) -> str:
        r"""A token as text; what is no whole characters as OpenAI has it: `bytes:\xe2\x82`."""
        data = self._token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _characters(self, token: int) -> int:
        """How many characters begin in a token that is shown."""
        if token in self._hidden:
            return 0
        return sum(byte & 0xC0 != 0x80 for byte in self._token_bytes(token))
