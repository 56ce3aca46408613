"""llama.cpp through its C API: one batch a step, greedy, no sampler in the way.

Variants: `Q8_0`, and `Q4_1`, the original file.
"""

import ctypes
import time
from collections.abc import Sequence

import llama_cpp as api
import numpy as np

from peer_engines import CONTEXT, SEQUENCES, Loaded, Weights

BATCH = 512  # tokens


def load(weights: Weights, threads: int, variant: str) -> Loaded:
    """A context with a KV cache for every sequence."""
    hush = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
    api.llama_log_set(hush, None)
    path = weights.gguf if variant == "Q4_1" else weights.q8_0
    model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
    options = api.llama_context_default_params()
    options.n_ctx, options.n_seq_max = SEQUENCES * CONTEXT, SEQUENCES
    options.n_batch = options.n_ubatch = BATCH
    options.n_threads = options.n_threads_batch = threads
    run = _Run(model, options, hush)
    facts = {"version": api.__version__, "weight_bytes": api.llama_model_size(model)}
    return Loaded(run.generate, facts)


class _Run:
    """A context and its batch."""

    def __init__(self, model: object, options: object, hush: object) -> None:
        self._hush = hush  # ctypes frees a callback that nobody holds
        self._context = api.llama_init_from_model(model, options)
        self._vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        self._batch = api.llama_batch_init(BATCH, 0, 1)

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> tuple[float, float]:
        """Prompts side by side in full batches, then a token of each sequence a step."""
        api.llama_memory_clear(api.llama_get_memory(self._context), True)
        rows = range(len(prompts))
        started = time.perf_counter()
        entries = [
            (token, k, row, k == len(prompts[row]) - 1)
            for row in rows
            for k, token in enumerate(prompts[row])
        ]
        chosen = [
            token
            for first in range(0, len(entries), BATCH)
            for token in self._step(entries[first : first + BATCH])
        ]
        first_s = time.perf_counter() - started
        for k in range(tokens - 1):
            chosen = self._step([(chosen[row], len(prompts[row]) + k, row, True) for row in rows])
        return first_s, time.perf_counter() - started

    def _step(self, entries: Sequence[tuple[int, int, int, bool]]) -> list[int]:
        """Decode (token, position, row, whether to sample) each; the likeliest of those sampled."""
        batch = self._batch
        batch.n_tokens = len(entries)
        for i, (token, position, row, sampled) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, sampled
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
        assert api.llama_decode(self._context, batch) == 0
        return [self._likeliest(i) for i, entry in enumerate(entries) if entry[3]]

    def _likeliest(self, place: int) -> int:
        logits = api.llama_get_logits_ith(self._context, place)
        return int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())
