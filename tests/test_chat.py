"""`roofline chat` as people use it: keys pressed at a terminal, and lines through a pipe."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.terminal import Terminal
from tests.tiny_model import write_tiny_model

COMMAND = [sys.executable, "-W", "error", "-m", "roofline", "chat"]
CONTEXT = 1 << 14
PROMPT = ">>>"
ALT_ENTER, UP, CTRL_C, CTRL_D = "\x1b\r", "\x1b[A", "\x03", "\x04"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("tiny"), context=CONTEXT))


@pytest.fixture
def environment(tmp_path: Path) -> Mapping[str, str]:
    """Nothing of this user's, and a terminal that is never asked where its cursor is."""
    own = {k: v for k, v in os.environ.items() if not k.startswith("ROOFLINE_")}
    terminal = {"TERM": "xterm", "NO_COLOR": "1", "PROMPT_TOOLKIT_NO_CPR": "1"}
    return {**own, **terminal, "ROOFLINE_CACHE": str(tmp_path / "cache")}


def say(terminal: Terminal, line: str, answer: str) -> None:
    """Send a line, see what is answered and wait for the next prompt."""
    terminal.send(line + "\r")
    terminal.expect(answer)
    terminal.expect(PROMPT)


def test_commands_and_turns_at_a_terminal(
    model: str, environment: Mapping[str, str], tmp_path: Path
) -> None:
    saved = tmp_path / "saved.json"
    greedy = ["--temperature=0", "--ignore-eos", "--max-model-len=256", "--system=Be kind."]
    with Terminal([*COMMAND, model, *greedy], environment) as terminal:
        terminal.expect("256 tokens of context, temperature 0.0, ignore_eos true")
        terminal.expect(PROMPT)
        say(terminal, "/set max_tokens 5", "max_tokens is 5\r\n")
        say(terminal, "/set max_tokens five", "error: max_tokens is 'five'; it must be an integer")
        say(terminal, "/sets", r"error: unknown command '/sets'; did you mean /set\?")
        say(terminal, "/sta\t", "no answer yet; 0 of 256 tokens of context used, 256 left")
        say(terminal, f"one{ALT_ENTER}<|im_end|>", r"\[max_tokens is 5: the answer ends here\]")
        say(terminal, "/system Be brief.", "from the next message on")
        say(terminal, '"""\r/clear\r"""', r"\[max_tokens is 5")
        say(terminal, "x" * 200, "error: .* tokens, and max_model_len is 256; .*/clear")
        say(terminal, f"/save {saved}", f"5 messages are in {saved}")
        say(terminal, f"/save {saved}", "exists already; name another file")
        say(terminal, "/stats", "% of the roofline")
        say(terminal, "/clear", "forgotten")
        say(terminal, "/stats", "no answer yet; 0 of 256")
        say(terminal, "/help", "/exit")
        assert terminal.leave(CTRL_D) == 0
        assert "Traceback" not in terminal.text
    messages = json.loads(saved.read_text())
    contents = [message["content"] for message in messages]
    assert [message["role"] for message in messages] == ["system", *["user", "assistant"] * 2]
    assert (contents[0], contents[1], contents[3]) == ("Be brief.", "one\n<|im_end|>", "/clear")


def test_ctrl_c_stops_the_answer_and_the_chat_goes_on(
    model: str, environment: Mapping[str, str], tmp_path: Path
) -> None:
    saved = tmp_path / "saved.json"
    with Terminal([*COMMAND, model, "--temperature=0", "--ignore-eos"], environment) as terminal:
        terminal.expect(PROMPT)
        terminal.send("Hello\r")
        terminal.expect(r"Hello\r+\n[^\x1b]{20}")  # it is answering
        terminal.send(CTRL_C)
        terminal.expect(r"\[stopped\]")
        terminal.expect(PROMPT)
        say(terminal, "/set max_tokens 5", "max_tokens is 5")
        say(terminal, "And now?", r"\[max_tokens is 5")
        terminal.send("/stats\r")
        cached = terminal.expect(r"(\d+) prompt tokens came from the prefix cache")
        assert int(cached[1]) > len("<|im_start|>user\nHello")  # the engine has lost nothing
        terminal.expect(PROMPT)
        say(terminal, f"dropped{CTRL_C}/save {saved}", "4 messages are in")
        say(terminal, CTRL_C, "Ctrl-D or /exit leaves")
        assert terminal.leave("/exit\r") == 0
    _, stopped, question, _ = json.loads(saved.read_text())
    assert (stopped["finish_reason"], question["content"]) == ("abort", "And now?")
    assert len(stopped["content"]) >= 10  # a newline is two characters on the screen


def test_arrow_up_recalls_a_message_of_the_run_before_even_of_a_terminal_that_only_prints(
    model: str, environment: Mapping[str, str], tmp_path: Path
) -> None:
    for term, keys in (("dumb", "/set top_k 55"), ("xterm", UP + UP)):
        with Terminal([*COMMAND, model], {**environment, "TERM": term}) as terminal:
            terminal.expect(PROMPT)
            say(terminal, keys, "top_k is 55")
            assert terminal.leave("/exit\r") == 0
    assert (tmp_path / "cache" / "chat_history.jsonl").stat().st_mode & 0o777 == 0o600


def test_smollm2_answers_paris(smollm2_path: Path, environment: Mapping[str, str]) -> None:
    with Terminal([*COMMAND, str(smollm2_path), "--temperature=0"], environment) as terminal:
        terminal.expect(PROMPT)
        say(terminal, "What is the capital of France?", "Paris")
        assert terminal.leave(CTRL_D) == 0


def test_a_pipe_is_a_conversation(model: str, environment: Mapping[str, str]) -> None:
    result = subprocess.run(
        [*COMMAND, model, "--temperature=0", "--max-tokens=3", "--ignore-eos"],
        input=b"Hello\nand\\\nmore\n/stats\n",
        capture_output=True,
        env=environment,
    )
    assert result.returncode == 0
    assert result.stdout.endswith(b"\n") and b"\x1b" not in result.stderr
    notes = result.stderr.decode().splitlines()
    assert notes[:2] == ["[max_tokens is 3: the answer ends here]"] * 2
    assert "prompt tokens came from the prefix cache" in notes[3]


def test_a_command_line_that_cannot_be_meant_is_exit_2(
    model: str, environment: Mapping[str, str]
) -> None:
    for arguments, stdin, words in (
        ([model, "--temperature=-1"], b"", "temperature is -1.0"),
        ([model], b"/nope\n", "unknown command '/nope'"),
    ):
        result = subprocess.run(
            [*COMMAND, *arguments], input=stdin, capture_output=True, env=environment
        )
        assert (result.returncode, result.stdout) == (2, b"")
        assert result.stderr.decode().startswith("roofline: error: ")
        assert words in result.stderr.decode() and result.stderr.count(b"\n") == 1
