"""The KV pool: one tensor a model, allocated at start. Who owns which block is the scheduler's."""

import math

import numpy as np
import torch
from torch import Tensor

from roofline.budget import Rank
from roofline.config import ModelConfig


def allocate(
    model: ModelConfig, dtype: str, rank: Rank, num_blocks: int, block_size: int
) -> Tensor:
    """A zeroed pool [layers, 2, blocks, kv_heads, block_size, head_dim] of one rank.

    The pages come from the kernel untouched (calloc), so a block costs memory when first written.
    """
    layers = len(rank.parallel.layers(model, rank.stage))
    heads = len(rank.parallel.kv_heads(model, rank.tp_rank))
    shape = (layers, 2, num_blocks, heads, block_size, model.head_dim)
    item = getattr(torch, dtype)
    pages = np.zeros(math.prod(shape) * item.itemsize, dtype=np.uint8)
    return torch.from_numpy(pages).view(item).view(shape)
