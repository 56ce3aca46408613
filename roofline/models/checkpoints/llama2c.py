"""A .bin file of llama2.c or KuiperLLama as a checkpoint: its tensors by canonical name.

The file is untrusted. Where its tensors lie is worked out in `llama2c_layout`; no tokenizer here.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from roofline.config import GROUP_SIZES, ModelConfig
from roofline.errors import CheckpointError, RooflineError, UnsupportedError
from roofline.models.checkpoints.llama2c_layout import (
    LONGEST_HEADER_BYTES,
    Contents,
    identify,
)
from roofline.models.checkpoints.mapping import map_file
from roofline.models.checkpoints.rotary_order import RotaryOrder, half_split, rotary_heads


class Llama2cCheckpoint:
    """An open .bin file in any of the four layouts, whose size is what its header says.

    Which rows of Q and K rotate together is not in the file: `rotary_order` says it where the
    layout's usual order is not the file's (docs/formats.md).
    """

    def __init__(
        self, path: str | os.PathLike[str], *, rotary_order: RotaryOrder | None = None
    ) -> None:
        self.file = Path(path)
        mapped = map_file(self.file, "a llama2.c .bin file")
        _refuse_other_formats(self.file, mapped[:_SNIFFED_BYTES])
        try:
            contents = identify(mapped[:LONGEST_HEADER_BYTES], len(mapped))
        except RooflineError as error:  # which knows no path
            raise type(error)(f"{self.file}: {error.message}") from None
        self.config: ModelConfig = contents.config
        self.native_groups: Mapping[str, int] = _native_groups(contents)
        self._places, self._group = contents.places, contents.group
        self._bytes: NDArray[np.uint8] | None = np.frombuffer(mapped, np.uint8)
        interleaved = (rotary_order or contents.layout.rotary_order) == "interleaved"
        self._interleaved_heads = rotary_heads(self.config) if interleaved else {}

    def read(self, name: str) -> NDArray[np.float32]:
        """Return a tensor as float32 [N, K] or [H], in memory of its own."""
        place = self._places[name]
        if place.is_int8:
            values, scales = self._int8(name)
            floats = values * scales[:, None]
        else:
            floats = self._view(place.offset, "<f4", place.items).astype(np.float32)
        return self._half_split(name, floats.reshape(place.shape))

    def read_int8(self, name: str) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """Return a tensor of `native_groups`: int8 [N, K] and float32 scales [N, K / group]."""
        rows = self._places[name].shape[0]
        values, scales = (array.reshape(rows, -1) for array in self._int8(name))
        return self._half_split(name, values), self._half_split(name, scales)

    def close(self) -> None:
        """Let go of the file; the mapping goes with the last array that views it."""
        self._bytes = None

    def _int8(self, name: str) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """Values [groups, group] and scales [groups]; of a group of zeros a scale of 0 is 1."""
        place = self._places[name]
        values = self._view(place.offset, "i1", place.items).reshape(-1, self._group).copy()
        scales = self._view(place.offset + place.items, "<f4", len(values)).astype(np.float32)
        scales[(scales == 0) & ~values.any(axis=1)] = 1.0
        good = (scales > 0) & np.isfinite(scales)
        if not good.all():
            group = int(np.argmin(good))
            raise CheckpointError(
                f"{self.file}: {name}: the scale of group {group} is {scales[group]}; "
                "scales are finite and above 0"
            )
        return values, scales

    def _view(self, offset: int, dtype: str, count: int) -> np.ndarray:
        """Numbers [count] of the file from a byte on, not copied and perhaps not aligned."""
        assert self._bytes is not None, "the file is closed"
        return np.frombuffer(self._bytes, dtype, count, offset)

    def _half_split(self, name: str, rows: np.ndarray) -> np.ndarray:
        heads = self._interleaved_heads.get(name)
        return rows if heads is None else half_split(rows, heads)


def is_pickle(path: Path) -> bool:
    """Whether a file starts as `torch.save` starts one; a file that cannot be read is none."""
    try:
        return _starts_pickle(map_file(path, "a file")[:_SNIFFED_BYTES])
    except CheckpointError:
        return False


def _native_groups(contents: Contents) -> dict[str, int]:
    """The INT8 tensors whose groups are groups of a row, of a size that we have."""
    group = contents.group
    columns = {name: place.shape[-1] for name, place in contents.places.items() if place.is_int8}
    return {
        name: group
        for name, width in columns.items()
        if width % group == 0 and (group in GROUP_SIZES or group == width)
    }


def _refuse_other_formats(path: Path, start: bytes) -> None:
    """Only what no header with sizes in bounds starts with."""
    if _starts_pickle(start):
        raise UnsupportedError(
            f"{path}: not loaded: a pickle can run code; give a safetensors folder, "
            "a .gguf file or a .bin file of llama2.c"
        )
    for beginning, what in _OTHER_FORMATS.items():
        if start.startswith(beginning):
            raise UnsupportedError(f"{path}: {what}")


def _starts_pickle(start: bytes) -> bool:
    may_be_dim = b"\0" <= start[2:3] < b"\x10"  # of 2**20 at most
    bare = start.startswith(b"\x80") and b"\x02" <= start[1:2] <= b"\x05"
    return (bare and not may_be_dim) or start.startswith(b"PK\x03\x04")


_SNIFFED_BYTES = 64
_OTHER_FORMATS = {
    b"GGUF": "is a GGUF file; rename it to end in .gguf",
    b"tjgg": "is a GGML file of before GGUF; convert the original model with llama.cpp",
    b"lmgg": "is a GGML file of before GGUF; convert the original model with llama.cpp",
    b"fmgg": "is a GGML file of before GGUF; convert the original model with llama.cpp",
    b"version https://git-lfs": "is a Git LFS pointer, no model; `git lfs pull` fetches it",
    b"<!DOCTYPE": "is a web page, no model",
    b"<html": "is a web page, no model",
}
