"""What an op needs on its way, taken one after the other from the scratch buffer."""

import math

import torch
from torch import Tensor

ALIGNMENT_VALUES = 64  # float32: 256 bytes


class Room:
    """The scratch buffer of one op, from its start."""

    def __init__(self, scratch: Tensor) -> None:
        self._scratch = scratch  # [n] float32
        self._taken = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor."""
        values = math.prod(shape)
        start = self._taken
        self._taken += -(-values * dtype.itemsize // (4 * ALIGNMENT_VALUES)) * ALIGNMENT_VALUES
        assert self._taken <= len(self._scratch), "scratch is smaller than budgeted"
        return self._scratch[start : self._taken].view(dtype)[:values].view(shape)
