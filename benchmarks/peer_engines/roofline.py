"""Roofline, INT8 in groups of 128; variants name the activations, `float` or `int8`."""

import time
from collections.abc import Sequence

from peer_engines import CONTEXT, SEQUENCES, Loaded, Weights
from roofline import LLM, SamplingParams, __version__, budget


def load(weights: Weights, threads: int, variant: str) -> Loaded:
    """The engine through its Python door, without the prefix cache."""
    llm = LLM(
        str(weights.gguf), device="cpu", threads=threads, max_model_len=CONTEXT,
        max_num_seqs=SEQUENCES, group_size=128, enable_prefix_caching=False, activations=variant,
    )  # fmt: skip

    def generate(prompts: Sequence[Sequence[int]], tokens: int) -> tuple[float, float]:
        asked = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        started = time.monotonic()
        outputs = llm.generate([list(prompt) for prompt in prompts], asked)
        assert all(len(output.outputs[0].token_ids) == tokens for output in outputs)
        firsts = [output.metrics.first_token_time or started for output in outputs]
        lasts = [output.metrics.last_token_time or started for output in outputs]
        return max(firsts) - started, max(lasts) - started

    facts = {
        "version": __version__,
        "activations": llm.config.dtype if variant == "float" else "int8",
        "weight_bytes": budget.step_read_bytes(llm.budget.model, budget.Rank()),
        "weights_and_kv_bytes": llm.budget.total_bytes - llm.budget.activation_bytes,
    }
    return Loaded(generate, facts)
