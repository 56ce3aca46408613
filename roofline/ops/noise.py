"""Counter-based noise: the same for a request's seed and position whatever else is sampled.

noise[v] = Gumbel(Philox(key = seed, counter = (position, v))). The definition; kernels follow it.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def choose(logits: Tensor, temperature: float, seed: int, position: int) -> int:
    """The token of logits [V] float32: argmax of logits / temperature + noise; -inf never.

    Temperature 0 is without noise. The lowest id wins ties. NaN is never chosen; where nothing else
    is left the answer means nothing, and whoever looks at `all_finite` knows.
    """
    allowed = torch.nonzero(logits > -torch.inf).squeeze(1)
    if not len(allowed):
        return 0
    if temperature == 0:
        return int(allowed[lowest_argmax(logits[allowed])])
    noise = torch.from_numpy(gumbel(seed, position, allowed.numpy()))
    return int(allowed[lowest_argmax(logits[allowed] / temperature + noise)])


def lowest_argmax(values: Tensor) -> int:
    """The first index of the largest value of a vector."""
    return int(torch.nonzero(values == values.max())[0])


def gumbel(seed: int, position: int, tokens: np.ndarray) -> np.ndarray:
    """Standard Gumbel noise [n] float32 for token ids [n] at a position.

    The exponential draw is -log(1 - u) with u = (word + 1/2) / 2**32: finest where the noise is
    largest, which is what an argmax looks at.
    """
    word = philox((position, tokens, 0, 0), (seed & _LOW, seed >> 32))[0]
    uniform = (word.astype(np.float64) + 0.5) * 2.0**-32
    return (-np.log(-np.log1p(-uniform))).astype(np.float32)


_LOW = (1 << 32) - 1
_PHILOX_FACTORS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_PHILOX_STEPS = 0x9E3779B9, 0xBB67AE85
Words = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # of 32 bits each, as uint64


def philox(counter: Sequence[int | np.ndarray], key: tuple[int, int]) -> Words:
    """Philox4x32-10 (Salmon et al. 2011) of counters of four words, which broadcast, and a key."""
    first, second, third, fourth = (np.asarray(word, np.uint64) for word in counter)
    low, high = np.uint64(_LOW), np.uint64(32)
    for turn in range(10):
        bump = [(k + turn * step) & _LOW for k, step in zip(key, _PHILOX_STEPS, strict=True)]
        one, other = first * _PHILOX_FACTORS[0], third * _PHILOX_FACTORS[1]
        first, second, third, fourth = (
            (other >> high) ^ second ^ np.uint64(bump[0]),
            other & low,
            (one >> high) ^ fourth ^ np.uint64(bump[1]),
            one & low,
        )
    return first, second, third, fourth
