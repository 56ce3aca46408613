"""`roofline chat`: a conversation at a terminal, or one message a line through a pipe.

Answers go to stdout as they are made, everything else to stderr. Options are checked before
anything is loaded.
"""

import contextlib
import dataclasses
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Annotated, Any

from cyclopts import Parameter

import roofline  # the public door: what it names loads on use, torch with it
from roofline import models
from roofline.cli import chat_commands, figures, line_editor, options
from roofline.cli.conversation import Conversation
from roofline.config import EngineConfig
from roofline.errors import RooflineError, UsageError
from roofline.request import SamplingParams

_ENGINE = {"max_num_seqs": 1}  # a KV pool for one
# Control characters as pictures of themselves: an answer may not steer the terminal.
_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
_PICTURES |= dict.fromkeys(range(0x7F, 0xA0), 0x2421)
_MODELS_OWN = dict.fromkeys(options.settable())  # sampling defaults come from the model


@options.accepts(options.sampling_options(_MODELS_OWN), options.engine_options(_ENGINE))
def chat(
    model: options.Model,
    /,
    *,
    system: Annotated[str | None, Parameter(help="a first message: how to answer")] = None,
    verbose: Annotated[bool, Parameter(help="show the figures of every answer")] = False,
    **given: Any,
) -> None:
    """Talk with a model; /help in the chat lists what else it can do.

    Sampling is as the model's generation_config says, unless options say otherwise. Where stdin is
    no terminal, each of its lines is a message, and the first error ends the chat.
    """
    sampling = options.take_sampling(given)
    SamplingParams.from_options(sampling)
    config = EngineConfig.from_options(given, os.environ, _ENGINE)
    if sys.stdin is None:
        raise UsageError("there is no stdin to read messages from")
    with roofline.LLM.from_config(model, config) as llm:
        if llm.get_tokenizer().chat_template is None:
            raise UsageError(f"{model} has no chat template; --chat-template FILE gives it one")
        params = dataclasses.replace(llm.default_sampling_params(), **sampling)
        for name in sampling:
            chat_commands.refuse_without_effect(name, params)
        talk = _Talk(Conversation(llm, params, system), verbose)
        if sys.stdin.isatty():
            _say(
                f"{model}: {llm.max_model_len} tokens of context, "
                f"{chat_commands.effective(params)}\n/help lists the commands, Ctrl-D leaves"
            )
            talk.at_terminal()
        else:
            talk.through_pipe(sys.stdin.buffer)


@dataclasses.dataclass(frozen=True)
class _Talk:
    """A conversation, with where its messages come from and its answers go."""

    conversation: Conversation
    verbose: bool

    def at_terminal(self) -> None:
        """Take what is typed until the person leaves; an error or Ctrl-C never ends the chat."""
        history = models.builtin.cache_folder() / "chat_history.jsonl"
        with line_editor.line_editor(history, chat_commands.completions()) as read:
            while True:
                try:
                    self._take(read(), heed_interrupts())
                except EOFError:
                    return
                except KeyboardInterrupt:
                    _say("Ctrl-D or /exit leaves")
                except RooflineError as error:
                    _say(f"error: {error.message}")

    def through_pipe(self, lines: Iterable[bytes]) -> None:
        """Take every line until the last one, /exit or an error."""
        with contextlib.suppress(EOFError):
            for text in _read_messages(lines):
                self._take(text, contextlib.nullcontext(threading.Event()))

    def _take(
        self, text: str, interrupts: contextlib.AbstractContextManager[threading.Event]
    ) -> None:
        message = chat_commands.message(text)
        if message is None:
            _say(chat_commands.perform(self.conversation, text))
        elif message:
            answers = len(self.conversation.turns)
            with interrupts as interrupted:
                self._answer(message, interrupted)
            if len(self.conversation.turns) == answers:
                _say("[stopped before the first word: the message is forgotten]")
                return
            if note := _note(self.conversation):
                _say(f"[{note}]")
            report = self.conversation.report() if self.verbose else None
            if report is not None:
                _say(figures.one_line(report))

    def _answer(self, message: str, interrupted: threading.Event) -> None:
        """Show the answer as it is made, and no more of it after an interrupt."""
        begun = False
        try:
            with contextlib.closing(self.conversation.ask(message)) as pieces:
                for piece in pieces:
                    begun = True
                    shown = piece.translate(_PICTURES) if sys.stdout.isatty() else piece
                    print(shown, end="", flush=True)
                    if interrupted.is_set():
                        break
        finally:
            if begun:
                print(flush=True)


@contextlib.contextmanager
def heed_interrupts() -> Iterator[threading.Event]:
    """Note a Ctrl-C instead of raising it; a second one ends the block at once.

    It ends it in the middle of a step, which costs the engine all its state, the prefix cache too.
    """
    noted = threading.Event()

    def note(_: int, __: FrameType | None) -> None:
        if noted.is_set():
            raise KeyboardInterrupt
        noted.set()

    previous = signal.signal(signal.SIGINT, note)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield noted
    finally:
        signal.signal(signal.SIGINT, previous)


def _read_messages(lines: Iterable[bytes]) -> Iterator[str]:
    """Join the lines of each message."""
    text = ""
    for number, line in enumerate(lines, 1):
        try:
            text += line.decode().removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise UsageError(f"stdin is not UTF-8 in line {number}") from error
        if chat_commands.is_unfinished(text):
            text = chat_commands.next_line(text)
        else:
            yield text
            text = ""
    if text:
        raise UsageError('stdin ends within a message, after """ or a \\ at the end of a line')


def _note(conversation: Conversation) -> str | None:
    """What to say of how the last answer ended, unless the model ended it."""
    reason = conversation.turns[-1].finish_reason
    if reason == "abort":
        return "stopped"
    if reason != "length":
        return None
    context = conversation.llm.max_model_len
    if conversation.context_tokens() < context:
        return f"max_tokens is {conversation.sampling.max_tokens}: the answer ends here"
    return f"the context of {context} tokens is full: the answer ends here; /clear begins anew"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
