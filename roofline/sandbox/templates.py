"""Chat templates in Jinja, with what they expect of `transformers`.

`render` runs what a template says and is for the sandbox's process; `names_in` only parses. No
token ids and no messages here.
"""

import datetime
import functools
import json
from collections.abc import Mapping
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from roofline.errors import CheckpointError, RequestError

_MAX_SOURCE_CHARACTERS = 1 << 20

# What an expression in a template can come to: Jinja's own errors, and Python's for its operands.
_FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def names_in(source: str, origin: str) -> frozenset[str]:
    """The names of all variables a template knows, its own among them; `origin` is its file.

    Nothing of the template runs: Jinja computes constants when it compiles, not when it parses.
    """
    if len(source) > _MAX_SOURCE_CHARACTERS:
        raise CheckpointError(
            f"{origin}: is {len(source)} characters long; at most {_MAX_SOURCE_CHARACTERS} are read"
        )
    try:
        return frozenset(name.name for name in _ENVIRONMENT.parse(source).find_all(nodes.Name))
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(f"{origin}: line {error.lineno}: {_line(error)}") from error
    except _FAILURES as error:  # nested deeper than Python's stack
        raise CheckpointError(f"{origin}: cannot be parsed: {_line(error)}") from error


def render(source: str, origin: str, variables: Mapping[str, Any], max_bytes: int) -> str:
    """Write a conversation out as the model was taught to read it, in at most so many bytes."""
    template = _compiled(source, origin)
    pieces: list[str] = []
    try:
        for piece in template.generate(**variables):
            pieces.append(piece)
            max_bytes -= len(piece.encode("utf-8", "surrogatepass"))
            if max_bytes < 0:
                raise RequestError(
                    "the chat template writes more than the context can hold",
                    code="context_length_exceeded",
                )
    except RequestError:
        raise
    except _TemplateRefusal as error:
        raise RequestError(f"the chat template refused the messages: {_line(error)}") from error
    except _FAILURES as error:
        raise RequestError(
            f"the chat template cannot write these messages: {_line(error)}"
        ) from error
    return "".join(pieces)


@functools.lru_cache(maxsize=16)
def _compiled(source: str, origin: str) -> jinja2.Template:
    try:
        return _ENVIRONMENT.from_string(source, globals=_FUNCTIONS)
    except jinja2.TemplateSyntaxError as error:  # such as a filter there is not
        raise CheckpointError(f"{origin}: line {error.lineno}: {_line(error)}") from error
    except (*_FAILURES, SyntaxError) as error:  # Python refuses the code Jinja made of it
        raise CheckpointError(f"{origin}: cannot be compiled: {_line(error)}") from error


class _TemplateRefusal(jinja2.TemplateError):
    """A template's own `raise_exception`."""


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's text for training; here its body is just written."""

    tags = {"generation"}  # noqa: RUF012 (Jinja declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        """Parse to the closing tag; what is set within is not known without."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models were trained on: unlike Jinja's own filter, nothing is escaped for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise _TemplateRefusal(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _to_json
    return environment


def _line(error: BaseException) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


_ENVIRONMENT = _environment()
_FUNCTIONS = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
