"""How fast a host or a GPU reads memory: the slope of the roofline, measured once, kept in a file.

A buffer far larger than any cache is read by the native kernels' threads; without them by torch's.
The best pass counts: what else the host did meanwhile is no property of its memory.
"""

import contextlib
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from roofline.budget import available_host_bytes
from roofline.execution.host import cpu_model
from roofline.ops.cpu.memory import PIECE_BYTES, native_reader

_PASS_BYTES = 1 << 30  # read in one pass
_PASSES = 5
_GPU_ROUNDS = 16  # of a pass: a launch costs little beside them


def read(cache: Path, threads: int, device: str = "cpu", *, anew: bool = False) -> float:
    """Read bandwidth in 1e9 bytes/s, of a CPU on so many threads: from the file, or measured.

    A file that cannot be understood is replaced; one that cannot be written is done without.
    """
    place = f"{cpu_model()} | {threads} threads, best pass"
    if device != "cpu":
        place = f"{torch.cuda.get_device_name(device)} | {device}"
    key = f"{platform.node()} | {place}"
    known = _load(cache)
    if anew or key not in known:
        known[key] = measure(threads) if device == "cpu" else measure_gpu(device)
        _save(cache, known)
    return known[key]


def measure(threads: int, pass_bytes: int = _PASS_BYTES, passes: int = _PASSES) -> float:
    """The best pass over `pass_bytes`, in 1e9 bytes/s."""
    buffer_bytes = min(pass_bytes, max(available_host_bytes() // 4, 1 << 20))
    buffer_bytes -= buffer_bytes % PIECE_BYTES
    buffer = torch.ones(buffer_bytes // 4, dtype=torch.float32)  # written: every page is its own
    rounds = -(-pass_bytes // buffer_bytes)
    read_all = native_reader(threads) or torch.amax  # no chain of additions: memory is its limit
    read_all(buffer)
    seconds = []
    for _ in range(passes):
        start = time.perf_counter()
        for _ in range(rounds):
            read_all(buffer)
        seconds.append(time.perf_counter() - start)
    return rounds * buffer.nbytes / min(seconds) / 1e9


def measure_gpu(device: str) -> float:
    """The best pass over a GPU's memory, or over what others leave of it, in 1e9 bytes/s."""
    free, _ = torch.cuda.mem_get_info(torch.device(device))
    buffer = torch.ones(min(_PASS_BYTES, free // 4) // 4, device=device)
    buffer.amax()
    seconds = []
    for _ in range(_PASSES):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(_GPU_ROUNDS):
            buffer.amax()
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return _GPU_ROUNDS * buffer.nbytes / min(seconds) / 1e9


def _load(cache: Path) -> dict[str, float]:
    """The hosts of a file; none if it is absent or damaged."""
    try:
        found: Any = json.loads(cache.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {k: float(v) for k, v in found.items() if isinstance(v, (int, float)) and 0 < v < 1e9}


def _save(cache: Path, known: dict[str, float]) -> None:
    """Write beside the file and rename: another process never reads half of it."""
    with contextlib.suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".bandwidth-", dir=cache.parent)
        with os.fdopen(handle, "w") as file:
            json.dump(known, file, indent=1)
        Path(name).replace(cache)
