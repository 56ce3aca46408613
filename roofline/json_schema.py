"""JSON schemas as requests bring them: capped in size and depth, and free of what nothing enforces.

Only what the grammar library would accept and not keep to is refused here; it refuses the rest by
name itself. No grammar library here: a schema is checked before any is loaded.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from roofline.errors import RequestError, shown

MAX_BYTES = 64 << 10
_MAX_DEPTH = 64
_EXACT = 1 << 53  # integers up to here are the same as doubles, which is how bounds are kept

_DRAFTS = ("draft-04/", "draft-06/", "draft-07/", "draft/2019-09/", "draft/2020-12/")
_NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_INSTANCES = ("const", "enum", "default", "example", "examples")
_UNKNOWN = ("nullable", "divisibleBy", "disallow", "extends")  # OpenAPI's and draft 3's
_INT64_BOUNDS = {"maximum": (1 << 63) - 1, "minimum": -(1 << 63)}


def schema_text(schema: str | dict[str, Any]) -> str:
    """A checked schema as compact JSON; RequestError says what is wrong with it."""
    parsed = _parsed(schema) if isinstance(schema, str) else schema
    try:
        text = json.dumps(parsed, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        size = len(text.encode())
    except RecursionError:
        raise _too_deep() from None
    except (TypeError, ValueError) as error:  # UnicodeEncodeError is a ValueError
        raise RequestError(f"the JSON schema holds more than JSON values: {error}") from None
    _check_size(size)
    return json.dumps(checked_schema(parsed), ensure_ascii=False, separators=(",", ":"))


def checked_schema(schema: object) -> dict[str, Any] | bool:
    """A schema without its `$schema`; RequestError for what would be accepted and not enforced.

    Without it every keyword is judged by the latest draft, where none of the earlier drafts' that
    constrain anything is unknown.
    """
    if isinstance(schema, bool):
        return schema
    if not isinstance(schema, dict):
        raise RequestError(f"the JSON schema is {shown(schema)}; it must be an object")
    _check_depth(schema)
    draft = schema.get("$schema", "")
    if draft and not any(part in f"{draft}" for part in _DRAFTS):
        raise RequestError(f"$schema is {shown(draft)}; known are drafts 4 to 2020-12")
    bare = {key: value for key, value in schema.items() if key != "$schema"}
    for part in _schemas(bare):
        _check_keywords(part)
    return bare


def _parsed(text: str) -> object:
    _check_size(len(text))
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        raise RequestError(f"the JSON schema is no valid JSON: {error}") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _check_size(size: int) -> None:
    if size > MAX_BYTES:
        raise RequestError(f"the JSON schema has {size} bytes; at most {MAX_BYTES} are taken")


def _check_depth(value: object) -> None:
    level, depth = [value], 0
    while level := [child for each in level for child in _children(each)]:
        depth += 1
        if depth > _MAX_DEPTH:
            raise _too_deep()


def _children(value: object) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _too_deep() -> RequestError:
    return RequestError(f"the JSON schema is nested deeper than {_MAX_DEPTH}, which is the most")


def _schemas(root: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every object that is or may be a schema: a $ref may lead anywhere but into an instance."""
    waiting: list[Any] = [root]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            yield value
            for key, child in value.items():
                if key in _NAMED_SCHEMAS and isinstance(child, dict):
                    waiting += child.values()
                elif key not in _INSTANCES:
                    waiting.append(child)


def _check_keywords(schema: Mapping[str, Any]) -> None:
    """Refuse by name what the grammar library passes over or rounds."""
    if "x-guidance" in schema:
        raise RequestError("the JSON schema has x-guidance, which can switch its keywords off")
    if isinstance(schema.get("$schema"), str):
        raise RequestError("the JSON schema has $schema below its root; it must be at the root")
    for name in _UNKNOWN:
        if name in schema:
            raise RequestError(
                f"the JSON schema has {name}, which is no keyword of JSON Schema since draft 4"
            )
    _check_min_properties(schema)
    for name, value in schema.items():
        if name not in (*_NAMED_SCHEMAS, "default", "example", "examples"):
            _check_numbers(name, value)


def _check_min_properties(schema: Mapping[str, Any]) -> None:
    """A key that no keyword names may be written twice, and counts once."""
    least, required = schema.get("minProperties"), schema.get("required")
    if not isinstance(least, (int, float)) or least < 2:
        return
    if schema.get("additionalProperties") is False and "patternProperties" not in schema:
        return
    named = len(set(map(str, required))) if isinstance(required, list) else 0
    if least > named + 1:
        raise RequestError(
            f"minProperties {least} cannot be enforced; at most 1 beyond the properties in "
            f"required can, {named + 1} here"
        )


def _check_numbers(name: str, value: object) -> None:
    if isinstance(value, list):
        for each in value:
            if not isinstance(each, dict) or name in _INSTANCES:
                _check_numbers(name, each)
    elif isinstance(value, dict):
        if name in _INSTANCES:  # other objects are schemas, and checked by themselves
            for each in value.values():
                _check_numbers(name, each)
    elif isinstance(value, (int, float)) and not _is_exact(name, value):
        raise RequestError(
            f"{name} holds {shown(value)}; numbers are enforced exactly from -2**53 to 2**53"
        )


def _is_exact(name: str, value: float) -> bool:
    return -_EXACT <= value <= _EXACT or value == _INT64_BOUNDS.get(name)
