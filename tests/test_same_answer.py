"""A request's tokens do not depend on its company, its chunks, the prefix cache or preemption.

The real model in INT8 and bfloat16; log-probabilities are compared bit for bit, so that two ways
which differ in rounding cannot pass by luck.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from roofline import LLM, SamplingParams
from roofline.doors.outputs import RequestOutput
from tests.prompts import PROMPTS

TEXT = " ".join(PROMPTS)  # over 128 tokens
TOKENS = 24  # more than a block, so that a full pool is met on the way
KINDS = {
    "greedy": SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=0),
    "seeded": SamplingParams(
        temperature=0.9, top_p=0.95, seed=7, max_tokens=TOKENS, ignore_eos=True, logprobs=0
    ),
}
Bits = list[tuple[int, float]]  # (token, its logprob)


@pytest.fixture(scope="module")
def alone(smollm2_path: Path) -> dict[str, Bits]:
    """What the request gets with the engine to itself and its prompt in one chunk."""
    with LLM(str(smollm2_path), max_model_len=512, max_num_seqs=1) as llm:
        return {kind: _bits(llm.generate(TEXT, params)[0]) for kind, params in KINDS.items()}


@pytest.fixture(scope="module")
def crowded(smollm2_path: Path) -> Iterator[LLM]:
    """An engine with room for 33 requests."""
    with LLM(str(smollm2_path), max_model_len=512, max_num_seqs=33) as llm:
        yield llm


@pytest.mark.parametrize("chunk", [7, 64, 512])
def test_chunks_of_a_prompt_change_no_bit(
    smollm2_path: Path, alone: dict[str, Bits], chunk: int
) -> None:
    with LLM(str(smollm2_path), max_model_len=512, max_num_seqs=2, max_prefill_chunk=chunk) as llm:
        for kind, params in KINDS.items():
            assert _bits(llm.generate(TEXT, params)[0]) == alone[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_company_of_32_others_changes_no_bit(
    crowded: LLM, alone: dict[str, Bits], kind: str
) -> None:
    others = [f"{i}. {PROMPTS[i % len(PROMPTS)]}" for i in range(32)]
    sampled = [SamplingParams(seed=i, max_tokens=3 + i % 12) for i in range(32)]
    prompts = [*others[:16], TEXT, *others[16:]]
    params = [*sampled[:16], KINDS[kind], *sampled[16:]]
    assert _bits(crowded.generate(prompts, params)[16]) == alone[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_found_in_the_cache_changes_no_bit(
    crowded: LLM, alone: dict[str, Bits], kind: str
) -> None:
    crowded.generate(TEXT, SamplingParams(temperature=0, max_tokens=1))
    answer = crowded.generate(TEXT, KINDS[kind])[0]
    assert answer.num_cached_tokens >= 128
    assert _bits(answer) == alone[kind]


def test_preemption_changes_no_bit(smollm2_path: Path, alone: dict[str, Bits]) -> None:
    """Both prompts fit, and one block more: the second to ask for its next block gives way."""
    with LLM(str(smollm2_path), max_model_len=512, max_num_seqs=1) as llm:
        prompt = llm.get_tokenizer().encode(TEXT)
    in_blocks = len(prompt) // 16
    block_bytes = 30 * 2 * 3 * 16 * 64 * 2
    with LLM(
        str(smollm2_path),
        max_model_len=len(prompt) + 64,
        max_num_seqs=2,
        kv_cache_memory_bytes=block_bytes * (2 * (in_blocks + 1) + 1),
        enable_prefix_caching=False,
    ) as llm:
        for kind, params in KINDS.items():
            preempted = llm.stats()["num_preemptions"]
            first = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
            second = llm.generate([prompt, prompt], [first, params], priority=[0, 1])[1]
            assert llm.stats()["num_preemptions"] > preempted
            assert _bits(second) == alone[kind]


def _bits(answer: RequestOutput) -> Bits:
    output = answer.outputs[0]
    assert output.logprobs is not None
    return [
        (t, entry[t].logprob) for t, entry in zip(output.token_ids, output.logprobs, strict=True)
    ]
