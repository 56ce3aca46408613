"""What an answer's text must be like, as a request asks for it, and the matcher that sees to it.

Plain values, checked and capped; how they become a matcher is the business of `doors/`, and what a
matcher does to sampling that of `scheduling/` and `execution/`. No grammar library here.
"""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self

from roofline.errors import RequestError, shown
from roofline.json_schema import MAX_BYTES, schema_text

_MAX_CHOICES, _MAX_CHOICE = 1024, 1024  # strings, characters of each
_MAX_WHITESPACE_PATTERN = 256
_KINDS = ("json", "regex", "choice", "grammar", "json_object")


@dataclasses.dataclass(frozen=True)
class StructuredOutputsParams:
    """Exactly one of the first five: vLLM's names and meanings."""

    json: str | dict[str, Any] | None = None  # a JSON schema; kept as text
    regex: str | None = None  # of the whole answer
    choice: Sequence[str] | None = None
    grammar: str | None = None  # in Lark's syntax as llguidance has it, or llama.cpp's GBNF
    json_object: bool | None = None  # any JSON object
    disable_any_whitespace: bool = False  # of JSON: none between its parts
    whitespace_pattern: str | None = None  # of JSON: a regex for what may be between its parts

    def __post_init__(self) -> None:
        given = [name for name in _KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise RequestError(
                f"structured_outputs has {', '.join(given) or 'nothing'}; "
                f"give exactly one of {', '.join(_KINDS)}"
            )
        if self.json_object is not None and self.json_object is not True:
            raise RequestError(f"json_object is {shown(self.json_object)}; it must be True or None")
        for name in ("regex", "grammar"):
            _check_text(name, getattr(self, name), MAX_BYTES)
        if self.json is not None:
            if not isinstance(self.json, (str, dict)):
                raise RequestError(f"json is {shown(self.json)}; it must be a schema: str or dict")
            object.__setattr__(self, "json", schema_text(self.json))
        if self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))
        self._check_whitespace()

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Build from named options; an unknown name is refused with the nearest that exists."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(f"{name}"[:100], known, n=1)
                advice = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
                raise RequestError(f"unknown structured_outputs option {shown(name)}; {advice}")
        return cls(**options)

    def _check_whitespace(self) -> None:
        if not isinstance(self.disable_any_whitespace, bool):
            raise RequestError(
                f"disable_any_whitespace is {shown(self.disable_any_whitespace)}; "
                "it must be True or False"
            )
        _check_text("whitespace_pattern", self.whitespace_pattern, _MAX_WHITESPACE_PATTERN)
        set_here = self.disable_any_whitespace or self.whitespace_pattern is not None
        if set_here and self.json is None and self.json_object is None:
            raise RequestError("whitespace between parts is an option of json and json_object only")
        if self.disable_any_whitespace and self.whitespace_pattern is not None:
            raise RequestError("disable_any_whitespace and whitespace_pattern exclude each other")


class TokenMatcher(Protocol):
    """Follows one answer token by token, and says what may come next."""

    def mask(self) -> bytes | None:
        """What may come next, `mask_bytes` long: bit i % 8 of byte i // 8 is token i's.

        None is everything. Asked any number of times between two tokens; it cannot fail.
        """
        ...

    def accept(self, token: int) -> bool:
        """Take the next token; True when the text is complete and nothing may follow.

        RequestError when it cannot say what may come after; the request ends there.
        """
        ...


def mask_bytes(vocab_size: int) -> int:
    """Bytes of a token mask: whole words of 64 bits, those beyond the vocabulary zero."""
    return -(-vocab_size // 64) * 8


def _choices(choice: object) -> tuple[str, ...]:
    wanted = f"1 to {_MAX_CHOICES} strings of 1 to {_MAX_CHOICE} characters"
    if isinstance(choice, str) or not isinstance(choice, Sequence):
        raise RequestError(f"choice is {shown(choice)}; it must be {wanted}")
    if not 1 <= len(choice) <= _MAX_CHOICES:
        raise RequestError(f"choice has {len(choice)} entries; it must be {wanted}")
    for index, each in enumerate(choice):
        if not isinstance(each, str) or not 1 <= len(each) <= _MAX_CHOICE:
            raise RequestError(f"choice[{index}] is {shown(each)}; it must be {wanted}")
        _check_text(f"choice[{index}]", each, 4 * _MAX_CHOICE)
    if sum(len(each.encode()) for each in choice) > MAX_BYTES:
        raise RequestError(f"choice is longer than {MAX_BYTES} bytes in all, which is the most")
    return tuple(choice)


def _check_text(name: str, value: object, most: int) -> None:
    if value is None:
        return
    if not isinstance(value, str) or not value:
        raise RequestError(f"{name} is {shown(value)}; it must be text")
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{name} holds half a surrogate pair at character {error.start}; "
            "it must be valid Unicode"
        ) from None
    if size > most:
        raise RequestError(f"{name} has {size} bytes; at most {most} are taken")
