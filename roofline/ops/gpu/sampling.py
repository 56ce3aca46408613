"""From logits to a token on a GPU: masks, penalties, truncation without a sort, noise, argmax.

A row of 128,256 logits is 0.5 MB; each pass over it is some microseconds from the second-level
cache. Nothing here writes but into its arguments, and a row depends on nothing but itself.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from roofline.ops.gpu.triton_support import launch, let_next_start, wait_for_previous

_CHUNK = 2048  # logits a program of `choose` looks at
_BLOCK = 4096  # logits at a time where one program walks a row


def choose_scratch_floats(rows: int, vocab: int) -> int:
    """Float32 elements of scratch `choose` needs."""
    return 2 * _aligned(rows * -(-vocab // _CHUNK))


def _aligned(floats: int) -> int:
    """So many that what comes after them is aligned at any number of rows: one compiled kernel."""
    return -(-floats // 64) * 64


def choose(
    logits: Tensor,  # [S, V] float32; -inf and NaN are never chosen
    temperature: Tensor,  # [S] float64; 0 = the likeliest
    seed: Tensor,  # [S] int64, the bits of an unsigned number
    position: Tensor,  # [S] int64
    out: Tensor,  # [S] int64: token ids
    scratch: Tensor,  # [choose_scratch_floats(S, V) or more] float32
    *,
    pdl: bool,
) -> None:
    """Argmax of logits / temperature + noise (`ops.noise`), the lowest id winning ties.

    The words of the noise are those of the reference, and so are quotient and sum, correctly
    rounded. Its logarithms are float64, rounded to float32: two libraries give another float32 once
    in some 2**27 draws, and another token where that decides the largest sum.
    """
    rows, vocab = logits.shape
    if not rows:
        return
    assert logits.stride(1) == 1
    chunks = -(-vocab // _CHUNK)
    peaks, ids = scratch, scratch[_aligned(rows * chunks) :].view(torch.int32)
    launch(
        largest_of_chunks, (rows, chunks), pdl,
        logits, temperature, seed, position, peaks, ids, logits.stride(0), vocab, chunks,
        CHUNK=_CHUNK, num_warps=4,
    )  # fmt: skip
    launch(
        largest_of_rows, (rows,), pdl,
        peaks, ids, out, chunks,
        WIDTH=1 << (chunks - 1).bit_length(), num_warps=1,
    )  # fmt: skip


def truncate(
    logits: Tensor,  # [S, V] float32, divided by temperature; what is left out becomes -inf
    min_p: Tensor,  # [S] float32; 0 = off
    top_k: Tensor,  # [S] int64; 0 = off
    top_p: Tensor,  # [S] float64; 1 = off
    *,
    pdl: bool,
) -> None:
    """Set to -inf what min_p, top_k and top_p leave out, in this order: `ops.truncation`, exactly.

    But for exponentials of float64, whose last bit is a library's own: a token before which lies a
    mass within 1e-12 of top_p may fall on either side.
    """
    rows, vocab = logits.shape
    if not rows:
        return
    assert logits.stride(1) == 1
    launch(
        truncate_rows, (rows,), pdl,
        logits, min_p, top_k, top_p, logits.stride(0), vocab,
        BLOCK=2 * _BLOCK, num_warps=32,
    )  # fmt: skip


def keep_allowed(
    logits: Tensor,  # [S, V] float32
    mask: Tensor,  # [masks, ceil(V / 8)] uint8: bit i % 8 of byte i // 8 says token i may come
    mask_of: Tensor,  # [S] int64: which mask is a row's; -1 = none
    *,
    pdl: bool,
) -> None:
    """Set to -inf what a row's mask does not allow."""
    rows, vocab = logits.shape
    if not rows:
        return
    assert logits.stride(1) == 1 and mask.stride(1) == 1
    launch(
        mask_rows, (rows, -(-vocab // _BLOCK)), pdl,
        logits, mask, mask_of, logits.stride(0), mask.stride(0), vocab,
        BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip


def penalize(
    logits: Tensor,  # [S, V] float32
    counts: Tensor,  # [rows, V] int16: times in the output; PROMPT_BIT added where in the prompt
    row: Tensor,  # [S] int64: row of `counts`
    repetition: Tensor,  # [S] float32; 1 = off
    frequency: Tensor,  # [S] float32; 0 = off
    presence: Tensor,  # [S] float32; 0 = off
    *,
    pdl: bool,
) -> None:
    """Repetition (Keskar et al. 2019) over prompt and output; presence, frequency over output."""
    sampled, vocab = logits.shape
    if not sampled:
        return
    assert logits.stride(1) == 1 and counts.stride(1) == 1
    launch(
        penalize_rows, (sampled, -(-vocab // _BLOCK)), pdl,
        logits, counts, row, repetition, frequency, presence, logits.stride(0), counts.stride(0),
        vocab, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip


def count_tokens(
    counts: Tensor,  # [rows, V] int16
    row: Tensor,  # [S] int64: row of `counts`; -1 = none
    token: Tensor,  # [S] int64: what was chosen
    *,
    pdl: bool,
) -> None:
    """Count a chosen token in its row's output; at most one token a row and call."""
    if len(row):
        launch(
            count_rows,
            (-(-len(row) // 128),),
            pdl,
            counts,
            row,
            token,
            counts.stride(0),
            len(row),
            num_warps=4,
        )


PROMPT_BIT = 1 << 14  # of a count: the token is in the prompt


@triton.jit
def largest_of_chunks(
    logits,  # [S, vocab] float32
    temperature,  # [S] float64
    seed,  # [S] int64
    position,  # [S] int64
    peaks,  # [S, chunks] float32: the largest sum of a chunk
    ids,  # [S, chunks] int32: its lowest token
    stride,
    vocab,
    chunks,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One chunk of one row: its largest logit / temperature + noise, and where it is."""
    let_next_start(PDL)
    wait_for_previous(PDL)
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    logit = tl.load(logits + row * stride + token, mask=token < vocab, other=-float("inf"))
    value = tl.where(logit == logit, logit, -float("inf"))
    heat = tl.load(temperature + row)
    if heat != 0:
        place = tl.load(position + row).to(tl.uint32)
        none = tl.zeros([CHUNK], tl.uint32)
        word, _, _, _ = tl.philox(
            tl.load(seed + row), none + place, token.to(tl.uint32), none, none
        )
        # (word + 1/2) / 2**32 and one minus it are exact in float64.
        uniform = (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10
        noise = -tl.log(-tl.log(1.0 - uniform))
        value = tl.div_rn(value, heat.to(tl.float32)) + noise.to(tl.float32)
    peak = tl.max(value, 0)
    tl.store(peaks + row * chunks + chunk, peak)
    tl.store(ids + row * chunks + chunk, tl.min(tl.where(value == peak, token, vocab), 0))


@triton.jit
def largest_of_rows(peaks, ids, out, chunks, WIDTH: tl.constexpr, PDL: tl.constexpr):
    """The token of one row: the lowest id of the largest peak of its chunks."""
    let_next_start(PDL)
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, WIDTH)
    peak = tl.load(peaks + row * chunks + chunk, mask=chunk < chunks, other=-float("inf"))
    token = tl.load(ids + row * chunks + chunk, mask=chunk < chunks, other=(1 << 31) - 1)
    token = tl.where(peak == tl.max(peak, 0), token, (1 << 31) - 1)
    tl.store(out + row, tl.min(token, 0).to(tl.int64))


@triton.jit
def truncate_rows(
    logits, min_p, top_k, top_p, stride, vocab, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """One row. Borders are found by bisection over the order of float32, not by sorting.

    A float's bits, the lower 31 inverted where it is negative, are an integer of the same order: 16
    quarterings find any border exactly, each counting, or adding up the weights of, what lies above
    three pivots.
    """
    let_next_start(PDL)
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * stride
    least_share, kept, mass = tl.load(min_p + row), tl.load(top_k + row), tl.load(top_p + row)
    by_share, by_count, by_mass = least_share > 0, (kept > 0) & (kept < vocab), mass < 1
    if by_share | by_count | by_mass:
        column = tl.arange(0, BLOCK)
        highest = tl.full([BLOCK], -float("inf"), tl.float32)
        for start in range(0, vocab, BLOCK):
            highest = tl.maximum(highest, _values(line, start + column, vocab))
        peak = tl.max(highest, 0)
        bottom, top = (
            _order(tl.full([1], -float("inf"), tl.float32)),
            _order(tl.zeros([1], tl.float32) + peak),
        )
        bottom, top = tl.min(bottom, 0), tl.min(top, 0)
        finite = tl.abs(peak) < float("inf")
        by_share, by_mass = by_share & finite, by_mass & finite
        border = bottom  # the lowest value kept so far
        if by_share:
            limit = tl.log(least_share.to(tl.float64))
            low, high = bottom, top
            while high - low > 1:
                pivot = low + (high - low) // 2
                less = _float(pivot).to(tl.float64) - peak.to(tl.float64) < limit
                low, high = tl.where(less, pivot, low), tl.where(less, high, pivot)
            border = high
        if by_count:
            low, high = border - 1, top + 1  # at least k lie at or above low, fewer at high
            low = tl.maximum(low, bottom)
            while high - low > 1:
                low, high = _quarter(line, low, high, 0, kept, peak, vocab, BLOCK, False)
            border = tl.maximum(border, low)
        none = tl.full([], 0, tl.int64)
        least, above, share = border, none, none
        needed = tl.full([], 1.0, tl.float64)
        if by_mass:
            part = mass * _weight_from(line, least, peak, vocab, BLOCK)
            low, high = least - 1, top  # above low lies enough mass, above high less
            while high - low > 1:
                low, high = _quarter(line, low, high, 1, part, peak, vocab, BLOCK, True)
            border = high
            whole, above, share = _masses(line, least, border, peak, vocab, BLOCK // 4)
            needed = mass * whole.to(tl.float64)
            missed = (above.to(tl.float64) >= needed) | ((above + share).to(tl.float64) < needed)
            if missed:  # weights of float32 were too coarse, once in some thousand rows
                low, high = least - 1, top
                while high - low > 1:
                    pivot = low + (high - low) // 2
                    whole, above, share = _masses(line, least, pivot, peak, vocab, BLOCK // 4)
                    enough = above.to(tl.float64) >= needed
                    low, high = tl.where(enough, pivot, low), tl.where(enough, high, pivot)
                border = high
                whole, above, share = _masses(line, least, border, peak, vocab, BLOCK // 4)
        before = none
        for start in range(0, vocab, BLOCK):
            token = start + column
            order = _order(_values(line, token, vocab))
            equal = (order == border).to(tl.int32)
            rank = before + tl.cumsum(equal, 0) - equal
            before += tl.sum(equal, 0)
            past = (equal == 1) & ((above + rank * share).to(tl.float64) >= needed)
            left_out = (order < border) | past
            tl.store(line + token, -float("inf"), mask=left_out & (token < vocab))


@triton.jit
def _values(line, token, vocab):
    """Logits, -inf past the vocabulary and for NaN, +0 for -0."""
    value = tl.load(line + token, mask=token < vocab, other=-float("inf"))
    value = tl.where(value == value, value, -float("inf"))
    return tl.where(value == 0, 0.0, value)


@triton.jit
def _order(value):
    """Integers [..] int64 in the order of floats."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def _float(order):
    """The float of an integer of `_order`."""
    bits = order.to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _quarter(line, low, high, above, needed, peak, vocab, BLOCK, WEIGHED: tl.constexpr):
    """A quarter of [low, high): what lies at or above low + `above` is enough, and not for high.

    Counts, or where WEIGHED adds up the weights of, what lies above each of three pivots.
    """
    column = tl.arange(0, BLOCK)
    step = high - low
    first, second, third = low + step // 4, low + step // 2, low + step - (step + 3) // 4
    one = tl.zeros([BLOCK], tl.float32)
    two, three = tl.zeros_like(one), tl.zeros_like(one)
    for start in range(0, vocab, BLOCK):
        value = _values(line, start + column, vocab)
        order = _order(value)
        weight = tl.full([BLOCK], 1.0, tl.float32)
        if WEIGHED:
            weight = tl.exp(value - peak)
        one += tl.where(order >= first + above, weight, 0.0)
        two += tl.where(order >= second + above, weight, 0.0)
        three += tl.where(order >= third + above, weight, 0.0)
    is_one = tl.sum(one.to(tl.float64), 0) >= needed
    is_two = tl.sum(two.to(tl.float64), 0) >= needed
    is_three = tl.sum(three.to(tl.float64), 0) >= needed
    higher = tl.where(is_three, high, tl.where(is_two, third, tl.where(is_one, second, first)))
    lower = tl.where(is_three, third, tl.where(is_two, second, tl.where(is_one, first, low)))
    return lower, higher


@triton.jit
def _weight_from(line, border, peak, vocab, BLOCK: tl.constexpr):
    """Sum of exp(value - peak) over the values of a row at or above a border, float64."""
    column = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        value = _values(line, start + column, vocab)
        total += tl.where(_order(value) >= border, tl.exp(value - peak), 0.0)
    return tl.sum(total.to(tl.float64), 0)


@triton.jit
def _masses(line, least, border, peak, vocab, BLOCK: tl.constexpr):
    """Mass of all values from `least` on, of those above a border, of one at it: 2**-43, int64."""
    column = tl.arange(0, BLOCK)
    whole, above = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64)
    for start in range(0, vocab, BLOCK):
        value = _values(line, start + column, vocab)
        order = _order(value)
        mass = tl.where(order >= least, _mass(value, peak), 0)
        whole += mass
        above += tl.where(order > border, mass, 0)
    share = _mass(_float(tl.zeros([1], tl.int64) + border), peak)
    return tl.sum(whole, 0), tl.sum(above, 0), tl.sum(share, 0)


@triton.jit
def _mass(value, peak):
    return (tl.exp(value.to(tl.float64) - peak.to(tl.float64)) * 8796093022208.0 + 0.5).to(tl.int64)


@triton.jit
def mask_rows(
    logits, mask, mask_of, stride, mask_stride, vocab, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """A block of a row's logits: -inf where the bit is 0."""
    let_next_start(PDL)
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    chosen = tl.load(mask_of + row)
    if chosen >= 0:
        token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        byte = tl.load(mask + chosen * mask_stride + token // 8, mask=token < vocab, other=0)
        allowed = (byte.to(tl.int32) >> (token % 8)) & 1
        tl.store(
            logits + row * stride + token, -float("inf"), mask=(allowed == 0) & (token < vocab)
        )


@triton.jit
def penalize_rows(
    logits, counts, row, repetition, frequency, presence, stride, counts_stride, vocab,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A block of a row's logits, by the counts of its tokens."""
    let_next_start(PDL)
    wait_for_previous(PDL)
    sampled = tl.program_id(0).to(tl.int64)
    factor = tl.load(repetition + sampled)
    each, once = tl.load(frequency + sampled), tl.load(presence + sampled)
    if (factor != 1) | (each != 0) | (once != 0):
        token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        live = token < vocab
        place = tl.load(row + sampled) * counts_stride + token
        count = tl.load(counts + place, mask=live, other=0).to(tl.int32)
        at = logits + sampled * stride + token
        value = tl.load(at, mask=live, other=0.0)
        smaller = tl.where(
            value > 0, tl.div_rn(value, tl.zeros_like(value) + factor), value * factor
        )
        value = tl.where(count != 0, smaller, value)
        output = count & 0x3FFF
        less = tl.where(output > 0, each * output.to(tl.float32) + once, 0.0)
        tl.store(at, value - less, mask=live & (count != 0))


@triton.jit(do_not_specialize=["sampled"])
def count_rows(counts, row, token, counts_stride, sampled, PDL: tl.constexpr):
    """128 chosen tokens."""
    let_next_start(PDL)
    wait_for_previous(PDL)
    each = tl.program_id(0) * 128 + tl.arange(0, 128)
    mine = tl.load(row + each, mask=each < sampled, other=-1)
    at = counts + mine * counts_stride + tl.load(token + each, mask=each < sampled, other=0)
    live = mine >= 0
    count = tl.load(at, mask=live, other=0)
    tl.store(at, count + 1, mask=live & ((count & 0x3FFF) < 0x3FFF))
