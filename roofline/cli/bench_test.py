import json
from pathlib import Path
from typing import Any

import pytest

from roofline.cli import figures
from roofline.cli.bench import latency, throughput
from roofline.errors import UsageError
from tests.tiny_model import CONTEXT, write_tiny_model


@pytest.fixture(autouse=True)
def bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "bandwidth_gb_s", lambda threads, **_: 20.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("tiny")))


def test_the_last_line_is_one_json_document_of_medians(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"input_len": 5, "output_len": 4, "batch_size": 3, "num_iters": 2}
    latency(model, **sizes, num_iters_warmup=1)
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    assert len(lines) == len(report) + 1  # and a line for a person for each
    assert {name: report[name] for name in sizes} == sizes
    assert 0 < report["ttft_s"] < report["latency_s"]
    assert report["total_tokens_per_s"] == pytest.approx(12 / report["latency_s"])
    read = report["decode_tokens_per_s"] * 3 * report["bytes_per_token"]
    assert report["roofline_fraction"] == pytest.approx(read / 20e9)


def test_json_alone_and_a_dummy_shape(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"input_len": 1, "output_len": 1, "num_iters": 1, "num_iters_warmup": 0}
    latency("llama-110m", json=True, load_format="dummy", **sizes)
    report = json.loads(capsys.readouterr().out)
    assert report["decode_tokens_per_s"] is None and report["roofline_fraction"] is None
    assert report["model"] == "llama-110m"


def test_weights_are_shared_by_a_batch(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    def bytes_per_token(batch_size: int) -> float:
        counts = {"num_iters": 1, "num_iters_warmup": 0, "batch_size": batch_size}
        latency(model, json=True, input_len=2, output_len=2, **counts)
        return json.loads(capsys.readouterr().out)["bytes_per_token"]

    kv = (2 + 2 / 2) * 2 * 2 * 2 * 16 * 2
    assert bytes_per_token(1) - kv == 4 * (bytes_per_token(4) - kv)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_len": 0}, "input_len is 0; it must be at least 1"),
        ({"num_iters": 0}, "num_iters is 0"),
        ({"num_iters_warmup": -1}, "num_iters_warmup is -1; it must be at least 0"),
        ({"batch_size": 5000}, "max_num_seqs is 5000; it must be an integer from 1 to 4096"),
        ({"batch_size": 4, "max_num_seqs": 2}, "batch_size 4 is more than max_num_seqs 2"),
    ],
)
def test_sizes_that_cannot_be_meant_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        latency("nothing is opened", **options)


def test_a_batch_larger_than_the_default_step_has_a_step_of_its_size(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not an existing path"):  # options were good
        latency(str(tmp_path / "absent"), batch_size=1000)


def test_more_tokens_than_the_context_are_refused(model: str) -> None:
    with pytest.raises(UsageError, match=f"more than the context of {CONTEXT} tokens"):
        latency(model, input_len=CONTEXT, output_len=1)


ONE_ROUND = {"num_iters": 1, "num_iters_warmup": 0}


def test_throughput_counts_all_timed_rounds_together(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"input_len": 5, "output_len": 4, "num_prompts": 3}
    throughput(model, **sizes, num_iters=2, num_iters_warmup=1)
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    assert len(lines) == len(report) + 1
    assert {name: report[name] for name in sizes} == sizes and report["dataset"] is None
    counted = ("completed", "total_input_tokens", "total_output_tokens", "num_steps")
    assert [report[name] for name in counted] == [6, 30, 24, 8]
    assert report["request_throughput"] == pytest.approx(6 / report["duration"])
    assert report["output_throughput"] == pytest.approx(24 / report["duration"])
    assert report["total_token_throughput"] == pytest.approx(54 / report["duration"])
    for name in ("ttft", "tpot", "e2el"):
        median, p90, p99 = (report[f"{kind}_{name}_ms"] for kind in ("median", "p90", "p99"))
        assert 0 < median <= p90 <= p99
    last = report["mean_ttft_ms"] + 3 * report["mean_tpot_ms"]
    assert last == pytest.approx(report["mean_e2el_ms"])
    assert report["roofline_fraction"] == pytest.approx(
        report["bytes_read"] / report["duration"] / 20e9
    )


def test_throughput_reads_weights_each_step_and_the_context_of_each_token(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def bytes_read(num_prompts: int, **options: Any) -> float:
        sizes = {"input_len": 8, "output_len": 4, "num_prompts": num_prompts, **ONE_ROUND}
        throughput(model, json=True, **sizes, **options)
        return json.loads(capsys.readouterr().out)["bytes_read"]

    kv = 4 * (8 + 4 / 2) * 2 * 2 * 2 * 16 * 2  # of a prompt
    weights = bytes_read(1) - kv
    assert bytes_read(3) == weights + 3 * kv  # side by side
    assert bytes_read(3, max_num_seqs=1) == 3 * (weights + kv)  # one after another


def test_throughput_answers_a_dataset_without_finding_it_in_the_cache(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text('{"prompt": "' + "x" * 40 + '"}\n{"turns": ["y"]}\n{"prompt": "not asked"}\n')
    asked = {"dataset_path": str(path), "output_len": 1, "num_prompts": 2}
    throughput(model, json=True, **asked, num_iters=2, num_iters_warmup=0)
    report = json.loads(capsys.readouterr().out)
    chat = len("<|im_start|>user\ny<|im_end|>\n<|im_start|>assistant\n") - 2 * 11 - 9
    assert report["total_input_tokens"] == 2 * (40 + chat)
    assert (report["completed"], report["input_len"]) == (4, None)
    assert report["mean_tpot_ms"] is None and report["p99_tpot_ms"] is None


def test_throughput_reads_the_prompts_of_spec_bench(
    model: str, test_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(test_data / "spec-bench.jsonl")
    with pytest.raises(UsageError, match=r"the longest prompt .* more than the context of 256"):
        throughput(model, dataset_path=path, output_len=128, num_prompts=8)
    throughput(model, json=True, dataset_path=path, output_len=1, num_prompts=1, **ONE_ROUND)
    assert json.loads(capsys.readouterr().out)["completed"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_len": 0}, "input_len is 0; it must be at least 1"),
        ({"num_prompts": 0}, "num_prompts is 0; it must be at least 1"),
        ({"dataset_path": "x", "input_len": 5}, "input_len does nothing with a dataset"),
        ({"dataset_path": "no such file"}, "no such file: cannot be read"),
    ],
)
def test_throughput_refuses_what_cannot_be_meant(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        throughput("nothing is opened", **options)
