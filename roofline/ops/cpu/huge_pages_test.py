import sys
from pathlib import Path

import pytest
import torch

from roofline.ops.cpu.huge_pages import HUGE_BYTES, collapse


def huge_bytes() -> int:
    """Bytes of this process that lie on huge pages."""
    rollup = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    (line,) = (line for line in rollup.splitlines() if line.startswith("AnonHugePages"))
    return int(line.split()[1]) << 10


def test_tensors_hold_what_they_held() -> None:
    tensors = [torch.arange(size) for size in (1, 300_001, 2_000_003)]
    collapse([*tensors, tensors[1][5:], torch.empty(0)])
    for tensor in tensors:
        assert torch.equal(tensor, torch.arange(len(tensor)))


def test_a_large_tensor_lies_on_huge_pages() -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("huge pages are Linux's")
    tensor = torch.ones(8 * HUGE_BYTES, dtype=torch.int8)
    before = huge_bytes()
    count = collapse([tensor])
    if not count:
        pytest.skip("this kernel gives no huge pages")
    assert huge_bytes() - before >= HUGE_BYTES
    assert bool((tensor == 1).all())
