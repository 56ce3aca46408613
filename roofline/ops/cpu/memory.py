"""Reading memory at the speed the kernels could: the yardstick of what a step reads."""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from roofline.ops.cpu import abi
from roofline.ops.cpu.library import Library, open_library
from roofline.ops.cpu.native import Pool

PIECE_BYTES = 1 << 18  # of csrc/peaks.h: read by one thread


def native_reader(threads: int) -> Callable[[Tensor], None] | None:
    """What reads a tensor of whole pieces on our own threads; None without native kernels."""
    library = open_library(None)
    if not isinstance(library, Library):
        return None
    pool, sink = Pool(library, threads), torch.empty(64)

    def read(buffer: Tensor) -> None:
        arguments = abi.Measure(buffer.data_ptr(), buffer.nbytes, sink.data_ptr())
        place = library.isa, 0, abi.READ_MEMORY, ctypes.addressof(arguments)
        library.functions.roofline_run(pool.handle, *place)

    return read
