import json
from typing import Any

import pytest

from roofline.errors import RequestError
from roofline.json_schema import MAX_BYTES, schema_text


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


def circular() -> dict[str, Any]:
    schema: dict[str, Any] = {}
    schema["items"] = schema
    return schema


def refusal(schema: str | dict[str, Any]) -> str:
    with pytest.raises(RequestError) as caught:
        schema_text(schema)
    assert "\n" not in caught.value.message and len(caught.value.message) < 300
    return caught.value.message


def test_text_and_objects_are_the_same_schema_in_the_order_they_were_written() -> None:
    named: dict[str, Any] = {"z": {}, "été": {"const": "\0"}, "a": True}
    schema = {"type": "object", "properties": named}
    text = schema_text(schema)
    assert schema_text(json.dumps(schema)) == schema_text(text) == text
    assert list(json.loads(text)["properties"]) == ["z", "été", "a"]
    assert [schema_text(text) for text in ("true", "false", "{}")] == ["true", "false", "{}"]


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("", "no valid JSON"),
        ("{", "no valid JSON"),
        ('{"a": NaN}', "NaN"),
        ("[1]", "must be an object"),
        ("3", "must be an object"),
        ('{"const": 1e999}', "more than JSON values"),
        ({"const": float("nan")}, "more than JSON values"),
        ({"const": {1, 2}}, "more than JSON values"),
        ({"const": "\ud800"}, "more than JSON values"),
        (circular(), "more than JSON values"),
        ("[" * 60_000, "deeper than 64"),
        (nested(1000), "deeper than 64"),
        (nested(65), "deeper than 64"),
        ("1" * 5000, "no valid JSON"),
        ({"enum": ["x" * MAX_BYTES]}, "at most 65536"),
        (" " * (MAX_BYTES + 1), "at most 65536"),
        ({"enum": [f"v{index}" for index in range(100_000)]}, "at most 65536"),
    ],
)
def test_what_is_no_schema_of_reasonable_size_is_refused(schema: Any, message: str) -> None:
    assert message in refusal(schema)


def test_the_deepest_and_the_longest_pass() -> None:
    schema_text(nested(64))
    schema_text({"const": "x" * (MAX_BYTES - 12)})


@pytest.mark.parametrize(
    ("keywords", "name"),
    [
        ({"x-guidance": {"lenient": True}}, "x-guidance"),
        ({"nullable": True}, "nullable"),
        ({"minProperties": 2}, "minProperties 2"),
        ({"minProperties": 3, "required": ["a"], "properties": {"a": {}}}, "2 here"),
        ({"minProperties": 2, "additionalProperties": False, "patternProperties": {}}, "minProp"),
        ({"const": 2**53 + 1}, "const holds"),
        ({"enum": ["a", {"b": [-(2**53) - 1]}]}, "enum holds"),
        ({"maximum": 10**30}, "maximum holds"),
        ({"minimum": 2**63 - 1}, "minimum holds"),
        ({"multipleOf": 10**4000}, "multipleOf holds"),
        ({"const": 1e22}, "const holds"),
    ],
)
@pytest.mark.parametrize(
    "place",
    [
        lambda schema: schema,
        lambda schema: {"properties": {"const": schema}},
        lambda schema: {"anyOf": [{"type": "null"}, {"items": [schema]}]},
        lambda schema: {"$defs": {"x": schema}},
        lambda schema: {"components": {"schemas": {"x": schema}}, "$ref": "#/components/schemas/x"},
    ],
)
def test_what_would_be_taken_and_not_kept_to_is_refused_by_name(
    keywords: dict[str, Any], name: str, place: Any
) -> None:
    assert name in refusal(place(keywords))


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"nullable": {}, "x-guidance": {}, "minProperties": {"type": "null"}}},
        {"enum": [{"nullable": True, "minProperties": 9, "x-guidance": 1}]},
        {"default": 10**30, "examples": [1e200]},
        {"minProperties": 1},
        {"minProperties": 2, "required": ["a", "b"]},
        {"minProperties": 2, "additionalProperties": False},
        {"minimum": -(2**63), "maximum": 2**63 - 1},
        {"maximum": 2**53, "const": -(2**53), "multipleOf": 0.01},
    ],
)
def test_what_can_be_kept_to_passes(schema: dict[str, Any]) -> None:
    assert json.loads(schema_text(schema)) == schema


def test_every_draft_is_read_as_the_latest_and_others_are_refused() -> None:
    for draft in (
        "http://json-schema.org/draft-07/schema#",
        "https://json-schema.org/draft/2020-12/schema",
    ):
        assert schema_text({"$schema": draft, "type": "null"}) == '{"type":"null"}'
    assert "$schema is 'mine'" in refusal({"$schema": "mine"})
    assert "below its root" in refusal(
        {"items": {"$schema": "http://json-schema.org/draft-04/schema"}}
    )
