"""Attention of rows with many new tokens over the paged context: FlashAttention-2 (Dao 2023).

A query tile is TOKENS tokens x the GROUP query heads of one KV head, so KV is read once for all of
them. It walks the positions its tokens see in order: a chunk on a cached prefix differs from a
whole prompt in nothing but where it begins. n new tokens on a context of c do
4 x Hq x D x n (c - n / 2) FLOPs: tensor cores are the limit.
"""

import triton
import triton.language as tl

from roofline.ops.gpu.attention_walk import walk
from roofline.ops.gpu.triton_support import let_next_start, wait_for_previous


@triton.jit
def prompt(
    query,  # [T, KV_HEADS * GROUP, DIM]
    keys,  # [blocks, KV_HEADS, BLOCK_TOKENS, DIM], as values
    values,
    key_scales,  # [blocks, KV_HEADS, BLOCK_TOKENS] float32 where QUANTIZED, as value_scales
    value_scales,
    block_table,  # [rows, table_width] int32
    query_start,  # [rows + 1] int32
    context_len,  # [rows] int32
    out,  # [T, KV_HEADS * GROUP, DIM]
    rows,
    table_width,
    window,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TABLE_ROWS: tl.constexpr,  # rows, rounded up to a power of two
    FEWEST: tl.constexpr,  # tokens x GROUP of a row that is left to `decode`; 0: deterministic
    ROWS: tl.constexpr,  # query rows of a tile
    TILE: tl.constexpr,
    QUANTIZED: tl.constexpr,
    WINDOWED: tl.constexpr,
    PDL: tl.constexpr,
):
    """One tile of queries of one KV head. Row r has room for its tiles and a part of one."""
    let_next_start(PDL)
    wait_for_previous(PDL)
    TOKENS: tl.constexpr = ROWS // GROUP
    # The last tiles of a prompt see most: they start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    each = tl.arange(0, TABLE_ROWS)
    starts = tl.load(query_start + each, mask=each < rows, other=0)
    begins = tl.where(each < rows, starts // TOKENS + each, tile + 1)
    row = tl.sum((begins <= tile).to(tl.int32), 0) - 1
    start, stop = tl.load(query_start + row), tl.load(query_start + row + 1)
    context = tl.load(context_len + row)
    skipped = (tile - start // TOKENS - row) * TOKENS  # new tokens of the row before this tile
    tokens = stop - start
    if (skipped < tokens) & (tokens * GROUP > FEWEST):
        line, channel = tl.arange(0, ROWS), tl.arange(0, WIDTH)
        token = skipped + line // GROUP
        lived = (line < TOKENS * GROUP) & (token < tokens)
        held = lived[:, None] & (channel < DIM)[None, :]
        place = (start + token) * (KV_HEADS * GROUP) + head * GROUP + line % GROUP
        offset = place[:, None] * DIM + channel[None, :]
        q = tl.load(query + offset, mask=held, other=0.0)

        position = context - tokens + token
        lowest = context - tokens + skipped  # position of the tile's first token
        oldest = 0
        if WINDOWED:
            oldest = tl.maximum(lowest + 1 - window, 0)
        first = oldest // TILE * TILE
        # Up to here every query of the tile sees every position, but for a window.
        middle = tl.maximum((lowest + 1) // TILE * TILE, first)
        if FEWEST == 0:  # deterministic: one loop, whose roundings depend on no tile's place
            middle = first
        last = tl.minimum(lowest + TOKENS, context)
        highest = tl.full([ROWS], -float("inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        mixed = tl.zeros([ROWS, WIDTH], tl.float32)
        table = block_table + row * table_width
        highest, total, mixed = walk(
            q, position, highest, total, mixed, keys, values, key_scales, value_scales,
            table, head, first, middle, oldest, context, window, scale,
            KV_HEADS, BLOCK_TOKENS, DIM, WIDTH, TILE, QUANTIZED, WINDOWED, WINDOWED,
        )  # fmt: skip
        highest, total, mixed = walk(
            q, position, highest, total, mixed, keys, values, key_scales, value_scales,
            table, head, middle, last, oldest, context, window, scale,
            KV_HEADS, BLOCK_TOKENS, DIM, WIDTH, TILE, QUANTIZED, WINDOWED, True,
        )  # fmt: skip
        tl.store(out + offset, (mixed / total[:, None]).to(out.dtype.element_ty), mask=held)
