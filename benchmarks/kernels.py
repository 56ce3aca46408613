"""Each native kernel against what this machine can do: GB/s of read bandwidth, GMAC/s of the peak.

    python benchmarks/kernels.py [--threads 2] [--isa avx512_bf16] [--rounds 9]

First the yardsticks, measured here, the best of the rounds: memory read, and dot products of each
kind. Then each op at the shapes of SmolLM2-135M on a working set far larger than any cache, for 1,
16 and 512 tokens; medians over rounds. The last line is one JSON document.
"""

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable

import torch

from roofline.budget import usable_cores
from roofline.ops import Int8Weight, KvCache, PackedWeight, StepInputs
from roofline.ops.cpu import abi
from roofline.ops.cpu.library import Library, open_library
from roofline.ops.cpu.native import NativeOps, Pool
from roofline.ops.cpu.packing import pack

HIDDEN, HEADS, KV_HEADS, DIM, CHANNELS = 576, 9, 3, 64, 1536
GROUP, BLOCK_TOKENS, CONTEXT = 128, 16, 512
LAYERS = 40  # copies of each matrix: 3 to 80 MB, so that none stays in a cache
READ_BYTES, DOT_TASKS, TASK_PRODUCTS = 1 << 28, 64, 20_000_000  # tasks as in csrc/peaks.h
DOTS = {"float32": (abi.DOT_ACTIVATIONS, False), "bfloat16": (abi.DOT_ACTIVATIONS, True),
        "int8": (abi.DOT_INT8, False)}  # op, and whether activations are bfloat16  # fmt: skip
TOKENS = (1, 16, 512)
LINE = (
    "{activations:9} {kernel:20} {tokens:4} tokens {us:9.1f} us {gb_s:6.1f} GB/s "
    "{gmac_s:7.1f} GMAC/s {roofline:6.1%} of the roof"
)


def main() -> None:
    """Measure, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--isa", help="default: the best this CPU runs")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    library = open_library(arguments.isa)
    if not isinstance(library, Library):
        parser.error(library)
    bench = Bench(library, arguments.threads, arguments.rounds)
    peaks = bench.peaks()
    print(f"{library.isa_name}, {arguments.threads} threads: read {peaks['read_gb_s']:.1f} GB/s, "
          + ", ".join(f"{k} {peaks[f'{k}_gmac_s']:.0f} GMAC/s" for k in DOTS))  # fmt: skip
    rows = [
        row for activations in ("bfloat16", "int8") for row in bench.kernels(activations, peaks)
    ]
    for row in rows:
        print(LINE.format(**row))
    figures = {"isa": library.isa_name, **peaks, "kernels": rows}
    print(json.dumps({"benchmark": "kernels", **vars(arguments), **figures}))


class Bench:
    """One ISA and one pool of threads."""

    def __init__(self, library: Library, threads: int, rounds: int) -> None:
        self._library, self._pool, self._rounds = library, Pool(library, threads), rounds
        self._step = torch.zeros(4, dtype=torch.int64)
        self._scratch = torch.empty(1 << 22)

    def peaks(self) -> dict[str, float]:
        """Read bandwidth in 1e9 bytes/s; products in 1e9/s of each kind of dot."""
        buffer, sink = torch.ones(READ_BYTES // 4), torch.empty(64)

        def rate(op: int, count: int, work: float, *, bfloat16: bool) -> float:
            arguments = abi.Measure(buffer.data_ptr(), count, sink.data_ptr())
            place = self._library.isa, int(bfloat16), op, ctypes.addressof(arguments)
            run = self._library.functions.roofline_run
            return work / min(self._times(lambda: run(self._pool.handle, *place))) / 1e9

        found = {"read_gb_s": rate(abi.READ_MEMORY, READ_BYTES, READ_BYTES, bfloat16=False)}
        for kind, (op, bfloat16) in DOTS.items():
            work = DOT_TASKS * TASK_PRODUCTS
            found[f"{kind}_gmac_s"] = rate(op, TASK_PRODUCTS, work, bfloat16=bfloat16)
        return found

    def kernels(self, activations: str, peaks: dict[str, float]) -> list[dict[str, object]]:
        """Every op of a layer, and the head."""
        ops = NativeOps(torch.bfloat16, self._scratch, self._step, self._pool)
        rows: list[dict[str, object]] = []
        for tokens in TOKENS:
            for name, (run, size, products) in self._cases(ops, activations, tokens).items():
                with ops.record(run) as tape:  # as the engine runs them
                    run()
                ops.set_sizes(tokens, sampled=1, rows=1)
                seconds = statistics.median(self._times(tape.play))
                # attention multiplies values in float32, linears as they are told
                kinds = ("bfloat16", "float32") if name == "attention" else (activations,)
                work = sum(products / len(kinds) / peaks[f"{kind}_gmac_s"] for kind in kinds)
                roof = max(size / peaks["read_gb_s"], work) / 1e9
                rows.append({
                    "activations": activations, "kernel": name, "tokens": tokens,
                    "us": seconds * 1e6, "gb_s": size / seconds / 1e9,
                    "gmac_s": products / seconds / 1e9, "roofline": roof / seconds,
                })  # fmt: skip
        return rows

    def _cases(
        self, ops: NativeOps, activations: str, tokens: int
    ) -> dict[str, tuple[Callable[[], None], int, int]]:
        """Name -> how to run it on LAYERS matrices, bytes it must read, products it must make."""
        qkv_rows, dtype = (HEADS + 2 * KV_HEADS) * DIM, torch.bfloat16
        residual, delta = torch.randn(tokens, HIDDEN), torch.zeros(tokens, HIDDEN)
        norm, query = torch.ones(HIDDEN), torch.randn(tokens, HEADS, DIM).to(dtype)
        activated = torch.randn(tokens, CHANNELS).to(dtype)
        logits, sampled = torch.empty(1, 49152), torch.zeros(1, dtype=torch.int64)
        inputs, cache = _inputs(tokens)
        rope = torch.zeros(2, CONTEXT, DIM // 2)

        def case(
            rows: int, columns: int, run: Callable[[PackedWeight], None], paired: bool = False,
            copies: int = LAYERS, width: int = tokens,
        ) -> tuple[Callable[[], None], int, int]:  # fmt: skip
            weights = [self._weight(rows, columns, activations, paired) for _ in range(copies)]
            size = copies * rows * (columns + 4 * -(-columns // GROUP))

            def run_all() -> None:
                for weight in weights:
                    run(weight)

            return run_all, size, copies * rows * columns * width

        def attend() -> None:
            ops.attention(query, cache, 0, inputs.block_table, inputs.query_start,
                          inputs.context_len, DIM**-0.5, None, out=query)  # fmt: skip

        seen = tokens * CONTEXT - tokens * (tokens - 1) // 2
        out = torch.empty(tokens, HIDDEN)
        return {
            "norm_qkv_rope_store": case(qkv_rows, HIDDEN, lambda w: ops.norm_qkv_rope_store(
                residual, delta, norm, 1e-5, w, None, None, None, rope, inputs, cache, 0, query)),
            "attention": (attend, 2 * CONTEXT * KV_HEADS * DIM * 2, 2 * seen * HEADS * DIM),
            "linear (output)": case(HIDDEN, HIDDEN, lambda w: ops.linear(query.flatten(1), w, out)),
            "norm_gate_up_swiglu": case(2 * CHANNELS, HIDDEN, lambda w: ops.norm_gate_up_swiglu(
                residual, delta, norm, 1e-5, w, activated), paired=True),
            "linear (down)": case(HIDDEN, CHANNELS, lambda w: ops.linear(activated, w, out)),
            "norm_head": case(49152, HIDDEN, lambda w: ops.norm_head(
                residual, delta, sampled, norm, 1e-5, w, logits), copies=4, width=1),
        }  # fmt: skip

    def _weight(self, rows: int, columns: int, activations: str, paired: bool) -> PackedWeight:
        values = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
        weight = Int8Weight(values, torch.rand(rows, -(-columns // GROUP)) / 100, GROUP, 0)
        return pack(self._library, weight, paired=paired, int8_activations=activations == "int8")

    def _times(self, run: Callable[[], None]) -> list[float]:
        """Seconds of each round, after one that is not counted."""
        run()
        found = []
        for _ in range(self._rounds):
            started = time.perf_counter()
            run()
            found.append(time.perf_counter() - started)
        return found


def _inputs(tokens: int) -> tuple[StepInputs, KvCache]:
    """The last `tokens` of a context, in blocks of their own."""
    blocks = CONTEXT // BLOCK_TOKENS
    positions = torch.arange(CONTEXT - tokens, CONTEXT)
    inputs = StepInputs(
        token_ids=positions,
        positions=positions,
        slots=positions,
        query_start=torch.tensor([0, tokens], dtype=torch.int32),
        context_len=torch.tensor([CONTEXT], dtype=torch.int32),
        block_table=torch.arange(blocks, dtype=torch.int32).view(1, blocks),
    )
    values = torch.randn(1, 2, blocks, KV_HEADS, BLOCK_TOKENS, DIM).to(torch.bfloat16)
    return inputs, KvCache(values, None)


if __name__ == "__main__":
    main()
