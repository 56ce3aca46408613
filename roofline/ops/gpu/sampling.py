"""From logits to a token on a GPU: grammar masks, penalties, truncation without a sort, noise, argmax.

A row of 128,256 logits is 0.5 MB; each pass over it is some microseconds from the second-level cache. Nothing here
writes but into its arguments, and a row depends on nothing but itself.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from roofline.ops.gpu.triton_support import let_next_start, wait_for_previous

_CHUNK = 2048  # logits a program of `choose` looks at
_BLOCK = 4096  # logits at a time where one program walks a row


def choose_scratch_floats(rows: int, vocab: int) -> int:
    """Float32 elements of scratch `choose` needs."""
    return 2 * rows * triton.cdiv(vocab, _CHUNK)


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

    The words of the noise are those of the reference, and so are quotient and sum, correctly rounded.
    Its logarithms are float64, rounded to float32: two libraries give another float32 once in some
    2**27 draws, and another token where that decides the largest sum.
    """
    rows, vocab = logits.shape
    if not rows:
        return
    assert logits.stride(1) == 1
    chunks = triton.cdiv(vocab, _CHUNK)
    peaks = scratch[: rows * chunks]
    ids = scratch[rows * chunks : 2 * rows * chunks].view(torch.int32)
    largest_of_chunks[(rows, chunks)](
        logits, temperature, seed, position, peaks, ids, logits.stride(0), vocab, chunks,
        CHUNK=_CHUNK, PDL=pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
    largest_of_rows[(rows,)](
        peaks, ids, out, chunks,
        WIDTH=triton.next_power_of_2(chunks), PDL=pdl, num_warps=1, launch_pdl=pdl,
    )  # fmt: skip


def truncate(
    logits: Tensor,  # [S, V] float32, divided by temperature; what is left out becomes -inf
    min_p: Tensor,  # [S] float32; 0 = off
    top_k: Tensor,  # [S] int64; 0 = off
    top_p: Tensor,  # [S] float64; 1 = off
    *,
    pdl: bool,
) -> None:
    """Leave out what min_p, then top_k, then top_p leave out.

    min_p: less likely than min_p times the likeliest. top_k: less than the k-th largest; ties stay. top_p: tokens
    before which, the largest first and of equals the lowest id, lies a mass of top_p or more. Weights are float32,
    masses sums in float64: a token whose mass lies within 1e-6 of top_p may fall on either side.
    """
    rows, vocab = logits.shape
    if not rows:
        return
    assert logits.stride(1) == 1
    truncate_rows[(rows,)](
        logits, min_p, top_k, top_p, logits.stride(0), vocab,
        BLOCK=_BLOCK, PDL=pdl, num_warps=16, launch_pdl=pdl,
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
    mask_rows[(rows, triton.cdiv(vocab, _BLOCK))](
        logits, mask, mask_of, logits.stride(0), mask.stride(0), vocab,
        BLOCK=_BLOCK, PDL=pdl, num_warps=4, launch_pdl=pdl,
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
    penalize_rows[(sampled, triton.cdiv(vocab, _BLOCK))](
        logits, counts, row, repetition, frequency, presence, logits.stride(0), counts.stride(0),
        vocab, BLOCK=_BLOCK, PDL=pdl, num_warps=4, launch_pdl=pdl,
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
        count_rows[(triton.cdiv(len(row), 128),)](
            counts, row, token, counts.stride(0), len(row), PDL=pdl, num_warps=4, launch_pdl=pdl
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

    A float's bits, the lower 31 inverted where it is negative, are an integer of the same order: 32 halvings find any
    border exactly, each counting, or adding up the weights of, what lies above a pivot.
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
        bottom, top = _order(tl.full([1], -float("inf"), tl.float32)), _order(
            tl.zeros([1], tl.float32) + peak
        )
        bottom, top = tl.min(bottom, 0), tl.min(top, 0)
        border = bottom  # the lowest value kept so far
        if by_share:
            # The weight of a value is monotone in it: the border is the lowest that weighs enough.
            low, high = bottom, top
            while high - low > 1:
                pivot = low + (high - low) // 2
                weight = tl.exp(_float(pivot) - peak)
                low, high = tl.where(weight < least_share, pivot, low), tl.where(
                    weight < least_share, high, pivot
                )
            border = high
        if by_count:
            low, high = border - 1, top + 1  # at least k lie at or above low, fewer at high
            low = tl.maximum(low, bottom)
            while high - low > 1:
                pivot = low + (high - low) // 2
                count = tl.zeros([BLOCK], tl.int32)
                for start in range(0, vocab, BLOCK):
                    value = _values(line, start + column, vocab)
                    count += (_order(value) >= pivot).to(tl.int32)
                enough = tl.sum(count, 0) >= kept
                low, high = tl.where(enough, pivot, low), tl.where(enough, high, pivot)
            border = tl.maximum(border, low)
        equal_kept = vocab + 0  # of those at the border, the lowest ids
        if by_mass:
            whole = _weight_from(line, border, peak, vocab, BLOCK)
            low, high = border - 1, top  # above low lies enough mass, above high less
            while high - low > 1:
                pivot = low + (high - low) // 2
                enough = _weight_from(line, pivot + 1, peak, vocab, BLOCK) / whole >= mass
                low, high = tl.where(enough, pivot, low), tl.where(enough, high, pivot)
            border = high
            above = _weight_from(line, border + 1, peak, vocab, BLOCK) / whole
            share = tl.exp(_float(border) - peak).to(tl.float64) / whole
            equal_kept = tl.ceil((mass - above) / share)
            equal_kept = tl.minimum(equal_kept, vocab).to(tl.int32)
        before = 0
        for start in range(0, vocab, BLOCK):
            token = start + column
            order = _order(_values(line, token, vocab))
            equal = (order == border).to(tl.int32)
            rank = before + tl.cumsum(equal, 0) - equal
            before += tl.sum(equal, 0)
            left_out = (order < border) | ((equal == 1) & (rank >= equal_kept))
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
def _weight_from(line, border, peak, vocab, BLOCK: tl.constexpr):
    """Sum of exp(value - peak) over the values of a row at or above a border, float64."""
    column = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, vocab, BLOCK):
        value = _values(line, start + column, vocab)
        total += tl.where(_order(value) >= border, tl.exp(value - peak), 0.0).to(tl.float64)
    return tl.sum(total, 0)


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
        smaller = tl.where(value > 0, tl.div_rn(value, tl.zeros_like(value) + factor), value * factor)
        value = tl.where(count != 0, smaller, value)
        output = count & 0x3FFF
        less = tl.where(output > 0, each * output.to(tl.float32) + once, 0.0)
        tl.store(at, value - less, mask=live & (count != 0))


@triton.jit
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
