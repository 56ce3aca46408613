import io
import sys
from pathlib import Path

import pytest

from roofline.cli.rm import rm
from roofline.errors import UsageError
from roofline.models import hub
from roofline.models.huggingface_test import FOLDER
from tests.hub_server import Hub


@pytest.fixture
def folder(hub_server: Hub) -> Path:
    hub_server.add("org/model", FOLDER)
    return hub.resolve("org/model")


def answering(monkeypatch: pytest.MonkeyPatch, text: str, *, terminal: bool = True) -> None:
    stream = io.StringIO(text)
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stdin", stream)


def test_rm_asks_and_says_what_it_freed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for answer in ("", "\n", "n\n", "yess\n"):
        answering(monkeypatch, answer)
        rm("org/model")
        assert folder.exists()
        assert capsys.readouterr().out.endswith("nothing removed\n")
    answering(monkeypatch, "Y\n")
    rm("org/model")
    assert not folder.exists()
    out = capsys.readouterr().out
    assert out == "Remove org/model (0.3 MB)? [y/N] removed org/model: 0.3 MB freed\n"


def test_off_a_terminal_rm_removes_only_when_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, "y\n", terminal=False)
    with pytest.raises(UsageError, match="--yes removes without asking"):
        rm("org/model")
    assert folder.exists()
    rm("org/model", yes=True)
    assert not folder.exists()
