import mmap
import sys
from pathlib import Path

import pytest
import torch

from roofline.ops.cpu.huge_pages import HUGE_BYTES, collapse


def huge_bytes(place: int) -> int:
    """Bytes on huge pages in the mapping that holds an address of this process."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        name, *values = line.split()
        if not name.endswith(":"):  # a mapping begins: "7f00-7f20 rw-p ..."
            first, end = (int(text, 16) for text in name.split("-"))
            inside = first <= place < end
        elif inside and name == "AnonHugePages:":
            return int(values[0]) << 10
    raise AssertionError(f"no mapping holds {place:#x}")


def test_tensors_hold_what_they_held() -> None:
    tensors = [torch.arange(size) for size in (1, 300_001, 2_000_003)]
    collapse([*tensors, tensors[1][5:], torch.empty(0)])
    for tensor in tensors:
        assert torch.equal(tensor, torch.arange(len(tensor)))


def test_a_large_tensor_lies_on_huge_pages() -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("huge pages are Linux's")
    with mmap.mmap(-1, 8 * HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_DONTDUMP)  # unlike its neighbours: a mapping of its own
        tensor = torch.frombuffer(memory, dtype=torch.int8).fill_(1)
        count = collapse([tensor])
        held = huge_bytes(tensor.data_ptr())
        ones = bool((tensor == 1).all())
        del tensor
    assert ones
    if not count:
        pytest.skip("this kernel gives no huge pages")
    assert held >= (count - 2) * HUGE_BYTES  # the first and the last may be another's, too
