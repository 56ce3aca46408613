"""The form an answer must have, as OpenAI's and vLLM's fields ask for it.

What is in them StructuredOutputsParams checks. No other field of a request.
"""

from typing import Any

from msgspec import Struct

from roofline.errors import RequestError, shown
from roofline.structured_outputs import StructuredOutputsParams

_GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
_TYPES = ("text", "json_object", "json_schema")


class JsonSchema(Struct, forbid_unknown_fields=True):
    """A schema, and what it is called."""

    name: str
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None  # answers keep to every schema, strict or not


class ResponseFormat(Struct, forbid_unknown_fields=True):
    """OpenAI's way to ask for JSON."""

    type: str
    json_schema: JsonSchema | None = None


class FormRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """The fields that ask for a form; at most one of them may."""

    response_format: ResponseFormat | None = None
    structured_outputs: dict[str, Any] | None = None  # vLLM's, by its names
    guided_json: str | dict[str, Any] | None = None  # vLLM's older names
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    @property
    def form_field(self) -> str | None:
        """The field that asks for a form."""
        names = ("structured_outputs", *_GUIDED)
        given = [name for name in names if getattr(self, name) is not None]
        if self.response_format is not None and self.response_format.type != "text":
            given.insert(0, "response_format")
        if len(given) > 1:
            raise RequestError(f"{given[1]} and {given[0]} exclude each other", param=given[1])
        return given[0] if given else None

    def to_structured_outputs(self) -> StructuredOutputsParams | None:
        """The form asked for, if any; RequestError names the field."""
        _check_type(self.response_format)
        name = self.form_field
        if name is None:
            return None
        try:
            return StructuredOutputsParams.from_options(self._options(name))
        except RequestError as error:
            raise RequestError(f"{name}: {error.message}", param=name) from None

    def _options(self, name: str) -> dict[str, Any]:
        """What a field asks for, by the names of StructuredOutputsParams."""
        if name == "structured_outputs":
            return self.structured_outputs or {}
        if name != "response_format":
            return {name.removeprefix("guided_"): getattr(self, name)}
        asked = self.response_format
        if asked is not None and asked.json_schema is not None:
            return {"json": asked.json_schema.schema}
        return {"json_object": True}


def _check_type(asked: ResponseFormat | None) -> None:
    if asked is None:
        return
    if asked.type not in _TYPES:
        param = "response_format.type"
        known = ", ".join(_TYPES)
        raise RequestError(f"{param} is {shown(asked.type)}; supported: {known}", param=param)
    if (asked.json_schema is not None) != (asked.type == "json_schema"):
        param = "response_format.json_schema"
        fault = "missing" if asked.json_schema is None else f"of no use to type {asked.type}"
        raise RequestError(f"{param} is {fault}", param=param)
