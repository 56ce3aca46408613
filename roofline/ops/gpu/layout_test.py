"""Plans of matrices: what kernels and the budget take for granted of them."""

import pytest
import torch

pytest.importorskip("triton")

from roofline.budget import DEQUANTIZED_ROWS, PARTIAL_ROWS, SPLIT_TOKENS
from roofline.ops import FloatWeight, Int8Weight
from roofline.ops.gpu.layout import Layout, layout_of, pack

SHAPES = [
    (6144, 4096),
    (28672, 4096),
    (4096, 14336),
    (128256, 4096),
    (768, 768),
    (960, 576),
    (7, 1),
]


def layout(rows: int, columns: int, group: int | None, offset: int = 0, **options: bool) -> Layout:
    meta = torch.device("meta")
    if group is None:
        floats = FloatWeight(torch.empty(rows, columns, dtype=torch.bfloat16, device=meta))
        return layout_of(pack(floats, False, dtype=torch.bfloat16, **options))
    values = torch.empty(rows, columns, dtype=torch.int8, device=meta)
    scales = torch.empty(rows, -(-(columns + offset) // group), device=meta)
    weight = Int8Weight(values, scales, group, offset)
    return layout_of(pack(weight, False, dtype=torch.bfloat16, **options))


@pytest.mark.parametrize("group", [None, 32, 64, 128, 256])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_plans_fit_what_is_budgeted_and_what_kernels_take(
    rows: int, columns: int, group: int | None
) -> None:
    found = layout(rows, columns, group)
    for plan in found.tiles:
        assert plan.splits == 1 or plan.tokens <= SPLIT_TOKENS
        assert plan.splits == 1 or plan.splits * rows <= PARTIAL_ROWS
        assert plan.splits <= found.chunks
    assert found.gemv is not None
    for number in (found.gemv.rows, found.gemv.chunks, found.chunk):
        assert number & (number - 1) == 0
    assert not found.group or found.group % found.chunk == 0  # a chunk is of one group
    assert found.is_even(found.chunks) == (columns % found.chunk == 0)


@pytest.mark.parametrize("group", [32, 128, 256])
@pytest.mark.parametrize("offset", [0, 20, 64, 200])
def test_a_chunk_is_of_one_group(group: int, offset: int) -> None:
    offset %= group
    found = layout(8, 500, group, offset)
    for chunk in range(found.chunks):
        first = max(0, chunk * found.chunk - found.shift)
        last = min(499, (chunk + 1) * found.chunk - found.shift - 1)
        assert first <= last
        assert (first + offset) // group == (last + offset) // group
        assert (chunk * found.chunk - found.shift + offset) // group == (first + offset) // group


def test_tiles_are_chosen_by_the_tokens_they_hold() -> None:
    found = layout(6144, 4096, 128)
    assert [found.tiles_of(n).tokens for n in (1, 16, 17, 32, 33, 64, 65, 9999)] == [
        16, 16, 32, 32, 64, 64, 128, 128,
    ]  # fmt: skip


def test_a_deterministic_matrix_has_one_plan_for_every_number_of_tokens() -> None:
    found = layout(6144, 4096, 128, deterministic=True)
    assert found.gemv is None and found.library_tokens is None
    assert len({found.tiles_of(n) for n in (1, 16, 100, 9999)}) == 1


def test_the_library_multiplies_long_prompts_by_matrices_that_fit_the_buffer() -> None:
    assert layout(6144, 4096, 128).library_tokens == 97
    assert layout(DEQUANTIZED_ROWS + 1, 64, 32).library_tokens is None
    assert layout(6144, 4096, 128, int8_activations=True).library_tokens is None
    assert layout(6144, 4096, None).library_tokens == SPLIT_TOKENS + 1
