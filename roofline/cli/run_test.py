import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from roofline import LLM, SamplingParams
from roofline.cli import figures
from roofline.cli.run import run
from roofline.errors import RequestError, UsageError
from tests.tiny_model import CONTEXT, write_tiny_model

KEYS = [
    "text",
    "token_ids",
    "prompt_tokens",
    "completion_tokens",
    "finish_reason",
    "load_s",
    "ttft_s",
    "decode_tokens_per_s",
    "bytes_per_token",
    "bandwidth_gb_s",
    "roofline_fraction",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(autouse=True)
def bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "bandwidth_gb_s", lambda threads, **_: 20.0)


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str, **options: Any) -> dict[str, Any]:
    run(*arguments, json=True, **options)
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and err == ""
    return json.loads(out)


def stdin(monkeypatch: pytest.MonkeyPatch, data: bytes, *, terminal: bool = False) -> None:
    stream = io.TextIOWrapper(io.BytesIO(data))
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stdin", stream)


def test_json_is_one_object_that_agrees_with_python(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run_json(capsys, model, "Hello", max_tokens=9, ignore_eos=True)
    assert list(report) == KEYS
    with LLM(model, max_num_seqs=1) as llm:
        ids = llm.get_tokenizer().apply_chat_template([{"role": "user", "content": "Hello"}])
        params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
        (expected,) = llm.generate([ids], params)
        sizes = llm.storage_bytes()
    assert report["text"] == expected.outputs[0].text
    assert report["token_ids"] == expected.outputs[0].token_ids
    assert report["prompt_tokens"] == len(ids)
    assert (report["completion_tokens"], report["finish_reason"]) == (9, "length")
    kv_token = 2 * 2 * 2 * 16 * 2  # layers, keys and values, heads, head_dim, bfloat16
    kv = (len(ids) + 9 / 2) * kv_token
    assert report["bytes_per_token"] == sizes["weights"] + sizes["scales"] + kv
    assert 0 < report["ttft_s"] < report["load_s"] + 60
    read = report["decode_tokens_per_s"] * report["bytes_per_token"]
    assert report["roofline_fraction"] == pytest.approx(read / 20e9)


def test_text_streams_to_stdout_and_figures_are_one_line_on_stderr(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = run_json(capsys, model, "Hello", max_tokens=9, temperature=1.0, seed=3)["text"]
    run(model, "Hello", max_tokens=9, temperature=1.0, seed=3)
    out, err = capsys.readouterr()
    assert out == text + "\n"
    assert err.count("\n") == 1 and "prompt tokens" in err and "of the roofline" in err


def test_a_file_of_options_is_read_below_the_command_line(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "options.toml"
    path.write_text("temperature = 1.0\ntop_k = 3\nseed = 7\nmax_tokens = 9\nignore-eos = true")
    report = run_json(capsys, model, "Hello", config=str(path))
    spelled = {"temperature": 1.0, "top_k": 3, "seed": 7, "max_tokens": 9, "ignore_eos": True}
    assert report["token_ids"] == run_json(capsys, model, "Hello", **spelled)["token_ids"]
    assert len(report["token_ids"]) == 9
    greedy = run_json(capsys, model, "Hello", config=str(path), temperature=0.0, max_tokens=3)
    assert greedy["token_ids"] == run_json(capsys, model, "Hello", max_tokens=3)["token_ids"]
    path.write_text("top_k = 3")
    with pytest.raises(UsageError, match="top_k does nothing at temperature 0"):
        run(model, "Hello", config=str(path))


def test_one_token_has_no_speed(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = run_json(capsys, model, "Hello", max_tokens=1)
    assert report["decode_tokens_per_s"] is None
    assert report["roofline_fraction"] is None
    assert report["bytes_per_token"] > 0
    run(model, "Hello", max_tokens=1)
    assert "tokens/s" not in capsys.readouterr().err


def test_raw_continues_the_text_without_a_template(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run_json(capsys, model, "Hello", raw=True, max_tokens=1)
    assert report["prompt_tokens"] == len("Hello")


def test_a_model_without_a_template_says_so_and_suggests_raw(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(write_tiny_model(tmp_path, chat=False))
    with pytest.raises(UsageError, match="has no chat template; --raw continues the text"):
        run(model, "Hello")
    assert run_json(capsys, model, "Hello", raw=True, max_tokens=1)["completion_tokens"] == 1


@pytest.mark.parametrize("prompt", [None, "-"])
def test_the_prompt_comes_from_stdin_less_one_newline(
    prompt: str | None,
    model: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stdin(monkeypatch, "Grüße\n\n".encode())
    arguments = [model] if prompt is None else [model, prompt]
    report = run_json(capsys, *arguments, raw=True, max_tokens=1)
    assert report["prompt_tokens"] == len("Grüße\n".encode())


def test_no_prompt_on_a_terminal_is_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin(monkeypatch, b"", terminal=True)
    with pytest.raises(UsageError, match="no prompt: write it after the model, or pipe it in"):
        run("nothing is opened")


def test_no_stdin_at_all_is_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UsageError, match="no prompt"):
        run("nothing is opened", "-")


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"a\xffb", "stdin is not UTF-8 at byte 1"), (b"\n", "the prompt is empty")],
)
def test_bad_stdin_is_usage(data: bytes, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stdin(monkeypatch, data)
    with pytest.raises(UsageError, match=message):
        run("nothing is opened")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; it must be a number from 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0; it must be a number above 0"),
        ({"max_tokens": 0}, "max_tokens is 0; it must be an integer from 1"),
        ({"top_k": 5}, "top_k does nothing at temperature 0; add --temperature 1"),
        ({"group_size": 48}, "group_size 48 is not supported; supported: 32, 64"),
        ({"tensor_parallel_size": 2}, "this version runs one rank; `roofline fit` plans for more"),
        ({"max_modle_len": 5}, "unknown option 'max_modle_len'; did you mean 'max_model_len'"),
    ],
)
def test_bad_options_are_refused_before_anything_is_opened(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        run("nothing is opened", "Hello", **options)


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(model: str) -> None:
    with pytest.raises(RequestError, match=rf"{CONTEXT + 10}.*{CONTEXT}"):
        run(model, "x" * (CONTEXT + 10), raw=True)


def test_the_kv_pool_is_for_one_unless_more_is_asked(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pools = []
    start = LLM.from_config

    def spy(model: str, config: Any) -> LLM:
        llm = start(model, config)
        pools.append(llm.storage_bytes()["kv"])
        return llm

    monkeypatch.setattr(LLM, "from_config", spy)
    run_json(capsys, model, "Hello", max_tokens=1)
    monkeypatch.setenv("ROOFLINE_MAX_NUM_SEQS", "2")
    run_json(capsys, model, "Hello", max_tokens=1)
    run_json(capsys, model, "Hello", max_tokens=1, max_num_seqs=3)
    assert pools == [pools[0], 2 * pools[0], 3 * pools[0]]
