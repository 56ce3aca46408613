"""The KV cache: one pool a model, allocated at start. Who owns which block is the scheduler's."""

import math

import numpy as np
import torch
from torch import Tensor

from roofline.budget import Rank, is_quantized
from roofline.config import ModelConfig
from roofline.errors import CapacityError
from roofline.ops import KvCache


def allocate(
    model: ModelConfig, dtype: str, rank: Rank, num_blocks: int, block_size: int
) -> KvCache:
    """A zeroed cache of one rank: values of `dtype`, and scales beside int8 and float8_e4m3fn.

    The pages come from the kernel untouched (calloc), so a block costs memory when first written.
    """
    layers = len(rank.parallel.layers(model, rank.stage))
    heads = len(rank.parallel.kv_heads(model, rank.tp_rank))
    shape = (layers, 2, num_blocks, heads, block_size, model.head_dim)
    values = _zeros(shape, getattr(torch, dtype))
    return KvCache(values, _zeros(shape[:-1], torch.float32) if is_quantized(dtype) else None)


def tensors(cache: KvCache) -> list[Tensor]:
    """What a cache consists of: for counting bytes."""
    return [cache.values] if cache.scales is None else [cache.values, cache.scales]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    size_bytes = math.prod(shape) * dtype.itemsize
    try:
        pages = np.zeros(size_bytes, dtype=np.uint8)
    except MemoryError as error:
        raise CapacityError(
            f"the system refuses a KV pool of {size_bytes:,} bytes; lower --kv-cache-memory-bytes, "
            "--gpu-memory-utilization or --max-model-len"
        ) from error
    return torch.from_numpy(pages).view(dtype).view(shape)
