"""Each candidate plan of a linear on a GPU, GB/s under CUDA graph replay: where `layout.py` learns.

    PYTHONPATH=. python benchmarks/gpu_tune.py [--shapes qkv,down] [--tokens 1,8] [--prompts 2048]

The matrices of Llama-3.1-8B in INT8 groups of 128. A graph holds a chain of launches over copies
that are together larger than any cache; a candidate that fails is a line and no more. Kernels are
compiled beforehand by processes that share the work. The last line is one JSON document.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from roofline.ops import Int8Weight, PackedWeight
from roofline.ops.gpu.layout import GemvPlan, Layout, TilesPlan, pack
from roofline.ops.gpu.linear import Linears
from roofline.ops.gpu.room import Room
from roofline.ops.gpu.stream import StreamPlan, plan_stream
from roofline.ops.gpu.wide import BLOCK_SLABS, MOST_SHARED, SLAB_ROWS, WidePlan, tile_of

SHAPES = {  # rows, columns, paired
    "qkv": (6144, 4096, False),
    "o": (4096, 4096, False),
    "gate_up": (28672, 4096, True),
    "down": (4096, 14336, False),
    "head": (128256, 4096, False),
}
GROUP = 128
WORKING_SET_BYTES = 400_000_000  # several times the second cache
ROUNDS = 9
SCRATCH_VALUES = 1 << 28  # float32, 1 GiB
SHARED_BYTES = 230_000  # of a multiprocessor, for blocks
MULTIPROCESSORS = 132  # of a whole Hopper

GEMVS = [
    GemvPlan(rows, chunks, warps)
    for rows, chunks, warps in itertools.product((2, 4, 8), (8, 16, 32), (2, 4, 8))
    if 4096 <= rows * chunks * 128 // warps * 4 <= 32768
]
FEW = [  # up to 64 tokens: rows, warps, stages
    (32, 4, 4), (32, 4, 6), (32, 2, 6), (64, 4, 3), (64, 4, 4), (64, 4, 6), (64, 8, 4),
    (128, 4, 3), (128, 8, 3), (128, 8, 4),
]  # fmt: skip
SPLITS = (1, 2, 4, 8)
MANY = [  # prompts
    TilesPlan(64, 64, 1, 4, 4), TilesPlan(128, 64, 1, 8, 3), TilesPlan(64, 128, 1, 4, 3),
    TilesPlan(128, 128, 1, 8, 3), TilesPlan(128, 128, 1, 8, 4), TilesPlan(128, 256, 1, 8, 3),
]  # fmt: skip


@dataclass
class Candidate:
    """One way to compute one product."""

    shape: str
    tokens: int
    kind: str  # stream, wide, gemv, tiles, library, library_copy; `_int8`: rounded activations
    plan: StreamPlan | WidePlan | GemvPlan | TilesPlan | None


def candidates(shapes: list[str], tokens: list[int], prompts: list[int]) -> Iterator[Candidate]:
    """Everything that is worth a try."""
    for shape, count in itertools.product(shapes, tokens):
        if count == 1:
            yield from (Candidate(shape, 1, "gemv", plan) for plan in GEMVS)
            yield from (Candidate(shape, 1, "gemv_int8", plan) for plan in GEMVS[::4])
        for planes, kind in ((2, "stream"), (1, "stream_int8")):
            for stream in stream_plans(count, planes, SHAPES[shape][1]):
                yield Candidate(shape, count, kind, stream)
        yield from (Candidate(shape, count, "wide", plan) for plan in wide_plans(shape, count))
        tile = 16 if count <= 16 else 32 if count <= 32 else 64
        splits = (1,) if shape in ("gate_up", "head") else SPLITS
        for (rows, warps, stages), split in itertools.product(FEW, splits):
            yield Candidate(shape, count, "tiles", TilesPlan(rows, tile, split, warps, stages))
            if stages == 4:
                plan = TilesPlan(rows, tile, split, warps, stages)
                yield Candidate(shape, count, "tiles_int8", plan)
    for shape, count in itertools.product([s for s in shapes if s != "head"], prompts):
        yield from (Candidate(shape, count, "wide", plan) for plan in wide_plans(shape, count))
        for plan, kind in itertools.product(MANY, ("tiles", "tiles_int8")):
            yield Candidate(shape, count, kind, plan)
        yield Candidate(shape, count, "library", None)
        yield Candidate(shape, count, "library_copy", None)


def stream_plans(tokens: int, planes: int, columns: int) -> Iterator[StreamPlan]:
    """The rule's plan, and others that fit a multiprocessor."""
    if tokens > 16:
        return
    rule = plan_stream(tokens, planes, columns)
    yield rule
    own = -(-(columns // GROUP) // rule.warps)
    depths = [depth for depth in (2, 4, 7) if own % depth == 0]
    for depth, waves, held, tiles in itertools.product(depths, (1, 2), (0, 1, 2), (1, 2)):
        plan = replace(rule, depth=depth, waves=waves, blocks=waves, held=held, row_tiles=tiles)
        in_registers = held < 2 or own * plan.token_tiles <= 8
        if plan != rule and in_registers and waves * plan.shared_bytes(tokens) <= SHARED_BYTES:
            yield plan


def wide_plans(shape: str, tokens: int) -> list[WidePlan]:
    """As many rows a block as give each multiprocessor one, by how many blocks share K."""
    if not 16 < tokens <= 512:
        return []
    slabs, tile = SHAPES[shape][0] // SLAB_ROWS, tile_of(tokens)
    found: dict[WidePlan, None] = {}
    for splits, lost in itertools.product(range(1, 9), range(4)):  # clusters that do not fit
        clusters = MULTIPROCESSORS // splits - lost
        if splits > 1 and clusters * BLOCK_SLABS < slabs:
            continue
        mine = -(-slabs // (clusters * -(-slabs // (BLOCK_SLABS * clusters))))
        rings = ((2, 4), (3, 3), (3, 4), (4, 4), (6, 5))
        plans = [WidePlan(tile, mine, splits, depth, held) for depth, held in rings]
        found |= dict.fromkeys(plan for plan in plans if plan.shared_bytes <= MOST_SHARED)
    return list(found)


class Bench:
    """Matrices of one shape, and the timing of candidates on them."""

    def __init__(self, shape: str, most_tokens: int, device: torch.device, copies: int) -> None:
        self.rows, self.columns, self.paired = SHAPES[shape]
        self.device = device
        groups = self.columns // GROUP
        self.weights = [self._weight(groups) for _ in range(copies)]
        self.x = torch.randn(most_tokens, self.columns, device=device).bfloat16()
        self.scratch = torch.empty(SCRATCH_VALUES, device=device)
        width = self.rows // 2 if self.paired else self.rows
        dtype = torch.bfloat16 if self.paired else torch.float32
        self.out = torch.empty(most_tokens, width, dtype=dtype, device=device)
        self.linears = Linears(device)

    def launches(self, candidate: Candidate) -> list[Callable[[], None]]:
        """One launch for each copy of the matrix."""
        x, out = self.x[: candidate.tokens], self.out[: candidate.tokens]
        rounds = candidate.kind.endswith("_int8")
        packed = [self._packed(w, candidate.kind, rounds) for w in self.weights]
        plan, streams, steps = candidate.plan, self.linears.streams, None
        if isinstance(plan, WidePlan):
            wides, laid = self.linears.wides, self.linears.laid(x, Room(self.scratch))
            assert wides is not None
            return [partial(wides.multiply, laid, w, out, None, plan) for w in packed]
        if rounds or isinstance(plan, StreamPlan):
            layout = packed[0].layout
            assert isinstance(layout, Layout)
            planes = self.linears.rounded(x, layout, Room(self.scratch))
            x, steps = planes.values[0], planes.steps
            if isinstance(plan, StreamPlan):
                assert streams is not None
                return [partial(streams.multiply, planes, w, out, None, plan) for w in packed]
        return [self._launch(candidate, x, steps, weight, out) for weight in packed]

    def _launch(
        self, candidate: Candidate, x: Tensor, steps: Tensor | None, weight: PackedWeight,
        out: Tensor,
    ) -> Callable[[], None]:  # fmt: skip
        plan, linears = candidate.plan, self.linears
        assert not isinstance(plan, StreamPlan | WidePlan)
        if isinstance(plan, GemvPlan):
            return lambda: linears.gemv(x, steps, weight, out, None, plan)
        if plan is None:
            return lambda: linears.library(x, weight, out, Room(self.scratch))
        if plan.splits == 1:
            return lambda: linears.tiles(x, steps, weight, out, None, plan)
        shape = (plan.splits, candidate.tokens, self.rows)
        partial = torch.empty(shape, device=self.device)

        def split() -> None:
            linears.tiles(x, steps, weight, partial, None, plan)
            linears.sum_splits(partial, out)

        return split

    def _weight(self, groups: int) -> Int8Weight:
        shape = (self.rows, self.columns)
        values = torch.randint(-127, 128, shape, dtype=torch.int8, device=self.device)
        scales = torch.rand(self.rows, groups, device=self.device) / self.columns
        return Int8Weight(values, scales, GROUP, 0)

    def _packed(self, weight: Int8Weight, kind: str, rounds: bool) -> PackedWeight:
        if kind == "library_copy":
            copy = weight.values.bfloat16()
            weight = Int8Weight(weight.values, weight.scales, GROUP, 0, copy)
        return pack(weight, self.paired, dtype=torch.bfloat16, int8_activations=rounds)


def measure(launches: list[Callable[[], None]]) -> float:
    """Microseconds of one launch: the median of replays of a graph of all."""
    for launch in launches[:1]:
        launch()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    graph.replay()
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end) / len(launches))
    return statistics.median(times)


def copies_of(shape: str) -> int:
    """Copies of a matrix that no cache holds."""
    rows, columns, _ = SHAPES[shape]
    return max(2, -(-WORKING_SET_BYTES // (rows * columns)))


def run(todo: list[Candidate], device: torch.device) -> list[dict[str, Any]]:
    """Measure all, shape by shape."""
    rows: list[dict[str, Any]] = []
    for shape, group in itertools.groupby(sorted(todo, key=lambda c: c.shape), lambda c: c.shape):
        mine = list(group)
        bench = Bench(shape, max(c.tokens for c in mine), device, copies_of(shape))
        weight_bytes = bench.rows * bench.columns * (1 + 4 / GROUP)
        for candidate in mine:
            line = asdict(candidate)
            try:
                us = measure(bench.launches(candidate))
                flops = 2 * candidate.tokens * bench.rows * bench.columns
                line |= {"us": round(us, 2), "gb_s": round(weight_bytes / us / 1e3, 1),
                         "tflop_s": round(flops / us / 1e6, 1)}  # fmt: skip
            except Exception as error:  # one bad candidate costs nothing
                line["error"] = f"{type(error).__name__}: {error}"[:200]
            rows.append(line)
        del bench
        torch.cuda.empty_cache()
    return rows


def compile_part(todo: list[Candidate], part: int, parts: int, device: torch.device) -> None:
    """Compile this process's share of the kernels, each by one launch, into Triton's disk cache."""
    distinct = {
        (c.kind, SHAPES[c.shape][2], SHAPES[c.shape][1] if c.kind.startswith("gemv") else 0,
         c.plan if not isinstance(c.plan, TilesPlan) else (c.plan.rows, c.plan.tokens,
         c.plan.warps, c.plan.stages)): c
        for c in todo
    }  # fmt: skip
    mine = sorted(distinct.values(), key=lambda c: c.shape)[part::parts]
    for shape, group in itertools.groupby(sorted(mine, key=lambda c: c.shape), lambda c: c.shape):
        share = list(group)
        bench = Bench(shape, max(c.tokens for c in share), device, 1)
        for candidate in share:
            try:
                bench.launches(candidate)[0]()
            except Exception as error:
                print(f"{candidate}: {error}"[:300], file=sys.stderr)
        torch.cuda.synchronize()
        del bench
        torch.cuda.empty_cache()


def main() -> None:
    """Compile, measure, print the best of each product and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--tokens", default="1,8,16,32,64")
    parser.add_argument("--prompts", default="128,256,2048", help="empty: none")
    parser.add_argument("--processes", type=int, default=min(12, os.cpu_count() or 1))
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--raw", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    tokens, prompts = (
        [int(n) for n in text.split(",") if n] for text in (arguments.tokens, arguments.prompts)
    )
    todo = list(candidates(arguments.shapes.split(","), tokens, prompts))
    device = torch.device("cuda")
    if arguments.part is not None:
        compile_part(todo, arguments.part, arguments.processes, device)
        return
    if arguments.raw:
        print(json.dumps(run(todo, device)))
        return
    sizes = ["--tokens", arguments.tokens, "--prompts", arguments.prompts]
    compile_all(arguments.shapes, sizes, arguments.processes)
    rows = [row for shape in arguments.shapes.split(",") for row in apart(shape, sizes)]
    best = best_of(rows)
    for line in best:
        print(line)
    failed = [line for line in rows if "error" in line]
    print(f"{len(rows)} candidates, {len(failed)} failed")
    for line in failed[:10]:
        print(line)
    card = torch.cuda.get_device_name(device)
    print(json.dumps({"benchmark": "gpu_tune", "card": card, "best": best, "all": rows}))


def compile_all(shapes: str, sizes: list[str], processes: int) -> None:
    """Fill Triton's disk cache, each process its part."""
    command = [sys.executable, __file__, "--shapes", shapes, *sizes]
    command += ["--processes", str(processes), "--part"]
    children = [subprocess.Popen([*command, str(part)]) for part in range(processes)]
    for child in children:
        child.wait()


def apart(shape: str, sizes: list[str]) -> list[dict[str, Any]]:
    """Measure a shape in a process of its own: an illegal access spoils no other's figures."""
    command = [sys.executable, __file__, "--shapes", shape, *sizes, "--raw"]
    child = subprocess.run(command, capture_output=True, text=True)
    if child.returncode:
        return [{"shape": shape, "error": child.stderr[-300:]}]
    return json.loads(child.stdout.splitlines()[-1])


def best_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The fastest of each product and kind."""
    best: dict[tuple[str, int, str], dict[str, Any]] = {}
    for line in (line for line in rows if "us" in line):
        key = line["shape"], line["tokens"], line["kind"]
        if key not in best or line["us"] < best[key]["us"]:
            best[key] = line
    return list(best.values())


if __name__ == "__main__":
    main()
