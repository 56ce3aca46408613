"""The KV cache: one pool a model, allocated at start. Who owns which block is the scheduler's."""

import math
import mmap
from functools import partial

import torch
from torch import Tensor

from roofline.budget import Rank, is_quantized
from roofline.config import ModelConfig
from roofline.errors import CapacityError
from roofline.ops import KvCache

_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


def allocate(
    model: ModelConfig,
    dtype: str,
    rank: Rank,
    num_blocks: int,
    block_size: int,
    device: torch.device | None = None,
) -> KvCache:
    """A zeroed cache of one rank: values of `dtype`, and scales beside int8 and float8_e4m3fn.

    On the host the pages come from the kernel untouched, so a block costs memory when it is first
    written: small ones, as in huge ones a block, which lies apart in every layer, would cost 2 MiB
    in each.
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
        pages = mmap.mmap(-1, size_bytes, **_PRIVATE)
    except (OSError, OverflowError) as error:
        raise CapacityError(
            f"the system refuses a KV pool of {size_bytes:,} bytes; lower --kv-cache-memory-bytes, "
            "--gpu-memory-utilization or --max-model-len"
        ) from error
    return torch.frombuffer(pages, dtype=dtype).view(shape)
