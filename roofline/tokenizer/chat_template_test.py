"""Tests of choosing and stopping templates: each runs in the sandbox's process, as in use."""

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

from roofline.errors import CheckpointError, RequestError
from roofline.sandbox import Sandbox
from roofline.tokenizer.chat_template import ChatTemplate, Renderer
from roofline.tokenizer.vocabulary_test import CHATML

USER = {"role": "user", "content": "Hi"}
PARTS = {"role": "user", "content": [{"type": "text", "text": text} for text in ("Hi", "you")]}
TOOLS = [{"name": "add"}]
EACH_PART = (
    "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}({{ part.text }}){% endfor %}{% endif %}"
)


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    made = Renderer(Sandbox(), max_bytes=1 << 16)
    yield made
    made.sandbox.close()


def template(*default: str, **named: str) -> ChatTemplate:
    sources = dict(zip(["default"], default, strict=False)) | named
    return ChatTemplate(sources, "m.gguf: chat template")


def written(made: ChatTemplate, renderer: Renderer, *messages: Any, **variables: Any) -> str:
    given = {"messages": [*messages], "add_generation_prompt": False, **variables}
    return made.render(given, renderer)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'x' * 10**9 }}",
        "{{ 'x' * 10**8 }}",
        "{{ 'x' | center(10**9) }}",
        "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s * 2 %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) + f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ 7 ** (7 ** 12) }}",
        "{{ messages.__class__.__mro__ }}{{ ''.__class__.__subclasses__() }}{{ x.y }}",
        "{{ cycler.__init__.__globals__.os.system('sleep 9') }}",
        "{% set l = [1] %}{% for i in range(99) %}{{ l.append(l) }}{% endfor %}",
        "{{ '%999999999d' | format(1) }}",
        "{{ ['x' * 999] * 10**7 | join }}",
        "{% for i in range(99999) %}{{ (messages * 999) | tojson | length }}{% endfor %}",
    ],
)
def test_whatever_a_template_does_is_over_in_a_moment_and_the_next_is_right(
    renderer: Renderer, source: str
) -> None:
    good, bad = template(CHATML), template(source)
    written(good, renderer, USER)
    started = time.monotonic()
    with pytest.raises(RequestError, match="the chat template ") as error:
        written(bad, renderer, USER)
    assert time.monotonic() - started < 10  # a second, and what a busy machine adds
    assert "\n" not in error.value.message
    assert written(good, renderer, USER) == "<|im_start|>user\nHi<|im_end|>\n"


def test_a_template_that_does_not_parse_is_refused_by_file_and_line(renderer: Renderer) -> None:
    with pytest.raises(CheckpointError, match=r"^m\.gguf: chat template: line 2: Unexpected end"):
        template("a\n{% for x in y %}")
    with pytest.raises(CheckpointError, match=r"^m\.gguf: chat template: line 1: No filter named"):
        written(template("{{ 'x' | nosuchfilter }}"), renderer, USER)


def test_tools_and_documents_choose_the_template_made_for_them(renderer: Renderer) -> None:
    made = template("D", tool_use="T", rag="R")
    assert written(made, renderer, USER) == "D"
    assert written(made, renderer, USER, tools=TOOLS) == "T"
    assert written(made, renderer, USER, tools=[]) == "T"  # as transformers has it
    assert written(made, renderer, USER, documents=[{"text": "x"}]) == "R"
    assert written(made, renderer, USER, tools=TOOLS, documents=[{"text": "x"}]) == "T"
    assert written(template("D"), renderer, USER, tools=TOOLS, documents=[{}]) == "D"
    only = template(tool_use="T", rag="R")
    with pytest.raises(
        RequestError, match="has chat templates for rag, tool_use, and none that is"
    ):
        written(only, renderer, USER)


def test_what_a_template_has_no_use_for_is_refused_by_name() -> None:
    made = template("{{ messages }}", tool_use="{{ tools }}{{ enable_thinking }}")
    made.refuse_unused({"tools": TOOLS, "documents": None, "enable_thinking": False})
    made.refuse_unused({"tools": None, "documents": []})
    for name, value in (("enable_thinking", False), ("documents", TOOLS)):
        with pytest.raises(RequestError, match=f"has no use for '{name}'$"):
            made.refuse_unused({name: value})


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% for m in messages %}" + EACH_PART + "{% endfor %}", "(Hi)(you)"),
        ("{% for m in messages %}[{{ m.content }}]{% endfor %}", "[Hi\nyou]"),
        ("{% for m in messages %}{{ m.content + '!' }}{% endfor %}", "Hi\nyou!"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "Hi\\nyou"}]'),
    ],
)
def test_parts_are_given_to_templates_that_write_them_and_one_text_to_others(
    renderer: Renderer, source: str, text: str
) -> None:
    made = template(source)
    for _ in range(2):
        assert written(made, renderer, PARTS) == text


def test_templates_share_a_process_which_need_not_live(renderer: Renderer) -> None:
    made = template(CHATML)
    first = written(made, renderer, USER)
    renderer.sandbox.close()
    assert written(made, renderer, USER) == first


def test_a_rendering_costs_little_more_than_in_this_process(renderer: Renderer) -> None:
    made = template(CHATML)
    chat = [USER] * 20
    written(made, renderer, *chat)
    taken = []
    for _ in range(20):
        started = time.perf_counter()
        written(made, renderer, *chat)
        taken.append(time.perf_counter() - started)
    assert min(taken) < 0.025, os.getloadavg()  # a new process would take more
