"""Logits and greedy tokens against transformers: the real model, and small random ones."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from roofline import LLM, SamplingParams
from roofline.config import EngineConfig
from roofline.doors.outputs import RequestOutput
from roofline.models.checkpoints.gguf_checkpoint import GGUFCheckpoint
from tests.prompts import PROMPTS
from tests.whole_model import WholeModel

FLOATS: dict[str, Any] = {"quantization": "none", "dtype": "float32"}


@pytest.fixture(scope="module")
def peer(smollm2_path: Path) -> Any:
    """SmolLM2 dequantised to float32 by transformers' own GGUF loader."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_path.parent, gguf_file=smollm2_path.name, dtype=torch.float32
    )
    return model.eval()


@pytest.fixture(scope="module")
def answers(smollm2_path: Path) -> Iterator[list[RequestOutput]]:
    """What we say to twenty prompts, 64 tokens each, greedily, in one batch."""
    asked = SamplingParams(
        temperature=0, max_tokens=64, ignore_eos=True, prompt_logprobs=0, logprobs=0
    )
    with LLM(str(smollm2_path), max_model_len=256, max_num_seqs=20, **FLOATS) as llm:
        yield llm.generate(PROMPTS, asked)


@torch.inference_mode()
def test_smollm2_gives_the_greedy_tokens_and_logprobs_of_transformers(
    peer: Any, answers: list[RequestOutput]
) -> None:
    for answer in answers:
        _assert_same_tokens_and_logprobs(answer, peer, 1e-3)


@torch.inference_mode()
def test_smollm2_logits_are_within_a_thousandth_of_transformers(
    peer: Any, answers: list[RequestOutput], smollm2_path: Path
) -> None:
    checkpoint = GGUFCheckpoint(smollm2_path)
    ours = WholeModel(checkpoint, EngineConfig(max_model_len=256, max_num_seqs=1, **FLOATS))
    checkpoint.close()
    for answer in answers:
        ids = _all_ids(answer)
        assert (ours.logits(ids) - peer(torch.tensor([ids])).logits[0]).abs().max() < 1e-3


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
SHAPES: dict[str, dict[str, Any]] = {
    "tied, 4 queries to a KV head": dict(heads=4, kv_heads=1, head_dim=64, tied=True),
    "untied, no grouping": dict(heads=4, kv_heads=4, head_dim=64, tied=False),
    "tied, 9 heads over 3": dict(heads=9, kv_heads=3, head_dim=64, tied=True),
    "untied, 8 queries to a KV head": dict(heads=8, kv_heads=1, head_dim=128, tied=False),
    "head_dim 80": dict(heads=6, kv_heads=2, head_dim=80, tied=False),
    "llama3 rope": dict(heads=4, kv_heads=2, head_dim=128, tied=True, rope=LLAMA3_ROPE),
    "linear rope": dict(heads=4, kv_heads=2, head_dim=64, tied=False, rope=LINEAR_ROPE),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@torch.inference_mode()
def test_small_random_checkpoint_gives_the_tokens_and_logprobs_of_transformers(
    shape: dict[str, Any], tmp_path: Path
) -> None:
    peer = _random_model(tmp_path, **shape)
    prompts = [torch.randint(0, 256, (length,)).tolist() for length in (1, 2, 17, 90)]
    asked = SamplingParams(
        temperature=0, max_tokens=8, ignore_eos=True, prompt_logprobs=0, logprobs=0
    )
    with LLM(str(tmp_path), **FLOATS) as llm:
        for answer in llm.generate(prompts, asked):
            _assert_same_tokens_and_logprobs(answer, peer, 1e-4)


def _all_ids(answer: RequestOutput) -> list[int]:
    return answer.prompt_token_ids + answer.outputs[0].token_ids


def _assert_same_tokens_and_logprobs(answer: RequestOutput, peer: Any, tolerance: float) -> None:
    """Every output token is the peer's argmax; every token's logprob is the peer's."""
    ids, start, output = _all_ids(answer), len(answer.prompt_token_ids), answer.outputs[0]
    logits = peer(torch.tensor([ids])).logits[0]
    assert output.token_ids == logits[start - 1 : -1].argmax(-1).tolist()
    assert answer.prompt_logprobs is not None and output.logprobs is not None
    ours = [entry for entry in answer.prompt_logprobs + output.logprobs if entry is not None]
    given = torch.tensor([entry[token].logprob for token, entry in zip(ids[1:], ours, strict=True)])
    expected = logits.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]
    assert (given - expected).abs().max() < tolerance


def _random_model(
    folder: Path,
    heads: int,
    kv_heads: int,
    head_dim: int,
    tied: bool,
    rope: dict[str, Any] | None = None,
) -> Any:
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
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return model
