"""openvino-genai: variant `Q8_0` reads the GGUF file, `int8` weights with one scale a channel.

The latter are made once, and kept; that needs optimum-intel and nncf in this environment.
"""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import openvino
import openvino_genai as genai

from peer_engines import SEQUENCES, Loaded, Weights

STEP_TOKENS = 512


def load(weights: Weights, threads: int, variant: str) -> Loaded:
    """Its continuous batching, as its server runs it."""
    model = weights.q8_0 if variant == "Q8_0" else _converted(weights, variant)
    scheduling = genai.SchedulerConfig()
    scheduling.cache_size, scheduling.enable_prefix_caching = 1, False  # GiB
    scheduling.max_num_seqs, scheduling.max_num_batched_tokens = SEQUENCES, STEP_TOKENS
    properties = {"INFERENCE_NUM_THREADS": threads}
    pipeline = genai.ContinuousBatchingPipeline(str(model), scheduling, "CPU", properties)
    numbers = iter(range(1 << 62))

    def generate(prompts: Sequence[Sequence[int]], tokens: int) -> tuple[float, float]:
        asked = genai.GenerationConfig()
        asked.max_new_tokens, asked.ignore_eos, asked.do_sample = tokens, True, False
        ids = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        started = time.perf_counter()
        handles = [pipeline.add_request(next(numbers), each, asked) for each in ids]
        first_s, unseen = 0.0, list(handles)
        while pipeline.has_non_finished_requests():
            pipeline.step()
            unseen = [handle for handle in unseen if not handle.can_read()]
            if not unseen and not first_s:
                first_s = time.perf_counter() - started
        return first_s, time.perf_counter() - started

    read = (model if model.is_file() else model / "openvino_model.bin").stat().st_size
    return Loaded(generate, {"version": genai.__version__, "weight_bytes": read})


def _converted(weights: Weights, weight_format: str) -> Path:
    folder = weights.folder / f"openvino-{weight_format}"
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "openvino"]
        how = ["--task", "text-generation-with-past", "--weight-format", weight_format]
        model = ["--model", str(weights.safetensors), str(partial)]
        if subprocess.run([*command, *how, *model], check=False).returncode:
            raise SystemExit("optimum-intel made no weights; are it and nncf in this environment?")
        partial.rename(folder)
    return folder
