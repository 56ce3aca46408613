"""What OpenAI's API asks, as JSON, and what it means here: messages, prompts, SamplingParams.

A field that would change the answer and is not supported is refused by name, never ignored. No
HTTP, and no answers.
"""

import dataclasses
import difflib
import re
from collections.abc import Mapping
from typing import Annotated, Any, Self

import msgspec
from msgspec import Meta, Struct, field

from roofline.errors import RequestError, shown
from roofline.request import MAX_TOKENS, SamplingParams
from roofline.server.response_format import FormRequest

MAX_MESSAGES = 4096
MAX_PROMPTS = 1024
_MAX_ECHOED = 200  # characters of a refused value in a message

# Said to the service, not to the model: they change no answer.
_NO_EFFECT = {
    "metadata",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}

# OpenAI's and vLLM's, not supported, and the value that asks for nothing.
_UNSUPPORTED: dict[str, Any] = {
    "audio": None,
    "chat_template": None,
    "documents": [],
    "function_call": "none",
    "functions": [],
    "modalities": ["text"],
    "moderation": None,
    "parallel_tool_calls": None,
    "prediction": None,
    "prompt_logprobs": None,
    "reasoning_effort": None,
    "suffix": None,
    "tool_choice": "none",
    "tools": [],
    "verbosity": None,
    "web_search_options": None,
}

# Of SamplingParams: asked for in OpenAI's own way, or not at all.
_TRANSLATED = {"logprobs", "prompt_logprobs", "structured_outputs"}
_SAMPLING = {field.name for field in dataclasses.fields(SamplingParams)} - _TRANSLATED

# A template reads these too, and they come by other ways than its own variables.
_NOT_VARIABLES = {
    "add_generation_prompt",
    "continue_final_message",
    "documents",
    "messages",
    "tools",
}

_ROLES = {  # and what templates call them
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}
_NAME = re.compile(r"[^\s<|\\/>]{1,64}")


class StreamOptions(Struct, forbid_unknown_fields=True):
    """What a stream tells besides its text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False  # padding against who measures packets: none is sent


class Part(Struct):
    """A piece of a message's content."""

    type: str
    text: str | None = None


class Message(Struct, forbid_unknown_fields=True):
    """One turn of a conversation."""

    role: str
    content: str | list[Part]
    name: str | None = None
    # What answers have too: they come back as messages.
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None
    refusal: None = None
    tool_calls: list[Any] | None = None
    tool_call_id: str | None = None  # of a role that is refused


class _Request(FormRequest, kw_only=True, forbid_unknown_fields=True):
    """What both kinds of completion ask for."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    priority: int = 0
    sampling: dict[str, Any] = field(
        default_factory=dict
    )  # SamplingParams by name; a body has them beside the others

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> Self:
        """Check a JSON object: its fields, their types, and what is not supported."""
        given = {name: value for name, value in body.items() if value is not None}
        known = set(cls.__struct_fields__) - {"sampling"} | _SAMPLING
        fields: dict[str, Any] = {"sampling": {}}
        for name, value in given.items():
            if name in known:
                (fields["sampling"] if name in _SAMPLING else fields)[name] = value
            elif name in _UNSUPPORTED:
                _refuse_unsupported(name, value)
            elif name not in _NO_EFFECT:
                raise _unknown(name, known)
        try:
            request = msgspec.convert(fields, cls)
        except msgspec.ValidationError as error:
            raise _invalid(error) from None
        if request.stream_options is not None and not request.stream:
            raise RequestError("stream_options needs stream to be true", param="stream_options")
        request.check()
        return request

    def check(self) -> None:
        """Refuse what contradicts itself."""

    @property
    def max_tokens(self) -> int | None:
        """The tokens of an answer, as far as the request says."""
        return self.sampling.get("max_tokens")

    def _params(self, defaults: SamplingParams, **own: Any) -> SamplingParams:
        """The sampling asked for, over the model's own; `own` are this kind's."""
        own["structured_outputs"] = self.to_structured_outputs()
        given = {**self.sampling, **own}
        if "logit_bias" in given:
            given["logit_bias"] = _biases(given["logit_bias"])
        return dataclasses.replace(defaults, **given)


class ChatRequest(_Request):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] = 0
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)

    def check(self) -> None:
        """Refuse contradictions; what a template has no use for, its tokenizer refuses."""
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
        for name in self.chat_template_kwargs:
            if name in _NOT_VARIABLES:
                raise RequestError(
                    f"chat_template_kwargs has {name}, which is no variable of a template",
                    param="chat_template_kwargs",
                )

    @property
    def max_tokens(self) -> int | None:
        """The tokens of an answer, as far as the request says."""
        return self.max_completion_tokens or super().max_tokens

    def to_messages(self) -> list[dict[str, Any]]:
        """The conversation as chat templates take it."""
        return [_message(index, message) for index, message in enumerate(self.messages)]

    def to_template_options(self) -> dict[str, Any]:
        """The keywords of `apply_chat_template`."""
        return {
            "add_generation_prompt": self.add_generation_prompt,
            "continue_final_message": self.continue_final_message,
            **self.chat_template_kwargs,
        }

    def to_params(self, defaults: SamplingParams) -> SamplingParams:
        """How to sample; an answer may take the rest of the context."""
        own: dict[str, Any] = {"logprobs": self.top_logprobs if self.logprobs else None}
        if self.max_completion_tokens is not None:
            own["max_tokens"] = self.max_completion_tokens
        return self._params(defaults, **own)


class CompletionRequest(_Request):
    """The body of POST /v1/completions."""

    prompt: str | Annotated[list[str | int | list[int]], Meta(min_length=1)]
    echo: bool = False
    logprobs: int | None = None
    best_of: int | None = None

    def check(self) -> None:
        """Refuse to choose the best of several."""
        if self.best_of not in (None, self.sampling.get("n", 1)):
            raise RequestError("best_of is not supported; ask for n answers", param="best_of")

    def to_prompts(self) -> list[str | list[int]]:
        """Every prompt asked for: one, or a list of one kind."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [item for item in self.prompt if isinstance(item, int)]
        if len(ids) == len(self.prompt):
            return [ids]
        prompts = [item for item in self.prompt if not isinstance(item, int)]
        if ids or len(prompts) > MAX_PROMPTS:
            raise RequestError(
                f"prompt must be a text, a list of token ids, or at most {MAX_PROMPTS} of those",
                param="prompt",
            )
        return prompts

    @property
    def echoes_alone(self) -> bool:
        """Whether the prompt comes back with nothing added, which is how a text is scored."""
        return self.echo and self.sampling.get("max_tokens") == 0

    def to_params(self, defaults: SamplingParams) -> SamplingParams:
        """How to sample; 16 tokens unless more are asked for, as OpenAI has it."""
        own: dict[str, Any] = {"logprobs": self.logprobs}
        if self.echo:
            own["prompt_logprobs"] = self.logprobs
        if self.echoes_alone:
            own["max_tokens"] = 1  # the engine's least; it is not told
        elif "max_tokens" not in self.sampling and defaults.max_tokens is None:
            own["max_tokens"] = 16
        return self._params(defaults, **own)


def _refuse_unsupported(name: str, value: Any) -> None:
    nothing = _UNSUPPORTED[name]
    if value != nothing:
        advice = "leave it out" if nothing is None else f"leave it out or say {nothing!r}"
        raise RequestError(f"{name} is not supported by this version; {advice}", param=name)


def _unknown(name: str, known: set[str]) -> RequestError:
    near = difflib.get_close_matches(name[:_MAX_ECHOED], known, n=1)
    advice = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(sorted(known))}"
    return RequestError(f"unknown field {shown(name)}{advice}", param=name[:_MAX_ECHOED])


def _invalid(error: msgspec.ValidationError) -> RequestError:
    """A refusal by msgspec, which says at the end where: `$.messages[0].role`."""
    text, _, path = str(error).replace("`", "").partition(" - at $")
    text, path = text[:_MAX_ECHOED], path.lstrip(".")[:_MAX_ECHOED]
    missing = re.fullmatch(r"Object missing required field (\w+)", text)
    if missing:
        path = f"{path}.{missing[1]}".lstrip(".")
        return RequestError(f"{path} is missing", param=path)
    return RequestError(f"{path}: {text[0].lower()}{text[1:]}", param=path)


def _biases(value: Any) -> Any:
    """A map whose keys, text in JSON, are numbers; what else it may be SamplingParams refuses."""
    if not isinstance(value, dict):
        return value
    return {int(key) if re.fullmatch("[0-9]{1,18}", key) else key: v for key, v in value.items()}


def _message(index: int, message: Message) -> dict[str, Any]:
    where = f"messages[{index}]"
    if message.role not in _ROLES:
        raise _refused(f"{where}.role", message.role, ", ".join(_ROLES))
    for name, value in (("tool_calls", message.tool_calls), ("tool_call_id", message.tool_call_id)):
        if value:
            name = f"{where}.{name}"
            raise RequestError(f"{name} is not supported by this version", param=name)
    given: dict[str, Any] = {"role": _ROLES[message.role], "content": message.content}
    if not isinstance(message.content, str):
        given["content"] = [
            _part(f"{where}.content[{index}]", part) for index, part in enumerate(message.content)
        ]
    if message.name is not None:
        if not _NAME.fullmatch(message.name):
            raise _refused(f"{where}.name", message.name, "1 to 64 letters without spaces")
        given["name"] = message.name
    return given


def _part(where: str, part: Part) -> dict[str, str]:
    if part.type != "text":
        raise _refused(f"{where}.type", part.type, "text")
    if part.text is None:
        raise RequestError(f"{where}.text is missing", param=f"{where}.text")
    return {"type": "text", "text": part.text}


def _refused(name: str, value: str, wanted: str) -> RequestError:
    return RequestError(f"{name} is {shown(value)}; supported: {wanted}", param=name)
