import io
import signal
import sys
from typing import Any

import pytest

from roofline import LLM
from roofline.cli import chat as module
from roofline.cli import figures
from roofline.cli.chat import chat, heed_interrupts
from roofline.cli.conversation import Conversation
from roofline.errors import RequestError, UsageError
from tests.fake_llm import NO_SYSTEM, FakeLLM

REPORT = {
    "prompt_tokens": 3,
    "cached_tokens": 2,
    "completion_tokens": 1,
    "ttft_s": 0.5,
    "decode_tokens_per_s": None,
}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeLLM:
    llm = FakeLLM()
    monkeypatch.setattr(LLM, "from_config", lambda *_: llm)
    return llm


def pipe(monkeypatch: pytest.MonkeyPatch, data: str | bytes, **options: Any) -> None:
    """Chat with what stdin holds."""
    data = data.encode() if isinstance(data, str) else data
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    chat("a model", **options)


def test_each_line_of_a_pipe_is_a_message_and_only_answers_are_on_stdout(
    fake: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(monkeypatch, "Grüße\n\n  \n/set top_k 5\r\ntwo\\\nlines\nlast", system="Be kind.")
    assert capsys.readouterr() == ("Grüße\ntwo\nlines\nlast\n", "top_k is 5\n")
    assert [each[-1]["content"] for each in fake.asked] == ["Grüße", "two\nlines", "last"]
    assert fake.asked[0][0] == {"role": "system", "content": "Be kind."}


def test_a_pipe_ends_at_exit(
    fake: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(monkeypatch, "one\n/exit\ntwo\n")
    assert capsys.readouterr().out == "one\n"
    pipe(monkeypatch, "")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"one\n\xff\nnever asked\n", "stdin is not UTF-8 in line 2"),
        (b'one\n"""two\n', "stdin ends within a message"),
        (b"one\ntwo\\", "stdin ends within a message"),
        (b"one\n/clera\nnever asked\n", "unknown command '/clera'; did you mean /clear?"),
        (
            b"one\n" + b"word " * 100 + b"\nnever asked",
            "the conversation has 102 tokens, and max_model_len is 100",
        ),
    ],
)
def test_an_error_ends_a_pipe(
    data: bytes,
    message: str,
    fake: FakeLLM,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(UsageError, match=message.replace("?", r"\?")):
        pipe(monkeypatch, data)
    assert capsys.readouterr().out == "one\n"
    assert fake.alive == 0


def test_sampling_starts_from_the_models_own_and_flags_go_before_it(
    fake: FakeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe(monkeypatch, "one\n/set temperature 0\ntwo\n/set temperature default\nthree", top_p=0.5)
    assert [(p.temperature, p.top_p) for p in fake.params] == [(0.7, 0.5), (0, 0.5), (0.7, 0.5)]


def test_an_answer_that_did_not_end_by_itself_says_why(
    fake: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(monkeypatch, "one two three\nfour", max_tokens=2)
    out, err = capsys.readouterr()
    assert (out, err) == ("one two\nfour\n", "[max_tokens is 2: the answer ends here]\n")
    fake.max_model_len = 5
    pipe(monkeypatch, "one two three")
    out, err = capsys.readouterr()
    assert out == "one two\n"
    assert err == "[the context of 5 tokens is full: the answer ends here; /clear begins anew]\n"


@pytest.mark.parametrize("verbose", [False, True])
def test_figures_are_shown_on_request_only(
    verbose: bool,
    fake: FakeLLM,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Conversation, "report", lambda _: REPORT)
    pipe(monkeypatch, "one", verbose=verbose)
    assert capsys.readouterr() == ("one\n", f"{figures.one_line(REPORT)}\n" if verbose else "")
    pipe(monkeypatch, "one two\n/stats")
    line, rest = capsys.readouterr().err.splitlines()
    assert line == figures.one_line(REPORT)
    assert rest == (
        "1 tokens answered; 2 prompt tokens came from the prefix cache; "
        "4 of 100 tokens of context used, 96 left"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; it must be a number from 0"),
        ({"group_size": 48}, "group_size 48 is not supported; supported: 32, 64"),
        ({"max_modle_len": 5}, "unknown option 'max_modle_len'; did you mean 'max_model_len'"),
    ],
)
def test_bad_options_are_refused_before_anything_is_opened(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        chat("nothing is opened", **options)


def test_what_cannot_chat_is_refused_at_the_start(
    fake: FakeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RequestError, match="no system role"):
        pipe(monkeypatch, "one", system=NO_SYSTEM)
    with pytest.raises(UsageError, match="top_k does nothing at temperature 0"):
        pipe(monkeypatch, "one", temperature=0.0, top_k=5)
    fake.chat_template = None
    with pytest.raises(UsageError, match="a model has no chat template; --chat-template FILE"):
        pipe(monkeypatch, "one")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UsageError, match="there is no stdin"):
        chat("a model")
    assert fake.asked == []


def test_an_interrupt_ends_a_pipe(fake: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(module, "print", interrupt, raising=False)
    with pytest.raises(KeyboardInterrupt):
        pipe(monkeypatch, "one two")
    assert fake.alive == 0


def test_a_first_interrupt_is_noted_and_a_second_ends_the_block() -> None:
    before = signal.getsignal(signal.SIGINT)
    steps = []
    with heed_interrupts() as noted:
        assert not noted.is_set()
        signal.raise_signal(signal.SIGINT)
        assert noted.is_set()
        steps.append("between")
        signal.raise_signal(signal.SIGINT)
        steps.append("after")
    assert steps == ["between"]
    assert signal.getsignal(signal.SIGINT) is before


def test_an_answer_cannot_steer_the_terminal(
    fake: FakeLLM,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pipe(monkeypatch, "a\x1b[2Jb")
    assert capsys.readouterr().out == "a\x1b[2Jb\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    pipe(monkeypatch, "a\x1b[2J\tb\x9b\x7f")
    assert capsys.readouterr().out == "a␛[2J\tb␡␡\n"
