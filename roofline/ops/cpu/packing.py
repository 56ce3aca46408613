"""Weights in the order that SIMD lanes read them, packed once at load (`Weight` in csrc/abi.h)."""

import torch

from roofline.budget import ROW_MULTIPLE, padded_rows
from roofline.ops import FloatWeight, Int8Weight, PackedWeight
from roofline.ops.cpu import abi
from roofline.ops.cpu.library import Library

LANES = ROW_MULTIPLE  # rows of a chunk
_KINDS = {torch.int8: abi.INT8, torch.bfloat16: abi.BFLOAT16, torch.float32: abi.FLOAT32}


def can_pack(columns: int, group: int, offset: int) -> bool:
    """Whether a matrix is of a shape that the kernels take."""
    return columns % 4 == 0 and group % 4 == 0 and offset % 4 == 0


def pack(
    library: Library,
    weight: Int8Weight | FloatWeight,
    *,
    paired: bool = False,
    int8_activations: bool = False,
) -> PackedWeight:
    """Pack a matrix; `paired`: the first and second half of its rows in turn, 16 by 16."""
    rows, columns = weight.values.shape
    source, source_scales, scales = weight.values.contiguous(), None, None
    group, offset, groups = 0, 0, 0
    if isinstance(weight, Int8Weight):
        source_scales = weight.scales.contiguous()
        group, offset, groups = weight.group, weight.offset, source_scales.shape[1]
        scales = torch.empty(padded_rows(rows) * groups)
    values = torch.empty(padded_rows(rows) * columns, dtype=source.dtype)
    kind = _KINDS[source.dtype]
    if kind == abi.INT8 and int8_activations:
        kind = abi.OFFSET_INT8
    chunks = _block_chunks(padded_rows(rows) // LANES, paired)
    extremes = library.functions.roofline_pack(
        *(source.data_ptr(), address(source_scales), rows, columns, groups),
        *(source.element_size(), chunks, paired, kind == abi.OFFSET_INT8),
        *(values.data_ptr(), address(scales)),
    )
    layout = abi.Weight(
        *(values.data_ptr(), address(scales), rows, columns, group, offset),
        *(kind, chunks, extremes),
    )
    return PackedWeight(values, scales, rows, layout)


def address(tensor: torch.Tensor | None) -> int | None:
    """Where a tensor's values begin, as ctypes takes it; None is a null pointer."""
    return None if tensor is None else tensor.data_ptr()


def _block_chunks(chunks: int, paired: bool) -> int:
    """Chunks of a block: as many as registers hold, in an even number of blocks where possible."""
    heights = (4, 2) if paired else (4, 3)
    return next((height for height in heights if chunks % (2 * height) == 0), 4)
