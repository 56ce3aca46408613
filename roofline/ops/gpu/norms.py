"""What lies between linears: RMSNorm of the residual, and its rounding to INT8.

The residual is updated here, by the one program of its token, and not in the linear that reads the
normed activations: other programs of that launch could still be reading what one has updated.
"""

import triton
import triton.language as tl

from roofline.ops.gpu.triton_support import let_next_start, wait_for_previous

SMALLEST_NORMAL = tl.constexpr(1.1754943508222875e-38)  # of float32
SMALLEST_PLANES = tl.constexpr(1e-30)  # below, its step's inverse would be infinite
MOST_PLANES = tl.constexpr(32512.0)  # 127 * 256: no high is more than 127
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2**23: added and taken away, it rounds half to even


@triton.jit
def add_norm(
    residual,  # [T, H] float32
    delta,  # [T, H] float32, or None
    sampled,  # [S] int64, the tokens to norm; or None: all
    norm,  # [H] float32
    out,  # [T, H] or [S, H] activation dtype; as `lay` writes it; or [PLANES, T or S, H] int8
    steps,  # [groups of 128, stride] float32, of int8
    infinite,  # [1] int32, which is cleared; or None
    H,
    eps,
    stride,  # or the tokens that are laid out
    LAID: tl.constexpr,  # as `lay` does
    UPDATE: tl.constexpr,  # residual += delta
    PLANES: tl.constexpr,  # 0: floats
    FLOAT: tl.constexpr,  # the activation dtype
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """RMSNorm of residual + delta, a token a program."""
    let_next_start(PDL)
    column = tl.arange(0, BLOCK)
    inside = column < H
    weight = tl.load(norm + column, mask=inside, other=0)
    wait_for_previous(PDL)
    place = tl.program_id(0).to(tl.int64)
    token = place
    if sampled is not None:
        token = tl.load(sampled + place)
    x = tl.load(residual + token * H + column, mask=inside, other=0)
    if delta is not None:
        x += tl.load(delta + token * H + column, mask=inside, other=0)
    if UPDATE:
        tl.store(residual + token * H + column, x, mask=inside)
    scale = 1 / tl.sqrt(tl.sum(x * x) / H + eps)
    value = (x * scale * weight).to(FLOAT)
    if LAID:
        tl.store(out + laid(column, place, stride), value, mask=column < tl.cdiv(H, 128) * 128)
    elif PLANES == 0:
        tl.store(out + place * H + column, value, mask=inside)
    else:
        grouped = tl.reshape(value.to(tl.float32), [BLOCK // 128, 128])
        high, low, step = planes_of(grouped, PLANES)
        group = tl.arange(0, BLOCK // 128)
        within = group[:, None] * 128 + tl.arange(0, 128)[None, :]
        target = out + place * H + within
        tl.store(target, high, mask=within < H)
        if PLANES == 2:
            tl.store(target + tl.num_programs(0).to(tl.int64) * H, low, mask=within < H)
        tl.store(steps + group * stride + place, step, mask=group * 128 < H)
    if infinite is not None:
        tl.store(infinite, 0, mask=place == 0)


@triton.jit
def largest_of(x):
    """Max |x| over the last axis of [R, C]: NaN where one of them is, which `tl.max` leaves out."""
    largest = tl.max(tl.abs(x), axis=1)
    broken = tl.max((x != x).to(tl.int32), axis=1)
    return tl.where(broken > 0, float("nan"), largest)


@triton.jit
def rounded(x, step):
    """x / step rounded half to even, INT8; 0 where that is NaN or infinite."""
    quotient = tl.div_rn(x, step)
    quotient = tl.where(tl.abs(quotient) < 128.0, quotient, 0.0)
    return ((quotient + ROUNDER) - ROUNDER).to(tl.int8)


@triton.jit
def planes_of(x, PLANES: tl.constexpr):
    """[R, C] float32 as int8 high, int8 low and step [R] float32.

    One plane: x = step * high, and low is high. Two: x = step * (256 * high + low), as `stream.cu`
    rounds it. The step of what is not finite is not.
    """
    largest = largest_of(x)
    if PLANES == 1:
        step = tl.where(largest < SMALLEST_NORMAL, 1.0, tl.div_rn(largest, 127.0))
        high = rounded(x, step[:, None])
        low = high
    else:
        finite, none = largest < float("inf"), largest < SMALLEST_PLANES
        most = tl.zeros_like(largest) + MOST_PLANES
        inverse = tl.where(none, 1.0, tl.where(finite, tl.div_rn(most, largest), 0.0))
        step = tl.where(none, 1.0, tl.where(finite, tl.div_rn(largest, most), float("nan")))
        quotient = tl.fma(x, tl.broadcast_to(inverse[:, None], x.shape), ROUNDER) - ROUNDER
        whole = tl.where(tl.abs(quotient) < 32768.0, quotient, 0.0).to(tl.int32)
        low = ((whole + 128) & 255) - 128
        high = ((whole - low) >> 8).to(tl.int8)
        low = low.to(tl.int8)
    return high, low, step


@triton.jit
def quantize(
    x,  # [T, K] activation dtype
    values,  # [PLANES, T, K] int8
    steps,  # [G, stride] float32, one a token and group
    K,
    G,
    stride,
    PLANES: tl.constexpr,
    OFFSET: tl.constexpr,
    GROUP: tl.constexpr,  # 0: all of a row is one
    COLUMNS: tl.constexpr,  # of a group, up to a power of two
    GROUPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Round a token and group to one plane or two; GROUPS groups of a token a program."""
    let_next_start(PDL)
    wait_for_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    within = tl.arange(0, COLUMNS)
    if GROUP == 0:
        column = within[None, :] + group[:, None] * K
        mine = column < K
    else:
        column = group[:, None] * GROUP - OFFSET + within[None, :]
        mine = (column >= 0) & (column < K) & (within < GROUP)[None, :]
    given = tl.load(x + token * K + column, mask=mine, other=0).to(tl.float32)
    high, low, step = planes_of(given, PLANES)
    tl.store(values + token * K + column, high, mask=mine)
    if PLANES == 2:
        below = values + tl.num_programs(0).to(tl.int64) * K
        tl.store(below + token * K + column, low, mask=mine)
    tl.store(steps + group * stride + token, step, mask=group < G)


@triton.jit
def laid(column, token, tokens):
    """Where `wide.cu` has a value: [columns / 64, tokens, 64], and within 64 an order of its own.

    A lane holds 16 columns of a row of weights and widens four at once: 0 and 2, 1 and 3. The 16
    bytes of eight values change places from token to token, so that banks of memory differ.
    """
    within = column % 64
    lane, word, byte = within // 16, within % 16 // 4, within % 4
    eight = (2 * word + byte % 2) ^ (token % 8)
    line = (column // 64).to(tl.int64) * tokens + token
    return line * 64 + eight * 8 + 2 * lane + byte // 2


@triton.jit
def lay(
    x,  # [T, K] activation dtype
    out,  # [2 ceil(K / 128), tokens, 64] activation dtype; past the end of K zeros
    K,
    tokens,
    COLUMNS: tl.constexpr,  # of a program
    PDL: tl.constexpr,
):
    """Lay out activations as `wide.cu` multiplies them."""
    let_next_start(PDL)
    wait_for_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    value = tl.load(x + token * K + column, mask=column < K, other=0)
    tl.store(out + laid(column, token, tokens), value, mask=column < tl.cdiv(K, 128) * 128)


@triton.jit
def swiglu(
    both,  # [T, 2 F] activation dtype
    out,  # [T, F] activation dtype
    F,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = silu(gate) * up, of products that the library made."""
    let_next_start(PDL)
    wait_for_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < F
    gate = tl.load(both + token * 2 * F + channel, mask=inside, other=0).to(tl.float32)
    up = tl.load(both + token * 2 * F + F + channel, mask=inside, other=0).to(tl.float32)
    value = gate / (1 + tl.exp(-gate)) * up
    tl.store(out + token * F + channel, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def find_infinite(
    x,  # [count] float32
    infinite,  # [1] int32, set where one is NaN or infinite
    count,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Look through what the library wrote."""
    let_next_start(PDL)
    wait_for_previous(PDL)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + index, mask=index < count, other=0)
    broken = tl.max(tl.where(tl.abs(value) < float("inf"), 0, 1), axis=0)
    tl.store(infinite, 1, mask=broken > 0)
