"""How the cost of decoding grows with context and with batch, and what limits each point.

    python benchmarks/growth.py [--threads 2] [--rounds 3] [--plot docs/cpu_growth.svg]

SmolLM2-135M in INT8 groups of 128. Beside each step's time stand the least times of its parts on
this machine: reading the weights, reading the KV cache, multiplying; and what was spent outside
the native kernels (host). The longest is what limits. A plot needs matplotlib. The last line is
one JSON document.
"""

import argparse
import contextlib
import itertools
import json
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from yardsticks import products, yardsticks

from roofline import LLM, SamplingParams, budget
from roofline.ops.cpu.native import Tape

MODEL = "smollm2-135m"
CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
BATCH_CONTEXT, TOKENS = 64, 24
COLUMNS = ("tokens_per_s", "step_ms", "weights_ms", "kv_ms", "arithmetic_ms", "host_ms")


@dataclass(frozen=True)
class Point:
    """Sequences of one context decoded side by side."""

    series: str  # what is fixed: `dtype` of activations and KV, or `activations int8`
    context: int  # tokens, of each sequence
    batch: int
    tokens_per_s: float  # of all sequences together
    step_ms: float
    weights_ms: float  # the least time: bytes over read bandwidth
    kv_ms: float
    arithmetic_ms: float  # the least time: multiplications over the peak of dot products
    host_ms: float  # measured: outside the native kernels

    @property
    def limit(self) -> str:
        """What takes longest; of memory, its larger part."""
        memory = "KV cache" if self.kv_ms > self.weights_ms else "weights"
        times = {
            memory: self.weights_ms + self.kv_ms,
            "arithmetic": self.arithmetic_ms,
            "host": self.host_ms,
        }
        return max(times, key=lambda name: times[name])

    @property
    def of_limit(self) -> float:
        """That least time, of the step's time."""
        longest = max(self.weights_ms + self.kv_ms, self.arithmetic_ms, self.host_ms)
        return longest / self.step_ms


def main() -> None:
    """Measure, print the tables, draw, and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=budget.usable_cores())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contexts", nargs="+", type=int, default=CONTEXTS, help="ascending")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--plot", type=Path, help="an SVG file to write")
    arguments = parser.parse_args()
    started = time.monotonic()
    machine = yardsticks(arguments.threads)
    bench = Bench(machine, arguments.threads, arguments.rounds)
    by_context = [
        point
        for dtype in ("bfloat16", "float32")
        for point in bench.by_context(dtype, arguments.contexts)
    ]
    by_batch = [
        point
        for activations in ("float", "int8")
        for point in bench.by_batch(activations, arguments.batches)
    ]
    for points in (by_context, by_batch):
        print_table(points)
    if arguments.plot is not None:
        draw(by_context, by_batch, arguments.plot)
    report = {
        "benchmark": "growth",
        "machine": machine,
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "elapsed_s": time.monotonic() - started,
        "by_context": [as_row(point) for point in by_context],
        "by_batch": [as_row(point) for point in by_batch],
    }
    print(json.dumps(report))


class Bench:
    """Points measured on one machine."""

    def __init__(self, machine: dict[str, Any], threads: int, rounds: int) -> None:
        self._machine, self._threads, self._rounds = machine, threads, rounds

    def by_context(self, dtype: str, contexts: Sequence[int]) -> Iterator[Point]:
        """One sequence; each prompt begins with the one before."""
        most = max(contexts)
        with self._load(dtype=dtype, max_num_seqs=1, max_model_len=most) as llm:
            text = _random_prompt(most, 0)
            cases = [(context, [text[: context - TOKENS]]) for context in contexts]
            yield from self._points(llm, dtype, cases)

    def by_batch(self, activations: str, batches: Sequence[int]) -> Iterator[Point]:
        """Many sequences of one short context."""
        series = "bfloat16" if activations == "float" else "activations int8"
        sizes = {
            "max_num_seqs": max(batches),
            "max_model_len": BATCH_CONTEXT,
            "max_num_batched_tokens": max(batches) * BATCH_CONTEXT,  # every prompt in one step
        }
        with self._load(activations=activations, **sizes) as llm:
            texts = [_random_prompt(BATCH_CONTEXT - TOKENS, row) for row in range(max(batches))]
            yield from self._points(
                llm, series, [(BATCH_CONTEXT, texts[:batch]) for batch in batches]
            )

    def _load(self, **options: Any) -> LLM:
        return LLM(MODEL, device="cpu", threads=self._threads, group_size=128, **options)

    def _points(
        self, llm: LLM, series: str, cases: Sequence[tuple[int, Sequence[Sequence[int]]]]
    ) -> Iterator[Point]:
        """The medians of rounds over all cases: a busy moment meets each of them once at most.

        The prefix cache keeps prompts from one round to the next.
        """
        rounds = [[_decode(llm, prompts) for _, prompts in cases] for _ in range(self._rounds)]
        for (context, prompts), times in zip(cases, zip(*rounds, strict=True), strict=True):
            step_s, native_s = (statistics.median(each) for each in zip(*times, strict=True))
            yield self._point(llm, series, context, len(prompts), step_s, native_s)

    def _point(
        self, llm: LLM, series: str, context: int, batch: int, step_s: float, native_s: float
    ) -> Point:
        """A step's time beside the least times of its parts."""
        model = llm.model_config
        seen = batch * (context - TOKENS / 2)
        weights = budget.step_read_bytes(llm.budget.model, budget.Rank())
        kv = seen * budget.kv_token_bytes(model, llm.config.dtype)
        kind = "int8" if llm.config.activations == "int8" else llm.config.dtype
        work = products(model, batch, batch, int(seen))
        return Point(
            series, context, batch, batch / step_s, step_s * 1e3,
            weights_ms=weights / self._machine["read_gb_s"] / 1e6,
            kv_ms=kv / self._machine["read_gb_s"] / 1e6,
            arithmetic_ms=work / self._machine[f"{kind}_gmac_s"] / 1e6,
            host_ms=(step_s - native_s) * 1e3,
        )  # fmt: skip


def as_row(point: Point) -> dict[str, Any]:
    """A point of the JSON document."""
    return asdict(point) | {"limit": point.limit, "of_limit": point.of_limit}


def print_table(points: Sequence[Point]) -> None:
    """A row for each point, as Markdown."""
    columns = ("series", "context", "batch", *COLUMNS, "limit", "of limit")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for point in points:
        times = [f"{getattr(point, name):.4g}" for name in COLUMNS]
        ends = [point.limit, f"{point.of_limit:.0%}"]
        print("|", " | ".join([point.series, str(point.context), str(point.batch), *times, *ends]),
              "|")  # fmt: skip
    print()


def draw(by_context: Sequence[Point], by_batch: Sequence[Point], path: Path) -> None:
    """Both curves, and beside each what its limit alone would allow."""
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = path.name  # the same figures, the same file
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for panel, points, axis in zip(
        panels, (by_context, by_batch), ("context", "batch"), strict=True
    ):
        for name, group in itertools.groupby(points, lambda point: point.series):
            line = list(group)
            sizes = [getattr(point, axis) for point in line]
            (drawn,) = panel.plot(sizes, [p.tokens_per_s for p in line], marker="o", label=name)
            roof = [p.tokens_per_s / p.of_limit for p in line]
            panel.plot(sizes, roof, linestyle=":", color=drawn.get_color(), label=f"{name}, limit")
        panel.set(xscale="log", xlabel=axis, ylabel="tokens/s", ylim=(0, None))
        panel.set_xticks(sizes, [str(size) for size in sizes])
        panel.minorticks_off()
        panel.legend()
    figure.savefig(path, format="svg", metadata={"Date": None})


def _decode(llm: LLM, prompts: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Seconds of a decoding step, and of them in native kernels."""
    asked = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    with _native_calls() as calls:
        outputs = llm.generate([list(prompt) for prompt in prompts], asked)
    first = max(output.metrics.first_token_time or 0.0 for output in outputs)
    last = max(output.metrics.last_token_time or 0.0 for output in outputs)
    native_s = sum(end - start for start, end in calls if first <= start and end <= last)
    return (last - first) / (TOKENS - 1), native_s / (TOKENS - 1)


def _random_prompt(tokens: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(100, 40_000), k=tokens)


@contextlib.contextmanager
def _native_calls() -> Iterator[list[tuple[float, float]]]:
    """The start and end of every replay meanwhile, seconds of `time.monotonic`."""
    calls: list[tuple[float, float]] = []
    play = Tape.play

    def timed(tape: Tape) -> None:
        started = time.monotonic()
        play(tape)
        calls.append((started, time.monotonic()))

    Tape.play = timed
    try:
        yield calls
    finally:
        Tape.play = play


if __name__ == "__main__":
    main()
