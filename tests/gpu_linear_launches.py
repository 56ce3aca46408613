"""Compile what one layer and the head of a model launch; prints a line for each kernel.

    python tests/gpu_linear_launches.py CAPABILITY [all]

Run without TRITON_INTERPRET, by `ops/gpu/compile_test.py`. `all`: every number of tokens.
"""

import sys

import torch

from roofline.budget import LayerPlan, MatrixPlan, ModelPlan, gpu_scratch_values
from roofline.ops import FloatWeight, Int8Weight, KvCache, StepInputs
from roofline.ops.gpu import gpu_ops, linear
from roofline.ops.gpu.attention import Heads, make_tasks
from roofline.ops.gpu.layout import pack
from tests.gpu_compile import Launch, recorded

HIDDEN, HEADS, KV_HEADS, DIM, CHANNELS, VOCABULARY = 4096, 32, 8, 128, 14336, 128256
META = torch.device("meta")
SPILLED_BYTES = {80: 8, 90: 0}  # two registers of the tiles of prompts, on an A100


def weight(rows: int, columns: int, floats: torch.dtype | None) -> Int8Weight | FloatWeight:
    """A matrix without memory."""
    if floats is not None:
        return FloatWeight(torch.empty(rows, columns, dtype=floats, device=META))
    values = torch.empty(rows, columns, dtype=torch.int8, device=META)
    return Int8Weight(values, torch.empty(rows, columns // 128, device=META), 128, 0)


def scratch_values(tokens: int, dtype: torch.dtype, floats: bool) -> int:
    """What the budget gives these steps."""
    name, group = str(dtype).removeprefix("torch."), 0 if floats else 128

    def matrix(rows: int, columns: int) -> MatrixPlan:
        return MatrixPlan("", rows, columns, group, 0, name)

    planned = LayerPlan(
        matrix((HEADS + 2 * KV_HEADS) * DIM, HIDDEN), matrix(HIDDEN, HEADS * DIM),
        matrix(2 * CHANNELS, HIDDEN), matrix(HIDDEN, CHANNELS),
    )  # fmt: skip
    plan = ModelPlan({0: planned}, None, matrix(VOCABULARY, HIDDEN), 0)
    return gpu_scratch_values(plan, tokens, name, False)


def layer(
    tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    cache: torch.dtype = torch.bfloat16,
    *,
    floats: bool = False,
    int8_activations: bool = False,
    deterministic: bool = False,
) -> list[Launch]:
    """What a step of some tokens launches, but for attention and sampling."""
    tasks = make_tasks(Heads(HEADS, KV_HEADS, DIM), dtype, cache, 64, META, deterministic=False)
    scratch = torch.empty(scratch_values(tokens, dtype, floats), device=META)
    ops = gpu_ops.GpuOps(dtype, scratch, tasks, None)

    def matrix(rows: int, columns: int, paired: bool = False):
        held = weight(rows, columns, dtype if floats else None)
        options = dict(int8_activations=int8_activations, deterministic=deterministic)
        return pack(held, paired, dtype=dtype, **options)

    def run() -> None:
        residual = torch.empty(tokens, HIDDEN, device=META)
        norm = torch.empty(HIDDEN, device=META)
        values = torch.empty(2, 2, 1000, KV_HEADS, 64, DIM, dtype=cache, device=META)
        scales = torch.empty(values.shape[:-1], device=META) if cache.itemsize == 1 else None
        ids = torch.empty(tokens, dtype=torch.int64, device=META)
        words = torch.empty(64, dtype=torch.int32, device=META)
        inputs = StepInputs(ids, ids, ids, words, words, words)
        query = torch.empty(tokens, HEADS, DIM, dtype=dtype, device=META)
        activated = torch.empty(tokens, CHANNELS, dtype=dtype, device=META)
        rope = torch.empty(2, 4096, DIM // 2, device=META)
        head = matrix(VOCABULARY, HIDDEN)
        ops.embed(ids, head, 0, residual)
        ops.norm_qkv_rope_store(
            residual, residual, norm, 1e-5, matrix((HEADS + 2 * KV_HEADS) * DIM, HIDDEN), None,
            None, None, rope, inputs, KvCache(values, scales), 1, query,
        )  # fmt: skip
        ops.linear(query.view(tokens, -1), matrix(HIDDEN, HEADS * DIM), residual)
        gate_up = matrix(2 * CHANNELS, HIDDEN, True)
        ops.norm_gate_up_swiglu(residual, residual, norm, 1e-5, gate_up, activated)
        ops.linear(activated, matrix(HIDDEN, CHANNELS), residual)
        if tokens <= 256:
            logits = torch.empty(tokens, VOCABULARY, device=META)
            ops.norm_head(residual, residual, ids, norm, 1e-5, head, logits)

    return recorded(run, [linear, gpu_ops])


def main() -> None:
    """Compile, print, and stop at what spills."""
    capability, thorough = int(sys.argv[1]), len(sys.argv) > 2
    steps = [layer(1), layer(8), layer(64)]
    if thorough:
        steps += [layer(n) for n in (2, 24, 100, 300, 2048)]
        steps += [layer(n, int8_activations=True) for n in (1, 8, 24, 64, 2048)]
        steps += [layer(n, cache=torch.int8) for n in (1, 2)]
        steps += [layer(n, floats=True) for n in (1, 8, 24, 64, 100)]
        steps += [layer(n, torch.float16) for n in (1, 8, 2048)]
        steps += [layer(n, torch.float32, torch.float32) for n in (1, 8, 300)]
        steps += [layer(n, deterministic=True) for n in (1, 64, 300)]
        steps += [layer(n, deterministic=True, int8_activations=True) for n in (1, 300)]
        if capability >= 89:
            steps.append(layer(1, cache=torch.float8_e4m3fn))
    seen: set[str] = set()
    for launch in {repr(launch): launch for step in steps for launch in step}.values():
        made = launch.compile(capability)
        line = f"{made.name} {launch.options} {made.registers} registers, "
        line += f"{made.spilled_bytes} spilled, {made.shared_bytes} shared bytes"
        waits = made.ptx.count("griddepcontrol.wait")
        assert made.spilled_bytes <= SPILLED_BYTES[capability], line
        assert made.shared_bytes <= (227 if capability >= 90 else 163) * 1024, line
        assert waits == (capability >= 90), line
        if made.name == "gemv" and capability >= 90:
            before = made.ptx.split("griddepcontrol.wait")[0]
            assert "ld.global" in before, line
        if made.ptx not in seen:
            print(line)
        seen.add(made.ptx)


if __name__ == "__main__":
    main()
