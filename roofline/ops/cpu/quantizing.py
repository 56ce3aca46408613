"""Weights to INT8 groups by the native kernel: the bits of quantization/int8_groups.py, sooner."""

import ctypes

import torch
from torch import Tensor

from roofline.ops.cpu import abi
from roofline.ops.cpu.native import Pool

_TYPES = (torch.float32, torch.bfloat16)  # that the kernel reads


def quantize(pool: Pool, weight: Tensor, group: int, values: Tensor, scales: Tensor) -> bool:
    """See `ops.Quantize`."""
    if weight.dtype not in _TYPES or weight.stride(1) != 1:
        weight = weight.float().contiguous()
    broken, (rows, columns) = ctypes.c_int64(), weight.shape
    arguments = abi.Quantize(
        *(weight.data_ptr(), values.data_ptr(), scales.data_ptr(), ctypes.addressof(broken)),
        *(rows, columns, weight.stride(0), group),
    )
    place = pool.library.isa, int(weight.dtype == torch.bfloat16), abi.QUANTIZE
    pool.library.functions.roofline_run(pool.handle, *place, ctypes.addressof(arguments))
    return not broken.value
