"""Linears of one token: every weight is read once, by ordinary loads that are 16 bytes a thread.

A decoding step of Llama-3.1-8B reads 7.7 GB of INT8 weights and scales, 2.6 ms of an H100's memory,
and everything else must hide behind them. So a program takes few rows by long spans of K, keeps
two spans in flight, and has the first one on its way before its input is ready (`triton_support`).
"""

import triton
import triton.language as tl

from roofline.ops.gpu.triton_support import let_next_start, wait_for_previous


@triton.jit
def span_columns(step, SHIFT: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr):
    """Columns [1, CHUNKS, CHUNK] of a span; SHIFT of the first lie before the matrix."""
    chunk = step * CHUNKS + tl.arange(0, CHUNKS)
    return chunk[None, :, None] * CHUNK + tl.arange(0, CHUNK)[None, None, :] - SHIFT


@triton.jit
def span_weights(
    weight,  # [N, K]
    rows,  # [R]
    K,
    step,
    SHIFT: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Weights [R, CHUNKS, CHUNK] of a span, read past the first cache: nobody reads them again."""
    columns = span_columns(step, SHIFT, CHUNKS, CHUNK)
    place = weight + rows.to(tl.int64)[:, None, None] * K + columns
    if EVEN:
        return tl.load(place, eviction_policy="evict_first")
    mask = (columns >= 0) & (columns < K)
    return tl.load(place, mask=mask, other=0, eviction_policy="evict_first")


@triton.jit
def span_input(
    x,  # [K]
    rows,  # [R]
    K,
    step,
    SHIFT: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    EVEN: tl.constexpr,
):
    """The input [R, CHUNKS, CHUNK] of a span, once a row: in the layout that its weights have."""
    columns = span_columns(step, SHIFT, CHUNKS, CHUNK)
    place = x + (rows * 0)[:, None, None] + columns
    if EVEN:
        return tl.load(place)
    return tl.load(place, mask=(columns >= 0) & (columns < K), other=0)


@triton.jit
def span_groups(
    G,
    step,
    SHIFT: tl.constexpr,
    OFFSET: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Groups [CHUNKS] of a span; GROUP is 0 where all of a row is one."""
    chunk = step * CHUNKS + tl.arange(0, CHUNKS)
    if GROUP == 0:
        return chunk * 0
    return tl.minimum((chunk * CHUNK - SHIFT + OFFSET) // GROUP, G - 1)


@triton.jit
def row_sums(
    x,  # [K] floats or int8
    x_steps,  # [G, x_stride] float32, of int8
    weight,  # [N, K] floats or int8
    scales,  # [N, G] float32, of int8
    rows,  # [R]
    K,
    G,
    x_stride,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    STEPS: tl.constexpr,
    SHIFT: tl.constexpr,
    OFFSET: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Products [R] float32 of rows with x. What the kernel before wrote may be read after it."""
    values = span_weights(weight, rows, K, 0, SHIFT, CHUNKS, CHUNK, EVEN)
    if scales is not None:
        groups = span_groups(G, 0, SHIFT, OFFSET, CHUNKS, CHUNK, GROUP)
        scale = tl.load(scales + rows[:, None] * G + groups[None, :])
    wait_for_previous(PDL)
    sums = tl.zeros([rows.shape[0], CHUNKS], tl.float32)
    for step in tl.static_range(STEPS):
        now = values
        if scales is not None:
            now_scale = scale
            now_groups = groups
        if step + 1 < STEPS:
            values = span_weights(weight, rows, K, step + 1, SHIFT, CHUNKS, CHUNK, EVEN)
            if scales is not None:
                groups = span_groups(G, step + 1, SHIFT, OFFSET, CHUNKS, CHUNK, GROUP)
                scale = tl.load(scales + rows[:, None] * G + groups[None, :])
        given = span_input(x, rows, K, step, SHIFT, CHUNKS, CHUNK, EVEN)
        part = tl.sum(now.to(tl.float32) * given.to(tl.float32), axis=2)
        if x_steps is not None:
            part *= tl.load(x_steps + now_groups * x_stride)[None, :]
        if scales is not None:
            part *= now_scale
        sums += part
    return tl.sum(sums, axis=1)


@triton.jit
def gemv(
    x,  # [K] floats or int8
    x_steps,  # [G, x_stride] float32, of int8
    weight,  # [N, K] floats or int8
    scales,  # [N, G] float32, of int8
    out,  # [N], or [N / 2] of a pair
    infinite,  # [1] int32, set where a product is NaN or infinite; or None
    N,
    K,
    G,
    x_stride,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    STEPS: tl.constexpr,
    SHIFT: tl.constexpr,
    OFFSET: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    PAIRED: tl.constexpr,  # the two halves of the rows are gate and up: out = silu(gate) * up
    PDL: tl.constexpr,
):
    """ROWS rows a program."""
    let_next_start(PDL)
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = index
    if PAIRED:
        rows = index // 2 + index % 2 * (N // 2)
    rows = tl.minimum(rows, N - 1)
    sums = row_sums(
        x, x_steps, weight, scales, rows, K, G, x_stride,
        CHUNKS, CHUNK, STEPS, SHIFT, OFFSET, GROUP, EVEN, PDL,
    )  # fmt: skip
    if PAIRED:
        gate, up = tl.split(tl.reshape(sums, [ROWS // 2, 2]))
        channel = tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS // 2)
        value = gate / (1 + tl.exp(-gate)) * up
        tl.store(out + channel, value.to(out.dtype.element_ty), mask=channel < N // 2)
    else:
        tl.store(out + index, sums.to(out.dtype.element_ty), mask=index < N)
        if infinite is not None:
            broken = tl.where(tl.abs(sums) < float("inf"), 0, 1)
            tl.store(infinite + index * 0, 1, mask=(index < N) & (broken > 0))
