"""GGUF, the container: metadata, and where each tensor lies in a memory map (ggml's docs/gguf.md).

The file is untrusted: every count, length and offset is checked against the bytes that are there
before anything of that size is made. No architecture, tokenizer or tensor arithmetic here.
"""

import math
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from roofline.errors import CheckpointError, UnsupportedError
from roofline.models.checkpoints.gguf_dequantize import FORMATS
from roofline.models.checkpoints.mapping import map_file

Value = bool | int | float | str | list[str] | np.ndarray  # of one metadata key
Kind = TypeVar("Kind", bool, int, float, str, list[str], np.ndarray)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: what it is and where its bytes lie."""

    name: str
    type: str  # ggml's name, such as 'Q4_1'
    shape: tuple[int, ...]  # row-major: the last dimension is contiguous (the file lists it first)
    offset: int  # bytes from the start of the file
    nbytes: int


class GGUFFile:
    """An open GGUF file, whose whole header has been checked."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        mapped = _map(self.path)
        header = _Header(self.path, mapped)
        n_tensors, n_keys = header.counts()
        self.metadata: Mapping[str, Value] = MappingProxyType(header.metadata(n_keys))
        self.tensors = header.tensors(n_tensors, self._alignment())
        self._bytes: NDArray[np.uint8] | None = np.frombuffer(mapped, np.uint8)

    def raw(self, name: str) -> NDArray[np.uint8]:
        """Return the bytes of a tensor, [nbytes], read-only and not copied."""
        assert self._bytes is not None, "the file is closed"
        info = self.tensors[name]
        return self._bytes[info.offset : info.offset + info.nbytes]

    def get(self, key: str, kind: type[Kind]) -> Kind | None:
        """Return a metadata value, None without the key; CheckpointError if of another type."""
        value = self.metadata.get(key)
        if value is None:
            return None
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise CheckpointError(
                f"{self.path}: {key} is {described(value)}; it must be {_KIND_NAMES[kind]}"
            )
        return value

    def require(self, key: str, kind: type[Kind]) -> Kind:
        """Return a metadata value; CheckpointError without the key or if of another type."""
        value = self.get(key, kind)
        if value is None:
            raise CheckpointError(f"{self.path}: metadata key {key} is missing")
        return value

    def close(self) -> None:
        """Let go of the file; the mapping goes with the last array that views it."""
        self._bytes = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _alignment(self) -> int:
        alignment = self.get(_ALIGNMENT_KEY, int)
        if alignment is None:
            return _DEFAULT_ALIGNMENT
        if alignment.bit_count() != 1 or not 8 <= alignment <= _MAX_ALIGNMENT:
            raise CheckpointError(
                f"{self.path}: {_ALIGNMENT_KEY} is {alignment}; "
                f"it must be a power of two from 8 to {_MAX_ALIGNMENT}"
            )
        return alignment


def _map(path: Path) -> mmap.mmap:
    """Map a file that starts like a GGUF file; anything else is refused for what it is."""
    mapped = map_file(path, "a GGUF file")
    start = mapped[:_SNIFFED_BYTES]
    if not start.startswith(_MAGIC):
        raise CheckpointError(f"{path}: {_what_instead(start)}, not a GGUF file")
    return mapped


def _what_instead(start: bytes) -> str:
    for prefix, what in _OTHER_FORMATS.items():
        if start.lower().startswith(prefix):
            return what
    return f"starts with the bytes {start[:4].hex(' ')}"


class _Header:
    """A walk through the header; nothing is read, or made, that the file has no bytes for."""

    def __init__(self, path: Path, mapped: mmap.mmap) -> None:
        self._path = path
        self._mapped = mapped
        self._size = len(mapped)
        self._end = min(self._size, _MAX_HEADER_BYTES)
        self._position = len(_MAGIC)

    def counts(self) -> tuple[int, int]:
        """Check the version; return how many tensors and metadata keys follow."""
        version = self._number(_U32, "the version")
        if version and version & 0xFFFF == 0:
            raise UnsupportedError(
                f"{self._path}: big-endian GGUF is not supported; supported: little-endian"
            )
        if version not in _VERSIONS:
            supported = ", ".join(map(str, _VERSIONS))
            raise UnsupportedError(
                f"{self._path}: GGUF version {version} is not supported; supported: {supported}"
            )
        n_tensors = self._number(_U64, "the tensor count")
        n_keys = self._number(_U64, "the metadata key count")
        self._check_fits(n_tensors * _MIN_TENSOR_BYTES, f"{n_tensors} tensors")
        self._check_fits(n_keys * _MIN_KEY_BYTES, f"{n_keys} metadata keys")
        return n_tensors, n_keys

    def metadata(self, n_keys: int) -> dict[str, Value]:
        """Scalars and strings as Python's, numeric arrays as numpy's, in memory of their own."""
        metadata: dict[str, Value] = {}
        for index in range(n_keys):
            key = self._string(f"the name of metadata key {index}")
            if key in metadata:
                self._fail(f"metadata key {quoted(key)} appears twice")
            metadata[key] = self._value(f"metadata key {quoted(key)}")
        return metadata

    def tensors(self, n_tensors: int, alignment: int) -> dict[str, TensorInfo]:
        """Return where the tensors lie, all inside the file and none on another."""
        entries = [self._tensor(index, alignment) for index in range(n_tensors)]
        data_start = -(-self._position // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, type_name, shape, offset in entries:
            where = f"tensor {quoted(name)}"
            if name in tensors:
                self._fail(f"{where} appears twice")
            nbytes = self._tensor_bytes(where, type_name, shape)
            tensors[name] = info = TensorInfo(name, type_name, shape, data_start + offset, nbytes)
            if info.offset + nbytes > self._size:
                self._fail(
                    f"{where} lies at bytes {info.offset} to {info.offset + nbytes}, "
                    f"but the file ends at {self._size}"
                )
        for one, other in pairwise(sorted(tensors.values(), key=lambda info: info.offset)):
            if one.offset + one.nbytes > other.offset:
                self._fail(f"tensors {quoted(one.name)} and {quoted(other.name)} overlap")
        return tensors

    def _value(self, where: str) -> Value:
        number = self._number(_U32, f"the type of {where}")
        if number == _STRING:
            return self._string(where)
        if number != _ARRAY:
            return self._numbers(self._scalar_type(number, where), 1, where)[0].item()
        item_number = self._number(_U32, f"the item type of {where}")
        count = self._number(_U64, f"the length of {where}")
        if item_number == _STRING:
            return self._strings(count, where)
        if item_number == _ARRAY:
            self._fail(f"{where} is an array of arrays, which no model file needs")
        return self._numbers(self._scalar_type(item_number, where), count, where).copy()

    def _scalar_type(self, number: int, where: str) -> np.dtype:
        if number not in _SCALARS:
            self._fail(f"{where} has value type {number}, which GGUF does not know")
        return _SCALARS[number]

    def _tensor(self, index: int, alignment: int) -> tuple[str, str, tuple[int, ...], int]:
        """Name, type, shape, and the offset from the start of the data."""
        name = self._string(f"the name of tensor {index}")
        where = f"tensor {quoted(name)}"
        n_dims = self._number(_U32, f"the dimension count of {where}")
        if not 1 <= n_dims <= _MAX_DIMS:
            self._fail(f"{where} has {n_dims} dimensions; it must have 1 to {_MAX_DIMS}")
        sizes = self._numbers(_U64, n_dims, f"the shape of {where}").tolist()
        if 0 in sizes:
            self._fail(f"{where} has a dimension of size 0 in its shape {sizes[::-1]}")
        type_number = self._number(_U32, f"the type of {where}")
        type_name = _TYPE_NAMES.get(type_number, f"number {type_number}")
        if type_name not in FORMATS:
            raise UnsupportedError(
                f"{self._path}: {where} has type {type_name}, which is not supported; "
                f"supported: {', '.join(FORMATS)}"
            )
        offset = self._number(_U64, f"the offset of {where}")
        if offset % alignment:
            self._fail(
                f"{where} has offset {offset}, which is no multiple of the alignment {alignment}"
            )
        return name, type_name, tuple(sizes[::-1]), offset

    def _tensor_bytes(self, where: str, type_name: str, shape: tuple[int, ...]) -> int:
        block = FORMATS[type_name]
        if shape[-1] % block.elements:
            self._fail(
                f"{where} has rows of {shape[-1]} weights; "
                f"{type_name} needs a multiple of {block.elements}"
            )
        return math.prod(shape) // block.elements * block.nbytes  # Python integers: no overflow

    def _number(self, dtype: np.dtype, what: str) -> int:
        return int(self._numbers(dtype, 1, what)[0])

    def _numbers(self, dtype: np.dtype, count: int, what: str) -> np.ndarray:
        """Return the next numbers [count], a view of the map."""
        nbytes = count * dtype.itemsize
        self._check_fits(nbytes, what)
        numbers = np.frombuffer(self._mapped, dtype, count, self._position)
        if dtype == np.bool_ and (numbers.view(np.uint8) > 1).any():
            self._fail(f"{what} holds a boolean that is neither 0 nor 1")
        self._position += nbytes
        return numbers

    def _string(self, what: str) -> str:
        return self._strings(1, what)[0]

    def _strings(self, count: int, what: str) -> list[str]:
        """Return the next strings; the one loop that every token of a vocabulary goes through."""
        self._check_fits(count * _LENGTH.size, what)
        mapped, position, end = self._mapped, self._position, self._end
        strings: list[str] = []
        unpack, append = _LENGTH.unpack_from, strings.append  # looked up once: a third faster
        try:
            for _ in range(count):
                start = position + _LENGTH.size
                if start > end:
                    self._fail_for_room(f"a string of {what}")
                (length,) = unpack(mapped, position)
                position = start + length
                if position > end:
                    self._fail_for_room(f"a string of {what}")
                append(mapped[start:position].decode())
        except UnicodeDecodeError:
            self._fail(f"{what} is not valid UTF-8, in its string {len(strings)}")
        self._position = position
        return strings

    def _check_fits(self, nbytes: int, what: str) -> None:
        if nbytes > self._end - self._position:
            self._fail_for_room(what)

    def _fail_for_room(self, what: str) -> NoReturn:
        end = "the end of the file" if self._end == self._size else "the most a header may take"
        self._fail(f"no room for {what} before {end}, {self._end} bytes")

    def _fail(self, problem: str) -> NoReturn:
        raise CheckpointError(f"{self._path}: {problem}")


def quoted(text: str) -> str:
    """Return a text from a file fit for one line of a message, whatever it holds."""
    return repr(text if len(text) <= _QUOTED_CHARACTERS else text[:_QUOTED_CHARACTERS] + "…")


def described(value: Value) -> str:
    """Return what a metadata value is, fit for one line of a message."""
    if isinstance(value, str):
        return f"the string {quoted(value)}"
    if isinstance(value, list):
        return f"an array of {len(value)} strings"
    if isinstance(value, np.ndarray):
        return f"an array of {len(value)} {value.dtype} numbers"
    return f"the {type(value).__name__} {value}"


_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT_KEY = "general.alignment"
_DEFAULT_ALIGNMENT, _MAX_ALIGNMENT = 32, 1 << 20
_MAX_DIMS = 4
_MAX_HEADER_BYTES = 1 << 28  # far above any vocabulary, far below what a sparse file can claim
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # empty name, one dimension, type, offset
_MIN_KEY_BYTES = 8 + 4 + 1  # empty name, type, one byte of value
_QUOTED_CHARACTERS = 80
_SNIFFED_BYTES = 64

_U32, _U64 = np.dtype("<u4"), np.dtype("<u8")
_LENGTH = struct.Struct("<Q")  # of a string, before its bytes
_STRING, _ARRAY = 8, 9
_SCALARS = {
    number: np.dtype(code)
    for number, code in {
        0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4",
        6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
    }.items()
}  # fmt: skip
_TYPE_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1",
    10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS",
    17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S",
    23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M",
    30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
_KIND_NAMES = {
    bool: "a boolean",
    int: "an integer",
    float: "a floating-point number",
    str: "a string",
    list: "an array of strings",
    np.ndarray: "an array of numbers",
}
_OTHER_FORMATS = {
    b"version https://git-lfs": "is a Git LFS pointer (git lfs pull fetches the file)",
    b"pk\x03\x04": "is a zip archive, as torch.save writes them",
    b"\x80": "is a pickle, as torch.save writes them",
    b"<": "is a web page",
}
