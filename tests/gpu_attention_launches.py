"""Compile what attention and sampling launch; prints a line for each kernel.

    python tests/gpu_attention_launches.py CAPABILITY [all]

Run without TRITON_INTERPRET, by `ops/gpu/attention_compile_test.py`. `all`: every kind of head and
of cache.
"""

import sys

import torch

from roofline.ops import KvCache
from roofline.ops.gpu import attention, sampling
from tests.gpu_compile import Compiled, Launch, recorded

META = torch.device("meta")
# Bytes of registers a thread may spill: the programs of a multiprocessor are bounded by registers,
# and a few that are kept in the first-level cache cost less than a program.
SPILLED_BYTES = {"decode": 64, "prompt": 640, "truncate_rows": 64}  # most in float32


def step(
    dim: int,
    activation: torch.dtype,
    cache: torch.dtype,
    block_tokens: int = 64,
    window: int | None = None,
    heads: tuple[int, int] = (32, 8),
) -> list[Launch]:
    """A step's plan and one layer's attention, of decodes and prompts."""
    shape = attention.Heads(*heads, dim)
    rows = 256
    tasks = attention.make_tasks(shape, activation, cache, rows, META, deterministic=False)
    words = torch.empty(rows, dtype=torch.int32, device=META)
    table = torch.empty(rows, 512, dtype=torch.int32, device=META)
    values = torch.empty(2, 2, 1000, heads[1], block_tokens, dim, dtype=cache, device=META)
    scales = torch.empty(values.shape[:-1], device=META) if cache.itemsize == 1 else None
    query = torch.empty(512, heads[0], dim, dtype=activation, device=META)

    def run() -> None:
        attention.plan(tasks, words, words, window, pdl=False)
        attention.attention(
            query, KvCache(values, scales), 1, table, words, words, tasks, 0.125, window,
            query, torch.empty(tasks.scratch_floats, device=META), longest=512, pdl=False,
        )  # fmt: skip

    return recorded(run, [attention])


def samplers() -> list[Launch]:
    """What may come between a step's logits and its tokens."""
    logits = torch.empty(64, 128256, device=META)
    words, floats = torch.empty(64, dtype=torch.int64, device=META), torch.empty(64, device=META)
    counts = torch.empty(64, 128256, dtype=torch.int16, device=META)
    bits = torch.empty(64, 128256 // 8, dtype=torch.uint8, device=META)

    def run() -> None:
        sampling.keep_allowed(logits, bits, words, pdl=False)
        sampling.penalize(logits, counts, words, floats, floats, floats, pdl=False)
        sampling.truncate(logits, floats, words, floats.double(), pdl=False)
        sampling.choose(logits, floats.double(), words, words, words, logits.view(-1), pdl=False)
        sampling.count_tokens(counts, words, words, pdl=False)

    return recorded(run, [sampling])


def steps(capability: int) -> list[list[Launch]]:
    """Every kind of head and of cache."""
    half, single, narrow = torch.bfloat16, torch.float32, [torch.int8]
    if capability >= 89:
        narrow.append(torch.float8_e4m3fn)
    made = [step(dim, half, cache) for dim in (64, 80, 128, 256) for cache in (half, *narrow)]
    made += [step(dim, single, single) for dim in (64, 128, 256)]
    made += [step(96, torch.float16, torch.float16), step(128, half, half, 64, 1024)]
    made += [step(128, half, cache, 16) for cache in (half, torch.int8)]
    made += [step(64, half, half, heads=(71, 1)), step(64, half, half, heads=(9, 3))]
    return made


def check(made: Compiled, capability: int) -> None:
    """Stop at what does not fit, what spills, and what does not wait for the kernel before."""
    line = f"{made.name} {made.registers} registers, {made.spilled_bytes} bytes of them spilled, "
    line += f"{made.shared_bytes} bytes of shared memory"
    print(line, flush=True)
    assert made.spilled_bytes <= SPILLED_BYTES.get(made.name, 0), line
    assert made.shared_bytes <= (227 if capability >= 90 else 163) * 1024, line
    assert made.ptx.count("griddepcontrol.wait") == (capability >= 90), line
    multiplies = "wgmma.mma_async" in made.ptx or "mma.sync" in made.ptx
    assert made.name not in ("prompt", "decode") or multiplies, line


def main() -> None:
    """Compile, print, check."""
    capability, thorough = int(sys.argv[1]), len(sys.argv) > 2
    wanted = [samplers(), step(128, torch.bfloat16, torch.bfloat16)]
    if thorough:
        wanted += steps(capability)
    for launches in wanted:
        for launch in launches:
            check(launch.compile(capability), capability)


if __name__ == "__main__":
    main()
