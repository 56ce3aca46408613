"""Tests of the template language, against `transformers`' rendering where it has one.

Templates are rendered in this process; what only stops with it is in `chat_template_test`.
"""

import datetime
import re
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from roofline.errors import CheckpointError, RequestError
from roofline.sandbox.templates import names_in, render
from roofline.tokenizer.vocabulary_test import CHATML

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " <b>Hi & 'bye'</b>\n"},
    {"role": "assistant", "content": "é😀"},
]
TOOLS: list[Any] = [{"type": "function", "function": {"name": "add", "description": "Adds <&> é."}}]

EACH = "{% for m in messages %}"
END = "{% endfor %}"
COUNT = "{% set ns = namespace(n=0) %}" + EACH + "{% set ns.n = ns.n + 1 %}" + END + "{{ ns.n }}"
COMPACT_JSON = "tojson(ensure_ascii=true, sort_keys=true, separators=[',', ':'])"
TEMPLATES = {
    "chatml": CHATML,
    "blocks are trimmed": EACH + "\n  {% if true %}\n{{ m.role }}\n  {% endif %}\n" + END,
    "loop controls": EACH + "{% if loop.index == 2 %}{% break %}{% endif %}{{ m.role }}" + END,
    "set within a tag": "{% generation %}{% set x = 1 %}{{ x }}{% endgeneration %}{{ x }}",
    "generation tag": EACH + "{% generation %}{{ m.content }}{% endgeneration %}" + END,
    "tojson escapes no HTML": "{{ tools | tojson }} {{ tools | tojson(indent=2) }}",
    "tojson options": "{{ messages[2] | " + COMPACT_JSON + " }}",
    "namespace": COUNT,
    "absent is undefined": "{{ nothing }}{{ documents is none }}{{ messages[0].name is defined }}",
    "trailing newline": "{{ messages[0].content }}\n",
    "macros and filters": "{% macro w(x) %}[{{ x | trim | upper }}]{% endmacro %}{{ w('é ') }}",
}


def rendered(source: str, *, max_bytes: int = 1 << 20, **variables: Any) -> str:
    given = {"messages": CHAT, "tools": TOOLS, "documents": None, **variables}
    return render(source, "m.gguf", given, max_bytes)


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_a_rendering_equals_transformers(source: str, add_generation_prompt: bool) -> None:
    (expected,), _ = render_jinja_template(
        [CHAT], TOOLS, chat_template=source, add_generation_prompt=add_generation_prompt
    )
    assert rendered(source, add_generation_prompt=add_generation_prompt) == expected


def test_the_date_is_todays() -> None:
    assert rendered("{{ strftime_now('%Y') }}") == str(datetime.datetime.now().year)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% if %}", r"^m\.gguf: line 1: Expected an expression"),
        ("a\n{% for x in y %}", r"^m\.gguf: line 2: Unexpected end of template"),
        ("{% include 'x' %}{% block a %}{% block a %}", r"^m\.gguf: line 1: "),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", r"^m\.gguf: cannot be parsed: "),
        ("x" * (1 << 20) + "y", r"^m\.gguf: is 1048577 characters long; at most 1048576"),
    ],
)
def test_a_template_that_does_not_parse_is_a_bad_checkpoint(source: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        names_in(source, "m.gguf")
    assert "\n" not in error.value.message


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("\n{{ 'x' | nosuchfilter }}", r"^m\.gguf: line 2: No filter named 'nosuchfilter'"),
        ("{% if a %}" * 200 + "{% endif %}" * 200, r"^m\.gguf: cannot be compiled: "),
    ],
)
def test_a_template_that_does_not_compile_is_told_when_it_is_used(
    source: str, message: str
) -> None:
    names_in(source, "m.gguf")
    with pytest.raises(CheckpointError, match=message) as error:
        rendered(source)
    assert "\n" not in error.value.message


def test_a_filter_there_is_not_harms_nothing_where_it_is_not_reached() -> None:
    assert rendered("{% if nothing %}{{ 'x' | nosuchfilter }}{% endif %}x") == "x"


def test_names_are_found_wherever_they_stand_and_nothing_is_computed() -> None:
    source = "{% if not tools is defined %}{% set tools = none %}{% endif %}"
    assert "tools" in names_in(source, "m.gguf")
    assert names_in("{% for m in a.b[c] %}{{ m | f(d) }}{% endfor %}", "m.gguf") == set("acdm")
    assert names_in("{{ 'x' * 10 ** 12 }}{{ 'x' | center(10 ** 12) }}", "m.gguf") == set()


def test_a_rendering_ends_where_it_becomes_too_long() -> None:
    assert rendered("{% for i in range(9) %}é{% endfor %}", max_bytes=18) == "é" * 9
    for source in (
        "{{ 'é' * 10 }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}é" + END * 2,
    ):
        with pytest.raises(RequestError, match="writes more than the context can hold"):
            rendered(source, max_bytes=18)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "{{ raise_exception('Roles must\nalternate!') }}",
            "refused the messages: Roles must alternate!",
        ),
        ("{{ messages[0].tool_calls[0] }}", "cannot write these messages: .*tool_calls"),
        ("{{ messages[0].content + 1 }}", "cannot write these messages: "),
        ("{{ 1 / (messages | length - 3) }}", "cannot write these messages: .*zero"),
        ("{{ messages[0].content | int | round(method='x') }}", "cannot write these messages: "),
        (
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "cannot write these messages: .*recursion",
        ),
        ("{{ range(10 ** 9) }}", "cannot write these messages: Range too big"),
        ("{{ strftime_now(3) }}", "cannot write these messages: "),
        ("{% include 'x' %}", "cannot write these messages: "),
    ],
)
def test_messages_a_template_cannot_take_are_a_bad_request(source: str, message: str) -> None:
    with pytest.raises(RequestError, match=re.compile(message, re.IGNORECASE)) as error:
        rendered(source)
    assert "\n" not in error.value.message


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ raise_exception.__globals__ }}{{ raise_exception.__globals__.x }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
    ],
)
def test_a_template_cannot_leave_the_sandbox_or_change_what_it_is_given(source: str) -> None:
    before = [dict(message) for message in CHAT]
    with pytest.raises(RequestError):
        rendered(source)
    assert before == CHAT
