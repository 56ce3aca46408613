"""A model's chat template, rendered where it can be stopped.

Templates come with models and are untrusted: here they are parsed at most. What Jinja makes of them
is in `sandbox.templates`; no token ids here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from roofline.errors import RequestError, shown
from roofline.sandbox import Sandbox
from roofline.sandbox.templates import names_in

_RENDERING = "roofline.sandbox.templates"
_RENDER_S = 1.0  # for one rendering
_JSON_BYTES = 6  # that a byte of text may take as JSON
_PROBE = "7b1d39"  # a text to find again


@dataclass(frozen=True)
class Renderer:
    """Where templates are rendered, and how long a text they may write."""

    sandbox: Sandbox
    max_bytes: int

    def start(self) -> None:
        """Get ready without waiting for it."""
        self.sandbox.start(_RENDERING)

    def render(self, source: str, origin: str, variables: Mapping[str, Any]) -> str:
        """Write a template out; RequestError where it is not done in time or writes too much."""
        arguments = {"source": source, "origin": origin, "variables": variables}
        try:
            return self.sandbox.call(
                f"{_RENDERING}:render",
                {**arguments, "max_bytes": self.max_bytes},
                limit_s=_RENDER_S,
                max_bytes=_JSON_BYTES * self.max_bytes + 100,
            )
        except TimeoutError as error:
            raise RequestError(
                f"the chat template is not done with these messages after {_RENDER_S:g} s"
            ) from error
        except MemoryError as error:
            raise RequestError(
                "the chat template needs too much memory for these messages"
            ) from error


class ChatTemplate:
    """The templates of a model by name, of which what a conversation holds chooses one.

    They are parsed here; `origin` names their file in messages.
    """

    def __init__(self, sources: Mapping[str, str], origin: str = "chat template") -> None:
        self.sources = dict(sources)
        self._origin = origin
        self._names = {name: names_in(source, origin) for name, source in sources.items()}
        self._takes_parts: dict[str, bool] = {}

    def refuse_unused(self, given: Mapping[str, Any]) -> None:
        """RequestError where a variable of the caller's would change nothing."""
        names = self._names[self._chosen(given)]
        for name in [name for name, value in given.items() if name not in names]:
            if given[name] is not None and given[name] != []:
                raise RequestError(
                    f"the model's chat template has no use for {shown(name)}",
                    param=name if name in ("tools", "documents") else "chat_template_kwargs",
                )

    def render(self, variables: Mapping[str, Any], renderer: Renderer) -> str:
        """Write out the conversation in `variables`, all of them JSON values."""

        def render(variables: Mapping[str, Any]) -> str:
            return renderer.render(self.sources[name], self._origin, variables)

        variables = {"tools": None, "documents": None, **variables}
        name, messages = self._chosen(variables), variables["messages"]
        if any(isinstance(message.get("content"), list) for message in messages):
            if name not in self._takes_parts:
                self._takes_parts[name] = _writes_parts(render, variables)
            if not self._takes_parts[name]:
                variables["messages"] = [_in_one_part(message) for message in messages]
        return render(variables)

    def _chosen(self, given: Mapping[str, Any]) -> str:
        """The name of the template for a conversation: `tool_use` and `rag` are for what they say.

        As `transformers` chooses (5.23, `get_chat_template`), which leaves `rag` to its caller.
        """
        if given.get("tools") is not None and "tool_use" in self.sources:
            return "tool_use"
        if given.get("documents") is not None and "rag" in self.sources:
            return "rag"
        if "default" in self.sources:
            return "default"
        raise RequestError(
            f"the model has chat templates for {', '.join(sorted(self.sources))}, and none that is "
            "the default"
        )


def _writes_parts(render: Callable[[Mapping[str, Any]], str], variables: Mapping[str, Any]) -> bool:
    """Whether a template writes the text of a content in parts, by trying.

    Those for content that is a string fail, show the list itself, or leave the content out.
    """
    message = {"role": "user", "content": [{"type": "text", "text": _PROBE}]}
    try:
        text = render({**variables, "messages": [message]})
    except RequestError:
        return False
    return _PROBE in text and f"'{_PROBE}'" not in text and f'"{_PROBE}"' not in text


def _in_one_part(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message whose parts are one text, a line or more each, as vLLM and llama.cpp join them."""
    parts = message.get("content")
    if not isinstance(parts, list):
        return message
    return {**message, "content": "\n".join(part["text"] for part in parts)}
