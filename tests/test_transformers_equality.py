"""Logits and greedy tokens against transformers: the real model, and small random ones."""

import math
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM

from roofline import LLM, SamplingParams
from tests.prompts import PROMPTS

GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, prompt_logprobs=0, logprobs=0)


@pytest.fixture(scope="module")
def peer(smollm2_path: Path) -> LlamaForCausalLM:
    """SmolLM2 dequantised to float32 by transformers' own GGUF loader."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_path.parent, gguf_file=smollm2_path.name, dtype=torch.float32
    )
    return model.eval()


@pytest.fixture(scope="module")
def ours(smollm2_path: Path):
    """The same file, its weights kept as floats."""
    with LLM(
        str(smollm2_path), quantization="none", dtype="float32", max_model_len=256, max_num_seqs=20
    ) as llm:
        yield llm


@torch.inference_mode()
def test_smollm2_in_float32_has_the_logits_and_greedy_tokens_of_transformers(peer, ours) -> None:
    answers = ours.generate(PROMPTS, GREEDY)
    worst = 0.0
    for answer in answers:
        ids = answer.prompt_token_ids + answer.outputs[0].token_ids
        logits = peer(torch.tensor([ids])).logits[0]
        start = len(answer.prompt_token_ids)
        assert answer.outputs[0].token_ids == logits[start - 1 : -1].argmax(-1).tolist()
        worst = max(worst, *_logprob_differences(answer, logits.log_softmax(-1)))
    assert worst < 1e-3


def _logprob_differences(answer, expected: torch.Tensor) -> list[float]:
    """|ours - transformers'| for every prompt token but the first, and every output token."""
    ids = answer.prompt_token_ids + answer.outputs[0].token_ids
    entries = [*answer.prompt_logprobs[1:], *answer.outputs[0].logprobs]
    return [
        abs(entry[token].logprob - float(expected[place, token]))
        for place, (token, entry) in enumerate(zip(ids[1:], entries, strict=True))
    ]


@torch.inference_mode()
def test_smollm2_logits_are_within_a_thousandth_of_transformers(peer, ours) -> None:
    prompt = ours.get_tokenizer().encode(PROMPTS[1])
    everything = SamplingParams(temperature=0, max_tokens=1, logprobs=20)
    step = ours.generate([prompt], everything)[0].outputs[0].logprobs[0]
    expected = peer(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    top = expected.topk(20)
    assert list(step) [:1] == top.indices[:1].tolist()
    for token, entry in step.items():
        assert math.isclose(entry.logprob, float(expected[token]), abs_tol=1e-3)
    assert set(step) == set(top.indices.tolist())


SHAPES = {
    "tied, 4 queries to a KV head": dict(heads=4, kv_heads=1, head_dim=64, tied=True),
    "untied, no grouping": dict(heads=4, kv_heads=4, head_dim=64, tied=False),
    "9 heads over 3": dict(heads=9, kv_heads=3, head_dim=64, tied=True),
    "8 queries to a KV head": dict(heads=8, kv_heads=1, head_dim=128, tied=False),
    "head_dim 80": dict(heads=6, kv_heads=2, head_dim=80, tied=False),
    "head_dim 128, llama3 rope": dict(
        heads=4,
        kv_heads=2,
        head_dim=128,
        tied=True,
        rope={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "linear rope": dict(
        heads=4,
        kv_heads=2,
        head_dim=64,
        tied=False,
        rope={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    ),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@torch.inference_mode()
def test_small_random_checkpoint_has_the_logits_of_transformers(shape, tmp_path: Path) -> None:
    model = _random_model(tmp_path, **shape)
    prompts = [torch.randint(0, 256, (length,)).tolist() for length in (1, 2, 17, 90)]
    asked = SamplingParams(
        temperature=0, max_tokens=8, ignore_eos=True, prompt_logprobs=0, logprobs=0
    )
    with LLM(str(tmp_path), quantization="none", dtype="float32") as llm:
        answers = llm.generate(prompts, asked)
    for answer in answers:
        ids = answer.prompt_token_ids + answer.outputs[0].token_ids
        logits = model(torch.tensor([ids])).logits[0]
        start = len(answer.prompt_token_ids)
        assert answer.outputs[0].token_ids == logits[start - 1 : -1].argmax(-1).tolist()
        assert max(_logprob_differences(answer, logits.log_softmax(-1))) < 1e-4


def _random_model(
    folder: Path, heads: int, kv_heads: int, head_dim: int, tied: bool, rope: dict | None = None
) -> LlamaForCausalLM:
    """A two-layer model with weights large enough that its logits differ by more than noise."""
    config = LlamaConfig(
        hidden_size=heads * 32,
        intermediate_size=200,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=256,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=0.1,
        rope_parameters=rope,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE({chr(0x100 + i): i for i in range(256)}, []))
    tokenizer.save(str(folder / "tokenizer.json"))
    return model
