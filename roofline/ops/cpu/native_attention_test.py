"""Native attention against the reference: any mix of rows, windows, heads; NaN and inf too."""

import functools

import pytest
import torch
from torch import Tensor

from roofline.ops.cpu.library import Library
from roofline.ops.cpu.native import NativeOps, Pool
from roofline.ops.reference import ReferenceOps
from tests.native_library import ISAS, open_native
from tests.paged_step import MIXED, PagedStep

TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 8e-3}  # of the largest value
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
ROWS = [*MIXED, (16, 1), (17, 17), (32, 3), (1, 1)]
# heads, kv_heads, head_dim, block_tokens: one query head to 32 a KV head, 3 heads, each head_dim
SHAPES = [
    (9, 3, 64, 16), (3, 3, 80, 32), (32, 1, 16, 64), (17, 1, 128, 16), (8, 2, 256, 16),
]  # fmt: skip
WINDOWS = [None, 1, 5, 16, 40, 257, 5000]
OVER_SHAPES = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))


@pytest.fixture(scope="module", params=ISAS)
def library(request: pytest.FixtureRequest) -> Library:
    return open_native(request.param)


@functools.cache
def paged(shape: tuple[int, int, int, int], dtype: torch.dtype) -> PagedStep:
    torch.manual_seed(4)
    return PagedStep(ROWS, *shape, dtype)


@functools.cache
def wanted(shape: tuple[int, int, int, int], dtype: torch.dtype, window: int | None) -> Tensor:
    return paged(shape, dtype).run(reference(dtype), window)


def reference(dtype: torch.dtype) -> ReferenceOps:
    return ReferenceOps(dtype, torch.zeros(1))


def native(
    library: Library, dtype: torch.dtype, threads: int = 2, scratch: int = 1 << 20
) -> NativeOps:
    step = torch.zeros(4, dtype=torch.int64)
    return NativeOps(dtype, torch.zeros(scratch), step, Pool(library, threads))


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Within tolerance; NaN and inf in the same places."""
    limit = TOLERANCE[dtype] * float(expected.float().nan_to_num(0, 0, 0).abs().max())
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0, atol=limit, equal_nan=True)


@OVER_SHAPES
@DTYPES
def test_prompts_and_decodes_in_one_step_at_any_window(
    library: Library, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    ops, step = native(library, dtype), paged(shape, dtype)
    for window in WINDOWS:
        assert_close(step.run(ops, window), wanted(shape, dtype, window), dtype)


@OVER_SHAPES
@DTYPES
@pytest.mark.parametrize("window", [None, 20])
def test_neither_company_nor_chunks_change_a_bit(
    library: Library,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    window: int | None,
) -> None:
    ops, step = native(library, dtype), paged(shape, dtype)
    together = step.run(ops, window)
    for row, (_, new) in enumerate(ROWS):
        start = int(step.query_start[row])
        for chunk in (1, 2, 15, 33):
            for first in range(0, new, chunk):
                last = min(first + chunk, new)
                part = step.run_part(ops, row, first, last, window)
                assert torch.equal(part, together[start + first : start + last]), (row, chunk)


@DTYPES
def test_threads_change_no_bit(library: Library, dtype: torch.dtype) -> None:
    step = paged(SHAPES[0], dtype)
    first, *others = (step.run(native(library, dtype, threads), None) for threads in (1, 2, 3))
    assert all(torch.equal(first, other) for other in others)


LONG = [(700, 1), (1030, 40), (0, 0), (256, 256), (257, 257), (513, 3)]


@DTYPES
@pytest.mark.parametrize("window", [None, 300])
def test_spans_of_a_long_context_are_merged_alike_by_whoever_worked_on_them(
    library: Library, dtype: torch.dtype, window: int | None
) -> None:
    """Room for the spans' parts decides who works on what; chunks decide what a tile is."""
    torch.manual_seed(9)
    step = PagedStep(LONG, 9, 3, 64, 16, dtype)
    whole = step.run(native(library, dtype, 2, scratch=1), window)
    assert_close(whole, step.run(reference(dtype), window), dtype)
    for threads in (1, 3):
        assert torch.equal(step.run(native(library, dtype, threads), window), whole)
    ops = native(library, dtype)
    for row, (_, new) in enumerate(LONG):
        start = int(step.query_start[row])
        for first in range(0, new, 37):
            last = min(first + 37, new)
            part = step.run_part(ops, row, first, last, window)
            assert torch.equal(part, whole[start + first : start + last]), row


@DTYPES
def test_large_scores_do_not_overflow(library: Library, dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    step = PagedStep([(300, 20)], 2, 1, 64, 16, dtype)
    step.query *= 1e4
    assert_close(step.run(native(library, dtype), None), step.run(reference(dtype), None), dtype)


@DTYPES
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_poisoned_query_is_alone(library: Library, dtype: torch.dtype, poison: float) -> None:
    torch.manual_seed(6)
    step = PagedStep([(40, 20), (30, 1), (50, 1)], 4, 2, 64, 16, dtype)
    ops = native(library, dtype)
    clean = step.run(ops, None)
    step.query[[7, 20], 1, 3] = poison
    actual = step.run(ops, None)
    assert_close(actual, step.run(reference(dtype), None), dtype)
    others = torch.ones(22, 4, dtype=torch.bool)
    others[[7, 20], 1] = False
    assert torch.equal(actual[others], clean[others])


@DTYPES
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("position", [0, 15, 16, 17, 32, 47])
def test_a_poisoned_key_reaches_those_that_see_it(
    library: Library, dtype: torch.dtype, poison: float, position: int
) -> None:
    """The first position of sixteen, seen alone by the query at its own place, is the hard one."""
    torch.manual_seed(7)
    step = PagedStep([(48, 48), (33, 1), (40, 20)], 4, 2, 64, 16, dtype)
    ops = native(library, dtype)
    clean = step.run(ops, None)
    step.keys_values[0][0, position, 1, 5] = poison
    step.write(0, position, step.keys_values[0][:, position])
    for window in (None, 1, 9):
        actual = step.run(ops, window)
        assert_close(actual, step.run(reference(dtype), window), dtype)
    actual = step.run(ops, None)
    assert torch.equal(actual[:position], clean[:position])
    assert torch.equal(actual[48:], clean[48:])


@DTYPES
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_poisoned_value_reaches_those_that_see_it_and_no_other_row(
    library: Library, dtype: torch.dtype, poison: float
) -> None:
    torch.manual_seed(8)
    step = PagedStep([(48, 8), (33, 1), (40, 20)], 4, 2, 64, 16, dtype)
    ops = native(library, dtype)
    clean = step.run(ops, None)
    step.keys_values[0][1, 42, 1, 5] = poison
    step.write(0, 42, step.keys_values[0][:, 42])
    actual, expected = step.run(ops, None), step.run(reference(dtype), None)
    assert_close(actual[2:], expected[2:], dtype)  # the tokens at 42 and after
    assert not actual[2:8, 2:, 5].isfinite().any()
    assert torch.equal(actual[8:], clean[8:])
