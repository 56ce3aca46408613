"""The ops of a layer against the reference, in Triton's interpreter where there is no GPU."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from roofline.ops import FloatWeight, Int8Weight, KvCache, StepInputs
from roofline.ops.gpu.attention import Heads, make_tasks
from roofline.ops.gpu.gpu_ops import GpuOps
from roofline.ops.gpu.layout import pack
from roofline.ops.reference import ReferenceOps

# Of NumPy, in the interpreter: run-time bounds of loops, products with infinities.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Conversion of an array:DeprecationWarning", "ignore::RuntimeWarning"
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS, KV_HEADS, DIM, HIDDEN, BLOCK_TOKENS = 4, 2, 12, 100, 16
# Of the largest value: the interpreter cuts bfloat16 off where a GPU rounds it.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(1)
    yield


def int8_weight(rows: int, columns: int, group: int = 32) -> Int8Weight:
    values = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    scales = torch.rand(rows, -(-columns // group)) / (60 * columns**0.5)
    return Int8Weight(values, scales, group, 0)


def gpu_ops(dtype: torch.dtype, cache: torch.dtype = torch.bfloat16) -> GpuOps:
    heads = Heads(HEADS, KV_HEADS, DIM)
    tasks = make_tasks(heads, dtype, cache, 4, DEVICE, deterministic=False)
    return GpuOps(dtype, torch.full((1 << 22,), torch.nan, device=DEVICE), tasks, None)


def reference(dtype: torch.dtype) -> ReferenceOps:
    return ReferenceOps(dtype, torch.empty(1 << 18))


def packed(weight: Int8Weight | FloatWeight, dtype: torch.dtype, paired: bool = False):
    values = weight.values.to(DEVICE)
    if isinstance(weight, Int8Weight):
        weight = replace(weight, values=values, scales=weight.scales.to(DEVICE))
    else:
        weight = FloatWeight(values)
    return pack(weight, paired, dtype=dtype)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    actual, expected = actual.cpu().float(), expected.float()
    limit = tolerance * max(1.0, float(expected.abs().max()))
    assert float((actual - expected).abs().max()) <= limit


def on(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(DEVICE)


def step(tokens: int) -> StepInputs:
    slots = torch.randperm(5 * BLOCK_TOKENS)[:tokens]
    slots[-1] = -1 if tokens > 1 else slots[-1]
    unused = torch.zeros(1, dtype=torch.int32)
    positions = torch.randint(0, 50, (tokens,))
    return StepInputs(unused.long(), positions, slots, unused, unused, unused)


def layer_cache(dtype: torch.dtype) -> KvCache:
    values = torch.full((2, 2, 5, KV_HEADS, BLOCK_TOKENS, DIM), 7.0).to(dtype)
    scales = torch.full(values.shape[:-1], 0.5) if dtype.itemsize == 1 else None
    return KvCache(values, scales)


def moved(cache: KvCache) -> KvCache:
    scales = None if cache.scales is None else cache.scales.clone().to(DEVICE)
    return KvCache(cache.values.clone().to(DEVICE), scales)


@pytest.mark.parametrize(
    ("dtype", "cache", "tokens", "extras"),
    [
        (torch.bfloat16, torch.bfloat16, 1, False),
        (torch.bfloat16, torch.int8, 3, True),
        (torch.float16, torch.float16, 1, False),
        (torch.float16, torch.float8_e4m3fn, 2, False),
        (torch.float32, torch.float32, 2, True),
        (torch.float32, torch.int8, 1, False),
        (torch.float32, torch.float8_e4m3fn, 2, True),
    ],
    ids=str,
)
def test_norm_qkv_rope_store(
    dtype: torch.dtype, cache: torch.dtype, tokens: int, extras: bool
) -> None:
    rows = (HEADS + 2 * KV_HEADS) * DIM
    residual, delta = torch.randn(2, tokens, HIDDEN)
    norm, weight = torch.rand(HIDDEN), int8_weight(rows, HIDDEN)
    bias, q_norm, k_norm = torch.randn(rows), torch.rand(DIM), torch.rand(DIM)
    if not extras:
        bias = q_norm = k_norm = None
    rope, inputs = torch.randn(2, 50, DIM // 2), step(tokens)
    given = delta if extras else None
    expected, written = residual.clone(), layer_cache(cache)
    query = torch.full((tokens, HEADS, DIM), torch.nan, dtype=dtype)
    reference(dtype).norm_qkv_rope_store(
        expected, given, norm, 1e-5, weight, bias, q_norm, k_norm, rope, inputs, written, 1, query
    )

    actual, mine = residual.clone().to(DEVICE), moved(layer_cache(cache))
    turned = torch.full_like(query, torch.nan).to(DEVICE)
    on_device = replace(
        inputs, positions=inputs.positions.to(DEVICE), slots=inputs.slots.to(DEVICE)
    )
    gpu_ops(dtype, cache).norm_qkv_rope_store(
        actual, on(given), norm.to(DEVICE), 1e-5, packed(weight, dtype), on(bias), on(q_norm),
        on(k_norm), rope.to(DEVICE), on_device, mine, 1, turned,
    )  # fmt: skip
    assert torch.equal(actual.cpu(), expected)
    assert_close(turned, query, TOLERANCE[dtype])
    assert_close(dequantized(mine), dequantized(written), cache_tolerance(dtype, cache))
    assert torch.equal(mine.values[0].cpu().float(), layer_cache(cache).values[0].float())


def dequantized(cache: KvCache) -> Tensor:
    values = cache.values.cpu().float()
    return values if cache.scales is None else values * cache.scales.cpu().unsqueeze(-1)


def cache_tolerance(dtype: torch.dtype, cache: torch.dtype) -> float:
    """A value beside a border between two codes may fall on either side."""
    step = {torch.int8: 1 / 127, torch.float8_e4m3fn: 1 / 8}.get(cache, 0.0)
    return TOLERANCE[dtype] + step


@pytest.mark.parametrize("slot", [-1, 33])
def test_one_token_with_a_bias_in_one_launch(slot: int) -> None:
    rows = (HEADS + 2 * KV_HEADS) * DIM
    residual, norm, weight = torch.randn(1, HIDDEN), torch.rand(HIDDEN), int8_weight(rows, HIDDEN)
    bias, rope = torch.randn(rows), torch.randn(2, 50, DIM // 2)
    inputs, written = replace(step(1), slots=torch.tensor([slot])), layer_cache(torch.float32)
    query = torch.full((1, HEADS, DIM), torch.nan)
    reference(torch.float32).norm_qkv_rope_store(
        residual.clone(),
        None,
        norm,
        1e-5,
        weight,
        bias,
        None,
        None,
        rope,
        inputs,
        written,
        1,
        query,
    )
    mine, turned = moved(layer_cache(torch.float32)), torch.full_like(query, torch.nan).to(DEVICE)
    on_device = replace(
        inputs, positions=inputs.positions.to(DEVICE), slots=inputs.slots.to(DEVICE)
    )
    gpu_ops(torch.float32, torch.float32).norm_qkv_rope_store(
        residual.to(DEVICE), None, norm.to(DEVICE), 1e-5, packed(weight, torch.float32),
        bias.to(DEVICE), None, None, rope.to(DEVICE), on_device, mine, 1, turned,
    )  # fmt: skip
    assert_close(turned, query, 1e-5)
    assert_close(mine.values, written.values, 1e-5)


def test_quantised_values_of_nan_and_zeros() -> None:
    """A head of zeros has a scale of one, a head with NaN a scale of NaN."""
    rows = (HEADS + 2 * KV_HEADS) * DIM
    weight = FloatWeight(torch.zeros(rows, HIDDEN))
    bias = torch.zeros(rows)
    bias[-1] = torch.nan
    cache, inputs = moved(layer_cache(torch.int8)), step(1)
    inputs = replace(inputs, positions=inputs.positions.to(DEVICE), slots=inputs.slots.to(DEVICE))
    out = torch.empty(1, HEADS, DIM, device=DEVICE)
    gpu_ops(torch.float32, torch.int8).norm_qkv_rope_store(
        torch.ones(1, HIDDEN, device=DEVICE), None, torch.ones(HIDDEN, device=DEVICE), 1e-5,
        packed(weight, torch.float32), bias.to(DEVICE), None, None,
        torch.ones(2, 50, DIM // 2, device=DEVICE), inputs, cache, 0, out,
    )  # fmt: skip
    assert cache.scales is not None
    block, place = int(inputs.slots) // BLOCK_TOKENS, int(inputs.slots) % BLOCK_TOKENS
    scales = cache.scales[0, :, block, :, place].cpu()
    assert scales.flatten()[:3].tolist() == [1.0] * 3 and scales[1, 1].isnan()


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_norm_gate_up_swiglu(tokens: int, dtype: torch.dtype) -> None:
    residual, delta = torch.randn(2, tokens, HIDDEN)
    norm, weight = torch.rand(HIDDEN), int8_weight(2 * 5, HIDDEN)
    expected, out = residual.clone(), torch.empty(tokens, 5, dtype=dtype)
    reference(dtype).norm_gate_up_swiglu(expected, delta, norm, 1e-5, weight, out)
    actual = residual.clone().to(DEVICE)
    mine = torch.full((tokens, 5), torch.nan, dtype=dtype, device=DEVICE)
    gpu_ops(dtype).norm_gate_up_swiglu(
        actual, delta.to(DEVICE), norm.to(DEVICE), 1e-5, packed(weight, dtype, True), mine
    )
    assert torch.equal(actual.cpu(), expected)
    assert_close(mine, out, TOLERANCE[dtype])


@pytest.mark.parametrize("sampled", [[2], [3, 0, 3]])
def test_norm_head_and_whether_its_logits_are_finite(sampled: list[int]) -> None:
    dtype = torch.bfloat16
    residual, delta = torch.randn(2, 4, HIDDEN)
    norm, head = torch.rand(HIDDEN), int8_weight(9, HIDDEN)
    chosen, out = torch.tensor(sampled), torch.empty(len(sampled), 9)
    reference(dtype).norm_head(residual, delta, chosen, norm, 1e-5, head, out)
    ops, weight = gpu_ops(dtype), packed(head, dtype)
    mine = torch.full((len(sampled), 9), torch.nan, device=DEVICE)
    flag = torch.full((1,), -1, device=DEVICE)
    before = residual.clone().to(DEVICE)
    rest = norm.to(DEVICE), 1e-5, weight, mine
    ops.norm_head(before, delta.to(DEVICE), chosen.to(DEVICE), *rest)
    ops.flag_finite(mine, flag)
    assert torch.equal(before.cpu(), residual)
    assert_close(mine, out, TOLERANCE[dtype])
    assert ops.all_finite(mine) and flag.item() == 1
    before[sampled[0], 3] = torch.nan
    ops.norm_head(before, delta.to(DEVICE), chosen.to(DEVICE), *rest)
    ops.flag_finite(mine, flag)
    assert not ops.all_finite(mine) and flag.item() == 0
    before[sampled[0], 3] = 0
    ops.norm_head(before, delta.to(DEVICE), chosen.to(DEVICE), *rest)
    assert ops.all_finite(mine)


@pytest.mark.parametrize("group", [32, 128])
def test_embed(group: int) -> None:
    table = int8_weight(9, 300, group)
    ids = torch.tensor([10, 3, 18, 19, 11])
    expected = torch.empty(5, 300)
    reference(torch.float32).embed(ids, table, 10, expected)
    mine = torch.full((5, 300), torch.nan, device=DEVICE)
    gpu_ops(torch.bfloat16).embed(ids.to(DEVICE), packed(table, torch.bfloat16), 10, mine)
    assert torch.equal(mine.cpu(), expected)


def test_embed_of_floats() -> None:
    table, ids = FloatWeight(torch.randn(9, 100).bfloat16()), torch.tensor([8, 0])
    mine = torch.full((2, 100), torch.nan, device=DEVICE)
    gpu_ops(torch.bfloat16).embed(ids.to(DEVICE), packed(table, torch.bfloat16), 0, mine)
    assert torch.equal(mine.cpu(), table.values[ids].float())
