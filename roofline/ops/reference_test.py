"""Every reference op against an independent one in NumPy float64, over odd shapes."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from roofline.ops import FloatWeight, Int8Weight, KvCache, StepInputs, Weight
from roofline.ops.reference import ReferenceOps

Array = np.ndarray
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}  # of the largest value
over_dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(1)
    yield


def reference(dtype: torch.dtype) -> ReferenceOps:
    return ReferenceOps(dtype, torch.full((3000,), torch.nan))  # several slabs to a matrix


def int8_weight(rows: int, columns: int, group: int, offset: int = 0) -> Int8Weight:
    values = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    values[:, 0] = -128
    groups = -(-(columns + offset) // group)
    return Int8Weight(values, torch.rand(rows, groups) / (60 * columns**0.5), group, offset)


def exact(weight: Weight) -> Array:
    """The matrix [N, K] one value at a time."""
    values = weight.values.double().numpy().copy()
    if isinstance(weight, Int8Weight):
        for column in range(values.shape[1]):
            scale = weight.scales[:, (column + weight.offset) // weight.group]
            values[:, column] *= scale.double().numpy()
    return values


def exact_norm(x: Array, norm: Tensor, eps: float, dtype: torch.dtype) -> Array:
    """RMSNorm one token at a time, rounded to the dtype that a linear reads."""
    rows = [row / np.sqrt((row**2).sum() / len(row) + eps) for row in x]
    return torch.tensor(np.array(rows) * norm.double().numpy()).to(dtype).double().numpy()


def assert_close(actual: Tensor, wanted: Array, dtype: torch.dtype) -> None:
    assert actual.shape == wanted.shape
    limit = TOLERANCE[dtype] * max(1.0, np.abs(wanted).max(initial=0))
    assert np.abs(actual.double().numpy() - wanted).max(initial=0) <= limit


# columns, group, offset: K within a group, not dividing it, cut inside one, a whole channel
CUTS = [
    (64, 32, 0), (100, 32, 0), (31, 32, 0), (1, 128, 0), (576, 128, 0),
    (100, 32, 20), (7, 32, 20), (12, 32, 20), (13, 32, 20), (192, 128, 64), (96, 1536, 700),
]  # fmt: skip


@over_dtypes
@pytest.mark.parametrize(("columns", "group", "offset"), CUTS)
@pytest.mark.parametrize(("tokens", "rows"), [(1, 1), (16, 67), (35, 129)])
def test_linear_of_int8_groups(
    columns: int, group: int, offset: int, tokens: int, rows: int, dtype: torch.dtype
) -> None:
    x, weight = torch.randn(tokens, columns).to(dtype), int8_weight(rows, columns, group, offset)
    out = torch.full((tokens, rows), torch.nan)
    reference(dtype).linear(x, weight, out)
    assert_close(out, x.double().numpy() @ exact(weight).T, torch.float32)


@over_dtypes
def test_linear_of_floats(dtype: torch.dtype) -> None:
    x, weight = torch.randn(21, 100).to(dtype), FloatWeight(torch.randn(67, 100).to(dtype))
    out = torch.full((21, 67), torch.nan)
    reference(dtype).linear(x, weight, out)
    assert_close(out, x.double().numpy() @ exact(weight).T, torch.float32)


@pytest.mark.parametrize(("columns", "group", "offset"), CUTS)
def test_linear_of_int8_activations_in_stretches(columns: int, group: int, offset: int) -> None:
    x, weight = torch.randn(3, columns), int8_weight(67, columns, group, offset)
    x[1, ::45] *= 1000.0
    x[2] = 0.0
    out = torch.full((3, 67), torch.nan)
    scratch = torch.full((3000,), torch.nan)
    ops = ReferenceOps(torch.float32, scratch, int8_activations=True, stretches=True)
    ops.linear(x, weight, out)
    rounded = np.zeros(x.shape)
    for token, row in enumerate(x.double().numpy()):
        begin = 0
        while begin < columns:  # a part
            end = min(columns, begin + 128, (begin + offset) // group * group + group - offset)
            unit = np.abs(row[begin:end]).max() / (127 * 255) or 1.0
            for k in range(begin, end, 32):
                stretch = row[k : min(k + 32, end)]
                largest = np.abs(stretch).max()
                step = max(1, np.ceil(largest / (127 * unit) - 1e-4)) * unit
                assert step <= largest / 127 + unit
                rounded[token, k : k + len(stretch)] = (stretch / step).round() * step
            begin = end
    assert_close(out, rounded @ exact(weight).T, torch.float32)


def test_linear_of_no_tokens_writes_nothing() -> None:
    reference(torch.float32).linear(torch.zeros(0, 5), int8_weight(3, 5, 32), torch.zeros(0, 3))


@over_dtypes
def test_embed_is_zero_where_another_rank_has_the_token(dtype: torch.dtype) -> None:
    ids = torch.tensor([39, 40, 41, 52, 53, 10_000, 40])
    for table in (int8_weight(13, 70, 32), FloatWeight(torch.randn(13, 70).to(dtype))):
        out = torch.full((7, 70), torch.nan)
        reference(dtype).embed(ids, table, 40, out)
        matrix = exact(table)
        rows = [matrix[i - 40] if 40 <= i < 53 else np.zeros(70) for i in ids.tolist()]
        assert_close(out, np.array(rows), torch.float32)


@over_dtypes
@pytest.mark.parametrize(("biased", "normed"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_tokens"),
    [(9, 3, 64, 16), (2, 2, 80, 7), (4, 1, 128, 64), (8, 1, 2, 1)],
)
def test_norm_qkv_rope_store(
    heads: int,
    kv_heads: int,
    dim: int,
    block_tokens: int,
    biased: bool,
    normed: bool,
    dtype: torch.dtype,
) -> None:
    tokens, hidden, context = 19, 96, 300
    residual, delta = torch.randn(2, tokens, hidden)
    norm, angles = torch.rand(hidden) + 0.5, torch.rand(context, dim // 2) * 7
    positions = torch.randint(0, context, (tokens,))
    blocks = 4 + tokens // block_tokens
    slots = torch.randperm(blocks * block_tokens)[:tokens]
    pool = torch.full((2, 2, blocks, kv_heads, block_tokens, dim), 7.0, dtype=dtype)
    weight = int8_weight((heads + 2 * kv_heads) * dim, hidden, 64)
    bias = torch.randn((heads + 2 * kv_heads) * dim) if biased else None
    q_norm, k_norm = torch.rand(2, dim) + 0.5 if normed else (None, None)
    changed, out = residual.clone(), torch.full((tokens, heads, dim), torch.nan, dtype=dtype)
    unused = torch.zeros(1, dtype=torch.int32)
    inputs = StepInputs(positions, positions, slots, unused, unused, unused)
    reference(dtype).norm_qkv_rope_store(
        changed, delta, norm, 1e-5, weight, bias, q_norm, k_norm,
        torch.stack((angles.cos(), angles.sin())), inputs, KvCache(pool, None), 1, out,
    )  # fmt: skip

    summed = residual.double().numpy() + delta.double().numpy()
    mixed = exact_norm(summed, norm, 1e-5, dtype) @ exact(weight).T
    mixed += 0 if bias is None else bias.double().numpy()
    mixed = mixed.reshape(tokens, heads + 2 * kv_heads, dim)
    for token in mixed:
        for q_or_k, own in ((token[:heads], q_norm), (token[heads : heads + kv_heads], k_norm)):
            if own is not None:
                q_or_k[:] = exact_norm(q_or_k, own, 1e-5, torch.float64)
    turns = np.exp(1j * angles.double().numpy())[positions.numpy(), None]
    pairs = (mixed[..., : dim // 2] + 1j * mixed[..., dim // 2 :]) * turns
    turned = np.concatenate((pairs.real, pairs.imag), axis=2)
    assert_close(changed, summed, torch.float32)
    assert_close(out, turned[:, :heads], dtype)
    for token, slot in enumerate(slots.tolist()):
        key, value = pool[1, :, slot // block_tokens, :, slot % block_tokens]
        assert_close(key, turned[token, heads : heads + kv_heads], dtype)
        assert_close(value, mixed[token, heads + kv_heads :], dtype)
    untouched = torch.ones(blocks * block_tokens, dtype=torch.bool).index_fill(0, slots, False)
    assert (pool[0] == 7).all(), "another layer was written"
    assert (pool[1].permute(1, 3, 0, 2, 4).flatten(0, 1)[untouched] == 7).all()


def test_the_first_layer_has_no_delta() -> None:
    residual, unused = torch.randn(3, 8), torch.zeros(3, dtype=torch.int64)
    inputs = StepInputs(unused, unused, torch.arange(3), unused, unused, unused)
    kept = residual.clone()
    reference(torch.float32).norm_qkv_rope_store(
        residual, None, torch.ones(8), 1e-5, int8_weight(6, 8, 32), None, None, None,
        torch.ones(2, 1, 1), inputs, KvCache(torch.zeros(1, 2, 3, 1, 1, 2), None), 0,
        torch.zeros(3, 1, 2),
    )  # fmt: skip
    assert torch.equal(residual, kept)


@over_dtypes
def test_norm_gate_up_swiglu(dtype: torch.dtype) -> None:
    tokens, hidden, ffn = 18, 100, 65
    residual, delta = torch.randn(2, tokens, hidden)
    norm, weight = torch.rand(hidden) + 0.5, int8_weight(2 * ffn, hidden, 32)
    changed, out = residual.clone(), torch.full((tokens, ffn), torch.nan, dtype=dtype)
    reference(dtype).norm_gate_up_swiglu(changed, delta, norm, 1e-5, weight, out)
    summed = residual.double().numpy() + delta.double().numpy()
    gate, up = np.split(exact_norm(summed, norm, 1e-5, dtype) @ exact(weight).T, 2, axis=1)
    assert_close(changed, summed, torch.float32)
    assert_close(out, gate / (1 + np.exp(-gate)) * up, dtype)


def test_silu_of_an_extreme_gate_is_finite() -> None:
    gate = torch.tensor([-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30])
    weight = FloatWeight(torch.cat((gate, torch.ones(7)))[:, None])  # [14, 1]
    out = torch.zeros(1, 7)
    one = torch.ones(1, 1)
    reference(torch.float32).norm_gate_up_swiglu(one, one * 0, one[0], 0.0, weight, out)
    assert torch.equal(out[0], torch.nn.functional.silu(gate))


@over_dtypes
def test_norm_head_of_the_sampled_tokens_only(dtype: torch.dtype) -> None:
    residual, delta = torch.randn(2, 40, 100)
    residual[3] = torch.nan  # not asked for
    norm, head = torch.rand(100) + 0.5, int8_weight(77, 100, 128)
    sampled, out = torch.tensor([39, 0, 5]), torch.full((3, 77), torch.nan)
    kept = residual.clone()
    reference(dtype).norm_head(residual, delta, sampled, norm, 1e-5, head, out)
    summed = (residual.double() + delta.double())[sampled].numpy()
    assert_close(out, exact_norm(summed, norm, 1e-5, dtype) @ exact(head).T, dtype)
    assert torch.equal(residual[4:], kept[4:]), "the residual is not the head's to change"


LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


@pytest.mark.parametrize("stored", LARGEST, ids=str)
def test_a_quantized_cache_has_a_scale_a_token_and_head(stored: torch.dtype) -> None:
    tokens, dim, block_tokens = 9, 16, 4
    weight = int8_weight(3 * dim, 32, 32)
    weight.scales[dim:][::dim] = 0  # a channel of zeros changes nothing
    residual = torch.randn(tokens, 32)
    residual[3] = 0  # the token's keys and values are zero
    rope = torch.stack((torch.ones(1, dim // 2), torch.zeros(1, dim // 2)))
    zeros, slots = torch.zeros(tokens, dtype=torch.int64), torch.arange(tokens) + 2
    slots[5] = -1
    inputs = StepInputs(zeros, zeros, slots, zeros, zeros, zeros)
    caches = [
        KvCache(torch.full((1, 2, 3, 1, block_tokens, dim), 7.0).to(dtype), scales)
        for dtype, scales in (
            (torch.float32, None),
            (stored, torch.full((1, 2, 3, 1, block_tokens), 7.0)),
        )
    ]
    for cache in caches:
        reference(torch.float32).norm_qkv_rope_store(
            residual, None, torch.ones(32), 1e-5, weight, None, None, None, rope, inputs, cache,
            0, torch.zeros(tokens, 1, dim),
        )  # fmt: skip
    exact_values = caches[0].values[0, :, :, 0].flatten(1, 2).double().numpy()
    scales = caches[1].scales
    assert scales is not None
    values = caches[1].values[0, :, :, 0].flatten(1, 2).double().numpy()
    flat_scales = scales[0, :, :, 0].flatten(1, 2).double().numpy()
    for slot in range(3 * block_tokens):
        for half in range(2):
            wanted, row, scale = (
                exact_values[half, slot],
                values[half, slot],
                flat_scales[half, slot],
            )
            if slot not in slots:
                assert (row == 7).all() and scale == 7, "a slot of nobody's was written"
                continue
            largest = np.abs(wanted).max()
            assert scale == (np.float32(largest) / np.float32(LARGEST[stored]) if largest else 1)
            # Half a step of int8; of e4m3, with 3 bits of mantissa, 1/16 of the value.
            bound = scale / 2 if stored == torch.int8 else np.abs(wanted) / 16 + scale / 512
            assert (np.abs(row * scale - wanted) <= bound * (1 + 1e-6)).all()


@pytest.mark.parametrize("stored", LARGEST, ids=str)
def test_attention_reads_a_quantized_cache_as_the_floats_it_stands_for(stored: torch.dtype) -> None:
    blocks, block_tokens, dim = 5, 16, 32
    values = (torch.randn(2, 2, blocks, 2, block_tokens, dim) * 40).to(stored)
    scales = torch.rand(2, 2, blocks, 2, block_tokens) / 40
    floats = values.float() * scales.unsqueeze(-1)
    query = torch.randn(3, 4, dim)
    step = torch.tensor([[3, 0, 4]]).int(), torch.tensor([0, 3]).int(), torch.tensor([41]).int()
    outs = []
    for cache in (KvCache(values, scales), KvCache(floats, None)):
        outs.append(torch.full_like(query, torch.nan))
        reference(torch.float32).attention(query, cache, 1, *step, 0.2, None, outs[-1])
    assert torch.equal(*outs)
