"""What a checkpoint's tensors become in memory: INT8 groups and float32 vectors, one at a time.

The loader and the offline quantiser both read through here, so they get the same bits. No files,
no shards; it imports only what an engine may.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from roofline.budget import GATE_UP, QKV, NativeGroups, Rank, layer_tensor, plan_model
from roofline.config import ModelConfig, WeightFormat
from roofline.errors import CheckpointError
from roofline.models.checkpoints import Checkpoint
from roofline.ops import Int8Weight, Quantize
from roofline.quantization.int8_groups import quantize, quantize_groups

_PIECES = (QKV, ("self_attn.o_proj",), GATE_UP, ("mlp.down_proj",))  # of LayerPlan.matrices()


Upload = Callable[[Tensor], Tensor]  # puts a tensor where the model runs


def as_it_is(tensor: Tensor) -> Tensor:
    """The `Upload` of a model that runs on the host."""
    return tensor


def tensor_groups(
    config: ModelConfig, weights: WeightFormat, native: NativeGroups
) -> dict[str, int]:
    """Group size of every matrix, by the plan a loader follows: fused matrices share theirs."""
    plan = plan_model(config, weights, Rank(), native)
    tables = (plan.embedding, plan.head)
    groups = {table.name: table.group for table in tables if table is not None}
    for layer, layer_plan in plan.layers.items():
        for pieces, matrix in zip(_PIECES, layer_plan.matrices(), strict=True):
            groups |= {layer_tensor(layer, piece): matrix.group for piece in pieces}
    return groups


def int8_rows(
    checkpoint: Checkpoint,
    name: str,
    group: int,
    rows: slice,
    upload: Upload = as_it_is,
    quantize_slab: Quantize = quantize_groups,
) -> Int8Weight:
    """Some rows of a matrix in groups of `group`: the file's own if it has them, else quantised.

    They are quantised where `upload` puts them.
    """
    if checkpoint.native_groups.get(name) == group:
        values, scales = map(torch.as_tensor, checkpoint.read_int8(name))
        return Int8Weight(upload(values[rows]), upload(scales[rows]), group, 0)
    floats = upload(torch.as_tensor(checkpoint.read(name))[rows])
    return quantize(floats, group, name, quantize_slab)


def float_vector(checkpoint: Checkpoint, name: str, rows: slice) -> Tensor:
    """Some of a norm's weight or a bias, [n] float32, in memory of its own.

    CheckpointError for NaN or infinity in them.
    """
    vector = torch.as_tensor(checkpoint.read(name))[rows].float().clone()
    if not vector.isfinite().all():
        raise CheckpointError(f"tensor '{name}' holds NaN or infinity")
    return vector
