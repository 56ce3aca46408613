import json
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import pytest

import roofline.cli as command_line
from roofline.cli import main
from roofline.errors import (
    CapacityError,
    CheckpointError,
    DownloadError,
    RequestError,
    RooflineError,
    UnsupportedError,
    UsageError,
)

Raising = Callable[[BaseException], None]


@pytest.fixture
def command_raises(monkeypatch: pytest.MonkeyPatch) -> Raising:
    """Make every command raise."""

    def install(error: BaseException) -> None:
        def command(*_: Any, **__: Any) -> NoReturn:
            raise error

        monkeypatch.setattr(command_line, "app", command)

    return install


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (RooflineError, 1),
        (CheckpointError, 1),
        (DownloadError, 1),
        (CapacityError, 1),
        (UsageError, 2),
        (UnsupportedError, 2),
        (RequestError, 2),
    ],
)
def test_each_error_is_one_line_and_its_exit_code(
    kind: type[RooflineError],
    code: int,
    command_raises: Raising,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command_raises(kind("file.gguf: tensor 'a'\n is cut off"))
    assert main(["run"]) == code
    assert capsys.readouterr() == ("", "roofline: error: file.gguf: tensor 'a' is cut off\n")
    assert main(["run", "--json"]) == code
    out, err = capsys.readouterr()
    message = "file.gguf: tensor 'a' is cut off"
    assert json.loads(out) == {"error": {"type": kind.__name__, "message": message}}
    assert err == ""


def test_interruption_is_one_line_and_130(
    command_raises: Raising, capsys: pytest.CaptureFixture[str]
) -> None:
    command_raises(KeyboardInterrupt())
    assert main(["run"]) == 130
    assert capsys.readouterr() == ("", "roofline: interrupted\n")
    assert main(["run", "--json"]) == 130
    error = json.loads(capsys.readouterr().out)["error"]
    assert error == {"type": "KeyboardInterrupt", "message": "interrupted"}


def test_an_unexpected_error_is_one_line_and_its_traceback_only_on_request(
    command_raises: Raising, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ROOFLINE_DEBUG", raising=False)
    command_raises(KeyError("weights"))
    assert main(["run"]) == 1
    line = "roofline: error: KeyError: 'weights' (ROOFLINE_DEBUG=1 shows where)\n"
    assert capsys.readouterr() == ("", line)
    monkeypatch.setenv("ROOFLINE_DEBUG", "1")
    assert main(["run"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rnu"], 'Unknown command "rnu". Did you mean "run"?'),
        (["run"], 'Command "run" parameter MODEL requires an argument.'),
        (["fit", "x", "--max-modle-len", "5"], "Did you mean --max-model-len?"),
        (["fit", "x", "y"], "Unused Tokens: ['y']."),
        (["bench", "latency"], "MODEL requires an argument"),
    ],
)
def test_a_command_line_that_cannot_be_meant_is_usage(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert message in err and err.startswith("roofline: error: ") and err.count("\n") == 1
    assert out == ""
    assert main([*arguments, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["type"] == "UsageError"


def test_version_and_help_are_no_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"roofline {command_line.roofline.__version__}\n"
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("bench", "doctor", "fit", "ppl", "quantize", "run"))
    assert main([]) == 0
    assert capsys.readouterr().out == out


def test_the_programs_own_arguments_are_the_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["roofline", "fit"])
    assert main() == 2
    assert "MODEL requires an argument" in capsys.readouterr().err
