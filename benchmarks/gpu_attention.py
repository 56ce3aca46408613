"""Attention and sampling kernels on this GPU: against plain PyTorch, then GB/s, TFLOP/s and us.

    python benchmarks/gpu_attention.py [--seconds 40] [--only decode]

Shapes of Llama-3.1-8B. Layers of one pool, larger than the caches, are read in turn by one captured
graph. A case that fails is named and the others go on; those left when the time is over are named
too. The last line is one JSON document.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from roofline.ops import KvCache
from roofline.ops.gpu import attention as gpu
from roofline.ops.gpu import sampling
from roofline.ops.gpu.triton_support import supports_pdl
from roofline.ops.noise import choose
from roofline.ops.reference import LARGEST
from roofline.ops.truncation import truncate

DEVICE = torch.device("cuda")
LLAMA = gpu.Heads(32, 8, 128)
BLOCK_TOKENS, VOCABULARY = 64, 128256
POOL_BYTES = 4 << 30
MOST_TOKENS = 450_000  # of all contexts of a case
TOLERANCE = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3, torch.float32: 2e-5}


def main() -> None:
    """Check, measure, print lines and one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=40, help="start no case after so many")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    print(json.dumps(run(**vars(parser.parse_args()))))


def run(seconds: float, only: str = "") -> dict[str, Any]:
    """Cases by name: those measured, those that failed with the reason, those not come to."""
    begun = time.monotonic()
    torch.manual_seed(0)
    figures: dict[str, Any] = {"benchmark": "gpu_attention", "device": torch.cuda.get_device_name()}
    cases, failed, left = {}, {}, []
    for name, case in all_cases():
        if only not in name:
            continue
        if time.monotonic() - begun > seconds:
            left.append(name)
            continue
        try:
            cases[name] = case()
            torch.cuda.synchronize()
        except Exception as error:  # a kernel that fails must not hide what the others do
            failed[name] = f"{type(error).__name__}: {error}"[:500]
            print(f"{name:50} FAILED {failed[name]}", flush=True)
        else:
            print(f"{name:50} {cases[name]}", flush=True)
    spent = round(time.monotonic() - begun, 1)
    return figures | {"cases": cases, "failed": failed, "left": left, "seconds": spent}


def all_cases() -> list[tuple[str, Callable[[], dict[str, Any]]]]:
    """What to run, the most wanted first."""
    half, small, eighth = torch.bfloat16, torch.int8, torch.float8_e4m3fn
    cases: list[tuple[str, Callable[[], dict[str, Any]]]] = [("sampling check", check_sampling)]
    cases += [(f"sampling {n} rows", lambda n=n: time_sampling(n)) for n in (1, 64)]
    for cache in (half, small, eighth):
        cases.append((f"check {LLAMA} {cache}", lambda c=cache: check(LLAMA, half, c)))
        for batch in (1, 8, 64):
            for context in (256, 1024, 4096, 32768):
                if batch * context <= MOST_TOKENS:
                    name = f"decode {cache} batch {batch} context {context}"
                    cases.append((name, lambda c=cache, b=batch, n=context: time_decode(c, b, n)))
        for tokens in (2048, 8192):
            name = f"prompt {cache} {tokens} tokens"
            cases.append((name, lambda c=cache, n=tokens: time_prompt(c, n, None)))
    for shape in (
        gpu.Shape(64, 64, 4, 3),
        gpu.Shape(128, 128, 8, 2),
        gpu.Shape(128, 64, 8, 2),
        gpu.Shape(128, 64, 4, 3),
        gpu.Shape(128, 32, 8, 4),
    ):
        cases.append((f"prompt {shape}", lambda s=shape: time_prompt(half, 8192, s)))
    for heads in (gpu.Heads(9, 3, 64), gpu.Heads(8, 8, 80), gpu.Heads(8, 1, 256)):
        cases.append((f"check {heads}", lambda h=heads: check(h, half, half)))
    cases.append(("check float32", lambda: check(LLAMA, torch.float32, torch.float32)))
    cases.append(("deterministic", check_deterministic))
    return cases


class Step:
    """Rows of (context, new tokens) on a pool of layers."""

    def __init__(
        self,
        heads: gpu.Heads,
        rows: list[tuple[int, int]],
        activation: torch.dtype,
        cache: torch.dtype,
        layers: int,
        *,
        deterministic: bool = False,
    ) -> None:
        self.heads, self.rows, self.layers = heads, rows, layers
        counts = [-(-context // BLOCK_TOKENS) for context, _ in rows]
        order = torch.randperm(sum(counts), dtype=torch.int32).split(counts)
        self.table = torch.zeros(len(rows), max(counts), dtype=torch.int32)
        for row, blocks in enumerate(order):
            self.table[row, : len(blocks)] = blocks
        self.table = self.table.to(DEVICE)
        shape = (layers, 2, sum(counts), heads.kv, BLOCK_TOKENS, heads.dim)
        self.cache = random_cache(shape, cache)
        news = torch.tensor([0, *(new for _, new in rows)])
        self.starts = news.cumsum(0).int().to(DEVICE)
        self.contexts = torch.tensor([context for context, _ in rows]).int().to(DEVICE)
        shape = (int(news.sum()), heads.query, heads.dim)
        self.query = torch.randn(shape, device=DEVICE).to(activation)
        self.out = torch.full_like(self.query, torch.nan)
        self.tasks = gpu.make_tasks(
            heads, activation, cache, len(rows), DEVICE, deterministic=deterministic
        )
        self.scratch = torch.empty(self.tasks.scratch_floats, device=DEVICE)
        self.longest, self.pdl = max(new for _, new in rows), supports_pdl(DEVICE)

    def plan(self) -> None:
        """Cut the rows into tasks."""
        gpu.plan(self.tasks, self.starts, self.contexts, None, pdl=self.pdl)

    def attend(self, layer: int) -> None:
        """Attention of one layer."""
        gpu.attention(
            self.query, self.cache, layer, self.table, self.starts, self.contexts, self.tasks,
            self.heads.dim**-0.5, None, self.out, self.scratch, longest=self.longest, pdl=self.pdl,
        )  # fmt: skip

    def attend_all(self) -> None:
        """Attention of all layers, one after the other."""
        for layer in range(self.layers):
            self.attend(layer)

    def expected(self, row: int, layer: int) -> Tensor:
        """Attention [n, Hq, D] float32 of one row, by PyTorch."""
        context, new = self.rows[row]
        blocks = self.table[row, : -(-context // BLOCK_TOKENS)].long()
        both = self.cache.values[layer][:, blocks].float()
        if self.cache.scales is not None:
            both *= self.cache.scales[layer][:, blocks].unsqueeze(-1)
        both = both.transpose(2, 1).flatten(2, 3)[:, :, :context]  # [2, Hkv, context, D]
        keys, values = both.repeat_interleave(self.heads.group, dim=1)
        query = self.query[self.starts[row] : self.starts[row + 1]].float().transpose(0, 1)
        scores = query @ keys.transpose(1, 2) * self.heads.dim**-0.5
        place = torch.arange(context, device=DEVICE)
        scores.masked_fill_(place > place[context - new :, None], -torch.inf)
        return (scores.softmax(-1) @ values).transpose(0, 1)


def random_cache(shape: tuple[int, ...], dtype: torch.dtype) -> KvCache:
    """Keys and values, a layer at a time; INT8 and FP8 with a scale a token and head."""
    values = torch.empty(shape, dtype=dtype, device=DEVICE)
    scales = torch.empty(shape[:-1], device=DEVICE) if dtype.itemsize == 1 else None
    for layer in range(shape[0]):
        x = torch.randn(shape[1:], device=DEVICE, dtype=torch.bfloat16)
        if scales is not None:
            scales[layer] = x.abs().amax(-1).float() / LARGEST[dtype]
            x = x / scales[layer].unsqueeze(-1).bfloat16()
            x = x.clamp(-LARGEST[dtype], LARGEST[dtype])
            x = x.round() if dtype == torch.int8 else x
        values[layer] = x.to(dtype)
    return KvCache(values, scales)


def check(heads: gpu.Heads, activation: torch.dtype, cache: torch.dtype) -> dict[str, Any]:
    """Largest error, of the largest value, over decodes and prompts in one step, run twice."""
    rows = [(1, 1), (4097, 1), (300, 300), (32768, 1), (64, 1), (3000, 700), (777, 2), (65, 65)]
    step = Step(heads, rows, activation, cache, 2)
    torch.backends.cuda.matmul.allow_tf32 = False
    errors = []
    for layer in (1, 0, 1):  # arrivals and scratch as the launch before left them
        step.plan()
        step.out.fill_(torch.nan)
        step.attend(layer)
        for row in range(len(rows)):
            wanted = step.expected(row, layer)
            actual = step.out[step.starts[row] : step.starts[row + 1]].float()
            errors.append(float((actual - wanted).abs().max() / wanted.abs().max()))
    assert max(errors) <= TOLERANCE[activation], errors
    assert not step.tasks.arrivals.any()
    return {"error": max(errors), "tasks": int(step.tasks.words[0])}


def check_deterministic() -> dict[str, Any]:
    """A token's bits do not depend on how its row was cut into chunks."""
    half = torch.bfloat16
    whole = Step(LLAMA, [(3000, 3000), (500, 1)], half, half, 1, deterministic=True)
    whole.attend(0)
    for new in (1, 2, 777):
        part = Step(LLAMA, [(3000, new)], half, half, 1, deterministic=True)
        part.cache, part.table = whole.cache, whole.table[:1]
        part.query.copy_(whole.query[3000 - new : 3000])
        part.attend(0)
        assert torch.equal(part.out, whole.out[3000 - new : 3000]), f"the last {new} tokens differ"
    return {"equal": True}


def time_decode(cache: torch.dtype, batch: int, context: int) -> dict[str, Any]:
    """GB/s of KV of one layer's attention, one new token a row."""
    token_bytes = 2 * LLAMA.kv * (LLAMA.dim * cache.itemsize + 4 * (cache.itemsize == 1))
    layer_bytes = batch * context * token_bytes
    layers = max(1, min(256, POOL_BYTES // layer_bytes))
    step = Step(LLAMA, [(context, 1)] * batch, torch.bfloat16, cache, layers)
    step.plan()
    us = timed(step.attend_all) / layers
    planned = timed(step.plan)
    spans = int(step.tasks.words[0]) // batch
    return {"us": round(us, 2), "gb_s": round(layer_bytes / us / 1e3), "spans": spans,
            "plan_us": round(planned, 2)}  # fmt: skip


def time_prompt(cache: torch.dtype, tokens: int, shape: gpu.Shape | None) -> dict[str, Any]:
    """TFLOP/s of one layer's attention of one prompt, half of whose scores are masked."""
    step = Step(LLAMA, [(tokens, tokens)], torch.bfloat16, cache, 2)
    if shape is not None:
        step.tasks = dataclasses.replace(step.tasks, prompt=shape)
    step.plan()
    us = timed(step.attend_all) / step.layers
    wanted = step.expected(0, 1)[-1]
    error = float((step.out[-1].float() - wanted).abs().max() / wanted.abs().max())
    assert error <= TOLERANCE[torch.bfloat16], error
    flops = 2 * LLAMA.query * LLAMA.dim * tokens * (tokens + 1)
    return {"us": round(us, 1), "tflop_s": round(flops / us / 1e6, 1)}


def timed(launches: Callable[[], None], replays: int = 5) -> float:
    """Median microseconds of a captured graph of launches."""
    launches()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launches()
    graph.replay()
    spans = []
    for _ in range(replays):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        graph.replay()
        last.record()
        torch.cuda.synchronize()
        spans.append(first.elapsed_time(last) * 1e3)
    return statistics.median(spans)


def sampled(rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Logits, temperatures, seeds, positions, room for tokens, scratch."""
    logits = torch.randn(rows, VOCABULARY, device=DEVICE) * 3
    heat = torch.linspace(0, 1.5, rows, dtype=torch.float64, device=DEVICE)
    seed = torch.randint(-(2**63), 2**63 - 1, (rows,), device=DEVICE)
    position = torch.randint(0, 1 << 20, (rows,), device=DEVICE)
    scratch = torch.empty(sampling.choose_scratch_floats(rows, VOCABULARY), device=DEVICE)
    return logits, heat, seed, position, torch.zeros_like(seed), scratch


def check_sampling() -> dict[str, Any]:
    """Tokens and truncation of 16 rows against their definitions."""
    rows, pdl = 16, supports_pdl(DEVICE)
    logits, heat, seed, position, out, scratch = sampled(rows)
    heat[-1] = 0.0
    columns = heat.tolist(), seed.tolist(), position.tolist()
    before = logits.cpu()
    sampling.choose(logits, heat, seed, position, out, scratch, pdl=pdl)
    wanted = [
        choose(before[row], float(warm), key % (1 << 64), place)
        for row, (warm, key, place) in enumerate(zip(*columns, strict=True))
    ]
    assert out.tolist() == wanted, (out.tolist(), wanted)
    min_p = torch.tensor([0.0, 0.02, 0.0, 0.0] * 4)
    top_k = torch.tensor([0, 0, 50, 40, 0, 1, 1000, 0] * 2)
    top_p = torch.tensor([0.9, 1.0, 1.0, 0.5, 0.999, 0.3, 0.95, 0.1] * 2, dtype=torch.float64)
    columns = min_p.to(DEVICE), top_k.to(DEVICE), top_p.to(DEVICE)
    sampling.truncate(logits, *columns, pdl=pdl)
    for row in range(rows):
        truncate(before[row], float(min_p[row]), int(top_k[row]), float(top_p[row]))
    differing = int((logits.cpu() != before).sum())
    assert not differing, f"{differing} logits"
    return {"rows": rows}


def time_sampling(rows: int) -> dict[str, Any]:
    """Microseconds of choosing with noise, without, and of truncation, all rows at once."""
    pdl = supports_pdl(DEVICE)
    logits, _, seed, position, out, scratch = sampled(rows)
    off = torch.zeros(rows, device=DEVICE)
    cold, warm, none, top_k, top_p = (
        off.double(),
        off.double() + 1,
        off.long(),
        off.long() + 50,
        off.double() + 0.9,
    )
    figures = {
        "greedy": lambda: sampling.choose(logits, cold, seed, position, out, scratch, pdl=pdl),
        "noise": lambda: sampling.choose(logits, warm, seed, position, out, scratch, pdl=pdl),
        "top_k": lambda: sampling.truncate(logits, off, top_k, warm, pdl=pdl),
        "top_p": lambda: sampling.truncate(logits, off, none, top_p, pdl=pdl),
    }
    return {f"{name}_us": round(timed(launch), 1) for name, launch in figures.items()}


if __name__ == "__main__":
    main()
