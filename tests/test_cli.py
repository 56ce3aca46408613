"""The command as people run it: a process, its streams and its exit code."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from roofline import LLM
from roofline.cli.run_test import KEYS
from tests.tiny_model import write_tiny_model

COMMAND = [sys.executable, "-W", "error", "-m", "roofline"]
HELPS = [
    "",
    "run",
    "chat",
    "serve",
    "pull",
    "ls",
    "show",
    "rm",
    "fit",
    "ppl",
    "quantize",
    "doctor",
    "bench",
    "bench latency",
    "bench throughput",
]
# What a help text is written with; anything else a command needs it loads when it runs. How long
# that takes is docs/figures.md's to say: no test is timed.
HELP_PACKAGES = {"attr", "attrs", "cyclopts", "docstring_parser", "rich", "rich_rst", "roofline"}
HELP_PACKAGES |= {"docutils", "markdown_it", "mdurl", "pygments", "typing_extensions"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    return str(write_tiny_model(folder, context=1 << 15))


@pytest.fixture(autouse=True, scope="module")
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A bandwidth already measured is all these processes find."""
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ:
            if name.startswith("ROOFLINE_"):
                patch.delenv(name)
        patch.setenv("ROOFLINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def roofline(
    *arguments: str, stdin: bytes | None = None, **environment: str
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*COMMAND, *arguments],
        stdin=subprocess.DEVNULL if stdin is None else None,
        input=stdin,
        capture_output=True,
        env={**os.environ, **environment},
    )


def one_object(result: subprocess.CompletedProcess[bytes]) -> dict[str, Any]:
    assert result.stdout.count(b"\n") == 1
    return json.loads(result.stdout)


def assert_one_line(stderr: bytes, *words: str) -> None:
    line = stderr.decode()
    assert line.startswith("roofline: ") and line.count("\n") == 1
    assert all(word in line for word in words), line


def test_smollm2_answers_paris_in_json(smollm2_path: Path) -> None:
    result = roofline("run", str(smollm2_path), "What is the capital of France?", "--json")
    assert (result.returncode, result.stderr) == (0, b"")
    report = one_object(result)
    assert list(report) == KEYS
    assert "Paris" in report["text"]
    assert report["finish_reason"] == "stop"
    assert report["completion_tokens"] == len(report["token_ids"])
    assert all(report[name] > 0 for name in KEYS[-6:])
    assert report["roofline_fraction"] < 1


def test_smollm2_answers_paris_on_stdout_and_figures_on_stderr(smollm2_path: Path) -> None:
    result = roofline("run", str(smollm2_path), stdin=b"What is the capital of France?\n")
    assert result.returncode == 0
    assert b"Paris" in result.stdout and result.stdout.endswith(b"\n")
    assert result.stderr.count(b"\n") == 1 and b"of the roofline" in result.stderr


def test_fit_is_byte_for_byte_smollm2(smollm2_path: Path) -> None:
    assert_fit_equals_the_engine(str(smollm2_path), max_num_seqs=3)


def test_fit_is_byte_for_byte_a_dummy_llama_1b() -> None:
    options = {"max_num_seqs": 2, "max_model_len": 1024}
    assert_fit_equals_the_engine("llama-3.2-1b", "dummy", **options)


def assert_fit_equals_the_engine(model: str, load_format: str = "auto", **options: int) -> None:
    spelled = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    result = roofline("fit", model, *spelled, "--json")
    assert (result.returncode, result.stderr) == (0, b"")
    (rank,) = one_object(result)["ranks"]
    with LLM(model, load_format=load_format, **options) as llm:
        owned = llm.storage_bytes()
    assert {name: rank[name] for name in owned} == owned


@pytest.mark.parametrize("command", HELPS)
def test_help_loads_only_what_writes_it(command: str) -> None:
    code = (
        "import atexit, sys; before = set(sys.modules); from roofline.cli import main\n"
        "atexit.register(lambda: print(*(set(sys.modules) - before), file=sys.stderr)); main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *command.split(), "--help"], capture_output=True, check=True
    )
    packages = {name.partition(".")[0] for name in result.stderr.decode().split()}
    assert packages - sys.stdlib_module_names <= HELP_PACKAGES


@pytest.mark.parametrize(
    "arguments",
    [
        ["--version"],
        *([*command.split(), "--help"] for command in HELPS),
        ["fit", "llama-3.1-70b", "--tensor-parallel-size", "8", "--memory", "80", "--json"],
        ["fit", "MODEL", "--bandwidth", "100"],
        ["fit", "GGUF"],
        ["show", "MODEL"],
        ["ls"],
        ["run", "MODEL", "hi", "--temperature", "-1"],
        ["run", "absent", "hi"],
    ],
    ids=" ".join,
)
def test_what_needs_no_torch_imports_none(
    arguments: list[str], model: str, request: pytest.FixtureRequest
) -> None:
    if "GGUF" in arguments:
        arguments = ["fit", str(request.getfixturevalue("smollm2_path"))]
    arguments = [model if argument == "MODEL" else argument for argument in arguments]
    code = "import sys; from roofline.cli import main; main(); sys.exit('torch' in sys.modules)"
    subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments], check=True, capture_output=True
    )


def test_a_command_line_that_cannot_be_meant_is_exit_2(model: str) -> None:
    for arguments, words in (
        (["rnu"], ["Did you mean", "run"]),
        (["run", model, "hi", "--max-tokns", "3"], ["Did you mean --max-tokens"]),
        (["run", model, "hi", "--dtype", "int3"], ["dtype is 'int3'", "'float16' or 'float32'"]),
        (["run", model, "hi", "--group-size", "48"], ["group_size 48 is not supported", "32"]),
        (["run", "smolm2-135m", "hi"], ["smolm2-135m", "did you mean 'smollm2-135m'"]),
        (["run", "llama-3.1-8b", "hi"], ["--load-format dummy"]),
        (["run", model, "x" * (1 << 16), "--raw"], ["65536", "32768"]),
        (["run", model, ""], ["the prompt is empty"]),
    ):
        result = roofline(*arguments)
        assert (result.returncode, result.stdout) == (2, b""), arguments
        assert_one_line(result.stderr, *words)


def test_a_model_that_cannot_be_read_is_exit_1_or_2_and_names_the_file(tmp_path: Path) -> None:
    files = {"empty.gguf": (b"", 1), "cut.gguf": (b"GGUF\x03\0\0\0", 1), "a.bin": (b"\x80\x02", 2)}
    for name, (content, code) in files.items():
        path = tmp_path / name
        path.write_bytes(content)
        result = roofline("run", str(path), "hi")
        assert (result.returncode, result.stdout) == (code, b"")
        assert_one_line(result.stderr, name)
        result = roofline("run", str(path), "hi", "--json")
        assert (result.returncode, result.stderr) == (code, b"")
        assert name in one_object(result)["error"]["message"]


def test_the_environment_is_read_and_the_command_line_goes_before_it(model: str) -> None:
    result = roofline("run", model, "hi", ROOFLINE_MAX_MODEL_LEN="many")
    assert result.returncode == 2
    assert_one_line(result.stderr, "ROOFLINE_MAX_MODEL_LEN is 'many'", "'auto' or an integer")
    small = {"ROOFLINE_MAX_MODEL_LEN": "4"}
    assert b"max_model_len is 4" in roofline("run", model, "hello", "--raw", **small).stderr
    given = ("--raw", "--max-model-len", "16", "--json")
    assert one_object(roofline("run", model, "hello", *given, **small))["completion_tokens"] > 0


def test_no_prompt_on_a_terminal_is_exit_2(model: str) -> None:
    ours, theirs = os.openpty()
    result = subprocess.run([*COMMAND, "run", model], stdin=theirs, capture_output=True)
    os.close(ours)
    os.close(theirs)
    assert result.returncode == 2
    assert_one_line(result.stderr, "no prompt")


def test_ctrl_c_stops_at_once_with_one_line_and_130(model: str) -> None:
    with start_endless(model) as process:
        assert process.stdout is not None
        process.stdout.read(1)  # it is answering
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"roofline: interrupted\n")


def test_a_reader_that_leaves_is_no_error(model: str) -> None:
    with start_endless(model) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read()
        assert (process.wait(timeout=60), err) == (0, b"")


def start_endless(model: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*COMMAND, "run", model, "Hello", "--ignore-eos"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=_heed_interrupts,
    )


def _heed_interrupts() -> None:
    """A shell that ran the tests in the background has told them, and so us, to ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_a_stdout_that_cannot_be_written_is_one_line_and_exit_1(arguments: list[str]) -> None:
    with Path("/dev/full").open("wb") as full:
        result = subprocess.run(
            [*COMMAND, "fit", "llama-110m", *arguments], stdout=full, stderr=subprocess.PIPE
        )
    assert result.returncode == 1
    assert_one_line(result.stderr, "No space left on device")


def test_a_terminal_that_lacks_a_letter_still_gets_the_rest() -> None:
    result = roofline("run", "modèle-€", "hi", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert result.returncode == 2
    assert_one_line(result.stderr, "mod\\xe8le-\\u20ac")


def test_doctor_and_ppl_and_bench_and_quantize_run(model: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be. " * 10)
    ppl = roofline("ppl", model, str(text), "--context=64", "--stride=32", "--json")
    assert (ppl.returncode, ppl.stderr) == (0, b"")
    assert one_object(ppl)["perplexity"] > 1
    sizes = ("--input-len=4", "--output-len=3", "--num-iters=1", "--num-iters-warmup=0")
    bench = roofline("bench", "latency", model, *sizes)
    assert (bench.returncode, bench.stderr) == (0, b"")
    assert json.loads(bench.stdout.splitlines()[-1])["roofline_fraction"] > 0
    out = str(tmp_path / "int8")
    assert roofline("quantize", model, out).returncode == 0
    assert roofline("run", out, "hi", "--max-tokens=2").returncode == 0
    again = roofline("quantize", model, out)
    assert again.returncode == 2
    assert_one_line(again.stderr, "exists already")
    doctor = roofline("doctor", "--json")
    assert (doctor.returncode, doctor.stderr) == (0, b"")
    assert "bandwidth.json" in one_object(doctor)["cached_files"]
