"""One token's QKV projection, rotary embedding and write to the cache in one launch.

For a cache in floats and heads without a norm: then a pair of rows is all that a pair of channels
needs. Else `gemv`, then `rope_store`.
"""

import triton
import triton.language as tl

from roofline.ops.gpu.gemv import row_sums
from roofline.ops.gpu.triton_support import let_next_start


@triton.jit
def gemv_rope_store(
    x,  # [K] floats or int8
    x_steps,  # [G, x_stride] float32, of int8
    weight,  # [(Hq + 2 Hkv) D, K] floats or int8
    scales,  # [(Hq + 2 Hkv) D, G] float32, of int8
    bias,  # [(Hq + 2 Hkv) D] float32, or None
    cosines,  # [max_model_len, D / 2] float32
    sines,  # [max_model_len, D / 2] float32
    positions,  # [1] int64
    slots,  # [1] int64
    values,  # [2, blocks, Hkv, block_tokens, D]: the layer's cache
    query,  # [1, Hq, D]
    K,
    G,
    x_stride,
    heads,
    kv_heads,
    blocks,
    block_tokens,
    HALF: tl.constexpr,  # D / 2
    ROWS: tl.constexpr,  # two for each pair of channels
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    STEPS: tl.constexpr,
    SHIFT: tl.constexpr,
    OFFSET: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """ROWS rows a program."""
    let_next_start(PDL)
    pairs = (heads + 2 * kv_heads) * HALF
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pair_of_row = tl.minimum(index // 2, pairs - 1)
    rows = pair_of_row // HALF * (2 * HALF) + index % 2 * HALF + pair_of_row % HALF
    sums = row_sums(
        x, x_steps, weight, scales, rows, K, G, x_stride,
        CHUNKS, CHUNK, STEPS, SHIFT, OFFSET, GROUP, EVEN, PDL,
    )  # fmt: skip
    if bias is not None:
        sums += tl.load(bias + rows)
    first, second = tl.split(tl.reshape(sums, [ROWS // 2, 2]))

    pair = tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS // 2)
    head, channel = pair // HALF, pair % HALF
    turns = head < heads + kv_heads
    angle = tl.load(positions) * HALF + channel
    cosine = tl.load(cosines + angle, mask=turns, other=1)
    sine = tl.load(sines + angle, mask=turns, other=0)
    turned = tl.where(turns, first * cosine - second * sine, first)
    second = tl.where(turns, second * cosine + first * sine, second)

    asks = head < heads
    place = query + head * (2 * HALF) + channel
    tl.store(place, turned.to(query.dtype.element_ty), mask=asks)
    tl.store(place + HALF, second.to(query.dtype.element_ty), mask=asks)

    slot = tl.load(slots)
    kv_head = tl.maximum(head - heads, 0)
    block = (kv_head // kv_heads).to(tl.int64) * blocks + slot // block_tokens
    vector = (block * kv_heads + kv_head % kv_heads) * block_tokens + slot % block_tokens
    kept = values + vector * (2 * HALF) + channel
    written = (pair < pairs) & (head >= heads) & (slot >= 0)
    tl.store(kept, turned.to(values.dtype.element_ty), mask=written)
    tl.store(kept + HALF, second.to(values.dtype.element_ty), mask=written)
