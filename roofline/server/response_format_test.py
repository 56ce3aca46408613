import json
from typing import Any

import pytest

from roofline.errors import RequestError
from roofline.request import SamplingParams
from roofline.server.openai import ChatRequest, CompletionRequest
from roofline.structured_outputs import StructuredOutputsParams

SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}}


def form(**fields: Any) -> StructuredOutputsParams | None:
    body = {"messages": [{"role": "user", "content": "Hello"}], **fields}
    return ChatRequest.from_body(body).to_params(SamplingParams()).structured_outputs


def json_schema(**others: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, **others}}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": json_schema()}, {"json": SCHEMA}),
        ({"response_format": json_schema(strict=True, description="d")}, {"json": SCHEMA}),
        ({"response_format": json_schema(strict=None)}, {"json": SCHEMA}),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        ({"structured_outputs": {"regex": "a+", "json": None}}, {"regex": "a+"}),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, {"json": SCHEMA}),
        ({"guided_json": SCHEMA}, {"json": SCHEMA}),
        ({"guided_json": {}}, {"json": {}}),
        ({"guided_regex": "a+"}, {"regex": "a+"}),
        ({"guided_choice": ["a", "b"]}, {"choice": ["a", "b"]}),
        ({"guided_grammar": 'start: "a"'}, {"grammar": 'start: "a"'}),
        (
            {"response_format": {"type": "text"}, "guided_choice": ["a"]},
            {"choice": ["a"]},
        ),
    ],
)
def test_every_way_to_ask_for_a_form(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    assert form(**fields) == StructuredOutputsParams(**expected)
    asked = CompletionRequest.from_body({"prompt": "Hello", **fields})
    assert asked.to_params(SamplingParams()).structured_outputs == form(**fields)


def test_text_is_no_form() -> None:
    assert form() is None
    assert form(response_format={"type": "text"}) is None
    assert form(response_format={"type": "text", "json_schema": None}) is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": "json_object"}, "response_format"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "text", "x": 1}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": json_schema() | {"type": "json_object"}},
            "response_format.json_schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": json_schema(schema="{}")}, "response_format.json_schema.schema"),
        ({"response_format": json_schema(schema={"nullable": True})}, "response_format"),
        ({"response_format": json_schema(strict="yes")}, "response_format.json_schema.strict"),
        ({"structured_outputs": {"jsn": "{}"}}, "structured_outputs"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": [1]}, "structured_outputs"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": 1}, "guided_json"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": [1]}, "guided_choice[0]"),
        ({"guided_grammar": "x" * 100_000}, "guided_grammar"),
        ({"response_format": json_schema(), "guided_json": SCHEMA}, "guided_json"),
        ({"guided_json": SCHEMA, "structured_outputs": {"json": SCHEMA}}, "guided_json"),
    ],
)
def test_a_form_that_is_none_is_refused_by_its_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        form(**fields)
    assert refused.value.param == param
    assert param in refused.value.message and len(refused.value.message) < 300
