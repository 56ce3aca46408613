"""Tests of the template language, against `transformers`' rendering where it has one."""

import datetime
import re
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from roofline.errors import CheckpointError, RequestError
from roofline.tokenizer.chat_template import ChatTemplate
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
    "generation tag": EACH + "{% generation %}{{ m.content }}{% endgeneration %}" + END,
    "tojson escapes no HTML": "{{ tools | tojson }} {{ tools | tojson(indent=2) }}",
    "tojson options": "{{ messages[2] | " + COMPACT_JSON + " }}",
    "namespace": COUNT,
    "absent is undefined": "{{ nothing }}{{ documents is none }}{{ messages[0].name is defined }}",
    "trailing newline": "{{ messages[0].content }}\n",
    "macros and filters": "{% macro w(x) %}[{{ x | trim | upper }}]{% endmacro %}{{ w('é ') }}",
}


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_a_rendering_equals_transformers(source: str, add_generation_prompt: bool) -> None:
    (expected,), _ = render_jinja_template(
        [CHAT], TOOLS, chat_template=source, add_generation_prompt=add_generation_prompt
    )
    template = ChatTemplate(source)
    text = template.render(CHAT, tools=TOOLS, add_generation_prompt=add_generation_prompt)
    assert text == expected


def test_the_date_is_todays() -> None:
    template = ChatTemplate("{{ strftime_now('%Y') }}")
    assert template.render(CHAT) == str(datetime.datetime.now().year)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% if %}", r"^m\.gguf: line 1: Expected an expression"),
        ("a\n{% for x in y %}", r"^m\.gguf: line 2: Unexpected end of template"),
        ("{{ 'x' | nosuchfilter }}", r"^m\.gguf: line 1: No filter named 'nosuchfilter'"),
        ("{% include 'x' %}{% block a %}{% block a %}", r"^m\.gguf: line 1: "),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", r"^m\.gguf: cannot be compiled: "),
        ("{% if a %}" * 200 + "{% endif %}" * 200, r"^m\.gguf: cannot be compiled: "),
    ],
)
def test_a_template_that_does_not_compile_is_a_bad_checkpoint(source: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        ChatTemplate(source, "m.gguf")
    assert "\n" not in error.value.message


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
        ChatTemplate(source).render(CHAT)
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
        ChatTemplate(source).render(CHAT)
    assert before == CHAT
