"""The native quantiser against its definition in torch: every bit, ISA and kind of weight."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from roofline.ops.cpu.native import Pool
from roofline.ops.cpu.quantizing import quantize
from roofline.quantization import int8_groups
from roofline.quantization.int8_groups import quantize_groups
from tests.native_library import ISAS, open_native


@pytest.fixture(scope="module", params=ISAS)
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    made = Pool(open_native(request.param), 2)
    yield made
    made.close()


def both(pool: Pool, weight: torch.Tensor, group: int) -> list[tuple[bool, Any, Any]]:
    """What the kernel and the definition say and leave."""
    found = list[tuple[bool, Any, Any]]()
    for quantiser in (lambda *given: quantize(pool, *given), quantize_groups):
        rows, columns = weight.shape
        values = torch.zeros(rows, columns, dtype=torch.int8)
        scales = torch.zeros(rows, -(-columns // group))
        finite = quantiser(weight, group, values, scales)
        found.append((finite, values.tolist(), scales.tolist()))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rows", "columns", "group"),
    [(1, 1, 32), (3, 576, 128), (17, 100, 64), (40, 33, 32), (5, 80, 80)],
)
def test_bits_are_those_of_torch(
    pool: Pool, rows: int, columns: int, group: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(rows)
    weight = (torch.randn(rows, columns) * 10.0 ** torch.randint(-3, 4, (rows, columns))).to(dtype)
    weight[0] = 0
    kernel, definition = both(pool, weight, group)
    assert kernel == definition and kernel[0]


def test_ties_tiny_groups_and_signs_are_those_of_torch(pool: Pool) -> None:
    tiny = int8_groups.SMALLEST_NORMAL
    weight = torch.zeros(5, 40)
    weight[0, :11] = torch.tensor(
        [127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 125.5, 126.5, -126.5, -0.0]
    )
    weight[1, 3], weight[2, 3] = 127 * tiny, -100 * tiny
    weight[3, 39], weight[4, 0] = torch.finfo(torch.float32).max, tiny / 4
    kernel, definition = both(pool, weight, 32)
    assert kernel == definition and kernel[0]


def test_some_rows_and_columns_of_a_larger_matrix_are_taken(pool: Pool) -> None:
    weight = torch.randn(30, 200)
    for part in (weight[3:20], weight[:, 8:108], weight.T):
        kernel, definition = both(pool, part, 64)
        assert kernel == definition


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("place", [(0, 0), (2, 63), (2, 64), (16, 99)])
def test_what_is_no_number_is_told(
    pool: Pool, place: tuple[int, int], dtype: torch.dtype, bad: float
) -> None:
    weight = torch.ones(17, 100, dtype=dtype)
    weight[place] = bad
    values, scales = torch.zeros(17, 100, dtype=torch.int8), torch.zeros(17, 2)
    assert not quantize(pool, weight, 64, values, scales)
