"""A model's chat template: Jinja in a sandbox, with what templates expect of `transformers`.

Templates come with models and are untrusted, so all rendering is in the one function `render`.
No token ids here.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from roofline.errors import CheckpointError, RequestError

# What an expression in a template can come to: Jinja's own errors, and Python's for its operands.
_FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


class ChatTemplate:
    """One compiled template; `origin` names the file it came from in messages."""

    def __init__(self, source: str, origin: str = "chat template") -> None:
        self.source = source
        try:
            self._template = _environment().from_string(source, globals=_FUNCTIONS)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(f"{origin}: line {error.lineno}: {_line(error)}") from error
        except (*_FAILURES, SyntaxError) as error:  # Python refuses the code Jinja made of it
            raise CheckpointError(f"{origin}: cannot be compiled: {_line(error)}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Write the conversation out as the model was taught to read it."""
        given = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render({"tools": None, "documents": None, **variables, **given})
        except _TemplateRefusal as error:
            raise RequestError(f"the chat template refused the messages: {_line(error)}") from error
        except _FAILURES as error:
            raise RequestError(
                f"the chat template cannot write these messages: {_line(error)}"
            ) from error


class _TemplateRefusal(jinja2.TemplateError):
    """A template's own `raise_exception`."""


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's text for training; here its body is just written."""

    tags = {"generation"}  # noqa: RUF012 (Jinja declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Parse to the closing tag and keep the body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _to_json
    return environment


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


_FUNCTIONS = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}


def _line(error: BaseException) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__
