"""What follows the QKV projection: bias, norm of heads, rotary embedding, the write to the cache.

A program takes one head of one token, whose largest value is the scale of a quantised cache.
"""

import triton
import triton.language as tl

from roofline.ops.gpu.norms import SMALLEST_NORMAL, largest_of, rounded
from roofline.ops.gpu.triton_support import let_next_start, to_float8, wait_for_previous


@triton.jit(do_not_specialize=["T"])
def rope_store(
    mixed,  # [SPLITS, T, (Hq + 2 Hkv) D] float32: partial sums of the projection
    bias,  # [(Hq + 2 Hkv) D] float32, or None
    q_norm,  # [D] float32, or None
    k_norm,  # [D] float32, or None
    eps,
    cosines,  # [max_model_len, D / 2] float32
    sines,  # [max_model_len, D / 2] float32
    positions,  # [T] int64
    slots,  # [T] int64
    values,  # [2, blocks, Hkv, block_tokens, D]: the layer's cache
    scales,  # [2, blocks, Hkv, block_tokens] float32, or None
    query,  # [T, Hq, D] activation dtype
    T,
    heads,
    kv_heads,
    blocks,
    block_tokens,
    HALF: tl.constexpr,  # D / 2
    BLOCK: tl.constexpr,  # at least HALF
    SPLITS: tl.constexpr,
    FLOAT8: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: tokens, then heads: queries, keys, values."""
    let_next_start(PDL)
    wait_for_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    column = tl.arange(0, BLOCK)
    inside = column < HALF
    rows = (heads + 2 * kv_heads) * (2 * HALF)
    start = head * (2 * HALF) + column
    first = tl.zeros([BLOCK], tl.float32)
    second = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        part = mixed + (tl.cast(T, tl.int64) * split + token) * rows + start
        first += tl.load(part, mask=inside, other=0)
        second += tl.load(part + HALF, mask=inside, other=0)
    if bias is not None:
        first += tl.load(bias + start, mask=inside, other=0)
        second += tl.load(bias + start + HALF, mask=inside, other=0)
    if q_norm is not None:  # noqa: SIM102 - the outer condition is a constant
        if head < heads:
            first, second = _normed(first, second, q_norm, column, inside, eps, HALF)
    if k_norm is not None:  # noqa: SIM102
        if (head >= heads) & (head < heads + kv_heads):
            first, second = _normed(first, second, k_norm, column, inside, eps, HALF)
    if head < heads + kv_heads:
        position = tl.load(positions + token)
        cosine = tl.load(cosines + position * HALF + column, mask=inside, other=0)
        sine = tl.load(sines + position * HALF + column, mask=inside, other=0)
        turned = first * cosine - second * sine
        second = second * cosine + first * sine
        first = turned
    if head < heads:
        turned_to = query + (token * heads + head) * (2 * HALF) + column
        tl.store(turned_to, first.to(query.dtype.element_ty), mask=inside)
        tl.store(turned_to + HALF, second.to(query.dtype.element_ty), mask=inside)
    else:
        slot = tl.load(slots + token)
        is_value = (head - heads) // kv_heads
        kv_head = (head - heads) % kv_heads
        block = tl.cast(is_value, tl.int64) * blocks + slot // block_tokens
        vector = (block * kv_heads + kv_head) * block_tokens + slot % block_tokens
        written = inside & (slot >= 0)
        place = values + vector * (2 * HALF) + column
        if scales is not None:
            halves = tl.maximum(tl.abs(first), tl.abs(second), propagate_nan=tl.PropagateNan.ALL)
            largest = tl.sum(largest_of(halves[None, :]), axis=0)  # of one
            limit = 448.0 if FLOAT8 else 127.0
            scale = tl.div_rn(largest, limit)
            scale = tl.where(scale < SMALLEST_NORMAL, 1.0, scale)
            tl.store(scales + vector, scale, mask=slot >= 0)
            _store_half(place, first, scale, written, FLOAT8)
            _store_half(place + HALF, second, scale, written, FLOAT8)
        else:
            tl.store(place, first.to(values.dtype.element_ty), mask=written)
            tl.store(place + HALF, second.to(values.dtype.element_ty), mask=written)


@triton.jit
def _store_half(place, x, scale, written, FLOAT8: tl.constexpr):
    """Half a head over its scale, rounded half to even."""
    if FLOAT8:
        within = tl.div_rn(x, scale)
        within = tl.where(within > 448.0, 448.0, tl.where(within < -448.0, -448.0, within))
        tl.store(place, to_float8(within, place.dtype.element_ty), mask=written)
    else:
        tl.store(place, rounded(x, scale), mask=written)


@triton.jit
def _normed(first, second, weight, column, inside, eps, HALF: tl.constexpr):
    """RMSNorm of a head, its halves apart."""
    squares = tl.sum(first * first) + tl.sum(second * second)
    scale = 1 / tl.sqrt(squares / (2 * HALF) + eps)
    first *= scale * tl.load(weight + column, mask=inside, other=0)
    second *= scale * tl.load(weight + column + HALF, mask=inside, other=0)
    return first, second
