"""The KV cache: one pool a model, allocated at start. Who owns which block is the scheduler's."""

import math
from functools import partial

import numpy as np
import torch
from torch import Tensor

from roofline.budget import Rank, is_quantized
from roofline.config import ModelConfig
from roofline.errors import CapacityError
from roofline.ops import KvCache


def allocate(
    model: ModelConfig,
    dtype: str,
    rank: Rank,
    num_blocks: int,
    block_size: int,
    device: torch.device | None = None,
) -> KvCache:
    """A zeroed cache of one rank: values of `dtype`, and scales beside int8 and float8_e4m3fn.

    On the host the pages come from the kernel untouched (calloc), so a block costs memory when
    it is first written.
    """
    layers = len(rank.parallel.layers(model, rank.stage))
    heads = len(rank.parallel.kv_heads(model, rank.tp_rank))
    shape = (layers, 2, num_blocks, heads, block_size, model.head_dim)
    zeros = partial(torch.zeros, device=device) if device and device.type != "cpu" else _zeros
    values = zeros(shape, dtype=getattr(torch, dtype))
    scales = zeros(shape[:-1], dtype=torch.float32) if is_quantized(dtype) else None
    return KvCache(values, scales)


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
