"""The KV pool: one tensor a model, allocated at start. Who owns which block is the scheduler's."""

import math
import mmap

import torch
from torch import Tensor

from roofline.budget import Rank
from roofline.config import ModelConfig
from roofline.errors import CapacityError

_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


def allocate(
    model: ModelConfig, dtype: str, rank: Rank, num_blocks: int, block_size: int
) -> Tensor:
    """A zeroed pool [layers, 2, blocks, kv_heads, block_size, head_dim] of one rank.

    The pages come from the kernel untouched, so a block costs memory when first written: small
    ones, as in huge ones a block, which lies apart in every layer, would cost 2 MiB in each.
    """
    layers = len(rank.parallel.layers(model, rank.stage))
    heads = len(rank.parallel.kv_heads(model, rank.tp_rank))
    shape = (layers, 2, num_blocks, heads, block_size, model.head_dim)
    item = getattr(torch, dtype)
    size_bytes = math.prod(shape) * item.itemsize
    try:
        pages = mmap.mmap(-1, size_bytes, **_PRIVATE)
    except (OSError, OverflowError) as error:
        raise CapacityError(
            f"the system refuses a KV pool of {size_bytes:,} bytes; lower --kv-cache-memory-bytes, "
            "--gpu-memory-utilization or --max-model-len"
        ) from error
    return torch.frombuffer(pages, dtype=item).view(shape)
