"""transformers' own `generate`; variants name the dtype. A prompt batch has one length."""

import time
from collections.abc import Sequence
from typing import Any

import torch
import transformers

from peer_engines import Loaded, Weights


def load(weights: Weights, threads: int, variant: str) -> Loaded:
    """The model as `AutoModelForCausalLM` gives it."""
    torch.set_num_threads(threads)
    dtype = getattr(torch, variant)
    model = transformers.AutoModelForCausalLM.from_pretrained(weights.safetensors, dtype=dtype)
    model.generation_config.eos_token_id = None

    def generate(prompts: Sequence[Sequence[int]], tokens: int) -> tuple[float, float]:
        ids, clock = torch.tensor(prompts), _Clock()
        started = time.perf_counter()
        answers = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens,
            pad_token_id=0, stopping_criteria=transformers.StoppingCriteriaList([clock]),
        )  # fmt: skip
        assert answers.shape[1] == ids.shape[1] + tokens
        return clock.first - started, time.perf_counter() - started

    read = sum(parameter.nbytes for parameter in model.parameters())
    return Loaded(generate, {"version": transformers.__version__, "weight_bytes": read})


class _Clock(transformers.StoppingCriteria):
    """Stops nothing; sees when the first token is there."""

    def __init__(self) -> None:
        self.first = 0.0

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        self.first = self.first or time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool)
