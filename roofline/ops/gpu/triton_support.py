"""What every Triton kernel shares: the interpreter's limits and programmatic dependent launch.

With dependent launch (PDL) a kernel starts while the one before it still runs, so that its first
weights are on their way when its inputs are ready. What keeps this correct: every kernel of a chain
calls `wait_for_previous` in every program; before that it reads nothing but weights and writes
nothing; and it is told by `launch` whether it was launched so.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Kernels run on the CPU, one program after the other: TRITON_INTERPRET=1 when this was imported.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def supports_pdl(device: torch.device) -> bool:
    """Whether kernels on a device may be launched with PDL: compute capability 9.0 and later."""
    if INTERPRETED.value or device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def launch(
    kernel: Any, grid: tuple[int, ...], pdl: bool, *arguments: object, **options: object
) -> None:
    """Launch a kernel on its arguments; options are its constants, num_warps and num_stages."""
    kernel[grid](*arguments, **options, PDL=pdl, launch_pdl=pdl)


def parts(whole: int, size: int) -> int:
    """Programs that a grid has for `whole` things, `size` each."""
    return -(-whole // size)


def power_of_two(number: int) -> int:
    """The smallest power of two that is no less: the length of a block."""
    return 1 << (number - 1).bit_length()


@triton.jit
def let_next_start(PDL: tl.constexpr):
    """Allow the next kernel's programs onto the device; they wait for this kernel's end."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Wait until the kernel before has ended and its writes are seen."""
    if PDL:
        gdc_wait()


@triton.jit
def to_operand(x, dtype: tl.constexpr):
    """INT8 as the floats it is multiplied with."""
    if INTERPRETED:  # its bfloat16 of an integer is a bit pattern
        return x.to(tl.float32)
    return x.to(dtype)


@triton.jit
def to_float8(x, dtype: tl.constexpr):
    """float32 rounded half to even to float8_e4m3fn."""
    if INTERPRETED:  # it loses a carry into the exponent: round to three bits of fraction before
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
        whole = x * 512  # of the smallest float8; 1.5 * 2**23 leaves no fraction
        small = ((whole + 12582912.0) - 12582912.0) / 512
        x = tl.where(tl.abs(x) < 0.015625, small, bits.to(tl.float32, bitcast=True))
    return x.to(dtype)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b: float32 sums of floats, int32 sums of int8."""
    if INTERPRETED and a.dtype != tl.int8:  # its bfloat16 dot multiplies bit patterns
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)
