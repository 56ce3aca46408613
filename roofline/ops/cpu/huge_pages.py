"""Weights on huge pages: a step reads all of them, and a page of 4 KB ends what is read ahead."""

import ctypes
import sys
from collections.abc import Iterable, Iterator, Sequence

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

    def taken(pages: range) -> bool:
        size = len(pages) * HUGE_BYTES
        return madvise(pages.start * HUGE_BYTES, size, _MADV_COLLAPSE) == 0

    # A run at a time, each call costs the kernel a look at every processor; by the page where part
    # of a run is refused.
    return sum(
        len(run) if taken(run) else sum(taken(range(page, page + 1)) for page in run)
        for run in _runs(sorted(places))
    )


def _runs(numbers: Sequence[int]) -> Iterator[range]:
    """Ascending numbers as ranges without gaps."""
    start = 0
    for end in range(1, len(numbers) + 1):
        if end == len(numbers) or numbers[end] != numbers[end - 1] + 1:
            yield range(numbers[start], numbers[end - 1] + 1)
            start = end
