"""Seeded random weights of any shape, for benchmarks and tests without a file.

They are INT8 in groups of 128 from the start, so that a 70B preset costs one pass of random bytes.
"""

import hashlib

import numpy as np

from roofline.config import DEFAULT_GROUP_SIZE, ModelConfig
from roofline.models.checkpoints.tensors import matrix_shapes


class DummyCheckpoint:
    """`Checkpoint` whose tensors are functions of (seed, name)."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self.config, self._seed = config, seed
        self._shapes = matrix_shapes(config)
        self.native_groups = dict.fromkeys(self._shapes, DEFAULT_GROUP_SIZE)

    def read(self, name: str) -> np.ndarray:
        """Floats: ones for a norm [H], the dequantised values for a matrix [N, K]."""
        if name not in self._shapes:
            return np.ones(self.config.hidden_size, dtype=np.float32)
        values, scales = self.read_int8(name)
        columns = values.shape[1]
        return values * np.repeat(scales, DEFAULT_GROUP_SIZE, axis=1)[:, :columns]

    def read_int8(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Uniform values [N, K] in [-127, 127], and scales that keep activations near 1."""
        rows, columns = self._shapes[name]
        key = hashlib.blake2b(f"{self._seed}/{name}".encode(), digest_size=8).digest()
        random = np.random.Generator(np.random.SFC64(int.from_bytes(key, "little")))
        words = random.integers(0, 1 << 64, size=-(-rows * columns // 8), dtype=np.uint64)
        values = words.view(np.int8)[: rows * columns].reshape(rows, columns)
        np.maximum(values, -127, out=values)
        groups = -(-columns // DEFAULT_GROUP_SIZE)
        spread = random.uniform(0.5, 1.5, (rows, groups)) / (73.3 * columns**0.5)
        return values, spread.astype(np.float32)

    def close(self) -> None:
        """Nothing is open."""
