"""The linears in CUDA C++ against the reference: on a GPU alone, as nothing interprets them."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from roofline.ops import Int8Weight, KvCache, StepInputs
from roofline.ops.gpu import layout, norms
from roofline.ops.gpu.layout import layout_of, pack
from roofline.ops.gpu.linear import Linears
from roofline.ops.gpu.room import Room
from roofline.ops.gpu.triton_support import launch
from roofline.ops.reference import ReferenceOps

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NaN, in the interpreter
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
TOLERANCE = 1e-4  # of the largest value: activations have 16 bits of their group's largest
SHAPES = [
    (16, 192),
    (32, 256),
    (48, 576),
    (96, 1088),
    (272, 4096),
    (32, 8320),
    (32, 14336),
    (48, 768),
]


@pytest.fixture(autouse=True)
def seeded_and_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One token of a small matrix is streamed, too."""
    torch.manual_seed(1)
    monkeypatch.setattr(layout, "STREAM_BYTES", 0)


def int8_weight(rows: int, columns: int) -> Int8Weight:
    values = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    values[:, 1] = -128
    return Int8Weight(values, torch.rand(rows, -(-columns // 128)) / (60 * columns**0.5), 128, 0)


def packed(weight: Int8Weight, dtype: torch.dtype, paired: bool = False, rounded: bool = False):
    moved = Int8Weight(weight.values.to(DEVICE), weight.scales.to(DEVICE), 128, 0)
    return pack(moved, paired, dtype=dtype, int8_activations=rounded)


def product(x: Tensor, weight: Int8Weight, paired: bool = False, rounded: bool = False) -> Tensor:
    linears, matrix = Linears(DEVICE), packed(weight, x.dtype, paired, rounded)
    assert linears.is_streamed(layout_of(matrix), len(x))
    shape = (len(x), weight.rows // 2 if paired else weight.rows)
    out = torch.full(shape, torch.nan, device=DEVICE, dtype=x.dtype if paired else torch.float32)
    linears.multiply(x.to(DEVICE), matrix, out, Room(torch.full((1 << 20,), torch.nan).to(DEVICE)))
    return out.cpu().float()


def wanted(x: Tensor, weight: Int8Weight, rounded: bool = False) -> Tensor:
    out = torch.empty(len(x), weight.rows)
    ops = ReferenceOps(x.dtype, torch.empty(1 << 22), int8_activations=rounded)
    ops.linear(x, weight, out)
    return out


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    limit = tolerance * float(expected.abs().max())
    assert float((actual - expected).abs().max()) <= limit


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 8, 9, 16])
def test_products_are_the_reference_s(
    tokens: int, rows: int, columns: int, dtype: torch.dtype
) -> None:
    weight = int8_weight(rows, columns)
    x = torch.randn(tokens, columns).mul(torch.rand(tokens, columns).mul(4).exp()).to(dtype)
    assert_close(product(x, weight), wanted(x, weight))


@on_gpu
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("tokens", [1, 3, 8, 11, 16])
def test_products_of_int8_activations(tokens: int, rows: int, columns: int) -> None:
    weight, x = int8_weight(rows, columns), torch.randn(tokens, columns).bfloat16()
    assert_close(product(x, weight, rounded=True), wanted(x, weight, rounded=True), 2e-5)


@on_gpu
@pytest.mark.parametrize("tokens", [1, 3, 8, 11, 16])
@pytest.mark.parametrize("rows", [32, 96])
def test_swiglu(tokens: int, rows: int) -> None:
    weight, x = int8_weight(rows, 576), torch.randn(tokens, 576).bfloat16()
    gate, up = wanted(x, weight).chunk(2, dim=1)
    assert_close(product(x, weight, paired=True), gate / (1 + torch.exp(-gate)) * up, 1e-2)


@on_gpu
@pytest.mark.parametrize("tokens", [1, 5, 16])
@pytest.mark.parametrize("dim", [16, 64, 128])
@pytest.mark.parametrize("has_bias", [False, True])
def test_queries_keys_and_values_are_rotated_and_stored(
    tokens: int, dim: int, has_bias: bool
) -> None:
    heads, kv_heads, columns, block_tokens, dtype = 6, 2, 320, 16, torch.bfloat16
    rows = (heads + 2 * kv_heads) * dim
    weight, x = int8_weight(rows, columns), torch.randn(tokens, columns)
    bias, rope = torch.randn(rows) if has_bias else None, torch.randn(2, 50, dim // 2)
    slots = torch.randperm(5 * block_tokens)[:tokens]
    if tokens > 1:
        slots[1] = -1
    unused = torch.zeros(1, dtype=torch.int32)
    positions = torch.randint(0, 50, (tokens,))
    cache = torch.full((1, 2, 5, kv_heads, block_tokens, dim), 7.0).to(dtype)
    expected, query = cache.clone(), torch.empty(tokens, heads, dim, dtype=dtype)
    inputs = StepInputs(unused.long(), positions, slots, unused, unused, unused)
    one = torch.ones(columns)
    ReferenceOps(dtype, torch.empty(1 << 20)).norm_qkv_rope_store(
        x.clone(), None, one, 1e-5, weight, bias, None, None, rope, inputs,
        KvCache(expected, None), 0, query,
    )  # fmt: skip
    normed = (x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt()).to(dtype)
    moved = StepInputs(
        unused.long(), positions.to(DEVICE), slots.to(DEVICE), unused, unused, unused
    )
    mine, out = cache.to(DEVICE), torch.empty_like(query).to(DEVICE)
    linears, matrix = Linears(DEVICE), packed(weight, dtype)
    assert linears.fuses_rope(matrix, tokens, dim)
    linears.multiply_rope_store(
        normed.to(DEVICE), matrix, None if bias is None else bias.to(DEVICE), rope.to(DEVICE),
        moved, KvCache(mine[0], None), out, Room(torch.empty(1 << 20, device=DEVICE)),
    )  # fmt: skip
    assert_close(out.cpu().float(), query.float(), 1e-2)
    assert_close(mine.cpu().float(), expected.float(), 1e-2)


@on_gpu
@pytest.mark.parametrize("tokens", [1, 2, 9])
@pytest.mark.parametrize("rounded", [False, True])
def test_nan_and_infinity_reach_their_token_only_and_are_found(tokens: int, rounded: bool) -> None:
    weight, clean = int8_weight(48, 320), torch.randn(tokens, 320).bfloat16()
    matrix, linears = packed(weight, clean.dtype, rounded=rounded), Linears(DEVICE)
    room = torch.empty(1 << 20, device=DEVICE)
    for broken in (None, torch.nan, torch.inf, -torch.inf):
        x = clean.clone()
        if broken is not None:
            x[0, 140] = broken
        out = torch.empty(tokens, 48, device=DEVICE)
        found = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        linears.multiply(x.to(DEVICE), matrix, out, Room(room), found)
        assert bool(found.item()) == (broken is not None)
        assert out[1:].isfinite().all() and bool(out[0].isfinite().any()) == (broken is None)


@on_gpu
def test_a_token_has_the_same_bits_alone_and_among_others_in_planes() -> None:
    """Planes are made in `stream.cu` for one token and by a kernel of their own for more."""
    weight, x = int8_weight(64, 1024), torch.randn(4, 1024).bfloat16()
    alone = torch.cat([product(x[i : i + 1].contiguous(), weight) for i in range(4)])
    assert_close(alone, product(x, weight), 1e-6)  # the order of sums differs


@pytest.mark.parametrize("size", [1e-38, 1e-20, 1.0, 1e30])
def test_two_planes_hold_a_group_to_16_bits_of_its_largest(size: float) -> None:
    x = (torch.randn(3, 300) * size).float()
    x[1, :128] = 0
    x[2, 140] = torch.nan
    values = torch.full((2, 3, 300), 99, dtype=torch.int8, device=DEVICE)
    steps = torch.full((3, 16), torch.nan, device=DEVICE)
    launch(
        norms.quantize, (3, 1), Linears(DEVICE).pdl, x.to(DEVICE), values, steps, 300, 3, 16,
        PLANES=2, OFFSET=0, GROUP=128, COLUMNS=128, GROUPS=4, num_warps=4,
    )  # fmt: skip
    high, low = values.cpu().float()
    step = steps.cpu()[:, :3].t().repeat_interleave(128, 1)[:, :300]
    found, groups = (256 * high + low) * step, torch.arange(300) // 128
    assert found[2, groups == 1].isnan().all() and not found[2, groups != 1].isnan().any()
    for token, group in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (2, 2)):
        mine = x[token, groups == group]
        error = (found[token, groups == group] - mine).abs().max()
        assert error <= max(1e-30, float(mine.abs().max()) / 64000)
