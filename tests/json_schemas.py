"""Two hundred JSON schemas of growing difficulty, whose values are short: ten kinds of twenty."""

import json
import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]
PER_KIND = 20

_WORDS = ("red", "noun", "été", "名前", "a b", 'q"q', "x/y", "😀", "-", "Straße")


def schemas() -> list[Schema]:
    """The same ones every time, no two alike."""
    found: dict[str, Schema] = {}
    for number, kind in enumerate(_KINDS, 1):
        chance = random.Random(number)
        while len(found) < number * PER_KIND:
            schema = kind(chance)
            found[json.dumps(schema)] = schema
    return list(found.values())


def _scalar(chance: random.Random) -> Schema:
    low = chance.randint(-50, 40)
    return chance.choice(
        [
            {"type": "boolean"},
            {"type": "null"},
            {"type": "integer", "minimum": low, "maximum": low + chance.randint(0, 60)},
            {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": low + 9},
            {
                "type": "integer",
                "multipleOf": chance.choice([5, 7, 12]),
                "maximum": 99,
                "minimum": 0,
            },
            {"type": "number", "minimum": low / 4, "maximum": low / 4 + 1, "multipleOf": 0.25},
            {"type": ["integer", "null"], "minimum": 0, "maximum": 9},
        ]
    )


def _choice(chance: random.Random) -> Schema:
    values: list[Any] = [*chance.sample(_WORDS, 3), chance.randint(0, 999), None, 1.5, [], {"é": 1}]
    chance.shuffle(values)
    return {"const": values[0]} if chance.random() < 0.3 else {"enum": values[:4]}


def _string(chance: random.Random) -> Schema:
    patterns = ("^[A-Z][a-z]{1,6}$", "^\\d{3}-\\d{4}$", "^(ab|cd){1,3}$", "^#[0-9a-f]{6}$", "^é+$")
    least = chance.randint(0, 4)
    return chance.choice(
        [
            {"type": "string", "minLength": least, "maxLength": least + chance.randint(0, 6)},
            {"type": "string", "pattern": chance.choice(patterns), "maxLength": 8},
            {"type": "string", "minLength": 1, "maxLength": 4, "enum": list(_WORDS)},
        ]
    )


def _format(chance: random.Random) -> Schema:
    names = ("date", "time", "date-time", "ipv4", "uuid", "duration", "email")
    bounded = {
        "email": {"maxLength": 20},
        "date-time": {"maxLength": 20},
        "time": {"maxLength": 9},
    }
    name = chance.choice(names)
    value = {"type": "string", "format": name} | bounded.get(name, {})
    held = {"type": "object", "properties": {name: value}, "required": [name]}
    row = {"type": "array", "items": value, "minItems": 1, "maxItems": 1}
    null = {**value, "type": ["string", "null"]}
    return chance.choice([value, null, row, {**held, "additionalProperties": False}])


def _array(chance: random.Random) -> Schema:
    least = chance.randint(0, 2)
    bounds = {"minItems": least, "maxItems": least + chance.randint(0, 2)}
    items = _leaf(chance)
    return chance.choice(
        [
            {"type": "array", "items": items, **bounds},
            {"type": "array", "items": {"type": "array", "items": items, "maxItems": 2}, **bounds},
            {"type": "array", "prefixItems": [items, _leaf(chance)], "items": False},
        ]
    )


def _object(chance: random.Random, depth: int = 0) -> Schema:
    names = chance.sample(_WORDS, chance.randint(1, 3))
    inner = _leaf if depth == 0 else lambda chance: _object(chance, depth - 1)
    return {
        "type": "object",
        "properties": {name: inner(chance) for name in names},
        "required": chance.sample(names, chance.randint(0, len(names))),
        "additionalProperties": False,
    }


def _nested(chance: random.Random) -> Schema:
    return _object(chance, depth=chance.randint(1, 3))


def _combined(chance: random.Random) -> Schema:
    kinds = [{"type": "null"}, {"type": "boolean"}, {"type": "integer", "minimum": 0, "maximum": 9}]
    tagged = [
        {
            **_object(chance),
            "properties": {"kind": {"const": tag}, "n": kinds[2]},
            "required": ["kind"],
        }
        for tag in ("a", "b")
    ]
    return chance.choice(
        [
            {"anyOf": [_leaf(chance), _array(chance), _object(chance)]},
            {"oneOf": [*kinds[:2], {"type": "string", "maxLength": 4}]},
            {"oneOf": tagged},
            {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 9}, {"multipleOf": 2}]},
            {"allOf": [_object(chance), {"type": "object"}]},
            {"type": "integer", "anyOf": [{"minimum": 90}, {"maximum": 3}], "allOf": [kinds[2]]},
        ]
    )


def _recursive(chance: random.Random) -> Schema:
    leaf = _leaf(chance)
    tree = {
        "type": "object",
        "properties": {"v": {"$ref": "#/$defs/leaf"}, "next": {"$ref": "#/$defs/tree"}},
        "required": ["v"],
        "additionalProperties": False,
    }
    lists = {"anyOf": [leaf, {"type": "array", "items": {"$ref": "#"}, "maxItems": 1}]}
    rooted = {"$ref": "#/$defs/tree", "$defs": {"leaf": leaf, "tree": tree}}
    chain = {
        "$ref": "#/definitions/a~1b",
        "definitions": {"a/b": {"$ref": "#/definitions/c"}, "c": leaf},
    }
    return chance.choice([lists, rooted, chain])


def _everything(chance: random.Random) -> Schema:
    switches = {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 1}
    letters = {"type": "object", "patternProperties": {"^[a-c]$": _leaf(chance)}}
    letters |= {"additionalProperties": False, "minProperties": 1, "maxProperties": 2}
    whole = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "all",
        "description": "of it",
        "type": "object",
        "properties": {
            "名": _leaf(chance),
            "sub": _object(chance),
            "list": _array(chance),
            "how": _combined(chance),
            "when": _format(chance),
        },
        "required": ["list", "how"],
        "additionalProperties": False,
    }
    rows = {"type": "array", "items": _object(chance), "minItems": 1, "maxItems": 2}
    return chance.choice([switches, letters, whole, rows])


def _leaf(chance: random.Random) -> Schema:
    return chance.choice((_scalar, _choice, _string))(chance)


_KINDS: tuple[Callable[[random.Random], Schema], ...] = (
    _scalar,
    _choice,
    _string,
    _format,
    _array,
    _object,
    _nested,
    _combined,
    _recursive,
    _everything,
)
