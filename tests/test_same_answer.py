"""A request's tokens do not depend on its company, its chunks, the prefix cache or preemption.

The real model in INT8 and bfloat16; log-probabilities are compared bit for bit, so that two ways
which differ in rounding cannot pass by luck.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from roofline import LLM, SamplingParams
from roofline.llm import RequestOutput
from tests.prompts import PROMPTS

TEXT = " ".join(PROMPTS)  # over 150 tokens
KINDS = {
    "greedy": SamplingParams(temperature=0, max_tokens=12, logprobs=1),
    "seeded": SamplingParams(temperature=0.9, top_p=0.95, seed=7, max_tokens=12, logprobs=1),
}


@pytest.fixture(scope="module")
def alone(smollm2_path: Path) -> dict[str, list]:
    """What the request gets with the engine to itself and its prompt in one chunk."""
    with LLM(str(smollm2_path), max_model_len=512, max_num_seqs=1) as llm:
        return {kind: _bits(llm.generate(TEXT, params)[0]) for kind, params in KINDS.items()}


def _bits(answer: RequestOutput) -> list:
    output = answer.outputs[0]
    return [(t, entry[t].logprob) for t, entry in zip(output.token_ids, output.logprobs, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [7, 64, 512])
def test_chunks_of_a_prompt_change_no_bit(smollm2_path, alone, kind, chunk) -> None:
    with LLM(str(smollm2_path), max_model_len=512, max_num_seqs=2, max_prefill_chunk=chunk) as llm:
        assert _bits(llm.generate(TEXT, KINDS[kind])[0]) == alone[kind]


@pytest.fixture(scope="module")
def crowded(smollm2_path: Path) -> Iterator[LLM]:
    """An engine with room for 33 requests."""
    with LLM(str(smollm2_path), max_model_len=512, max_num_seqs=33) as llm:
        yield llm


@pytest.mark.parametrize("kind", KINDS)
def test_company_of_32_others_changes_no_bit(crowded, alone, kind) -> None:
    others = [f"{i}. {PROMPTS[i % len(PROMPTS)]}" for i in range(32)]
    params = [SamplingParams(seed=i, max_tokens=3 + i % 12) for i in range(32)]
    prompts, params = [*others[:16], TEXT, *others[16:]], [*params[:16], KINDS[kind], *params[16:]]
    assert _bits(crowded.generate(prompts, params)[16]) == alone[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_found_in_the_cache_changes_no_bit(crowded, alone, kind) -> None:
    crowded.generate(TEXT, SamplingParams(temperature=0, max_tokens=1))
    answer = crowded.generate(TEXT, KINDS[kind])[0]
    assert answer.num_cached_tokens >= 128
    assert _bits(answer) == alone[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_preemption_changes_no_bit(smollm2_path, alone, kind) -> None:
    """A pool too small for three: the last to arrive is preempted and computed again."""
    prompt_blocks = 12
    block_bytes = 30 * 2 * 3 * 16 * 64 * 2
    with LLM(
        str(smollm2_path),
        max_model_len=16 * (prompt_blocks + 4),
        max_num_seqs=3,
        kv_cache_memory_bytes=block_bytes * (2 * prompt_blocks + 3),
        enable_prefix_caching=False,
    ) as llm:
        long = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
        answers = llm.generate([TEXT, TEXT], [long, KINDS[kind]], priority=[0, 1])
        assert llm.stats()["num_preemptions"] >= 1
    assert _bits(answers[1]) == alone[kind]
