"""The linears of `wide.cu` against the reference: on a Hopper GPU alone, as nothing interprets it.

How activations are laid out for them, in the interpreter too, and what plans may be.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from roofline.ops import Int8Weight, PackedWeight
from roofline.ops.gpu import norms
from roofline.ops.gpu.layout import layout_of, pack
from roofline.ops.gpu.linear import Linears
from roofline.ops.gpu.room import Room
from roofline.ops.gpu.triton_support import launch, parts
from roofline.ops.gpu.wide import BLOCK_SLABS, MOST_SHARED, TILES, WidePlan, plan_wide, wides_on
from roofline.ops.reference import ReferenceOps

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WIDES = wides_on(DEVICE)
on_hopper = pytest.mark.skipif(WIDES is None, reason="no Hopper GPU, or no NVRTC")
TOLERANCE = 5e-5  # of the largest value; 1.6e-5 of the norm was measured at K = 14,336
CLUSTERS = (132, 66, 39, 30, 22)  # of an H200
SHAPES = [(16, 192), (48, 576), (272, 1088), (96, 4096)]


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(1)
    yield


def int8_weight(rows: int, columns: int) -> Int8Weight:
    values = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    values[:, 1] = -128
    return Int8Weight(values, torch.rand(rows, parts(columns, 128)) / (60 * columns**0.5), 128, 0)


def packed(weight: Int8Weight, dtype: torch.dtype, paired: bool = False) -> PackedWeight:
    moved = Int8Weight(weight.values.to(DEVICE), weight.scales.to(DEVICE), 128, 0)
    return pack(moved, paired, dtype=dtype)


def product(
    x: Tensor, weight: Int8Weight, paired: bool = False, plan: WidePlan | None = None
) -> Tensor:
    linears, matrix = Linears(DEVICE), packed(weight, x.dtype, paired)
    assert WIDES is not None
    shape = (len(x), weight.rows // 2 if paired else weight.rows)
    out = torch.full(shape, torch.nan, device=DEVICE, dtype=x.dtype if paired else torch.float32)
    room = Room(torch.full((1 << 20,), torch.nan, device=DEVICE))
    WIDES.multiply(linears.laid(x.to(DEVICE), room), matrix, out, None, plan)
    return out.cpu().float()


def wanted(x: Tensor, weight: Int8Weight) -> Tensor:
    out = torch.empty(len(x), weight.rows)
    ReferenceOps(x.dtype, torch.empty(1 << 22)).linear(x, weight, out)
    return out


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    limit = tolerance * float(expected.abs().max())
    assert float((actual - expected).abs().max()) <= limit


@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("tokens", [1, 17, 41, 70, 128, 200])
def test_products_are_the_reference_s(
    tokens: int, rows: int, columns: int, dtype: torch.dtype
) -> None:
    weight = int8_weight(rows, columns)
    x = torch.randn(tokens, columns).mul(torch.rand(tokens, columns).mul(4).exp()).to(dtype)
    assert_close(product(x, weight), wanted(x, weight))


@on_hopper
@pytest.mark.parametrize("splits", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("slabs", [3, 4, 14, 16])
@pytest.mark.parametrize("paired", [False, True])
def test_every_plan_gives_the_same_product(slabs: int, splits: int, paired: bool) -> None:
    weight, x = int8_weight(736, 1088), torch.randn(50, 1088).bfloat16()
    found = product(x, weight, paired, WidePlan(64, slabs, splits, 4, 4))
    expected = wanted(x, weight)
    if paired:
        gate, up = expected.chunk(2, dim=1)
        expected = gate / (1 + torch.exp(-gate)) * up
    assert_close(found, expected, 1e-2 if paired else TOLERANCE)
    assert torch.equal(found, product(x, weight, paired, WidePlan(64, slabs, splits, 4, 4)))


@on_hopper
@pytest.mark.parametrize("splits", [1, 3])
def test_nan_and_infinity_reach_their_token_only_and_are_found(splits: int) -> None:
    assert WIDES is not None
    weight, clean = int8_weight(48, 576), torch.randn(20, 576).bfloat16()
    matrix, linears = packed(weight, clean.dtype), Linears(DEVICE)
    for broken in (None, torch.nan, torch.inf, -torch.inf):
        x = clean.clone()
        if broken is not None:
            x[3, 140] = broken
        out = torch.empty(20, 48, device=DEVICE)
        flag = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        laid = linears.laid(x.to(DEVICE), Room(torch.empty(1 << 20, device=DEVICE)))
        WIDES.multiply(laid, matrix, out, flag, WidePlan(32, 2, splits, 4, 4))
        finite = out.isfinite().all(dim=1).tolist()
        assert bool(flag.item()) == (broken is not None)
        assert finite == [broken is None or token != 3 for token in range(20)]


@on_hopper
def test_scales_may_be_zero_and_far_apart() -> None:
    weight, x = int8_weight(32, 1024), torch.randn(33, 1024).bfloat16()
    weight.scales[:, 2] = 0
    weight.scales[3] = 0
    weight.scales[5] *= 1e12
    weight.scales[5, ::2] *= 1e-24
    found, expected = product(x, weight), wanted(x, weight)
    for row in range(32):
        largest = float(expected[:, row].abs().max())
        error = float((found[:, row] - expected[:, row]).abs().max())
        assert error <= max(TOLERANCE * largest, 1e-20)


@on_hopper
def test_a_token_has_the_same_bits_whatever_the_others_are() -> None:
    weight, x = int8_weight(64, 1024), torch.randn(64, 1024).bfloat16()
    plan = WidePlan(64, 4, 2, 4, 4)
    whole = product(x, weight, plan=plan)
    assert torch.equal(product(x[:40].contiguous(), weight, plan=plan), whole[:40])


@on_hopper
@pytest.mark.parametrize("tokens", [17, 64, 128])
@pytest.mark.parametrize("paired", [False, True])
def test_linears_choose_it_for_large_matrices(tokens: int, paired: bool) -> None:
    weight, x = int8_weight(2048, 4096), torch.randn(tokens, 4096).bfloat16()
    linears, matrix = Linears(DEVICE), packed(weight, x.dtype, paired)
    assert linears.is_wide(layout_of(matrix), tokens)
    assert not linears.is_wide(layout_of(matrix), 16)
    out = torch.full((tokens, 1024 if paired else 2048), torch.nan, device=DEVICE)
    out = out.to(x.dtype) if paired else out
    linears.multiply(x.to(DEVICE), matrix, out, Room(torch.empty(1 << 20, device=DEVICE)))
    expected = wanted(x, weight)
    if paired:
        gate, up = expected.chunk(2, dim=1)
        expected = gate / (1 + torch.exp(-gate)) * up
    assert_close(out.cpu().float(), expected, 1e-2 if paired else TOLERANCE)


@pytest.mark.parametrize("columns", [64, 192, 256])
def test_activations_are_laid_out_in_the_order_of_lanes(columns: int) -> None:
    tokens, room = 11, 16
    x = torch.randn(tokens, columns).half()
    out = torch.full((2 * parts(columns, 128), room, 64), torch.nan).half().to(DEVICE)
    launch(
        norms.lay, (tokens, 1), Linears(DEVICE).pdl, x.to(DEVICE), out, columns, room, COLUMNS=256
    )
    found = out.cpu()
    for token in range(tokens):
        for column in range(128 * parts(columns, 128)):
            lane, word, byte = column % 64 // 16, column % 16 // 4, column % 4
            eight = (2 * word + byte % 2) ^ (token % 8)
            value = found[column // 64, token, 8 * eight + 2 * lane + byte // 2]
            assert value == (x[token, column] if column < columns else 0)


def test_norms_lay_out_as_a_launch_of_its_own_does() -> None:
    tokens, hidden, pdl = 9, 320, Linears(DEVICE).pdl
    residual, weight = torch.randn(tokens, hidden).to(DEVICE), torch.rand(hidden).to(DEVICE)
    plain = torch.empty(tokens, hidden, dtype=torch.float16, device=DEVICE)
    laid, own = torch.full((2, 6, 16, 64), torch.nan).half().to(DEVICE)
    for out, is_laid in ((plain, False), (own, True)):
        launch(
            norms.add_norm, (tokens,), pdl, residual, None, None, weight, out, None, None, hidden,
            1e-5, 16 if is_laid else 0, LAID=is_laid, UPDATE=False, PLANES=0,
            FLOAT=norms.tl.float16, BLOCK=512,
        )  # fmt: skip
    launch(norms.lay, (tokens, 1), pdl, plain, laid, hidden, 16, COLUMNS=512)
    assert torch.equal(own[:, :tokens], laid[:, :tokens])


@pytest.mark.parametrize("tokens", [17, 32, 33, 96, 100, 128, 129, 256])
@pytest.mark.parametrize("rows", [16, 4096, 6144, 28672, 128256])
@pytest.mark.parametrize("columns", [64, 576, 4096, 14336])
def test_every_plan_fits_a_multiprocessor(tokens: int, rows: int, columns: int) -> None:
    plan = plan_wide(tokens, rows, columns, CLUSTERS)
    assert plan.shared_bytes <= MOST_SHARED and plan.slabs <= BLOCK_SLABS
    assert plan.splits <= parts(columns, 128) and plan.tokens in TILES


def test_plans_are_those_that_were_measured() -> None:
    shapes = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
    found = [plan_wide(64, rows, columns, CLUSTERS) for rows, columns in shapes]
    assert [(p.slabs, p.splits) for p in found] == [(13, 4), (9, 4), (14, 1), (12, 5)]
