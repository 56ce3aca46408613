"""Reading messages from a terminal: editing, several lines, completion, a history that is kept.

prompt-toolkit is imported when an editor is made and not before: it costs a tenth of a second.
What a message means is in `chat_commands`.
"""

import contextlib
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from roofline.cli import chat_commands

_HISTORY_BYTES = 1 << 20
_KEPT_FOR_ITS_OWNER = 0o600


@contextlib.contextmanager
def line_editor(history: Path, completions: Sequence[str]) -> Iterator[Callable[[], str]]:
    """Give a function that reads one message, prompting on stderr.

    It raises EOFError for Ctrl-D and KeyboardInterrupt for Ctrl-C, both on an empty line only.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.filters import is_searching
    from prompt_toolkit.history import InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import create_output
    from prompt_toolkit.shortcuts import CompleteStyle

    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.newline(copy_margin=False))

    @keys.add("enter", filter=~is_searching)
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if chat_commands.is_unfinished(buffer.text):
            buffer.text = chat_commands.next_line(buffer.text)
            buffer.cursor_position = len(buffer.text)
        else:
            buffer.validate_and_handle()

    @keys.add("c-c", filter=~is_searching)
    def _(event: KeyPressEvent) -> None:
        if not event.current_buffer.text:
            event.app.exit(exception=KeyboardInterrupt)
        event.current_buffer.reset()

    with create_app_session(output=create_output(stdout=sys.stderr)):
        session: PromptSession[str] = PromptSession(
            ">>> ",
            multiline=True,
            prompt_continuation="... ",
            history=InMemoryHistory(load_history(history)),
            completer=WordCompleter(list(completions), sentence=True),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,
            key_bindings=keys,
        )

        def read() -> str:
            text = session.prompt()
            store_history(history, text)
            return text

        yield read


def load_history(path: Path) -> list[str]:
    """Messages sent before, oldest first; none where there is no file that can be read.

    A file that has outgrown its bound is cut to its newest part.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - _HISTORY_BYTES, 0))
            lines = file.readlines()[1 if size > _HISTORY_BYTES else 0 :]
        if size > _HISTORY_BYTES:
            _replace(path, lines)
    except OSError:
        return []
    return [entry for entry, _ in itertools.groupby(_entries(lines))]


def store_history(path: Path, text: str) -> None:
    """Add a message that is not blank; a folder that cannot be written keeps no history."""
    if not text.strip():
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        with os.fdopen(os.open(path, flags, _KEPT_FOR_ITS_OWNER), "w", encoding="ascii") as file:
            path.chmod(_KEPT_FOR_ITS_OWNER)
            file.write(json.dumps(text) + "\n")


def _entries(lines: Sequence[bytes]) -> Iterator[str]:
    """One JSON string a line; what is none is passed over."""
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            entry = json.loads(line)
            if isinstance(entry, str):
                yield entry


def _replace(path: Path, lines: Sequence[bytes]) -> None:
    handle, name = tempfile.mkstemp(prefix=".history-", dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.writelines(lines)
    Path(name).replace(path)
