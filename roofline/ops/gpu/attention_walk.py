"""What both attention kernels do: one query tile walks a stretch of a row's paged KV.

Online softmax in powers of two (Dao et al. 2022; Milakov and Gimelshein 2018): of each query row
the highest score so far, the sum of its weights, and the weighted sum of values stay in registers.
"""

import triton
import triton.language as tl

from roofline.ops.gpu.triton_support import INTERPRETED


@triton.jit
def walk(
    q,  # [ROWS, WIDTH] activation dtype: query heads of one KV head, of one token or several
    position,  # [ROWS] int32, place of each query in its request
    highest,  # [ROWS] float32, base-2 logarithms
    total,  # [ROWS] float32
    mixed,  # [ROWS, WIDTH] float32
    keys,  # [blocks, KV_HEADS, BLOCK_TOKENS, DIM], as values
    values,
    key_scales,  # [blocks, KV_HEADS, BLOCK_TOKENS] float32 where QUANTIZED, as value_scales
    value_scales,
    table,  # the row's block ids, int32
    head,  # KV head
    first,  # positions [first, last), first a multiple of TILE
    last,
    oldest,  # what lies before it or from `context` on may be anything, NaN too
    context,
    window,  # tokens a query sees, itself included, where WINDOWED
    scale,  # of scores, times log2 e
    KV_HEADS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,  # DIM rounded up to a power of two
    TILE: tl.constexpr,  # positions a turn
    QUANTIZED: tl.constexpr,
    WINDOWED: tl.constexpr,
    MASKED: tl.constexpr,  # some query may not see some position, or there is none
):
    """Return highest, total and mixed after the positions [first, last)."""
    channel = tl.arange(0, WIDTH)
    block = _blocks(table, first, context, BLOCK_TOKENS, TILE)
    for start in range(first, last, TILE):
        place = start + tl.arange(0, TILE)
        live = (place >= oldest) & (place < context)
        # The next turn's blocks are looked up here: KV can then be fetched several turns ahead.
        following = _blocks(table, start + TILE, context, BLOCK_TOKENS, TILE)
        slot = (block * KV_HEADS + head) * BLOCK_TOKENS + place % BLOCK_TOKENS
        offset = slot[:, None] * DIM + channel[None, :]
        if MASKED:
            held = live[:, None] & (channel < DIM)[None, :]
            k = tl.load(keys + offset, mask=held, other=0.0)
            v = tl.load(values + offset, mask=held, other=0.0)
        elif WIDTH != DIM:
            k = tl.load(keys + offset, mask=(channel < DIM)[None, :], other=0.0)
            v = tl.load(values + offset, mask=(channel < DIM)[None, :], other=0.0)
        else:
            k = tl.load(keys + offset)
            v = tl.load(values + offset)
        scores = _dot(q, tl.trans(k.to(q.dtype)), tl.zeros([q.shape[0], TILE], tl.float32)) * scale
        if QUANTIZED:
            scores *= tl.load(key_scales + slot, mask=live, other=0.0)[None, :]
        if MASKED:
            seen = live[None, :] & (place[None, :] <= position[:, None])
            if WINDOWED:
                seen = seen & (place[None, :] > position[:, None] - window)
            scores = tl.where(seen, scores, -float("inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        # A query that has seen nothing yet has no highest score: weights are then 0, not NaN.
        finite = tl.where(higher == -float("inf"), 0.0, higher)
        weights = tl.exp2(scores - finite[:, None])
        keep = tl.exp2(highest - finite)
        total = total * keep + tl.sum(weights, 1)
        if QUANTIZED:
            weights *= tl.load(value_scales + slot, mask=live, other=0.0)[None, :]
        mixed = _dot(weights.to(q.dtype), v.to(q.dtype), mixed * keep[:, None])
        highest, block = higher, following
    return highest, total, mixed


@triton.jit
def _blocks(table, start, context, BLOCK_TOKENS: tl.constexpr, TILE: tl.constexpr):
    """Ids of the blocks of a turn's positions: one where it lies in one block, else [TILE]."""
    if BLOCK_TOKENS % TILE == 0:
        block = tl.load(table + start // BLOCK_TOKENS, mask=start < context, other=0)
    else:
        place = start + tl.arange(0, TILE)
        block = tl.load(table + place // BLOCK_TOKENS, mask=place < context, other=0)
    return block.to(tl.int64)


@triton.jit
def _dot(a, b, acc):
    """acc + a @ b; float32 in three products of TF32, near its own rounding on tensor cores."""
    if INTERPRETED:  # its bfloat16 dot multiplies bit patterns
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc, input_precision="tf32x3")
