"""What a caller gives a chat template to write: checked for shape, in the form templates expect.

Nothing is rendered here. That strings forge no special token is seen to in `placeholders`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from roofline.errors import RequestError, shown
from roofline.tokenizer.vocabulary import TOKEN_NAMES

# What templates name the reasoning before an answer; all are filled, as in `transformers`
# (5.23, `chat_template_utils.py`, `_alias_reasoning_fields`).
_REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class Conversation:
    """Messages, and what else a template may write of."""

    messages: Sequence[Mapping[str, Any]]
    add_generation_prompt: bool | None = None  # None: unless the final message is continued
    continue_final_message: bool = False
    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    variables: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for index, message in enumerate(_mappings("messages", self.messages)):
            _check_message(f"messages[{index}]", message)
        if not self.messages:
            raise RequestError("messages is empty; it must be a list of one message or more")
        for index, tool in enumerate(_mappings("tools", self.tools or [])):
            _check_tool(f"tools[{index}]", tool)
        _mappings("documents", self.documents or [])
        for name in ("add_generation_prompt", "continue_final_message"):
            value = getattr(self, name)
            if not isinstance(value, bool) and (name, value) != ("add_generation_prompt", None):
                raise RequestError(f"{name} is {shown(value)}; it must be true or false")
        for name in self.variables or {}:
            if name in TOKEN_NAMES:
                raise RequestError(f"{name} is the model's; a conversation cannot set it")
        if self.continue_final_message:
            self._check_continuation()

    @property
    def generation_prompt(self) -> bool:
        """Whether the answer is to begin where the template's text ends."""
        asked = self.add_generation_prompt
        return not self.continue_final_message if asked is None else asked

    @property
    def optional(self) -> dict[str, Any]:
        """The variables a template may do without."""
        return {"tools": self.tools, "documents": self.documents, **(self.variables or {})}

    def plain_messages(self) -> list[dict[str, Any]]:
        """The messages without nulls, and with reasoning under all its names."""
        return [_plain(message) for message in self.messages]

    def _check_continuation(self) -> None:
        if self.add_generation_prompt:
            raise RequestError(
                "add_generation_prompt begins an answer and continue_final_message goes on with "
                "one; only one of them can be true",
                param="continue_final_message",
            )
        if self.messages[-1].get("content") in (None, []):
            raise RequestError(
                f"messages[{len(self.messages) - 1}] has no content to go on with; "
                "continue_final_message needs some"
            )


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    plain = {name: value for name, value in message.items() if value is not None}
    reasoning = next((plain[name] for name in _REASONING if name in plain), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _mappings(name: str, values: Any) -> Sequence[Mapping[str, Any]]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise RequestError(f"{name} is {shown(values)}; it must be a list")
    for index, value in enumerate(values):
        if not isinstance(value, Mapping):
            raise RequestError(f"{name}[{index}] is {shown(value)}; it must be a mapping")
    return values


def _check_message(where: str, message: Mapping[str, Any]) -> None:
    _check_text(f"{where}.role", message.get("role"))
    for name in ("name", "tool_call_id", *_REASONING):
        if message.get(name) is not None:
            _check_text(f"{where}.{name}", message[name])
    content, calls = message.get("content"), message.get("tool_calls")
    for index, call in enumerate(_mappings(f"{where}.tool_calls", calls or [])):
        _check_function(f"{where}.tool_calls[{index}]", call, "arguments", (Mapping, str))
    if content is None and not calls:
        raise RequestError(f"{where} has no content; only a message with tool_calls may lack it")
    if content is None or isinstance(content, str):
        return
    if isinstance(content, bytes) or not isinstance(content, Sequence):
        raise RequestError(
            f"{where}.content is {shown(content)}; it must be text or a list of parts"
        )
    for index, part in enumerate(_mappings(f"{where}.content", content)):
        if part.get("type") != "text":
            raise RequestError(
                f"{where}.content[{index}].type is {shown(part.get('type'))}; supported: text"
            )
        _check_text(f"{where}.content[{index}].text", part.get("text"))


def _check_tool(where: str, tool: Mapping[str, Any]) -> None:
    """A function by its JSON schema: bare, or as OpenAI wraps it."""
    if tool.get("type", "function") != "function":
        raise RequestError(f"{where}.type is {shown(tool['type'])}; supported: function")
    _check_function(where, tool, "parameters", (Mapping,))


def _check_function(
    where: str, value: Mapping[str, Any], field: str, kinds: tuple[type, ...]
) -> None:
    """A name and perhaps a field of some kind, in the mapping or in its `function`."""
    function = value
    if "function" in value:
        where, function = f"{where}.function", value["function"]
        if not isinstance(function, Mapping):
            raise RequestError(f"{where} is {shown(function)}; it must be a mapping")
    _check_text(f"{where}.name", function.get("name"))
    found = function.get(field)
    if found is not None and not isinstance(found, kinds):
        wanted = " or ".join("text" if kind is str else "a mapping" for kind in kinds)
        raise RequestError(f"{where}.{field} is {shown(found)}; it must be {wanted}")


def _check_text(where: str, value: object) -> None:
    if not isinstance(value, str):
        what = "missing" if value is None else shown(value)
        raise RequestError(f"{where} is {what}; it must be text")
