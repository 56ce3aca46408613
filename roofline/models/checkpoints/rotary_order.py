"""The order of the rows of Q and K, which files take two ways.

Interleaved: rows 2i and 2i + 1 of a head rotate together, as in llama2.c and llama.cpp. Half-split:
rows i and i + head_dim / 2, as in Hugging Face and in our decoder.
"""

from typing import Literal

import numpy as np

from roofline.budget import layer_tensor
from roofline.config import ModelConfig

RotaryOrder = Literal["interleaved", "half-split"]


def rotary_heads(config: ModelConfig) -> dict[str, int]:
    """The matrices whose rows rotate, by canonical name, and how many heads they are of."""
    heads = {"self_attn.q_proj": config.num_heads, "self_attn.k_proj": config.num_kv_heads}
    layers = range(config.num_layers)
    return {layer_tensor(i, part): count for i in layers for part, count in heads.items()}


def half_split(rows: np.ndarray, heads: int) -> np.ndarray:
    """Bring rows [N, K] of so many heads from interleaved to half-split order."""
    pairs = rows.reshape(heads, -1, 2, rows.shape[1])  # [heads, head_dim / 2, 2, K]
    return pairs.swapaxes(1, 2).reshape(rows.shape)
