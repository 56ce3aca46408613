import json
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import PipeInput, create_pipe_input

from roofline.cli import line_editor
from roofline.cli.line_editor import load_history, store_history

UP, DOWN, ALT_ENTER, CTRL_C, CTRL_D, CTRL_R = "\x1b[A", "\x1b[B", "\x1b\r", "\x03", "\x04", "\x12"
WORDS = ["/set ", "/stats", "/set temperature "]
Reader = Callable[[], str]


@pytest.fixture
def keyboard() -> Iterator[PipeInput]:
    with create_pipe_input() as keys, create_app_session(input=keys):
        yield keys


@pytest.fixture
def history(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "history"


@pytest.fixture
def read(keyboard: PipeInput, history: Path) -> Iterator[Reader]:
    with line_editor.line_editor(history, WORDS) as reader:
        yield reader


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("one\r", "one"),
        (f"one{ALT_ENTER}two\r", "one\ntwo"),
        ("one\\\rtwo\r", "one\ntwo"),
        ('"""one\rtwo\\\r"""\r', '"""one\ntwo\\\n"""'),
        ("\x1b[200~one\r\ntwo\\\nthree\x1b[201~\r", "one\ntwo\\\nthree"),
        (f"one{CTRL_C}two\r", "two"),
        ("one" + CTRL_D + "\r", "one"),
        ("/sta\t\r", "/stats"),
        ("\r", ""),
    ],
)
def test_keys_make_a_message(typed: str, expected: str, keyboard: PipeInput, read: Reader) -> None:
    keyboard.send_text(typed)
    assert read() == expected


def test_ctrl_c_and_ctrl_d_on_an_empty_line_are_told_apart(
    keyboard: PipeInput, read: Reader
) -> None:
    keyboard.send_text(CTRL_C)
    with pytest.raises(KeyboardInterrupt):
        read()
    keyboard.send_text(CTRL_D)
    with pytest.raises(EOFError):
        read()


def test_arrow_up_brings_back_messages_of_now_and_of_earlier_runs(
    keyboard: PipeInput, history: Path
) -> None:
    store_history(history, "earlier\nlines")
    with line_editor.line_editor(history, WORDS) as read:
        keyboard.send_text("now\r")
        assert read() == "now"
        keyboard.send_text(UP + "!\r")
        assert read() == "now!"
        keyboard.send_text(UP * 3 + "?\r")
        assert read() == "earlier\nlines?"
        keyboard.send_text(" \r")
        assert read() == " "
    assert load_history(history) == ["earlier\nlines", "now", "now!", "earlier\nlines?"]


def test_the_history_is_searched(keyboard: PipeInput, history: Path) -> None:
    for fruit in ("apple", "pear"):
        store_history(history, fruit)
    with line_editor.line_editor(history, WORDS) as read:
        keyboard.send_text(f"{CTRL_R}appl\r\r")
        assert read() == "apple"
        keyboard.send_text(f"{CTRL_R}pea{CTRL_C}fig\r")
        assert read() == "fig"


def test_history_is_for_its_owner_only_even_if_it_was_not(history: Path) -> None:
    store_history(history, "one")
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    history.chmod(0o644)
    store_history(history, "Grüße \udc80")
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert load_history(history) == ["one", "Grüße \udc80"]


def test_history_passes_over_what_is_damaged_and_what_repeats(history: Path) -> None:
    assert load_history(history) == []
    history.parent.mkdir()
    history.write_bytes(b'"a"\n\n{"b"\n[1]\n\xff\n"a"\n"a"\n' + b"[" * 100_000 + b'\n"c"\n"cut')
    assert load_history(history) == ["a", "c"]


def test_history_that_outgrew_its_bound_keeps_the_newest(
    history: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_editor, "_HISTORY_BYTES", 100)
    for number in range(40):
        store_history(history, f"{number:06}")
    assert load_history(history) == [f"{number:06}" for number in range(29, 40)]
    assert history.stat().st_size <= 100
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert [path.name for path in history.parent.iterdir()] == ["history"]
    assert json.loads(history.read_text().splitlines()[0]) == "000029"


def test_a_folder_that_cannot_be_written_keeps_no_history(
    keyboard: PipeInput, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    history = tmp_path / "file" / "history"
    with line_editor.line_editor(history, WORDS) as read:
        keyboard.send_text("one\r")
        assert read() == "one"
        keyboard.send_text(UP + "\r")
        assert read() == "one"
    assert load_history(history) == []
