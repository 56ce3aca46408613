"""Weights on huge pages: a step reads all of them, and a page of 4 KB ends what is read ahead."""

import ctypes
import sys
from collections.abc import Iterable

from torch import Tensor

HUGE_BYTES = 2 << 20
_MADV_COLLAPSE = 25  # Linux 6.1: at once, whatever the policy of the system for new memory


def collapse(tensors: Iterable[Tensor]) -> int:
    """Put the memory of some tensors on huge pages; the number of those, 0 where there are none.

    Matrices smaller than a huge page share one with their neighbours. What the kernel refuses
    (memory that is not all there, no page free) stays as it is: nothing but speed depends on it.
    """
    if not sys.platform.startswith("linux"):
        return 0
    places: set[int] = set()
    for storage in (tensor.untyped_storage() for tensor in tensors):
        first, size = storage.data_ptr(), storage.nbytes()
        places.update(range(first // HUGE_BYTES, -(-(first + size) // HUGE_BYTES)))
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return sum(
        madvise(place * HUGE_BYTES, HUGE_BYTES, _MADV_COLLAPSE) == 0 for place in sorted(places)
    )
