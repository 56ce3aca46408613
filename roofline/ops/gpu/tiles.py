"""Linears of several tokens on the tensor cores: a tile of weight rows times a tile of tokens.

Weights are the left operand, so that they become floats in registers, once, on their way to it;
a group's scale multiplies its float32 sums. Up to 64 tokens the weights' bytes are the cost, and
few rows' tiles must keep every multiprocessor busy: K is cut in splits, which write partial sums
that `sum_splits` adds in order. No atomics: the same input always gives the same bits.
"""

import triton
import triton.language as tl

from roofline.ops.gpu.triton_support import (
    dot,
    let_next_start,
    to_operand,
    wait_for_previous,
)


@triton.jit
def prefetch(place):
    """Ask for the cache lines of pointers to be brought to the second cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [place],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit(do_not_specialize=["T", "split_chunks"])
def tiles(
    x,  # [T, K] floats or int8
    x_steps,  # [G, x_stride] float32, one a token and group, of int8
    weight,  # [N, K] floats or int8
    scales,  # [N, G] float32, of int8
    out,  # [T, N], or [T, N / 2] of a pair; float32 [splits, T, N] of partial sums
    infinite,  # [1] int32, set where a product is NaN or infinite; or None
    T,
    N,
    K,
    G,
    x_stride,
    out_stride,  # values of a token
    split_chunks,  # chunks of K of a split
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
    SHIFT: tl.constexpr,
    OFFSET: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    PAIRED: tl.constexpr,  # the two halves of the rows are gate and up: out = silu(gate) * up
    PREFETCHED_LINES: tl.constexpr,  # of 128 bytes of each row, before the wait
    PDL: tl.constexpr,
):
    """A tile of tokens by a tile of rows by a split of K a program; tokens change fastest."""
    let_next_start(PDL)
    index = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    rows = index
    if PAIRED:
        rows = index // 2 + index % 2 * (N // 2)
    rows = tl.minimum(rows, N - 1)
    first_chunk = tl.program_id(2) * split_chunks
    row_place = weight + rows.to(tl.int64)[:, None] * K
    if PDL:
        bits: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth
        line = tl.arange(0, PREFETCHED_LINES) * (1024 // bits)
        ahead = tl.minimum(tl.maximum(first_chunk * CHUNK - SHIFT + line, 0), K - 1)
        prefetch(row_place + ahead[None, :])
    wait_for_previous(PDL)

    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    token_place = x + token.to(tl.int64)[None, :] * K
    live = token < T
    sums = tl.zeros([ROWS, TOKENS], tl.float32)
    scale_place = scales
    if scales is not None:
        scale_place = scales + rows * G
        next_scale = tl.load(scale_place + _group(first_chunk, G, CHUNK, SHIFT, OFFSET, GROUP))
    for step in range(split_chunks):
        chunk = first_chunk + step
        column = chunk * CHUNK - SHIFT + tl.arange(0, CHUNK)
        if EVEN:
            values = tl.load(row_place + column[None, :])
            given = tl.load(token_place + column[:, None], mask=live[None, :], other=0)
        else:
            inside = (column >= 0) & (column < K)
            values = tl.load(row_place + column[None, :], mask=inside[None, :], other=0)
            mask = inside[:, None] & live[None, :]
            given = tl.load(token_place + column[:, None], mask=mask, other=0)
        if scales is not None:
            group = _group(chunk, G, CHUNK, SHIFT, OFFSET, GROUP)
            scale = next_scale
            # A step early: its latency is hidden.
            later = _group(chunk + 1, G, CHUNK, SHIFT, OFFSET, GROUP)
            next_scale = tl.load(scale_place + later)
            if x_steps is not None:
                part = dot(values, given, tl.zeros([ROWS, TOKENS], tl.int32))
                x_step = tl.load(x_steps + group * x_stride + token, mask=live, other=0)
                sums += part.to(tl.float32) * (scale[:, None] * x_step[None, :])
            else:
                operand = to_operand(values, given.dtype)
                part = dot(operand, given, tl.zeros([ROWS, TOKENS], tl.float32))
                sums += part * scale[:, None]
        else:
            sums = dot(values, given, sums)

    if PAIRED:
        paired = tl.permute(tl.reshape(sums, [ROWS // 2, 2, TOKENS]), (0, 2, 1))
        gate, up = tl.split(paired)
        channel = tl.program_id(1) * (ROWS // 2) + tl.arange(0, ROWS // 2)
        value = gate / (1 + tl.exp(-gate)) * up
        place = out + token.to(tl.int64)[None, :] * out_stride + channel[:, None]
        mask = live[None, :] & (channel < N // 2)[:, None]
        tl.store(place, value.to(out.dtype.element_ty), mask=mask)
    else:
        mask = live[None, :] & (index < N)[:, None]
        row = tl.program_id(2).to(tl.int64) * T + token
        tl.store(
            out + row[None, :] * out_stride + index[:, None],
            sums.to(out.dtype.element_ty),
            mask=mask,
        )
        if infinite is not None:
            broken = tl.where(mask & (tl.abs(sums) < float("inf")), 0, mask.to(tl.int32))
            found = tl.max(tl.max(broken, axis=1), axis=0)
            tl.store(infinite, 1, mask=found > 0)


@triton.jit
def _group(
    chunk,
    G,
    CHUNK: tl.constexpr,
    SHIFT: tl.constexpr,
    OFFSET: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The group of a chunk, the last one past the end; GROUP is 0 where all of a row is one."""
    if GROUP == 0:
        return chunk * 0
    return tl.minimum((chunk * CHUNK - SHIFT + OFFSET) // GROUP, G - 1)


@triton.jit
def sum_splits(
    partial,  # [SPLITS, values] float32
    out,  # [values]
    values,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Add partial sums in the order of their splits."""
    let_next_start(PDL)
    wait_for_previous(PDL)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < values
    total = tl.load(partial + index, mask=mask)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(partial + tl.cast(values, tl.int64) * split + index, mask=mask)
    tl.store(out + index, total.to(out.dtype.element_ty), mask=mask)
