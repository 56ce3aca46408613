"""Tests of the sandbox: every limit, every way to end, and that the next call is always right."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from roofline.errors import RequestError, RooflineError
from roofline.sandbox import Sandbox

WORK = "tests.sandboxed"
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    made = Sandbox(memory_bytes=64 << 20)
    yield made
    made.close()


def process_id(sandbox: Sandbox) -> int:
    return sandbox.call(f"{WORK}:process_id", {})


def is_gone(pid: int, within_s: float = 20.0) -> bool:
    """Whether a process ends; one that only waits to be reaped has."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize(
    "value",
    [None, True, -1, 1.5, 10**40, "é😀\x00\x01\n", "half \ud800", [1, [2, {}]], {"a": {"b": []}}],
)
def test_json_goes_there_and_back(sandbox: Sandbox, value: object) -> None:
    assert sandbox.call(f"{WORK}:echo", {"value": value}) == value


def test_large_messages_pass_both_ways(sandbox: Sandbox) -> None:
    text = "é" * (1 << 20)
    assert sandbox.call(f"{WORK}:echo", {"value": text}, limit_s=10) == text


@pytest.mark.parametrize("function", ["loop", "one_long_operation"])
def test_work_that_takes_too_long_is_killed_and_the_next_call_is_right(
    sandbox: Sandbox, function: str
) -> None:
    sandbox.call(f"{WORK}:echo", {"value": 0})
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"took longer than 0\.2 s"):
        sandbox.call(f"{WORK}:{function}", {}, limit_s=0.2)
    assert time.monotonic() - started < 10  # neither would end by itself
    assert sandbox.call(f"{WORK}:echo", {"value": 1}) == 1


@on_linux
def test_work_has_the_memory_it_was_given_and_no_more(sandbox: Sandbox) -> None:
    assert sandbox.call(f"{WORK}:take", {"n_bytes": 48 << 20}) == 48 << 20
    with pytest.raises(MemoryError):
        sandbox.call(f"{WORK}:take", {"n_bytes": 80 << 20})
    assert sandbox.call(f"{WORK}:echo", {"value": 1}) == 1


def test_a_crash_ends_the_call_and_the_next_one_is_right(sandbox: Sandbox) -> None:
    with pytest.raises(MemoryError, match="crashed"):
        sandbox.call(f"{WORK}:crash", {})
    assert sandbox.call(f"{WORK}:echo", {"value": 1}) == 1


def test_a_child_killed_between_calls_is_replaced(sandbox: Sandbox) -> None:
    pid = process_id(sandbox)
    os.kill(pid, signal.SIGTERM)
    assert is_gone(pid)
    assert process_id(sandbox) != pid


def test_an_answer_larger_than_wanted_is_not_read(sandbox: Sandbox) -> None:
    with pytest.raises(MemoryError, match="at most 1000 are taken"):
        sandbox.call(f"{WORK}:echo", {"value": "x" * 1001}, max_bytes=1000)
    assert sandbox.call(f"{WORK}:echo", {"value": 1}, max_bytes=1000) == 1


def test_our_errors_keep_their_class_and_others_are_told(sandbox: Sandbox) -> None:
    pid = process_id(sandbox)
    with pytest.raises(RequestError, match=r"^messages\[0\] is bad$"):
        sandbox.call(f"{WORK}:refuse", {})
    with pytest.raises(RuntimeError, match=r"^tests\.sandboxed:fail in the sandbox: KeyError: 'oh"):
        sandbox.call(f"{WORK}:fail", {})
    with pytest.raises(RuntimeError, match="KeyError: 'nothing'"):
        sandbox.call(f"{WORK}:nothing", {})
    assert process_id(sandbox) == pid


def test_what_work_prints_is_no_answer(sandbox: Sandbox) -> None:
    assert sandbox.call(f"{WORK}:write_on_stdout", {}) == ""


def test_a_module_that_is_not_there_is_told(sandbox: Sandbox) -> None:
    with pytest.raises(RuntimeError, match=r"ModuleNotFoundError: .*nothing"):
        sandbox.call("tests.nothing:f", {})
    assert sandbox.call(f"{WORK}:echo", {"value": 1}) == 1


def test_threads_share_one_child(sandbox: Sandbox) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda i: sandbox.call(f"{WORK}:echo", {"value": i}), range(64))
        assert list(answers) == list(range(64))
        assert len(set(pool.map(lambda _: process_id(sandbox), range(8)))) == 1


def test_start_does_not_wait_and_the_call_finds_the_child_ready() -> None:
    sandbox = Sandbox()
    shares = []
    for _ in range(5):
        begun = time.monotonic()
        sandbox.start(WORK)
        started = time.monotonic()
        assert sandbox.call(f"{WORK}:echo", {"value": 1}) == 1
        shares.append((started - begun) / (time.monotonic() - begun))
        sandbox.start(WORK)
        assert sandbox.call(f"{WORK}:echo", {"value": 2}) == 2
        sandbox.close()
    assert min(shares) < 0.5, "of the time to start, begin and answer"


@on_linux
def test_nothing_but_the_pipes_and_no_secret_is_inherited(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    with (tmp_path / "file").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        sandbox.close()
        found = sandbox.call(f"{WORK}:surroundings", {})
    assert not {"torch", "numpy", "tokenizers"} & set(found["modules"])
    assert set(found["environment"]) <= {"LD_LIBRARY_PATH", "TZ", "LC_CTYPE"}
    assert all(name == "/dev/null" or name.startswith("pipe:") for name in found["files"])


@on_linux
def test_close_and_the_end_of_the_object_leave_no_process() -> None:
    sandbox = Sandbox()
    first = process_id(sandbox)
    sandbox.close()
    sandbox.close()
    assert not Path(f"/proc/{first}").exists()
    second = process_id(sandbox)
    del sandbox
    gc.collect()
    assert not Path(f"/proc/{second}").exists()


def test_ctrl_c_in_a_call_interrupts_it_and_the_next_one_is_right() -> None:
    sandbox = Sandbox()
    sandbox.call(f"{WORK}:echo", {"value": 0})
    main = threading.main_thread().ident
    timer = threading.Timer(0.2, signal.pthread_kill, [main, signal.SIGINT])
    with pytest.raises(KeyboardInterrupt):
        timer.start()
        sandbox.call(f"{WORK}:loop", {}, limit_s=20)
    timer.join()
    assert sandbox.call(f"{WORK}:echo", {"value": 1}) == 1
    sandbox.close()


PARENT = f"""
import threading
from roofline.sandbox import Sandbox
sandbox = Sandbox()
print(sandbox.call("{WORK}:process_id", {{}}), flush=True)
"""
ENDLESS = f'sandbox.call("{WORK}:loop", {{}}, limit_s=0.5)\n'


@on_linux
@pytest.mark.parametrize(
    ("code", "end"),
    [
        (PARENT, None),
        (PARENT + "import os; os._exit(0)", None),
        (PARENT + "import time; time.sleep(60)", signal.SIGKILL),
        (PARENT + ENDLESS, signal.SIGKILL),
        (PARENT + f"threading.Thread(target=lambda: {ENDLESS.strip()}, daemon=True).start()", None),
    ],
    ids=["exits", "exits at once", "is killed", "is killed in a call", "exits in a call"],
)
def test_no_process_outlives_its_parent(code: str, end: signal.Signals | None) -> None:
    root = str(Path(__file__).parents[2])
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=root, env={"PYTHONPATH": root}
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    if end is not None:
        time.sleep(0.2)  # until the child is at work
        parent.send_signal(end)
    parent.wait(60)
    parent.stdout.close()
    assert is_gone(child)


def test_without_an_interpreter_the_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    Sandbox().start(WORK)
    with pytest.raises(RooflineError, match=r"/nowhere/python cannot be run: No such file"):
        Sandbox().call(f"{WORK}:echo", {"value": 1})
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RooflineError, match=r"\(/bin/false\) ended while it started"):
        Sandbox().call(f"{WORK}:echo", {"value": 1})
