"""Dummy tensors made by torch, on any device: the bits are those of numpy."""

from typing import Any

import torch
from torch import Tensor


class DeviceArrays:
    """`dummy.Arrays` on a device."""

    chunk = 1 << 26

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def counters(self, start: int, stop: int) -> Tensor:
        """See `Arrays`."""
        return torch.arange(start, stop, dtype=torch.int64, device=self._device)

    def join(self, parts: list[Any]) -> Any:
        """See `Arrays`."""
        return torch.cat(parts)

    def cast(self, array: Any, dtype: str) -> Any:
        """See `Arrays`."""
        return array.to(getattr(torch, dtype))

    def view(self, words: Any) -> Any:
        """See `Arrays`."""
        return words.view(torch.int8)
