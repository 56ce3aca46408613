"""Seeded random weights of any shape, for benchmarks and tests without a file.

They are INT8 in groups of 128 from the start, so that a 70B preset costs one pass of random bytes.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

from roofline.config import DEFAULT_GROUP_SIZE, ModelConfig
from roofline.models.checkpoints.tensors import matrix_shapes, vector_shapes

_SPREAD = 127 / 3**0.5  # standard deviation of a uniform value in [-127, 127]


class DummyCheckpoint:
    """`Checkpoint` whose tensors are functions of (seed, name)."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self.config, self._seed = config, seed
        self._matrices, self._vectors = matrix_shapes(config), vector_shapes(config)
        self.native_groups = dict.fromkeys(self._matrices, DEFAULT_GROUP_SIZE)

    def read(self, name: str) -> NDArray[np.float32]:
        """Floats: ones for a norm, small numbers for a bias, the dequantised values of a matrix."""
        if name in self._vectors:
            (size,) = self._vectors[name]
            if name.endswith(".bias"):
                return self._random(name).uniform(-0.5, 0.5, size).astype(np.float32)
            return np.ones(size, np.float32)
        values, scales = self.read_int8(name)
        floats = values.astype(np.float32)
        for group in range(scales.shape[1]):
            columns = slice(group * DEFAULT_GROUP_SIZE, (group + 1) * DEFAULT_GROUP_SIZE)
            floats[:, columns] *= scales[:, group : group + 1]
        return floats

    def read_int8(self, name: str) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """Uniform values [N, K] in [-127, 127], and scales that keep activations near 1."""
        rows, columns = self._matrices[name]
        random = self._random(name)
        words = random.integers(0, 1 << 64, size=-(-rows * columns // 8), dtype=np.uint64)
        values = words.view(np.int8)[: rows * columns].reshape(rows, columns)
        np.maximum(values, -127, out=values)
        groups = -(-columns // DEFAULT_GROUP_SIZE)
        spread = random.uniform(0.5, 1.5, (rows, groups)) / (_SPREAD * columns**0.5)
        return values, spread.astype(np.float32)

    def close(self) -> None:
        """Nothing is open."""

    def _random(self, name: str) -> np.random.Generator:
        key = hashlib.blake2b(f"{self._seed}/{name}".encode(), digest_size=8).digest()
        return np.random.Generator(np.random.SFC64(int.from_bytes(key, "little")))
