import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from roofline import LLM
from roofline.cli.ppl import ppl
from roofline.errors import RequestError, UsageError
from tests.tiny_model import CONTEXT, write_tiny_model

TEXT = "".join(f"Line {n}: ünïcode\r\n" for n in range(20)).encode()
FLOATS: dict[str, Any] = {"quantization": "none", "dtype": "float32"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT)
    return str(path)


def ppl_json(capsys: pytest.CaptureFixture[str], *arguments: str, **options: Any) -> dict[str, Any]:
    ppl(*arguments, json=True, **options)
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and err == ""
    return json.loads(out)


@torch.inference_mode()
def test_perplexity_is_that_of_transformers_over_the_same_windows(
    model: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    report = ppl_json(capsys, model, text, context=64, stride=24, **FLOATS)
    with LLM(model, max_num_seqs=1) as llm:
        ids = llm.get_tokenizer().encode(TEXT.decode())
    assert len(ids) == len(TEXT)  # a token is a byte: no newline was touched
    peer = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    nlls: list[float] = []
    for start in range(0, len(ids) - 63, 24):
        window = torch.tensor([ids[start : start + 64]])
        logprobs = peer(window).logits[0].log_softmax(-1)
        nlls += [-float(logprobs[i - 1, window[0, i]]) for i in range(40, 64)]
    assert report["nll"] == pytest.approx(math.fsum(nlls) / len(nlls), abs=1e-5)
    assert report["perplexity"] == math.exp(report["nll"])
    assert report["tokens_scored"] == len(nlls)
    assert report["windows"] * 24 == len(nlls)
    sums = [math.fsum(nlls[first : first + 24]) for first in range(0, len(nlls), 24)]
    assert report["window_nlls"] == pytest.approx(sums, abs=1e-3)
    assert (report["context"], report["stride"]) == (64, 24)
    assert report["sha256"] == hashlib.sha256(TEXT).hexdigest()
    assert list(report) == [
        *("perplexity", "nll", "tokens_scored", "context", "stride", "windows", "window_nlls"),
        "sha256",
    ]


def test_only_the_first_windows_are_scored_when_so_many_are_asked(
    model: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    report = ppl_json(capsys, model, text, context=64, stride=32, windows=2)
    assert (report["windows"], report["tokens_scored"]) == (2, 64)
    ppl(model, text, context=64, stride=32, windows=2)
    assert f"perplexity {report['perplexity']:.4f} over 64 tokens" in capsys.readouterr().out


def test_a_file_shorter_than_a_window_is_refused_with_both_numbers(model: str, text: str) -> None:
    Path(text).write_text("x" * 63)
    with pytest.raises(RequestError, match="has 63 tokens, fewer than one window of 64"):
        ppl(model, text, context=64, stride=32)
    Path(text).write_text("x" * 64)
    with pytest.raises(RequestError, match="has 1 windows, fewer than --windows 2"):
        ppl(model, text, context=64, stride=32, windows=2)


def test_a_window_longer_than_the_context_is_refused_with_both_numbers(
    model: str, text: str
) -> None:
    with pytest.raises(UsageError, match=f"--context {CONTEXT} is too long.*{CONTEXT} tokens"):
        ppl(model, text, context=CONTEXT, stride=32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 1}, "--context is 1; it must be at least 2"),
        ({"context": 8, "stride": 8}, "--stride is 8; it must be from 1 to 7"),
        ({"stride": 0}, "--stride is 0"),
        ({"windows": 0}, "--windows is 0; it must be at least 1"),
    ],
)
def test_windows_that_cannot_be_meant_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ppl("nothing is opened", "nor read", **options)


def test_a_file_that_is_no_text_is_refused_by_name(text: str, tmp_path: Path) -> None:
    Path(text).write_bytes(b"abc\xff")
    with pytest.raises(UsageError, match=r"text\.txt is not UTF-8 at byte 3"):
        ppl("nothing is opened", text)
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        ppl("nothing is opened", str(tmp_path))
    with pytest.raises(UsageError, match="absent cannot be read: No such file"):
        ppl("nothing is opened", str(tmp_path / "absent"))
