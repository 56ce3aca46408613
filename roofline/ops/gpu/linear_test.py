"""Every path of a linear against the reference, in Triton's interpreter where there is no GPU."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from roofline.ops import FloatWeight, Int8Weight, PackedWeight
from roofline.ops.gpu.layout import GemvPlan, Layout, TilesPlan, pack
from roofline.ops.gpu.linear import Linears
from roofline.ops.gpu.room import Room
from roofline.ops.reference import ReferenceOps, dequantize

# Of NumPy, in the interpreter: run-time bounds of loops, products with infinities.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Conversion of an array:DeprecationWarning", "ignore::RuntimeWarning"
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALVES = (torch.bfloat16, torch.float16)
# Of the largest value; sums are float32, and only the order of additions differs.
TOLERANCE = 2e-5
STREAMED = 1e-4  # where a few tokens are multiplied in planes: 16 bits of their group's largest


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(1)
    yield


def int8_weight(rows: int, columns: int, group: int, offset: int = 0) -> Int8Weight:
    values = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    values[:, 0] = -128
    groups = -(-(columns + offset) // group)
    return Int8Weight(values, torch.rand(rows, groups) / (60 * columns**0.5), group, offset)


def on_device(weight: Int8Weight | FloatWeight) -> Int8Weight | FloatWeight:
    values = weight.values.to(DEVICE)
    if isinstance(weight, FloatWeight):
        return FloatWeight(values)
    return Int8Weight(values, weight.scales.to(DEVICE), weight.group, weight.offset)


def product(x: Tensor, packed: PackedWeight, out: torch.dtype = torch.float32) -> Tensor:
    """The product on the device, brought back; every value of it was written."""
    linears = Linears(DEVICE)
    width = packed.rows
    layout = packed.layout
    assert isinstance(layout, Layout)
    if layout.paired:
        width //= 2
    result = torch.full((len(x), width), torch.nan, dtype=out, device=DEVICE)
    linears.multiply(
        x.to(DEVICE), packed, result, Room(torch.full((1 << 21,), torch.nan).to(DEVICE))
    )
    return result.cpu()


def wanted(x: Tensor, weight: Int8Weight | FloatWeight, rounded: bool = False) -> Tensor:
    out = torch.empty(len(x), weight.rows)
    reference = ReferenceOps(x.dtype, torch.empty(1 << 18), int8_activations=rounded)
    reference.linear(x, weight, out)
    return out


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert actual.shape == expected.shape
    limit = tolerance * max(1.0, float(expected.abs().max()))
    assert float((actual.float() - expected.float()).abs().max()) <= limit


# columns, group, offset: K within a group, not dividing it, cut inside one, a whole channel
CUTS = [
    (64, 32, 0), (100, 32, 0), (576, 128, 0), (100, 32, 20), (192, 128, 64), (96, 1536, 700),
    (300, 256, 128), (130, 64, 0),
]  # fmt: skip


@pytest.mark.parametrize(("columns", "group", "offset"), CUTS)
@pytest.mark.parametrize(("tokens", "rows"), [(1, 5), (19, 7)])
def test_int8(columns: int, group: int, offset: int, tokens: int, rows: int) -> None:
    check_int8(columns, group, offset, tokens, rows, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("tokens", "rows"), [(1, 3), (2, 67), (33, 4)])
def test_int8_at_other_dtypes(tokens: int, rows: int, dtype: torch.dtype) -> None:
    check_int8(160, 128, 0, tokens, rows, dtype)


def check_int8(
    columns: int, group: int, offset: int, tokens: int, rows: int, dtype: torch.dtype
) -> None:
    x, weight = torch.randn(tokens, columns).to(dtype), int8_weight(rows, columns, group, offset)
    packed = pack(on_device(weight), False, dtype=dtype)
    streams = isinstance(packed.layout, Layout) and tokens in packed.layout.streamed
    assert_close(product(x, packed), wanted(x, weight), STREAMED if streams else TOLERANCE)


@pytest.mark.parametrize("tokens", [1, 3, 17])
@pytest.mark.parametrize(("columns", "group", "offset"), CUTS)
def test_int8_activations(columns: int, group: int, offset: int, tokens: int) -> None:
    x = torch.randn(tokens, columns).bfloat16()
    x[0, : min(columns, 32)] = 0
    weight = int8_weight(3, columns, group, offset)
    packed = pack(on_device(weight), False, dtype=x.dtype, int8_activations=True)
    assert_close(product(x, packed), wanted(x, weight, rounded=True))


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 70])
def test_floats(tokens: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(tokens, 200).to(dtype), FloatWeight(torch.randn(3, 200).to(dtype))
    packed = pack(on_device(weight), False, dtype=dtype)
    assert_close(product(x, packed), wanted(x, weight))


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [("int8", 1), ("int8", 3), ("floats", 2), ("floats", 66), ("copy", 66), ("rounded", 1),
     ("rounded", 3), ("dequantized", 258)],
)  # fmt: skip
def test_swiglu_of_a_pair(kind: str, tokens: int) -> None:
    x, weight = torch.randn(tokens, 96).bfloat16(), int8_weight(2 * 7, 96, 32)
    held: Int8Weight | FloatWeight = on_device(weight)
    floats = dequantize(weight, torch.empty(14, 96)).bfloat16()
    known: Int8Weight | FloatWeight = weight
    if kind == "floats":
        known, held = FloatWeight(floats), FloatWeight(floats.to(DEVICE))
    if kind == "copy":
        assert isinstance(held, Int8Weight)
        held = Int8Weight(held.values, held.scales, 32, 0, floats.to(DEVICE))
    rounded = kind == "rounded"
    packed = pack(held, True, dtype=x.dtype, int8_activations=rounded)
    gate, up = wanted(x, known, rounded).chunk(2, dim=1)
    expected = gate / (1 + torch.exp(-gate)) * up
    assert_close(product(x, packed, x.dtype), expected, 2e-2)


@pytest.mark.parametrize("plan", [
    TilesPlan(64, 16, 2, 4, 3), TilesPlan(32, 32, 8, 4, 2), TilesPlan(128, 64, 1, 8, 3),
])  # fmt: skip
@pytest.mark.parametrize("tokens", [1, 40])
def test_every_cut_of_columns_gives_the_same_sum(plan: TilesPlan, tokens: int) -> None:
    x, weight = torch.randn(tokens, 576).bfloat16(), int8_weight(34, 576, 128)
    packed = pack(on_device(weight), False, dtype=x.dtype)
    partial = torch.full((plan.splits, tokens, 34), torch.nan, device=DEVICE)
    linears = Linears(DEVICE)
    linears.tiles(x.to(DEVICE), None, packed, partial, None, plan)
    out = torch.full((tokens, 34), torch.nan, device=DEVICE)
    linears.sum_splits(partial, out)
    assert_close(out.cpu(), wanted(x, weight))


@pytest.mark.parametrize("plan", [GemvPlan(4, 2, 2), GemvPlan(16, 8, 4)])
def test_every_plan_of_one_token_gives_the_same_sum(plan: GemvPlan) -> None:
    x, weight = torch.randn(1, 576).bfloat16(), int8_weight(34, 576, 128)
    packed = pack(on_device(weight), False, dtype=x.dtype)
    out = torch.full((1, 34), torch.nan, device=DEVICE)
    Linears(DEVICE).gemv(x.to(DEVICE), None, packed, out, None, plan)
    assert_close(out.cpu(), wanted(x, weight))


def test_a_prompt_goes_through_the_library_as_it_goes_through_the_kernel() -> None:
    x, weight = torch.randn(260, 100).bfloat16(), int8_weight(5, 100, 32, 20)
    packed = pack(on_device(weight), False, dtype=x.dtype)
    assert isinstance(packed.layout, Layout) and packed.layout.library_tokens == 97
    assert_close(product(x, packed), wanted(x, weight), 1e-2)
    assert_close(product(x[:65], packed), wanted(x[:65], weight))


@pytest.mark.parametrize("rounded", [False, True])
def test_deterministic_bits_of_a_token_do_not_depend_on_the_others(rounded: bool) -> None:
    x, weight = torch.randn(70, 320).bfloat16(), int8_weight(7, 320, 64)
    packed = pack(
        on_device(weight), False, dtype=x.dtype, deterministic=True, int8_activations=rounded
    )
    together = product(x, packed)
    parts = [slice(0, 1), slice(0, 20)]
    if torch.cuda.is_available():  # in the interpreter NumPy's sums depend on a token's place
        parts += [slice(3, 20), slice(66, 70)]
    for tokens in parts:
        assert torch.equal(product(x[tokens].contiguous(), packed), together[tokens])


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("rounded", [False, True])
def test_nan_and_infinity_reach_their_token_only(tokens: int, rounded: bool) -> None:
    x, weight = torch.randn(tokens, 100).bfloat16(), int8_weight(40, 100, 32)
    packed = pack(on_device(weight), False, dtype=x.dtype, int8_activations=rounded)
    for broken in (torch.nan, torch.inf):
        x[0, 40] = broken
        out = product(x, packed)
        assert not out[0].isfinite().any() and out[1:].isfinite().all()


@pytest.mark.parametrize("tokens", [1, 3, 66])  # each by another kernel; many by the library
def test_products_that_are_not_finite_are_found(tokens: int) -> None:
    x, weight = torch.randn(tokens, 40).to(DEVICE), FloatWeight(torch.randn(3, 40))
    packed = pack(on_device(weight), False, dtype=x.dtype)
    out, found = torch.empty(tokens, 3).to(DEVICE), torch.zeros(1, dtype=torch.int32).to(DEVICE)
    linears, room = Linears(DEVICE), torch.empty(1 << 21).to(DEVICE)
    linears.multiply(x, packed, out, Room(room), found)
    assert not found.item()
    for broken in (torch.nan, -torch.inf):
        x[-1, 7] = broken
        found.zero_()
        linears.multiply(x, packed, out, Room(room), found)
        assert found.item()
