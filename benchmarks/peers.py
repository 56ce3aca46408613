"""Roofline beside llama.cpp on the same weights, in one run: rounds in turn, medians and ratios.

    python benchmarks/peers.py --llama PYTHON [--threads 2] [--rounds 5] [--activations float]

PYTHON is the interpreter of an environment that holds llama-cpp-python (`pip install
llama-cpp-python`); it first writes a Q8_0 file of SmolLM2-135M's weights beside its Q4_1. Each peer
loads in a process of its own and answers one figure at a time, so that both meet the same machine.
The last line is one JSON document.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FIGURES = {  # name: (prompt tokens, sequences, tokens each)
    "decode_1": (16, 1, 128),
    "prefill_512": (512, 1, 1),
    "decode_16": (16, 16, 64),
}
CONTEXT = 2048


def main() -> None:
    """Drive the peers, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama", help="a Python with llama-cpp-python")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", help=argparse.SUPPRESS)  # be a peer: roofline, Q8_0 or Q4_1
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.threads)
        return
    peers = {
        "roofline": Peer("roofline", sys.executable, arguments.threads),
        "roofline_int8_activations": Peer("roofline_int8", sys.executable, arguments.threads),
    }
    if arguments.llama:
        for kind in ("Q8_0", "Q4_1"):
            peers[f"llama.cpp_{kind}"] = Peer(kind, arguments.llama, arguments.threads)
    found: dict[str, dict[str, list[float]]] = {name: {f: [] for f in FIGURES} for name in peers}
    for turn in range(arguments.rounds + 1):  # the first warms up
        for figure in FIGURES:
            for name, peer in peers.items():
                rate = peer.ask(figure)
                if turn:
                    found[name][figure].append(rate)
    medians = {
        name: {figure: statistics.median(rates) for figure, rates in figures.items()}
        for name, figures in found.items()
    }
    for figure in FIGURES:
        ours = medians["roofline"][figure]
        rates = "  ".join(
            f"{name} {figures[figure]:.1f} ({figures[figure] / ours:.2f})"
            for name, figures in medians.items()
        )
        print(f"{figure:12} tokens/s: {rates}")
    shape = {"threads": arguments.threads, "rounds": arguments.rounds}
    print(json.dumps({"benchmark": "peers", **shape, "tokens_per_s": medians, "all": found}))


class Peer:
    """A process that has a model loaded and measures on request."""

    def __init__(self, kind: str, python: str, threads: int) -> None:
        command = [python, __file__, "--serve", kind, "--threads", str(threads)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        if kind.startswith("roofline"):
            environment["PYTHONPATH"] = str(Path(__file__).parents[1])
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._read()  # ready

    def ask(self, figure: str) -> float:
        """Tokens a second of one figure."""
        assert self._process.stdin is not None
        self._process.stdin.write(figure + "\n")
        self._process.stdin.flush()
        return self._read()["tokens_per_s"]

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


def serve(kind: str, threads: int) -> None:
    """Load, then answer each line with one measurement."""
    measure = (
        load_roofline(kind, threads) if kind.startswith("roofline") else load_llama(kind, threads)
    )
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps({"tokens_per_s": measure(*FIGURES[line.strip()])}), flush=True)


def load_roofline(kind: str, threads: int) -> Callable[[int, int, int], float]:
    """The engine, INT8 in groups of 128."""
    from roofline import LLM, SamplingParams

    llm = LLM(
        "smollm2-135m", threads=threads, max_model_len=CONTEXT, max_num_seqs=16, group_size=128,
        enable_prefix_caching=False, activations="int8" if kind.endswith("int8") else "float",
    )  # fmt: skip

    def measure(prompt: int, sequences: int, tokens: int) -> float:
        prompts = [
            [(31 * i + 7 * k) % 40000 + 100 for k in range(prompt)] for i in range(sequences)
        ]
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        outputs = llm.generate(prompts, params)
        first = max(o.metrics.first_token_time or 0 for o in outputs)
        if tokens == 1:
            return prompt / (first - outputs[0].metrics.arrival_time)
        last = max(o.metrics.last_token_time or 0 for o in outputs)
        return sequences * (tokens - 1) / (last - first)

    return measure


def load_llama(kind: str, threads: int) -> Callable[[int, int, int], float]:
    """llama.cpp through its C API: one batch a step, greedy, no sampler in the way."""
    import ctypes

    import llama_cpp as api
    import numpy as np

    source = Path.home() / ".cache" / "roofline" / "models" / "smollm2-135m.gguf"
    source = Path(os.environ.get("ROOFLINE_CACHE", source.parents[1])) / "models" / source.name
    path = source if kind == "Q4_1" else source.with_suffix(".Q8_0.gguf")
    quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
    api.llama_log_set(quiet, None)
    if not path.exists():
        how = api.llama_model_quantize_default_params()
        how.ftype, how.allow_requantize, how.nthread = api.LLAMA_FTYPE_MOSTLY_Q8_0, True, threads
        api.llama_model_quantize(str(source).encode(), str(path).encode(), how)
    model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
    options = api.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch = 16 * 256 + CONTEXT, 512, 512
    options.n_threads = options.n_threads_batch = threads
    options.n_seq_max = 16
    context = api.llama_init_from_model(model, options)
    vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    batch = api.llama_batch_init(512, 0, 1)

    def step(tokens: list[int], positions: list[int], rows: list[int], asked: list[bool]) -> None:
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, positions[i], asked[i]
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, rows[i]
        assert api.llama_decode(context, batch) == 0

    def likeliest(place: int) -> int:
        logits = api.llama_get_logits_ith(context, place)
        return int(np.ctypeslib.as_array(logits, (vocab,)).argmax())

    def measure(prompt: int, sequences: int, tokens: int) -> float:
        api.llama_memory_clear(api.llama_get_memory(context), True)
        chosen = []
        started = time.perf_counter()
        for row in range(sequences):
            ids = [(31 * row + 7 * k) % 40000 + 100 for k in range(prompt)]
            ends = [k == prompt - 1 for k in range(prompt)]
            step(ids, list(range(prompt)), [row] * prompt, ends)
            chosen.append(likeliest(prompt - 1))
        if tokens == 1:
            return prompt / (time.perf_counter() - started)
        started = time.perf_counter()
        for k in range(tokens - 1):
            step(chosen, [prompt + k] * sequences, list(range(sequences)), [True] * sequences)
            chosen = [likeliest(row) for row in range(sequences)]
        return sequences * (tokens - 1) / (time.perf_counter() - started)

    return measure


if __name__ == "__main__":
    main()
