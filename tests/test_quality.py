"""Real text through the real model: what INT8 costs in perplexity may not grow.

Two windows of WikiText-2; the table over a hundred is in docs/int8_groups.md.
"""

import math
from pathlib import Path
from typing import Any

import pytest

from roofline import LLM, SamplingParams

CONTEXT, SCORED = 1024, 512
FLOAT32_NLL = 1131.3334 + 1556.930  # nats of the 1,024 scored tokens, weights kept as floats


@pytest.fixture(scope="module")
def text(test_data: Path) -> str:
    return (test_data / "wikitext2-test.txt").read_bytes().decode()


def nll(model: Path, text: str, **options: Any) -> float:
    """Negative log-likelihood of the last half of the first two windows, nats."""
    asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    with LLM(str(model), max_model_len=CONTEXT + 16, max_num_seqs=2, **options) as llm:
        ids = llm.get_tokenizer().encode(text)
        windows = [ids[start : start + CONTEXT] for start in (0, SCORED)]
        answers = llm.generate(windows, asked)
    scored: list[float] = []
    for window, answer in zip(windows, answers, strict=True):
        entries = (answer.prompt_logprobs or [])[-SCORED:]
        pairs = zip(window[-SCORED:], entries, strict=True)
        scored += [entry[token].logprob for token, entry in pairs if entry is not None]
    assert len(scored) == 2 * SCORED
    return -math.fsum(scored)


def test_float32_reproduces_the_recorded_likelihood(smollm2_path: Path, text: str) -> None:
    found = nll(smollm2_path, text, quantization="none", dtype="float32")
    assert found == pytest.approx(FLOAT32_NLL, abs=0.01)


@pytest.mark.parametrize("group_size", ["auto", 128])
def test_int8_costs_less_than_half_a_percent(
    smollm2_path: Path, text: str, group_size: str | int
) -> None:
    found = nll(smollm2_path, text, group_size=group_size)
    # Over two windows the noise is as large as the cost itself, so the line is drawn above both.
    assert math.expm1((found - FLOAT32_NLL) / (2 * SCORED)) < 0.005


def test_int8_activations_cost_less_than_was_asked(smollm2_path: Path, text: str) -> None:
    as_floats = nll(smollm2_path, text, group_size=128)
    found = nll(smollm2_path, text, group_size=128, activations="int8")
    assert math.expm1((found - as_floats) / (2 * SCORED)) < 0.006
