"""JSON schemas of growing difficulty, seeded: what `tests/test_structured_outputs.py` asks for.

Everything is bounded in length, so that a small model can come to an end of it.
"""

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]

LEVELS = 10
_NAMES = (
    "name",
    "city",
    "größe",
    "名前",
    "with space",
    'a "quote"',
    "naïve 😀",
    "back\\slash",
    "x",
)
_WORDS = ("red", "green", "", "grün", "青い", 'say "hi"', "line\nbreak", "river", "a/b", "😀")
_PATTERNS = (
    "^[a-z]{1,8}$",
    "^\\d{3}-\\d{4}$",
    "^(yes|no|maybe)$",
    "^[A-Z][a-z]{2,9}( [A-Z][a-z]{2,9})?$",
    "^#[0-9a-f]{6}$",
    "^(é|ü|😀){1,4}$",
    "^[^\\s<>]{1,12}$",
    "^v\\d{1,2}(\\.\\d{1,2}){2}$",
    "^.{2,12}$",
    "^(([a-c]{2}|[x-z]{3})_){1,3}end$",
)
# The formats that are enforced and that `jsonschema` checks without further packages.
_FORMATS = ("date", "email", "ipv4", "ipv6", "uuid")


def schemas() -> list[tuple[str, Schema]]:
    """200 names and schemas: each kind in ten levels, the easy levels first."""
    made = []
    for level in range(LEVELS):
        for kind in _KINDS:
            chance = random.Random(f"{kind.__name__} {level}")
            made.append((f"{kind.__name__.strip('_')} {level}", kind(chance, level)))
    return made


def _scalar(chance: random.Random, level: int) -> Schema:
    kinds: list[Schema] = [
        {"type": "integer", "minimum": -50, "maximum": 999},
        {"type": "boolean"},
        {"type": "null"},
        {"type": "string", "maxLength": 12},
    ]
    return kinds[level % 4] if level < 4 else chance.choice(kinds)


def _string(chance: random.Random, level: int) -> Schema:
    least = chance.randint(0, level)
    return {"type": "string", "minLength": least, "maxLength": least + chance.randint(0, 20)}


def _pattern(_: random.Random, level: int) -> Schema:
    return {"type": "string", "pattern": _PATTERNS[level]}


def _format(_: random.Random, level: int) -> Schema:
    return {"type": "string", "format": _FORMATS[level % len(_FORMATS)]}


def _integer(chance: random.Random, level: int) -> Schema:
    low = chance.randint(-(10**level), 10**level)
    schema: Schema = {"type": "integer", "minimum": low, "maximum": low + 10 ** (level // 2 + 1)}
    if level % 3 == 2:
        schema = {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": low + 20}
    if level % 4 == 3:
        schema["multipleOf"] = chance.choice([2, 5, 7])
    return schema


def _number(chance: random.Random, level: int) -> Schema:
    low = round(chance.uniform(-100, 100), 1 + level % 3)
    span = chance.choice([0.5, 7.25, 1000.0])
    ends = ("minimum", "maximum") if level % 2 else ("exclusiveMinimum", "exclusiveMaximum")
    return (
        {"enum": [low, 1e-3, -0.5]}
        if level == 9
        else {"type": "number", ends[0]: low, ends[1]: round(low + span, 3)}
    )


def _enum(chance: random.Random, level: int) -> Schema:
    values: list[Any] = [*chance.sample(_WORDS, 2 + level // 2), level, None, True, -1.5]
    if level > 4:
        values += [[1, "two"], {"größe": [level], "n": {}}]
    return {"enum": chance.sample(values, 2 + level // 2)}


def _const(chance: random.Random, level: int) -> Schema:
    value: Any = chance.choice(_WORDS)
    for depth in range(level):
        value = [value, depth] if depth % 2 else {chance.choice(_NAMES): value}
    return {"const": value}


def _leaf(chance: random.Random, level: int) -> Schema:
    kind = chance.choice([_scalar, _integer, _enum, _pattern, _const])
    return kind(chance, chance.randint(0, min(level, 3)))


def _object(chance: random.Random, level: int) -> Schema:
    names = chance.sample(_NAMES, 1 + level // 3)
    return {
        "type": "object",
        "properties": {name: _leaf(chance, level) for name in names},
        "required": chance.sample(names, chance.randint(1, len(names))),
        "additionalProperties": False,
    }


def _nested(chance: random.Random, level: int) -> Schema:
    schema: Schema = _leaf(chance, level)
    for depth in range(1 + level // 2):
        name = chance.choice(_NAMES)
        schema = _closed({name: schema})
        if depth % 2:
            schema = {"type": "array", "items": schema, "minItems": 1, "maxItems": 1}
    return schema


def _array(chance: random.Random, level: int) -> Schema:
    least = chance.randint(0, level // 3)
    most = least + chance.randint(1, 3)
    return {"type": "array", "items": _leaf(chance, level), "minItems": least, "maxItems": most}


def _tuple(chance: random.Random, level: int) -> Schema:
    count = 1 + level // 3
    return {
        "type": "array",
        "prefixItems": [_leaf(chance, level) for _ in range(count)],
        "items": False if level % 2 else {"type": "boolean"},
        "minItems": count,
        "maxItems": count + 2,
    }


def _any_of(chance: random.Random, level: int) -> Schema:
    return {"anyOf": [_leaf(chance, level) for _ in range(2 + level // 3)]}


def _one_of(chance: random.Random, level: int) -> Schema:
    """Kinds told apart by a constant, as in a tagged union."""
    tagged = []
    for index in range(2 + level // 4):
        properties = {"kind": {"const": f"kind {index}"}, "value": _leaf(chance, level)}
        tagged.append(_closed(properties))
    return {"oneOf": tagged}


def _all_of(chance: random.Random, level: int) -> Schema:
    low = chance.randint(-9, 9)
    first = {"type": "object", "properties": {"n": {"type": "integer", "minimum": low}}}
    second = {"properties": {"n": {"maximum": low + 5 + level}}, "required": ["n"]}
    third = {"properties": {"w": {"enum": chance.sample(_WORDS, 3)}}, "required": ["w"]}
    parts = [first, second] + [third] * (level > 4)
    names = {name: True for part in parts for name in part["properties"]}
    return {"allOf": parts, "properties": names, "additionalProperties": False}


def _reference(chance: random.Random, level: int) -> Schema:
    point = {"$ref": "#/$defs/point"}
    fields = {f"p{index}": point for index in range(1 + level // 4)}
    size = {"$ref": "#/$defs/gr%C3%B6%C3%9Fe"}
    corner: Schema = {"x": size, "y": size}
    definitions = {"point": _closed(corner), "größe": _integer(chance, level // 3)}
    return {"$defs": definitions, **_closed(fields)}


def _recursive(chance: random.Random, level: int) -> Schema:
    """A list or a tree in itself: the model decides how deep it goes."""
    node: Schema = _closed({"value": _leaf(chance, level // 2)})
    below: Schema = {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}
    if level % 2:
        below = {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1 + level // 5}
    node["properties"]["next"] = below
    node["required"].append("next")
    return {"$defs": {"node": node}, "$ref": "#/$defs/node"}


def _open(chance: random.Random, level: int) -> Schema:
    """Further keys, whose values have a schema, in number or by a pattern of their names."""
    schema: Schema = {"type": "object", "additionalProperties": _leaf(chance, level)}
    if level % 3 == 1:
        schema = {
            "type": "object",
            "patternProperties": {"^[a-z]{1,6}$": _leaf(chance, level)},
            "additionalProperties": False,
        }
    if level % 3 == 2:
        schema["required"] = [chance.choice(_NAMES)]
    return {**schema, "maxProperties": 3}


def _several_types(chance: random.Random, level: int) -> Schema:
    types = chance.sample(["string", "integer", "null", "boolean"], 2 + level // 5)
    return {"type": types, "maxLength": 10, "minimum": 0, "maximum": 10**level}


def _record(chance: random.Random, level: int) -> Schema:
    """What people write: several of the above in one object, with an old $schema."""
    properties = {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]{2,9}$", "description": "a name"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120, "default": 7},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 3},
        "home": _object(chance, level // 2),
        "choice": _any_of(chance, level // 2),
    }
    names = list(properties)[: 2 + level // 3]
    schema = _closed({name: properties[name] for name in names})
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": "Record", **schema}


def _closed(properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


_KINDS: tuple[Callable[[random.Random, int], Schema], ...] = (
    _scalar,
    _string,
    _pattern,
    _format,
    _integer,
    _number,
    _enum,
    _const,
    _object,
    _nested,
    _array,
    _tuple,
    _any_of,
    _one_of,
    _all_of,
    _reference,
    _recursive,
    _open,
    _several_types,
    _record,
)
