"""Group-wise INT8, weight-only: the format, its quantiser and its error bound.

    scale[n, g] = max |w[n, k in group g]| / 127      1.0 where that is zero or subnormal
    q[n, k]     = round_half_even(w[n, k] / scale)    in [-127, 127]

so |w - q * scale| <= scale / 2 * (1 + 2**-17). Groups run along K; the last one ends at K.
docs/int8_groups.md derives the bound and gives the layout on disk.
"""

import torch
from torch import Tensor

from roofline.errors import CheckpointError
from roofline.ops import Int8Weight, Quantize

SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
SLAB_VALUES = 1 << 21  # weights quantised at a time, so that temporaries stay small


def quantize_groups(weight: Tensor, group: int, values: Tensor, scales: Tensor) -> bool:
    """The definition, in torch, on the device the weights are on: see `ops.Quantize`.

    Division and rounding are IEEE's on every device, so the bits are the same.
    """
    weight, columns = weight.float(), weight.shape[1]
    whole = columns // group * group
    finite = _quantize_whole(weight[:, :whole], group, values[:, :whole], scales)
    if whole == columns:
        return finite
    rest = weight[:, whole:], columns - whole, values[:, whole:], scales[:, -1:]
    return _quantize_whole(*rest) and finite


def quantize(
    weight: Tensor, group: int, name: str, quantize_slab: Quantize = quantize_groups
) -> Int8Weight:
    """Quantise a float matrix [N, K] to INT8 groups of `group` columns.

    Raises CheckpointError naming the tensor where it holds NaN or infinity.
    """
    rows, columns = weight.shape
    values = torch.empty(rows, columns, dtype=torch.int8, device=weight.device)
    scales = torch.empty(rows, -(-columns // group), device=weight.device)
    slab = max(1, SLAB_VALUES // columns)
    for start in range(0, rows, slab):
        part = slice(start, start + slab)
        if not quantize_slab(weight[part], group, values[part], scales[part]):
            raise CheckpointError(f"tensor '{name}' holds NaN or infinity: it cannot be quantised")
    return Int8Weight(values, scales, group, 0)


def cut_columns(weight: Int8Weight, columns: range) -> Int8Weight:
    """The columns one rank holds; a cut inside a group copies its scale to both sides."""
    first, last = columns.start + weight.offset, columns.stop + weight.offset
    scales = weight.scales[:, first // weight.group : -(-last // weight.group)]
    values = weight.values[:, columns.start : columns.stop]
    return Int8Weight(values, scales, weight.group, first % weight.group)


def _quantize_whole(weight: Tensor, group: int, values: Tensor, scales: Tensor) -> bool:
    """Groups that divide the columns: weight [n, g * group] to values and the first g scales."""
    shape = (weight.shape[1] // group, group)
    grouped = weight.unflatten(1, shape)
    largest = grouped.abs().amax(dim=2)
    # By a tensor on the device: torch on CUDA multiplies by the reciprocal of a plain number.
    scale = largest / torch.tensor(127.0, device=weight.device)
    scale = torch.where(scale < SMALLEST_NORMAL, 1.0, scale)
    scales[:, : shape[0]] = scale
    quotient = grouped / scale.unsqueeze(2)
    values.unflatten(1, shape).copy_(quotient.round_().clamp_(-127, 127))
    return bool(torch.isfinite(largest).all())
