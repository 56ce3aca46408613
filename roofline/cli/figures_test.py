from pathlib import Path
from typing import Any, ClassVar

import pytest

from roofline import CompletionOutput, RequestOutput, execution
from roofline.cli import figures
from roofline.cli.figures import Decoding, one_line
from roofline.doors.outputs import RequestMetrics

ANSWER = {"prompt_tokens": 7, "ttft_s": 0.25}


def answered(tokens: int, first: float | None, last: float | None) -> RequestOutput:
    metrics = RequestMetrics(0.0, first, last)
    return RequestOutput("0", None, [1, 2], [CompletionOutput(0, token_ids=[3] * tokens)], metrics)


class Model:
    """As much of an LLM as the figures look at: 100 bytes of weights and 8 a token of KV."""

    config: ClassVar[Any] = None
    model_config: Any = None
    budget: Any = type("Budget", (), {"model": None})


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    Model.config = type("Config", (), {"kv_dtype": "bfloat16"})
    monkeypatch.setattr("roofline.budget.step_read_bytes", lambda plan, rank: 100)
    monkeypatch.setattr("roofline.budget.kv_token_bytes", lambda config, dtype: 8)
    return Model()


def test_speed_counts_the_steps_after_the_first_token(model: Any) -> None:
    decoding = Decoding.of(model, [answered(5, 10.0, 12.0)])
    assert decoding.tokens_per_s == 4 / 2.0
    assert decoding.bytes_per_token == 100 + 8 * (2 + 5 / 2)
    report = decoding.report(bandwidth_gb_s=1e-6)
    assert report["roofline_fraction"] == pytest.approx(2 * 136 / 1000)


def test_a_batch_shares_the_weights_and_tells_its_median_speed(model: Any) -> None:
    batch = [answered(3, 0.0, 1.0), answered(3, 0.0, 2.0), answered(3, 0.0, 8.0)]
    decoding = Decoding.of(model, batch)
    assert decoding.tokens_per_s == 1.0
    assert decoding.bytes_per_token == pytest.approx(100 / 3 + 8 * 3.5)
    fraction = decoding.report(1e-6, sequences=3)["roofline_fraction"]
    assert fraction == pytest.approx(3 * decoding.bytes_per_token / 1000)


@pytest.mark.parametrize(
    "output", [answered(1, 1.0, 1.0), answered(0, None, None), answered(2, 1.0, 1.0)]
)
def test_what_took_no_time_has_no_speed(output: RequestOutput, model: Any) -> None:
    decoding = Decoding.of(model, [output])
    assert decoding.tokens_per_s is None
    report = decoding.report(1.0)
    assert report["roofline_fraction"] is None
    assert one_line(ANSWER | report) == "7 prompt tokens, first token after 0.25 s"


def test_a_person_reads_one_line() -> None:
    report = ANSWER | Decoding(12.5, 2e8).report(10.0)
    assert one_line(report) == (
        "7 prompt tokens, first token after 0.25 s, then 12.5 tokens/s: 2.50 of 10.0 GB/s, "
        "25.0% of the roofline"
    )


def test_a_run_that_beats_the_known_bandwidth_has_it_measured_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ROOFLINE_CACHE", str(tmp_path))
    measured = iter([10.0, 30.0, 99.0])
    monkeypatch.setattr(execution.bandwidth, "measure", lambda threads: next(measured))
    assert figures.bandwidth_gb_s(2) == 10
    assert figures.bandwidth_gb_s(2, reached=9.9) == 10
    assert figures.bandwidth_gb_s(2, reached=11.0) == 30
    assert figures.bandwidth_gb_s(2) == 30
