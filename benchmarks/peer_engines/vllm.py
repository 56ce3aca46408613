"""vLLM's CPU build with its defaults, the engine in this process; variants name the dtype.

`-eager` behind it runs the model uncompiled: compiling takes minutes at every start, for release
0.32.0 cannot load what it kept of the start before.
"""

import os
import time
from collections.abc import Sequence

from peer_engines import CONTEXT, SEQUENCES, Loaded, Weights

os.environ |= {  # read when vllm is imported
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, sorted(os.sched_getaffinity(0))))

import vllm


def load(weights: Weights, threads: int, variant: str) -> Loaded:
    """An `LLM` without prefix caching; its threads are the processors this process may use."""
    dtype, _, mode = variant.partition("-")
    llm = vllm.LLM(
        str(weights.safetensors), dtype=dtype, max_model_len=CONTEXT, max_num_seqs=SEQUENCES,
        enable_prefix_caching=False, skip_tokenizer_init=True, enforce_eager=mode == "eager",
        seed=0,
    )  # fmt: skip
    engine = llm.llm_engine
    numbers = iter(range(1 << 62))

    def generate(prompts: Sequence[Sequence[int]], tokens: int) -> tuple[float, float]:
        asked = vllm.SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        started = time.perf_counter()
        waiting = {str(next(numbers)): prompt for prompt in prompts}
        for name, prompt in waiting.items():
            engine.add_request(name, {"prompt_token_ids": list(prompt)}, asked)
        first_s, unseen = 0.0, set(waiting)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            unseen -= {output.request_id for output in outputs if output.outputs[0].token_ids}
            if not unseen and not first_s:
                first_s = time.perf_counter() - started
        return first_s, time.perf_counter() - started

    read = (weights.safetensors / "model.safetensors").stat().st_size
    return Loaded(generate, {"version": vllm.__version__, "weight_bytes": read})
