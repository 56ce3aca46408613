"""Seeded random weights of any shape, for benchmarks and tests without a file.

They are INT8 in groups of 128 from the start, and every eight come from a hash of their place: a
GPU makes them where they are needed, the same bits as the host.
"""

import hashlib
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from roofline.config import DEFAULT_GROUP_SIZE, ModelConfig
from roofline.models.checkpoints.tensors import matrix_shapes, vector_shapes

_SPREAD = 127 / 3**0.5  # standard deviation of a uniform value in [-127, 127]
_STEP, _MIX = 0x1E3779B97F4A7C15, 0x14D049BB133111EB  # odd
_LOW = (1 << 35) - 1


class Arrays(Protocol):
    """Where tensors are made, and of what kind: arrays that know the operators of numpy."""

    chunk: int  # numbers hashed at a time

    def counters(self, start: int, stop: int) -> Any:
        """The integers from start to stop, int64."""
        ...

    def join(self, parts: list[Any]) -> Any:
        """One array of several."""
        ...

    def cast(self, array: Any, dtype: str) -> Any:
        """The same numbers, rounded to another type."""
        ...

    def view(self, words: Any) -> Any:
        """The bytes of int64 words [n] as int8 [8 n]."""
        ...


class HostArrays:
    """Numpy's."""

    chunk = 1 << 15  # what stays in cache

    def counters(self, start: int, stop: int) -> NDArray[np.int64]:
        """See `Arrays`."""
        return np.arange(start, stop, dtype=np.int64)

    def join(self, parts: list[Any]) -> Any:
        """See `Arrays`."""
        return np.concatenate(parts)

    def cast(self, array: Any, dtype: str) -> Any:
        """See `Arrays`."""
        return array.astype(dtype)

    def view(self, words: Any) -> Any:
        """See `Arrays`."""
        return words.view(np.int8)


class DummyCheckpoint:
    """`Checkpoint` whose tensors are functions of (seed, name)."""

    def __init__(self, config: ModelConfig, seed: int, arrays: Arrays | None = None) -> None:
        self.config, self._seed, self._arrays = config, seed, arrays or HostArrays()
        self._steps = self._arrays.counters(0, self._arrays.chunk) * _STEP
        self._matrices, self._vectors = matrix_shapes(config), vector_shapes(config)
        self.native_groups = dict.fromkeys(self._matrices, DEFAULT_GROUP_SIZE)

    def made_of(self, arrays: Arrays) -> "DummyCheckpoint":
        """The same tensors, made elsewhere."""
        return DummyCheckpoint(self.config, self._seed, arrays)

    def read(self, name: str) -> Any:
        """Floats: ones for a norm, small numbers for a bias, the dequantised values of a matrix."""
        if name in self._vectors:
            (size,) = self._vectors[name]
            spread = 1.0 if name.endswith(".bias") else 0.0
            small = (self._uniform(name, size) - 0.5) * spread
            return self._arrays.cast(small if spread else small + 1.0, "float32")
        values, scales = self.read_int8(name)
        floats = self._arrays.cast(values, "float32")
        for group in range(scales.shape[1]):
            columns = slice(group * DEFAULT_GROUP_SIZE, (group + 1) * DEFAULT_GROUP_SIZE)
            floats[:, columns] *= scales[:, group : group + 1]
        return floats

    def read_int8(self, name: str) -> tuple[Any, Any]:
        """Uniform values [N, K] in [-127, 127], and scales that keep activations near 1."""
        rows, columns = self._matrices[name]
        words = self._words(name, -(-rows * columns // 8))
        values = self._arrays.view(words)[: rows * columns].reshape(rows, columns)
        values += values == -128
        groups = -(-columns // DEFAULT_GROUP_SIZE)
        spread = (self._uniform(f"{name} scales", rows * groups) + 0.5) * (
            1 / (_SPREAD * columns**0.5)
        )
        return values, self._arrays.cast(spread.reshape(rows, groups), "float32")

    def close(self) -> None:
        """Nothing is open."""

    def _uniform(self, name: str, count: int) -> Any:
        """Numbers in [0, 1), float64."""
        top = (self._words(name, count) >> 11) & ((1 << 53) - 1)
        return self._arrays.cast(top, "float64") * 2.0**-53

    def _words(self, name: str, count: int) -> Any:
        """Random int64 [count]: a hash of each one's place, the seed and the name."""
        digest = hashlib.blake2b(f"{self._seed}/{name}".encode(), digest_size=8).digest()
        key, chunk = int.from_bytes(digest, "little", signed=True), self._arrays.chunk
        starts = range(0, max(count, 1), chunk)
        return self._arrays.join([self._hash(at, min(at + chunk, count), key) for at in starts])

    def _hash(self, start: int, stop: int, key: int) -> Any:
        """As SplitMix64 (Steele et al. 2014), by shifts that keep the sign: torch has no others."""
        first = (start * _STEP + key + (1 << 63)) % (1 << 64) - (1 << 63)  # as int64 wraps
        words = self._steps[: stop - start] + first
        words ^= words >> 32
        words *= _MIX
        words ^= (words >> 29) & _LOW
        return words
