"""Attention of rows with few new tokens: the KV of a row is cut into spans, for many programs.

A decoded token reads its whole context once: 2 x Hkv x D x bytes a position, 4,096 B a layer of
Llama-3.1-8B in bfloat16, and does 4 x Hq x D FLOPs with it, so memory is the limit by far. Spans of
all rows form one list, planned once a step on the device and shared by its layers; a fixed grid
works it off. Whoever finishes a row's last span adds up the row's spans, in their order.
"""

import triton
import triton.language as tl

from roofline.ops.gpu.attention_walk import walk
from roofline.ops.gpu.triton_support import let_next_start, wait_for_previous

TASK_WORDS = tl.constexpr(8)  # int32 a task: row, positions [first, last), tokens [start, stop),
# context, spans of its row, first task of its row. Word 0 of the list is the number of tasks.
_CANDIDATES = tl.constexpr(24)  # spans of 1, 2, 3, 4, 6, 8, 12, ... tiles are weighed, to 6,144
_OVERHEAD_TILES = tl.constexpr(2)  # what starting and ending a span costs, in tiles
_GATHERED_LINES = tl.constexpr(4)  # query lines whose spans are added up at a time
_GATHERED_VALUES = tl.constexpr(2048)  # of a line at a time: spans x WIDTH, as registers hold


@triton.jit
def plan_tasks(
    query_start,  # [rows + 1] int32
    context_len,  # [rows] int32
    tasks,  # [TASK_WORDS * (1 + capacity)] int32
    arrivals,  # [rows, KV_HEADS] int32
    rows,
    capacity,  # tasks there is room for, at least rows
    programs,  # of `decode`
    window,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads a KV head
    ROWS: tl.constexpr,  # query rows `decode` takes: tokens x GROUP of a row of the step
    TILE: tl.constexpr,
    TABLE_ROWS: tl.constexpr,  # rows, rounded up to a power of two
    SHARE: tl.constexpr,  # tasks a program writes
    WINDOWED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Write the list of tasks, with the span that lets all programs finish soonest."""
    let_next_start(PDL)
    wait_for_previous(PDL)
    row = tl.arange(0, TABLE_ROWS)
    low, high = _tiles_of(
        query_start, context_len, row, row < rows, window, GROUP, ROWS, TILE, WINDOWED
    )
    longest = tl.max(high - low, 0)
    best, span = 1 << 30, 1
    for candidate in range(_CANDIDATES):
        step = candidate - 1
        tiles = tl.where(candidate == 0, 1, (2 + (step & 1)) << tl.maximum(step >> 1, 0))
        count = tl.sum((high + tiles - 1) // tiles - low // tiles, 0)
        turns = (count * KV_HEADS + programs - 1) // programs
        cost = turns * (tl.minimum(tiles, longest) + _OVERHEAD_TILES)
        better = (count <= capacity) & (cost < best)
        best, span = tl.where(better, cost, best), tl.where(better, tiles, span)
    counts = (high + span - 1) // span - low // span
    ends = tl.cumsum(counts, 0)
    count = tl.sum(counts, 0)

    task = tl.program_id(0) * SHARE + tl.arange(0, SHARE)
    for head in range(KV_HEADS):
        tl.store(arrivals + task * KV_HEADS + head, 0, mask=task < rows)
    if tl.program_id(0) == 0:
        tl.store(tasks, count)
    live = task < count
    mine = tl.sum((ends[None, :] <= task[:, None]).to(tl.int32), 1)
    begin = tl.sum(tl.where(row[None, :] == mine[:, None], (ends - counts)[None, :], 0), 1)
    low, high = _tiles_of(query_start, context_len, mine, live, window, GROUP, ROWS, TILE, WINDOWED)
    index = low // span + task - begin
    entry = tasks + (1 + task) * TASK_WORDS
    context = tl.load(context_len + mine, mask=live, other=0)
    tl.store(entry, mine, mask=live)
    tl.store(entry + 1, tl.maximum(index * span, low) * TILE, mask=live)
    tl.store(entry + 2, tl.minimum((index + 1) * span * TILE, context), mask=live)
    tl.store(entry + 3, tl.load(query_start + mine, mask=live, other=0), mask=live)
    tl.store(entry + 4, tl.load(query_start + mine + 1, mask=live, other=0), mask=live)
    tl.store(entry + 5, context, mask=live)
    tl.store(entry + 6, (high + span - 1) // span - low // span, mask=live)
    tl.store(entry + 7, begin, mask=live)


@triton.jit
def _tiles_of(query_start, context_len, row, live, window, GROUP, ROWS, TILE, WINDOWED):
    """First tile of KV that each row's tokens see and the one after their last; 0, 0: not ours."""
    tokens = tl.load(query_start + row + 1, mask=live, other=0) - tl.load(
        query_start + row, mask=live, other=0
    )
    live = live & (tokens > 0) & (tokens * GROUP <= ROWS)
    context = tl.load(context_len + row, mask=live, other=0)
    low = tl.zeros_like(context)
    if WINDOWED:
        low = tl.maximum(context - tokens + 1 - window, 0) // TILE
    return tl.where(live, low, 0), tl.where(live, (context + TILE - 1) // TILE, 0)


@triton.jit
def decode(
    query,  # [T, KV_HEADS * GROUP, DIM]
    keys,  # [blocks, KV_HEADS, BLOCK_TOKENS, DIM], as values
    values,
    key_scales,  # [blocks, KV_HEADS, BLOCK_TOKENS] float32 where QUANTIZED, as value_scales
    value_scales,
    block_table,  # [rows, table_width] int32
    tasks,  # of `plan_tasks`
    arrivals,  # [rows, KV_HEADS] int32: spans finished; 0 before and after
    mixtures,  # [capacity, KV_HEADS, ROWS, WIDTH] float32: of each span, the weighted values
    sums,  # [capacity, KV_HEADS, 2, ROWS] float32: highest score, sum of weights
    out,  # [T, KV_HEADS * GROUP, DIM]
    table_width,
    window,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    QUANTIZED: tl.constexpr,
    WINDOWED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Work off the tasks, one KV head of one span at a time."""
    let_next_start(PDL)
    wait_for_previous(PDL)
    line, channel = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    pieces = tl.load(tasks) * KV_HEADS
    for piece in range(tl.program_id(0), pieces, tl.num_programs(0)):
        task = piece // KV_HEADS
        head = piece - task * KV_HEADS
        entry = tasks + (1 + task) * TASK_WORDS
        row, first, last = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
        token, stop, context = tl.load(entry + 3), tl.load(entry + 4), tl.load(entry + 5)
        spans, begin = tl.load(entry + 6), tl.load(entry + 7)

        lines = (stop - token) * GROUP
        held = (line < lines)[:, None] & (channel < DIM)[None, :]
        place = (token + line // GROUP) * (KV_HEADS * GROUP) + head * GROUP + line % GROUP
        offset = place[:, None] * DIM + channel[None, :]
        q = tl.load(query + offset, mask=held, other=0.0)
        oldest = 0
        if WINDOWED:
            oldest = tl.maximum(context - (stop - token) + 1 - window, 0)
            first = tl.maximum(first, oldest // TILE * TILE)  # planned for a wider window
        highest, total, mixed = walk(
            q,
            context - (stop - token) + line // GROUP,
            tl.full([ROWS], -float("inf"), tl.float32),
            tl.zeros([ROWS], tl.float32),
            tl.zeros([ROWS, WIDTH], tl.float32),
            keys,
            values,
            key_scales,
            value_scales,
            block_table + row * table_width,
            head,
            first,
            last,
            oldest,
            context,
            window,
            scale,
            KV_HEADS,
            BLOCK_TOKENS,
            DIM,
            WIDTH,
            TILE,
            QUANTIZED,
            WINDOWED,
            True,
        )
        if spans == 1:
            tl.store(out + offset, (mixed / total[:, None]).to(out.dtype.element_ty), mask=held)
        else:
            at = sums + piece * (2 * ROWS) + line
            tl.store(at, highest, mask=line < lines)
            tl.store(at + ROWS, total, mask=line < lines)
            at = mixtures + (piece * ROWS + line).to(tl.int64)[:, None] * WIDTH + channel[None, :]
            tl.store(at, mixed, mask=held)
            tl.debug_barrier()  # all threads' stores come before the one that tells of them
            arrived = tl.atomic_add(arrivals + row * KV_HEADS + head, 1, sem="acq_rel")
            if arrived == spans - 1:
                tl.store(arrivals + row * KV_HEADS + head, 0)
                for start in range(0, lines, _GATHERED_LINES):
                    each = start + tl.arange(0, _GATHERED_LINES)
                    wanted = (each < lines)[:, None] & (channel < DIM)[None, :]
                    target = (token + each // GROUP) * (KV_HEADS * GROUP) + each % GROUP
                    gathered = _gather(
                        mixtures, sums, begin * KV_HEADS + head, spans, each, lines,
                        DIM, KV_HEADS, ROWS, WIDTH,
                    )  # fmt: skip
                    tl.store(
                        out + (target + head * GROUP)[:, None] * DIM + channel[None, :],
                        gathered.to(out.dtype.element_ty),
                        mask=wanted,
                    )


@triton.jit
def _gather(mixtures, sums, piece, spans, line, lines, DIM, KV_HEADS, ROWS, WIDTH: tl.constexpr):
    """The attention [lines, WIDTH] of some query lines, of all spans of their row."""
    AT_A_TIME: tl.constexpr = _GATHERED_VALUES // WIDTH
    channel = tl.arange(0, WIDTH)
    highest = tl.full([_GATHERED_LINES], -float("inf"), tl.float32)
    total = tl.zeros([_GATHERED_LINES], tl.float32)
    mixed = tl.zeros([_GATHERED_LINES, WIDTH], tl.float32)
    for start in range(0, spans, AT_A_TIME):
        span = start + tl.arange(0, AT_A_TIME)
        live = (span < spans)[None, :] & (line < lines)[:, None]
        place = (piece + span * KV_HEADS).to(tl.int64)[None, :] * ROWS
        # Past the first-level cache, which may hold what an earlier layer left there.
        at = sums + place * 2 + line[:, None]
        peaks = tl.load(at, mask=live, other=-float("inf"), cache_modifier=".cg")
        parts = tl.load(at + ROWS, mask=live, other=0.0, cache_modifier=".cg")
        mixture = tl.load(
            mixtures + (place + line[:, None])[:, :, None] * WIDTH + channel[None, None, :],
            mask=live[:, :, None] & (channel < DIM)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        higher = tl.maximum(highest, tl.max(peaks, 1))
        finite = tl.where(higher == -float("inf"), 0.0, higher)
        weights = tl.exp2(peaks - finite[:, None])
        keep = tl.exp2(highest - finite)
        total = total * keep + tl.sum(weights * parts, 1)
        mixed = mixed * keep[:, None] + tl.sum(weights[:, :, None] * mixture, 1)
        highest = higher
    return mixed / total[:, None]
