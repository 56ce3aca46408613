"""Every buffer a step uses, allocated once from the plan in `budget`; nothing else is kept."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

Arena = dict[str, Tensor]


def allocate(
    buffers: Mapping[str, tuple[tuple[int, ...], str]], device: torch.device | None = None
) -> Arena:
    """Zeroed buffers by name, as planned by `budget.plan_buffers`."""
    return {
        name: torch.zeros(shape, dtype=getattr(torch, dtype), device=device)
        for name, (shape, dtype) in buffers.items()
    }


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind some tensors."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
