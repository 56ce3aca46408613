"""What a grammar becomes, and what is refused; here in this process, where nothing is killed."""

import json
import threading
from typing import Any

import pytest
from llguidance import LLTokenizer

from roofline.errors import RequestError
from roofline.grammars.trial import compiled, trial
from roofline.structured_outputs import StructuredOutputsParams


def matches(grammar: str, text: str) -> bool:
    """Whether a text is complete under a grammar."""
    matcher = compiled(grammar, LLTokenizer("byte"))
    data = list(text.encode())
    return matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()


def lark(kind: str, source: Any, whitespace: str | None = None) -> str:
    params = StructuredOutputsParams(**{kind: source})
    checked = getattr(params, kind)
    return trial(kind, checked, whitespace)


def refusal(kind: str, source: Any) -> str:
    with pytest.raises(RequestError) as caught:
        lark(kind, source)
    assert "\n" not in caught.value.message and len(caught.value.message) < 400
    return caught.value.message


@pytest.mark.parametrize(
    ("kind", "source", "taken", "refused"),
    [
        ("regex", "a/b|[/]{2}", ["a/b", "//"], ["a", "/"]),
        ("regex", r"^\d{2}é$", ["12é"], ["12", "é"]),
        ("regex", "(a+)+b", ["ab", "aaaab"], ["a", "b"]),
        ("choice", ["a", "ab", 'q"\\/ \n\x7f\0😀'], ["a", "ab", 'q"\\/ \n\x7f\0😀'], ["b", "abc"]),
        ("choice", ["<|im_end|>", "%json"], ["<|im_end|>", "%json"], ["<"]),
        ("grammar", 'start: "a" b* // <x>\nb: /</ "<|y|>"', ["a", "a<<|y|>"], ["a<"]),
        ("grammar", 'root ::= "a" b? "\\n"\nb ::= [0-9]+ | "x"', ["a\n", "a12\n", "ax\n"], ["a"]),
        ("grammar", 'start: "x" %json {"type": "null"} "y"', ["xnully"], ["x null y", "null"]),
        ("grammar", 'start: start "a" | "b"', ["b", "baaa"], ["a", ""]),
        ("json", {"type": "integer", "minimum": 5}, ["5", "12"], ["4", "5.0", " 5"]),
        ("json", {}, ["{}", "null", '"é"', "[1 , 2]"], ["{", "nul"]),
        ("json", "true", ["{}", "0"], [""]),
    ],
)
def test_a_grammar_takes_what_it_says_and_nothing_else(
    kind: str, source: Any, taken: list[str], refused: list[str]
) -> None:
    grammar = lark(kind, source)
    assert [text for text in taken if not matches(grammar, text)] == []
    assert [text for text in refused if matches(grammar, text)] == []


@pytest.mark.parametrize(
    ("whitespace", "taken", "refused"),
    [
        (None, ['{"a":1}', '{\n    "a" : 1\n}', f'{{"a":{" " * 40}1}}'], [f'{{"a":{" " * 41}1}}']),
        ("", ['{"a":1}'], ['{"a": 1}']),
        (" ", ['{"a":1}', '{ "a" : 1 }'], ['{"a":  1}', '{"a":\n1}']),
    ],
)
def test_space_between_the_parts_of_json_is_bounded(
    whitespace: str | None, taken: list[str], refused: list[str]
) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    grammar = lark("json", schema, whitespace)
    assert [text for text in taken if not matches(grammar, text)] == []
    assert [text for text in refused if matches(grammar, text)] == []


def test_a_key_spelled_with_escapes_cannot_escape_its_schema() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    for grammar in (lark("json", schema), lark("grammar", f"start: %json {json.dumps(schema)}")):
        assert matches(grammar, '{"a":1}') and matches(grammar, '{"b":"x"}')
        assert not matches(grammar, '{"\\u0061":"x"}')


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("regex", "a(", "regex cannot be enforced: unclosed group"),
        ("regex", "(?=a)b", "look-around"),
        ("regex", r"(a)\1", "backreferences"),
        ("regex", r"\ba", "lookarounds"),
        ("regex", "(" * 30_000 + "a" + ")" * 30_000, "nested parentheses"),
        ("json", "false", "allows nothing"),
        ("json", {"type": "foo"}, "json cannot be enforced: Invalid type: foo"),
        ("json", {"minLength": 3, "maxLength": 2, "type": "string"}, "Unsatisfiable"),
        ("json", {"minimum": 3, "maximum": 2, "type": "number"}, "Unsatisfiable"),
        ("json", {"required": ["b"], "additionalProperties": False, "type": "object"}, "Unsat"),
        ("json", {"type": "string", "pattern": "a("}, "unclosed group"),
        ("json", {"$ref": "#"}, "no text can match it"),
        ("json", {"$ref": "#/$defs/x"}, "does not exist"),
        ("json", {"$ref": "http://169.254.169.254/x"}, "not present in a registry"),
        ("json", {"$ref": "file:///etc/passwd"}, "not present in a registry"),
        ("json", {"uniqueItems": True}, 'Unimplemented keys: ["uniqueItems"]'),
        ("json", {"not": {}}, 'Unimplemented keys: ["not"]'),
        ("json", {"format": "regex", "type": "string"}, "Unknown format: regex"),
        ("json", {"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ("json", {"$schema": "http://json-schema.org/draft-07/schema#", "minContains": 2}, "minC"),
        ("json", {"const": "\x7f"}, "no text can match it"),
        ("grammar", "start: start", "no text can match it"),
        ("grammar", "start: nowhere", 'unknown name: "nowhere"'),
        ("grammar", 'start: "a"\nstart: "b"', 'at 2(8): duplicate rule: "start"'),
        ("grammar", 'start: A\nA: A "x"', "circular reference"),
        ("grammar", "start: " + "(" * 20_000 + '"a"' + ")" * 20_000, "too deeply nested"),
        ("grammar", "hello", "1(6): Expected token"),
        ("grammar", 'root ::= "a" nowhere', "Rule 'nowhere' not found"),
        ("grammar", "root ::= " + "(" * 20_000, "no GBNF that can be converted"),
        ("grammar", 'start: "a" <|im_end|>', "names the token <|im_end|>"),
        ("grammar", 'start: "a" <[0-9]> /b/', "names the token <[0-9]>"),
        ("grammar", 'start: "\\"" <x>', "names the token <x>"),
        ("grammar", "start: a\na[temperature=0.5]: /x/", "sets temperature="),
        ("grammar", 'start: a "b"\na[stop = "b"]: /x*/', "sets stop ="),
        ("grammar", 'start: %json {"x-guidance": {}}', "x-guidance"),
        ("grammar", 'start: "a" %json {"minProperties": 2} "b"', "minProperties 2"),
        ("grammar", "start: %json {", "no valid JSON"),
        ("grammar", "start: %json " + "[" * 9_000, "no valid JSON"),
    ],
)
def test_what_cannot_be_enforced_is_refused_in_one_line(
    kind: str, source: Any, message: str
) -> None:
    assert message in refusal(kind, source)


def test_the_thread_of_a_trial_leaves_no_trace() -> None:
    before = threading.stack_size()
    lark("regex", "a")
    refusal("regex", "(")
    assert threading.stack_size() == before
