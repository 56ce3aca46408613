"""The GPU backend on one card: its ceilings, its kernels, then the whole engine on dummy weights.

    python benchmarks/gpu.py [--sections ceilings,kernels,engine,growth] [--model llama-3.1-8b]

Runs from the source tree without installing: what it imports needs the standard library, numpy,
torch and triton. Kernels are held against PyTorch before they are timed. A section or a case that
fails is named with its error and costs nothing else. The last line is one JSON document.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from roofline.config import PRESETS, EngineConfig
from roofline.engine import Engine
from roofline.execution import devices
from roofline.execution.workers import InProcessWorkers
from roofline.models.checkpoints.dummy import DummyCheckpoint
from roofline.request import Request, SamplingParams
from roofline.scheduling.limits import SchedulerConfig
from roofline.scheduling.scheduler import Scheduler

BEGAN = time.perf_counter()
WARM_TOKENS = 12  # of each sequence, before its decoding is timed: kernels compiled, graph captured
GROWTH_TOKENS = 450_000  # most of batch x context in a cell of the table
CONTEXTS = (256, 1024, 4096, 16384, 32768)
BATCHES = (1, 8, 32, 64, 128, 256)


def main() -> None:
    """Run the sections asked for; print tables and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", default="ceilings,kernels,engine")
    parser.add_argument("--model", default="llama-3.1-8b", choices=sorted(PRESETS))
    parser.add_argument("--only", default="", help="engine cases whose names hold this")
    parser.add_argument("--most-tokens", type=int, default=GROWTH_TOKENS, help="of growth's cells")
    arguments = parser.parse_args()
    report: dict[str, Any] = {"benchmark": "gpu", "model": arguments.model, **machine()}
    sections: dict[str, Callable[[], dict[str, Any]]] = {
        "ceilings": ceilings,
        "kernels": kernels,
        "engine": lambda: engine_cases(arguments.model, arguments.only),
        "growth": lambda: growth(arguments.model, arguments.most_tokens),
    }
    for name in arguments.sections.split(","):
        report[name] = guarded(name, sections[name])
    report["seconds"] = time.perf_counter() - BEGAN
    print(json.dumps(report))


def guarded(name: str, run: Callable[[], Any]) -> Any:
    """What a section or case found, or its error, said at once."""
    try:
        return run()
    except Exception as error:  # the next case may work, and the machine is here once
        reason = f"{type(error).__name__}: {error}"
        print(f"{name}: FAILED: {' '.join(reason.split())[:500]}", flush=True)
        return {"error": reason[:2000]}


def show(text: str) -> None:
    """A line with the seconds since the start."""
    print(f"[{time.perf_counter() - BEGAN:6.1f}] {text}", flush=True)


def machine() -> dict[str, Any]:
    """The card and the versions."""
    import triton

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    show(f"{name}, torch {torch.__version__}, triton {triton.__version__}")
    return {"gpu": name, "torch": torch.__version__, "triton": triton.__version__}


def ceilings() -> dict[str, Any]:
    """Bytes a second of a copy and of a read, and FLOP/s of a bfloat16 product, on random data."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    floats = torch.ones(1 << 29, device="cuda")  # a reduction without a chain of additions
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)
    found = {
        "copy_tb_s": 2 * len(source) / event_seconds(lambda: target.copy_(source)) / 1e12,
        "read_tb_s": floats.nbytes / event_seconds(floats.amax) / 1e12,
        "bf16_tflop_s": 2 * 8192**3 / event_seconds(lambda: torch.mm(a, b, out=product)) / 1e12,
    }
    show("  ".join(f"{name} {value:.3f}" for name, value in found.items()))
    return found


def event_seconds(run: Callable[[], object], repeats: int = 10) -> float:
    """Median seconds of a run on the device."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def kernels() -> dict[str, Any]:
    """Attention, sampling and linears, each against PyTorch, then bytes or FLOP a second."""
    folder = Path(__file__).parent
    commands = {
        "attention": [folder / "gpu_attention.py", "--seconds", "40"],
        "linears": [folder / "gpu_tune.py"],
    }
    return {
        name: guarded(name, lambda: last_json([sys.executable, *map(str, command)]))  # noqa: B023
        for name, command in commands.items()
    }


def last_json(command: list[str]) -> Any:
    """The document on the last line of a benchmark's output, which is shown."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    print(result.stdout[-6000:], result.stderr[-2000:], sep="\n", flush=True)
    return json.loads(result.stdout.splitlines()[-1])


class Model:
    """A model of dummy weights in an engine of its own; no text, no tokenizer."""

    def __init__(self, name: str, **options: Any) -> None:
        started = time.perf_counter()
        config, reason = devices.resolve(EngineConfig(load_format="dummy", **options))
        if reason is not None:
            show(f"not on the GPU: {reason}")
        self.config, self.shape = config, PRESETS[name]
        checkpoint = DummyCheckpoint(self.shape, config.seed)
        self.workers = workers = InProcessWorkers(config, checkpoint, lambda name: None)
        limits = config.limits
        self.engine = Engine(
            Scheduler(
                SchedulerConfig(
                    num_blocks=workers.budget.num_blocks,
                    block_tokens=limits.block_size,
                    max_num_seqs=limits.max_num_seqs,
                    max_num_batched_tokens=limits.max_num_batched_tokens,
                    max_model_len=workers.budget.step.max_model_len,
                    vocab_size=self.shape.vocab_size,
                    enable_prefix_caching=False,
                    prefill_chunk_tokens=config.max_prefill_chunk,
                )
            ),
            workers,
        )
        self._numbers = iter(range(1 << 30))
        self._random = random.Random(0)
        self.load_s = time.perf_counter() - started
        workers.warm_up(lambda tokens: None)
        self.generate(1, 16, 1)
        self.first_token_s = time.perf_counter() - started

    def bytes_per_token(self) -> int:
        """Weights and scales that a decoding step reads: all but the rows of the embedding."""
        owned = self.workers.storage_bytes()
        table = self.workers.budget.model.embedding
        skipped = 0
        if table is not None and not self.shape.tie_word_embeddings:
            skipped = table.weight_bytes + table.scale_bytes
        return owned["weights"] + owned["scales"] - skipped

    def add(self, count: int, prompt: int, output: int) -> dict[str, int]:
        """Queue random prompts; returns the tokens each has had, none so far."""
        made: dict[str, int] = {}
        for _ in range(count):
            name = str(next(self._numbers))
            tokens = self._random.choices(range(self.shape.vocab_size), k=prompt)
            params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
            self.engine.add(Request(name, tokens, params, seed=0))
            made[name] = 0
        return made

    def steps(self, made: dict[str, int], until: int) -> None:
        """Step until every sequence has so many tokens."""
        while min(made.values()) < until:
            for output in self.engine.step():
                if output.request_id in made:
                    made[output.request_id] += 1

    def generate(self, count: int, prompt: int, output: int) -> float:
        """Seconds to answer so many prompts at once."""
        made = self.add(count, prompt, output)
        started = time.perf_counter()
        self.steps(made, output)
        return time.perf_counter() - started

    def decode(self, batch: int, context: int, tokens: int = 96) -> float:
        """Output tokens a second of `batch` sequences, from `context` tokens on.

        None ends meanwhile: those whose prompts were read first may have more tokens by as many
        steps as the prompts of all took.
        """
        chunk = self.config.limits.max_num_batched_tokens
        ahead = -(-batch * context // (chunk - batch)) + batch * context // chunk
        made = self.add(batch, context - WARM_TOKENS, WARM_TOKENS + tokens + ahead + 2)
        self.steps(made, WARM_TOKENS)
        before, started = sum(made.values()), time.perf_counter()
        self.steps(made, WARM_TOKENS + tokens)
        count, seconds = sum(made.values()) - before, time.perf_counter() - started
        assert len(made) * tokens == count, f"{count} tokens of {len(made)} sequences"
        self.drain()
        return count / seconds

    def drain(self) -> None:
        """Finish what is left."""
        while self.engine.has_unfinished:
            self.engine.step()

    def prefill(self, prompt: int, rounds: int = 6) -> float:
        """Prompt tokens a second of one prompt; the first round warms up."""
        times = [self.generate(1, prompt, 1) for _ in range(rounds)]
        return prompt / statistics.median(times[1:])

    def allocations(self, steps: int) -> int:
        """Allocations of the torch allocator in so many decoding steps of one sequence."""
        made = self.add(1, 64, WARM_TOKENS + steps + 2)
        self.steps(made, WARM_TOKENS)
        name = "allocation.all.allocated"
        before = torch.cuda.memory_stats()[name]
        self.steps(made, WARM_TOKENS + steps)
        after = torch.cuda.memory_stats()[name]
        self.drain()
        return after - before

    def close(self) -> None:
        """Free the card."""
        self.engine.close()
        torch.cuda.empty_cache()


Case = tuple[str, Callable[[Model], float]]

DECODE_1: Case = ("decode_1_context_256", lambda m: m.decode(1, 256, 256))
DECODE_8: Case = ("decode_8_context_256", lambda m: m.decode(8, 256))
DECODE_64: Case = ("decode_64_context_1024", lambda m: m.decode(64, 1024))
PREFILL: Case = ("prefill_2048", lambda m: m.prefill(2048))
SERVE: Case = ("output_256_requests_512_256", lambda m: 256 * 256 / m.generate(256, 512, 256))
STEPS: Case = ("allocations_in_1000_steps", lambda m: m.allocations(1000))


def engine_cases(model: str, only: str) -> dict[str, Any]:
    """The issue's figures, each under the options it is asked for."""
    configurations: list[tuple[str, str, dict[str, Any], list[Case]]] = [
        ("int8", model, {}, [DECODE_1, DECODE_8, DECODE_64, PREFILL, SERVE, STEPS]),
        ("bf16 prefill", model, {"prefill_weights": "bfloat16"}, [PREFILL, SERVE]),
        (
            "int8 activations and cache",
            model,
            {"activations": "int8", "kv_cache_dtype": "int8"},
            [DECODE_1, DECODE_64, PREFILL, SERVE],
        ),
        ("bf16 weights", model, {"quantization": "none"}, [DECODE_1]),
        ("deterministic", model, {"deterministic": True}, [DECODE_1, DECODE_64, PREFILL]),
        ("llama-110m", "llama-110m", {}, [DECODE_1]),
    ]
    return {
        name: guarded(name, lambda: one_configuration(name, shape, options, cases))  # noqa: B023
        for name, shape, options, cases in configurations
        if only in name
    }


def one_configuration(
    name: str, shape: str, options: dict[str, Any], cases: list[Case]
) -> dict[str, Any]:
    """Load once, measure every case."""
    model = Model(shape, **options)
    found: dict[str, Any] = {"load_s": model.load_s, "first_token_s": model.first_token_s}
    found["gb_per_token"] = model.bytes_per_token() / 1e9
    show(f"{name}: first token after {model.first_token_s:.2f} s, load {model.load_s:.2f} s")
    try:
        for case, measure in cases:
            found[case] = value = guarded(f"{name}: {case}", lambda: measure(model))  # noqa: B023
            if isinstance(value, float) and case.startswith("decode_1_"):
                found["weights_tb_s"] = value * found["gb_per_token"] / 1e3
            show(f"{name}: {case} {value if isinstance(value, dict) else format(value, ',.1f')}")
    finally:
        model.close()
    return found


def growth(model: str, most_tokens: int) -> dict[str, Any]:
    """Decoding rates against context and batch."""
    loaded = Model(model)
    found: dict[str, Any] = {}
    for context, batch in cells(loaded.workers.budget.step.max_model_len, most_tokens):
        case = f"decode_{batch}_context_{context}"
        found[case] = guarded(case, lambda: loaded.decode(batch, context, 48))  # noqa: B023
        show(f"{case} {found[case]}")
    loaded.close()
    return found


def cells(max_model_len: int, most_tokens: int) -> Iterator[tuple[int, int]]:
    """The contexts and batches of the table."""
    for context in CONTEXTS:
        for batch in BATCHES:
            if batch * context <= most_tokens and context + 64 <= max_model_len:
                yield context, batch


if __name__ == "__main__":
    main()
