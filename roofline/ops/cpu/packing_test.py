"""The packed layout, element by element, as csrc/abi.h defines it; and its bytes as planned."""

from typing import Any

import pytest
import torch

from roofline.budget import MatrixPlan
from roofline.ops import FloatWeight, Int8Weight, PackedWeight
from roofline.ops.cpu import abi
from roofline.ops.cpu.packing import LANES, can_pack, pack
from tests.native_library import open_native

# Inside [16 rows][4 columns]: where row and column lie.
PLACES: dict[int, Any] = {
    abi.INT8: lambda lane, i: 4 * lane + i,
    abi.OFFSET_INT8: lambda lane, i: 4 * lane + i,
    abi.BFLOAT16: lambda lane, i: i // 2 * 32 + 2 * lane + i % 2,
    abi.FLOAT32: lambda lane, i: LANES * i + lane,
}


def unpack(packed: PackedWeight) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The matrix and its scales, rows padded, read back one by one."""
    layout = packed.layout
    assert isinstance(layout, abi.Weight)
    chunks, quads = -(-layout.rows // LANES), layout.columns // 4
    values = torch.zeros(chunks * LANES, layout.columns)
    groups = 0 if packed.scales is None else packed.scales.numel() // (chunks * LANES)
    scales = None if packed.scales is None else torch.zeros(chunks * LANES, groups)
    flat, place = packed.values.float().tolist(), PLACES[layout.kind]
    for chunk in range(chunks):
        first = chunk // layout.chunks * layout.chunks  # of its block
        height, column = min(layout.chunks, chunks - first), chunk - first
        for lane in range(LANES):
            row = chunk * LANES + lane
            for k in range(layout.columns):
                quad = first * quads + k // 4 * height + column
                values[row, k] = flat[quad * 4 * LANES + place(lane, k % 4)]
            for g in range(groups):
                assert scales is not None and packed.scales is not None
                at = first * groups + g * height + column
                scales[row, g] = packed.scales[at * LANES + lane]
    return values, scales


@pytest.mark.parametrize("kind", [torch.int8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("rows", "columns", "group", "offset", "paired"),
    [
        (1, 4, 32, 28, False), (16, 100, 32, 20, False), (37, 20, 256, 0, False),
        (300, 12, 12, 0, False), (96, 36, 32, 0, False), (96, 36, 32, 0, True),
        (32, 8, 32, 4, True), (160, 8, 32, 0, True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("int8_activations", [False, True])
def test_every_weight_and_scale_is_where_the_layout_says(
    rows: int,
    columns: int,
    group: int,
    offset: int,
    paired: bool,
    int8_activations: bool,
    kind: torch.dtype,
) -> None:
    torch.manual_seed(1)
    groups = -(-(columns + offset) // group)
    weight: Int8Weight | FloatWeight = FloatWeight(torch.randn(rows, columns).to(kind))
    if kind == torch.int8:
        values = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
        weight = Int8Weight(values, torch.rand(rows, groups), group, offset)
    packed = pack(open_native(), weight, paired=paired, int8_activations=int8_activations)
    values, scales = unpack(packed)
    if kind == torch.int8 and int8_activations:  # with 128 added: bytes without a sign
        values = torch.where(values < 0, values + 256, values) - 128
    order = torch.arange(rows)
    if paired:  # gate and up in turn, 16 by 16
        order = order.view(2, -1, LANES).transpose(0, 1).flatten()
    assert torch.equal(values[:rows], weight.values.float()[order])
    assert not values[rows:].any()
    assert packed.rows == rows
    if isinstance(weight, Int8Weight):
        assert scales is not None and torch.equal(scales[:rows], weight.scales[order])
        assert not scales[rows:].any()

    plan = MatrixPlan(
        *("w", rows, columns, group if kind == torch.int8 else 0, offset, str(kind)[6:])
    )
    scale_bytes = 0 if packed.scales is None else packed.scales.untyped_storage().nbytes()
    assert packed.values.untyped_storage().nbytes() == plan.weight_bytes
    assert scale_bytes == plan.scale_bytes


@pytest.mark.parametrize("most", [126, 127, 128])
def test_the_rare_minus_128_is_told(most: int) -> None:
    weight = Int8Weight(torch.zeros(3, 8, dtype=torch.int8), torch.ones(3, 1), 32, 0)
    weight.values[2, 7] = -most
    layout = pack(open_native(), weight).layout
    assert isinstance(layout, abi.Weight) and bool(layout.extremes) == (most == 128)


def test_only_quads_of_columns_can_be_packed() -> None:
    assert can_pack(576, 128, 0) and can_pack(100, 32, 20) and can_pack(100, 0, 0)
    assert not any(can_pack(*shape) for shape in ((30, 32, 0), (32, 30, 0), (32, 32, 2)))
