"""What a line of a chat that begins with / does; and what counts as a whole message.

A command returns the text to show; EOFError leaves. Nothing is read or printed here.
"""

import dataclasses
import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from roofline.cli import figures, options
from roofline.cli.conversation import Conversation
from roofline.errors import UsageError, shown
from roofline.request import SamplingParams

_QUOTES = '"""'
_INITIAL = "default"  # the value of /set that goes back
_NOTHING = "none"
_NEUTRAL = SamplingParams()

_HOW_TO_WRITE = """\
Enter sends; Alt-Enter, or a \\ before Enter, begins a new line; so does Enter after \"""
until the next \""". A message that begins with / is sent with a space before it.
Ctrl-C stops an answer; Ctrl-D leaves."""


def is_unfinished(text: str) -> bool:
    """Whether a message goes on in the next line: after a backslash, or within triple quotes."""
    if text.startswith(_QUOTES):
        return len(text) < 2 * len(_QUOTES) or not text.rstrip().endswith(_QUOTES)
    return text.endswith("\\")


def next_line(text: str) -> str:
    """An unfinished message with a new line begun."""
    return (text if text.startswith(_QUOTES) else text[:-1]) + "\n"


def message(text: str) -> str | None:
    """The message that was typed; None for a command."""
    if text.startswith(_QUOTES):
        quoted = text.rstrip().removeprefix(_QUOTES).removesuffix(_QUOTES)
        return quoted.removeprefix("\n").removesuffix("\n")
    return None if text.startswith("/") else text.strip()


def perform(conversation: Conversation, line: str) -> str:
    """Do what a command says; UsageError with the nearest command if there is none of its name."""
    name, rest = _first_word(line)
    command = _COMMANDS.get(name)
    if command is None:
        near = difflib.get_close_matches(name, _COMMANDS, 1)
        advice = f"did you mean {near[0]}?" if near else "/help lists them"
        raise UsageError(f"unknown command {shown(name)}; {advice} (a space before / sends it)")
    if rest and not command.takes:
        raise UsageError(f"{name} takes nothing after it")
    return command.perform(conversation, rest)


def completions() -> list[str]:
    """Beginnings of lines that Tab may finish."""
    settings = [f"/set {name} " for name in options.settable()]
    return [*(f"{name} " if c.takes else name for name, c in _COMMANDS.items()), *settings]


def refuse_without_effect(name: str, sampling: SamplingParams) -> None:
    """Refuse an option just given that changes nothing beside the others."""
    cuts = name in options.TRUNCATION and getattr(sampling, name) != getattr(_NEUTRAL, name)
    if cuts and sampling.temperature == 0:
        raise UsageError(f"{name} does nothing at temperature 0; set temperature to 1 first")


def effective(sampling: SamplingParams) -> str:
    """How the next answer is sampled, in short: the temperature, and what is not neutral."""
    differing = [n for n in options.settable() if getattr(sampling, n) != getattr(_NEUTRAL, n)]
    names = dict.fromkeys(["temperature", *differing])
    return ", ".join(f"{name} {_text(getattr(sampling, name))}" for name in names)


def statistics(conversation: Conversation) -> str:
    """The figures of the last answer, and how full the context is."""
    report = conversation.report()
    used, whole = conversation.context_tokens(), conversation.llm.max_model_len
    context = f"{used} of {whole} tokens of context used, {whole - used} left"
    if report is None:
        return f"no answer yet; {context}"
    return (
        f"{figures.one_line(report)}\n{report['completion_tokens']} tokens answered; "
        f"{report['cached_tokens']} prompt tokens came from the prefix cache; {context}"
    )


def _help(_: Conversation, __: str) -> str:
    lines = [f"{f'{name} {c.takes}':18} {c.help}" for name, c in _COMMANDS.items()]
    return "\n".join([*lines, "", _HOW_TO_WRITE])


def _set(conversation: Conversation, rest: str) -> str:
    name, text = _first_word(rest)
    sampling = conversation.sampling
    if not name:
        values = [(name, getattr(sampling, name)) for name in options.settable()]
        return "\n".join(f"{name:20} {_text(value)}" for name, value in values)
    value = options.parse_sampling(name, text)
    if not text:
        return f"{name} is {_text(getattr(sampling, name))}; /set {name} VALUE changes it"
    if text == _INITIAL:
        value = getattr(conversation.initial_sampling, name)
    changed = dataclasses.replace(sampling, **{name: value})
    refuse_without_effect(name, changed)
    conversation.sampling = changed
    return f"{name} is {_text(getattr(conversation.sampling, name))}"


def _system(conversation: Conversation, rest: str) -> str:
    if not rest:
        return "no system message" if conversation.system is None else conversation.system
    conversation.system = None if rest == _NOTHING else rest
    return "it holds from the next message on; the conversation stays (/clear forgets it)"


def _clear(conversation: Conversation, _: str) -> str:
    conversation.clear()
    return "forgotten; the system message and the settings stay"


def _save(conversation: Conversation, rest: str) -> str:
    if not rest:
        raise UsageError("/save needs the name of a file")
    messages = conversation.transcript()
    try:
        path = Path(rest).expanduser()
        with path.open("x", encoding="utf-8") as file:
            file.write(json.dumps(messages, ensure_ascii=False, indent=2) + "\n")
    except FileExistsError as error:
        raise UsageError(f"{rest} exists already; name another file") from error
    except (OSError, RuntimeError, ValueError) as error:  # no home folder; a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"cannot write {rest}: {reason}") from error
    return f"{len(messages)} messages are in {path}"


def _stats(conversation: Conversation, _: str) -> str:
    return statistics(conversation)


def _exit(_: Conversation, __: str) -> str:
    raise EOFError  # as the end of the input does


@dataclasses.dataclass(frozen=True)
class _Command:
    takes: str  # what may stand after it
    help: str
    perform: Callable[[Conversation, str], str]


_COMMANDS = {
    "/help": _Command("", "list the commands", _help),
    "/set": _Command("NAME VALUE", "change a sampling option; alone: list them", _set),
    "/system": _Command("TEXT", "change the system message (none: drop it); alone: show", _system),
    "/clear": _Command("", "forget the conversation", _clear),
    "/save": _Command("FILE", "write the conversation as JSON", _save),
    "/stats": _Command("", "figures of the last answer", _stats),
    "/exit": _Command("", "leave", _exit),
}


def _first_word(text: str) -> tuple[str, str]:
    word, *rest = text.split(maxsplit=1) or [""]
    return word, "".join(rest).rstrip()


def _text(value: Any) -> str:
    """A value as /set takes it."""
    if value is None:
        return _NOTHING
    return json.dumps(value)
