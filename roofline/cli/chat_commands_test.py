import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from roofline.cli import chat_commands
from roofline.cli.chat_commands import is_unfinished, message, next_line, perform
from roofline.cli.conversation import Conversation
from roofline.errors import UsageError
from roofline.request import SamplingParams
from tests.fake_llm import NO_SYSTEM, FakeLLM

START = SamplingParams(temperature=0.5, top_p=0.9)


@pytest.fixture
def conversation() -> Conversation:
    return Conversation(FakeLLM.make()[1], START)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["Hello"], "Hello"),
        (["  Hello "], "Hello"),
        (["one\\", "two"], "one\ntwo"),
        (["one\\", "two\\", "", "ignored"], "one\ntwo"),
        (['"""one', "two\\", '"""'], "one\ntwo\\"),
        (['"""', "/exit", "", '"""'], "/exit\n"),
        (['"""one"""'], "one"),
        (['"""""', 'x"""'], '""\nx'),
        (['""""""'], ""),
        ([" /etc is a folder"], "/etc is a folder"),
        (["/exit"], None),
        (["/system one\\", "two"], None),
    ],
)
def test_lines_become_one_message(lines: list[str], expected: str | None) -> None:
    text, *rest = lines
    while is_unfinished(text):
        text = next_line(text) + rest.pop(0)
    assert message(text) == expected
    assert rest in ([], ["ignored"])


@pytest.mark.parametrize(
    ("line", "refusal"),
    [
        ("/stat", "unknown command '/stat'; did you mean /stats?"),
        ("/etc/passwd", "unknown command '/etc/passwd'; /help lists them"),
        ("/", "unknown command '/'; /help lists them"),
        ("/clear all", "/clear takes nothing after it"),
        ("/set temprature 1", "unknown sampling option 'temprature'; did you mean temperature?"),
        ("/set n 2", "unknown sampling option 'n'; options: temperature, top_k"),
        ("/set temperature hot", "temperature is 'hot'; it must be a number from 0 to 100"),
        ("/set temperature -1", "temperature is -1.0; it must be a number from 0 to 100"),
        ("/set max_tokens 0", "max_tokens is 0; it must be an integer from 1"),
        ("/set ignore_eos maybe", "ignore_eos is 'maybe'; it must be True or False"),
        ('/set stop ["a", 5]', "stop is 5; it must be at most 16 strings"),
        ("/save", "/save needs the name of a file"),
        ("/save /nowhere/at/all", "cannot write /nowhere/at/all: No such file"),
        ("/save ~nobody-at-all/x", "cannot write ~nobody-at-all/x: "),
        ("/save a\0b", "cannot write a.b: embedded null byte"),
        (f"/system {NO_SYSTEM}", "the chat template refused the messages"),
    ],
)
def test_what_cannot_be_meant_is_one_line_and_changes_nothing(
    line: str, refusal: str, conversation: Conversation
) -> None:
    with pytest.raises(UsageError) as caught:
        perform(conversation, line)
    assert caught.value.message.replace("\0", ".").startswith(refusal)
    assert "\n" not in caught.value.message
    assert (conversation.sampling, conversation.system) == (START, None)


@pytest.mark.parametrize(
    ("line", "said", "changed"),
    [
        ("/set temperature 0", "temperature is 0.0", {"temperature": 0}),
        ("/set seed 7", "seed is 7", {"seed": 7}),
        ("/set ignore_eos yes", "ignore_eos is true", {"ignore_eos": True}),
        ("/set stop END", 'stop is ["END"]', {"stop": ["END"]}),
        (r'/set stop "\n\n"', r'stop is ["\n\n"]', {"stop": ["\n\n"]}),
        ('/set stop ["a", "b"]', 'stop is ["a", "b"]', {"stop": ["a", "b"]}),
        ("/set stop [/INST]", 'stop is ["[/INST]"]', {"stop": ["[/INST]"]}),
        ("/set stop 5", 'stop is ["5"]', {"stop": ["5"]}),
        ("/set stop_token_ids 5", "stop_token_ids is [5]", {"stop_token_ids": [5]}),
        ("/set stop_token_ids [5, 6]", "stop_token_ids is [5, 6]", {"stop_token_ids": [5, 6]}),
        ("/set top_p", "top_p is 0.9; /set top_p VALUE changes it", {}),
        ("/set  top_k   7 ", "top_k is 7", {"top_k": 7}),
    ],
)
def test_set_changes_one_option(
    line: str, said: str, changed: dict[str, Any], conversation: Conversation
) -> None:
    assert perform(conversation, line) == said
    assert conversation.sampling == dataclasses.replace(START, **changed)


def test_set_refuses_what_would_do_nothing(conversation: Conversation) -> None:
    perform(conversation, "/set temperature 0")
    with pytest.raises(UsageError, match="top_k does nothing at temperature 0; set temperature"):
        perform(conversation, "/set top_k 5")
    perform(conversation, "/set top_k 0")
    perform(conversation, "/set temperature 1")
    perform(conversation, "/set top_k 5")
    assert conversation.sampling.top_k == 5


def test_set_goes_back_to_the_beginning_or_to_nothing(conversation: Conversation) -> None:
    perform(conversation, "/set temperature 1.5")
    perform(conversation, "/set max_tokens 9")
    assert perform(conversation, "/set temperature default") == "temperature is 0.5"
    assert perform(conversation, "/set max_tokens none") == "max_tokens is none"
    assert conversation.sampling == START


def test_set_alone_shows_every_option_it_can_change(conversation: Conversation) -> None:
    lines = perform(conversation, "/set").splitlines()
    values = dict(line.split(maxsplit=1) for line in lines)
    assert values["temperature"] == "0.5"
    assert (values["max_tokens"], values["ignore_eos"]) == ("none", "false")
    for name in values:
        perform(conversation, f"/set {name} {values[name]}")
    assert conversation.sampling == START


def test_the_short_form_shows_temperature_and_what_is_not_neutral() -> None:
    assert chat_commands.effective(START) == "temperature 0.5, top_p 0.9"
    assert chat_commands.effective(SamplingParams()) == "temperature 1.0"


def test_system_shows_sets_and_drops(conversation: Conversation) -> None:
    assert perform(conversation, "/system") == "no system message"
    assert "from the next message on" in perform(conversation, "/system\nBe  kind.\nAnd brief.")
    assert perform(conversation, "/system") == "Be  kind.\nAnd brief."
    perform(conversation, "/system none")
    assert conversation.system is None


def test_clear_keeps_the_system_message_and_the_settings(conversation: Conversation) -> None:
    list(conversation.ask("one"))
    perform(conversation, "/set temperature 0")
    perform(conversation, "/system Be kind.")
    perform(conversation, "/clear")
    assert conversation.turns == []
    assert (conversation.system, conversation.sampling.temperature) == ("Be kind.", 0)


def test_save_writes_the_messages_and_never_over_a_file(
    conversation: Conversation, tmp_path: Path
) -> None:
    list(conversation.ask("Grüße"))
    path = tmp_path / "a chat.json"
    assert perform(conversation, f"/save {path}") == f"2 messages are in {path}"
    assert json.loads(path.read_text(encoding="utf-8")) == conversation.transcript()
    list(conversation.ask("more"))
    with pytest.raises(UsageError, match=r"exists already; name another file"):
        perform(conversation, f"/save {path}")
    assert len(json.loads(path.read_text(encoding="utf-8"))) == 2


def test_exit_is_the_end_of_the_input(conversation: Conversation) -> None:
    with pytest.raises(EOFError):
        perform(conversation, "/exit")


def test_stats_before_any_answer_say_so(conversation: Conversation) -> None:
    assert perform(conversation, "/stats") == (
        "no answer yet; 0 of 100 tokens of context used, 100 left"
    )


def test_help_lists_every_command_and_tab_completes_them(conversation: Conversation) -> None:
    said = perform(conversation, "/help")
    names = {line.split()[0] for line in said.splitlines() if line.startswith("/")}
    completed = {text.split()[0] for text in chat_commands.completions()}
    assert names == completed == {"/help", "/set", "/system", "/clear", "/save", "/stats", "/exit"}
    assert "/set temperature " in chat_commands.completions()
