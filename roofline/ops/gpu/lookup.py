"""INT8 matrices as floats: single rows for the embedding, whole ones for long prompts' products."""

import triton
import triton.language as tl

from roofline.ops.gpu.gemv import span_columns, span_groups, span_weights
from roofline.ops.gpu.triton_support import let_next_start, wait_for_previous


@triton.jit
def float_weights(
    weight,
    scales,
    rows,  # [R]
    K,
    G,
    step,
    SHIFT: tl.constexpr,
    OFFSET: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Weights [R, CHUNKS, CHUNK] float32 of a span."""
    values = span_weights(weight, rows, K, step, SHIFT, CHUNKS, CHUNK, False).to(tl.float32)
    if scales is not None:
        groups = span_groups(G, step, SHIFT, OFFSET, CHUNKS, CHUNK, GROUP)
        values *= tl.load(scales + rows[:, None] * G + groups[None, :])[:, :, None]
    return values


@triton.jit
def dequantize(
    weight,  # [N, K] int8
    scales,  # [N, G] float32
    out,  # [N, K] activation dtype
    N,
    K,
    G,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    SHIFT: tl.constexpr,
    OFFSET: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
):
    """ROWS rows by a span of K a program."""
    let_next_start(PDL)
    wait_for_previous(PDL)
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows, step = tl.minimum(index, N - 1), tl.program_id(1)
    values = float_weights(weight, scales, rows, K, G, step, SHIFT, OFFSET, CHUNKS, CHUNK, GROUP)
    columns = span_columns(step, SHIFT, CHUNKS, CHUNK)
    place = out + rows.to(tl.int64)[:, None, None] * K + columns
    tl.store(place, values.to(out.dtype.element_ty), mask=(columns >= 0) & (columns < K))


@triton.jit
def embed(
    token_ids,  # [T] int64
    weight,  # [V, H] int8 or floats
    scales,  # [V, G] float32, of int8
    out,  # [T, H] float32
    first_id,
    V,
    H,
    G,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
):
    """A span of a token's row a program; zeros for tokens of another rank's vocabulary."""
    let_next_start(PDL)
    wait_for_previous(PDL)
    token, step = tl.program_id(0), tl.program_id(1)
    local = tl.load(token_ids + token) - first_id
    here = (local >= 0) & (local < V)
    rows = tl.where(here, local, 0) + tl.arange(0, 1)
    values = float_weights(weight, scales, rows, H, G, step, 0, 0, CHUNKS, CHUNK, GROUP)
    columns = span_columns(step, 0, CHUNKS, CHUNK)
    place = out + tl.cast(token, tl.int64) * H + columns
    tl.store(place, tl.where(here, values, 0.0), mask=columns < H)
