"""Tests that a conversation is checked field by field, and what templates get of it."""

from typing import Any

import pytest

from roofline.errors import RequestError
from roofline.tokenizer.conversation import Conversation

USER = {"role": "user", "content": "Hi"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.mark.parametrize(
    "message",
    [
        USER,
        {"role": "user", "content": ""},
        {"role": "anything", "content": [{"type": "text", "text": "Hi"}], "name": "Bob", "more": 1},
        {"role": "user", "content": []},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": "{}"}]},
        {"role": "assistant", "content": "", "tool_calls": None, "reasoning_content": "Hm."},
        {"role": "tool", "content": "12", "tool_call_id": "1"},
    ],
)
def test_messages_that_a_template_may_take_pass(message: dict[str, Any]) -> None:
    assert Conversation([message]).plain_messages()[0]["role"] == message["role"]
    assert Conversation((message, message)).generation_prompt


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is empty"),
        ("hi", "messages is 'hi'; it must be a list"),
        (None, "messages is None; it must be a list"),
        (USER, "messages is {.*; it must be a list"),
        (["hi"], r"messages\[0\] is 'hi'; it must be a mapping"),
        ([USER, {"content": "x"}], r"messages\[1\]\.role is missing; it must be text"),
        ([{**USER, "role": 3}], r"messages\[0\]\.role is 3; it must be text"),
        ([{**USER, "name": ["x"]}], r"messages\[0\]\.name is \['x'\]; it must be text"),
        ([{**USER, "tool_call_id": 1}], r"messages\[0\]\.tool_call_id is 1; it must be text"),
        ([{**USER, "reasoning": {}}], r"messages\[0\]\.reasoning is {}; it must be text"),
        ([{"role": "user"}], r"messages\[0\] has no content; only a message with tool_calls may"),
        ([{"role": "user", "content": None}], r"messages\[0\] has no content"),
        ([{**USER, "content": 3}], r"messages\[0\]\.content is 3; it must be text or a list"),
        ([{**USER, "content": b"x"}], r"messages\[0\]\.content is b'x'; it must be text or"),
        ([{**USER, "content": {"text": "x"}}], r"messages\[0\]\.content is {.*; it must be text"),
        ([{**USER, "content": ["x"]}], r"messages\[0\]\.content\[0\] is 'x'; it must be a map"),
        (
            [{**USER, "content": [{"type": "image_url", "image_url": {}}]}],
            r"messages\[0\]\.content\[0\]\.type is 'image_url'; supported: text",
        ),
        ([{**USER, "content": [{"text": "x"}]}], r"content\[0\]\.type is None; supported: text"),
        ([{**USER, "content": [{"type": "text"}]}], r"content\[0\]\.text is missing"),
        ([{**USER, "tool_calls": CALL}], r"messages\[0\]\.tool_calls is {.*; it must be a list"),
        ([{**USER, "tool_calls": ["f"]}], r"messages\[0\]\.tool_calls\[0\] is 'f'; it must be"),
        ([{**USER, "tool_calls": [{}]}], r"messages\[0\]\.tool_calls\[0\]\.name is missing"),
        ([{**USER, "tool_calls": [{"function": "f"}]}], r"tool_calls\[0\]\.function is 'f'"),
        (
            [{**USER, "tool_calls": [{"name": "f", "arguments": [1]}]}],
            r"tool_calls\[0\]\.arguments is \[1\]; it must be a mapping or text",
        ),
    ],
)
def test_bad_messages_are_refused_by_place(messages: Any, message: str) -> None:
    with pytest.raises(RequestError, match=f"^{message}|{message}") as error:
        Conversation(messages)
    assert "\n" not in error.value.message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tools": "f"}, "tools is 'f'; it must be a list"),
        ({"tools": [len]}, r"tools\[0\] is <built-in.*; it must be a mapping"),
        ({"tools": [{"type": "web_search"}]}, r"tools\[0\]\.type is 'web_search'; supported: fun"),
        ({"tools": [{"type": "function"}]}, r"tools\[0\]\.name is missing; it must be text"),
        ({"tools": [{"function": {}}]}, r"tools\[0\]\.function\.name is missing"),
        ({"tools": [{"function": None}]}, r"tools\[0\]\.function is None; it must be a mapping"),
        (
            {"tools": [{"name": "f", "parameters": "x"}]},
            r"tools\[0\]\.parameters is 'x'; it must be a mapping",
        ),
        ({"documents": {"title": "x"}}, "documents is {.*; it must be a list"),
        ({"documents": ["x"]}, r"documents\[0\] is 'x'; it must be a mapping"),
        ({"add_generation_prompt": 1}, "add_generation_prompt is 1; it must be true or false"),
        ({"continue_final_message": "yes"}, "continue_final_message is 'yes'; it must be true or"),
        ({"continue_final_message": None}, "continue_final_message is None; it must be true or"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "only one of them can be true",
        ),
        ({"variables": {"bos_token": "x"}}, "bos_token is the model's; a conversation cannot set"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as error:
        Conversation([USER], **options)
    assert "\n" not in error.value.message


@pytest.mark.parametrize("content", [None, []])
def test_a_message_without_content_cannot_be_continued(content: Any) -> None:
    messages = [USER, {"role": "assistant", "content": content, "tool_calls": [CALL]}]
    with pytest.raises(RequestError, match=r"messages\[1\] has no content to go on with"):
        Conversation(messages, continue_final_message=True)


def test_an_answer_is_prompted_for_unless_one_is_continued_or_none_is_wanted() -> None:
    assert Conversation([USER]).generation_prompt
    assert not Conversation([USER], continue_final_message=True).generation_prompt
    assert not Conversation([USER], add_generation_prompt=False).generation_prompt


def test_templates_get_no_nulls_and_reasoning_by_all_its_names() -> None:
    message = {"role": "assistant", "content": "4", "name": None, "reasoning": "Hm."}
    (plain,) = Conversation([message]).plain_messages()
    assert plain == {
        "role": "assistant",
        "content": "4",
        "reasoning": "Hm.",
        "thinking": "Hm.",
        "reasoning_content": "Hm.",
    }
    assert message["name"] is None
