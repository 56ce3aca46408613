import dataclasses
import errno
import mmap

import pytest
import torch

from roofline.budget import Rank, kv_block_bytes
from roofline.config import PRESETS, ParallelConfig
from roofline.errors import CapacityError
from roofline.execution import kv_cache
from roofline.execution.arena import storage_bytes

MODEL = dataclasses.replace(PRESETS["llama-110m"], num_layers=5, num_heads=9, num_kv_heads=3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8", "float8_e4m3fn"])
def test_pool_is_as_large_as_its_blocks_and_zero(dtype: str) -> None:
    cache = kv_cache.allocate(MODEL, dtype, Rank(), 7, 16)
    pool = cache.values
    assert pool.shape == (5, 2, 7, 3, 16, 64)
    assert pool.dtype == getattr(torch, dtype)
    assert storage_bytes(kv_cache.tensors(cache)) == 7 * kv_block_bytes(MODEL, dtype, Rank(), 16)
    assert pool.is_contiguous() and not pool.float().any()
    assert (cache.scales is None) == (pool.itemsize > 1)
    assert cache.scales is None or cache.scales.shape == pool.shape[:-1]


def test_a_rank_has_the_layers_and_heads_of_its_share() -> None:
    rank = Rank(ParallelConfig(2, 2), tp_rank=1, stage=1)
    pool = kv_cache.allocate(MODEL, "bfloat16", rank, 4, 8).values
    assert pool.shape == (2, 2, 4, 1, 8, 64)
    assert storage_bytes([pool]) == 4 * kv_block_bytes(MODEL, "bfloat16", rank, 8)


def test_memory_the_system_refuses_is_a_capacity_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*mapping: int, **flags: int) -> mmap.mmap:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(CapacityError, match="refuses a KV pool of 1,228,800 bytes; lower --kv"):
        kv_cache.allocate(MODEL, "float32", Rank(), 10, 16)
