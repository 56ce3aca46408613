"""What is CUDA's alone: pinned memory, events, the current device, captured graphs.

On a CPU the same objects do their work at once, so that what is built on them runs there too.
"""

import contextlib
import gc
from collections.abc import Callable

import torch
from torch import Tensor

_CHUNK_BYTES = 32 << 20  # of pinned memory, twice: one is filled while the other is sent


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make a device the current one of this thread: kernels, streams and events are its own."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def free_bytes(device: torch.device) -> int:
    """Memory of a GPU that nobody has taken, this process's own leftovers given up first."""
    give_up_unused(device)
    free, _ = torch.cuda.mem_get_info(device)
    return free


def give_up_unused(device: torch.device) -> None:
    """Return to the driver what was allocated and is no longer used."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


class Uploader:
    """Copies host tensors to a device in pinned chunks; the next is read while one is sent."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._turn = 0
        chunks = 2 if device.type == "cuda" else 0
        self._chunks = [
            torch.empty(_CHUNK_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(chunks)
        ]
        self._sent = [torch.cuda.Event() for _ in self._chunks]

    def __call__(self, tensor: Tensor) -> Tensor:
        """The tensor on the device; itself if it is there. It may still be on its way."""
        if tensor.device.type == self.device.type:
            return tensor
        tensor = tensor.contiguous()
        sent = torch.empty_like(tensor, device=self.device)
        source, target = (t.view(-1).view(torch.uint8) for t in (tensor, sent))
        for start in range(0, len(source), _CHUNK_BYTES):
            part = source[start : start + _CHUNK_BYTES]
            chunk, event = self._chunks[self._turn], self._sent[self._turn]
            self._turn = 1 - self._turn
            event.synchronize()
            chunk[: len(part)].copy_(part)
            target[start : start + len(part)].copy_(chunk[: len(part)], non_blocking=True)
            event.record()
        return sent


class Lane:
    """One step's way to the device and back: memory for both, and when the result has come."""

    def __init__(self, upload_bytes: int, result_items: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.upload = torch.zeros(upload_bytes, dtype=torch.uint8, pin_memory=pinned)
        self.result = torch.zeros(result_items, dtype=torch.int64, pin_memory=pinned)
        self._come = torch.cuda.Event() if pinned else None

    def send(self, size_bytes: int, target: Tensor) -> None:
        """Start copying the first bytes of `upload` to a device's buffer."""
        target[:size_bytes].copy_(self.upload[:size_bytes], non_blocking=True)

    def fetch(self, source: Tensor) -> None:
        """Start copying a device's tensor [n] to the first n of `result`."""
        self.result[: len(source)].copy_(source, non_blocking=True)
        if self._come is not None:
            self._come.record()

    def wait(self) -> None:
        """Return when what was fetched last is here."""
        if self._come is not None:
            self._come.synchronize()


class Graphs:
    """CUDA graphs over one pool of memory: they run one after the other."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """What replays `run`, which must have run before: nothing compiles while it is captured."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            run()
        return graph.replay
