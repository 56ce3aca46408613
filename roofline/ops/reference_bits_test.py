"""A token's bits depend on the token only: not on its batch, its place there, or chunking."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from roofline.ops import FloatWeight, Int8Weight, KvCache, StepInputs, Weight
from roofline.ops.reference import ReferenceOps

TOKENS = 70  # four whole tiles of 16 and a part of one
DTYPES = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    ffn: int
    vocab: int = 77


SMOLLM2 = Shape(heads=9, kv_heads=3, head_dim=64, hidden=576, ffn=768)  # large enough for 2 threads
ODD = Shape(heads=8, kv_heads=1, head_dim=80, hidden=37, ffn=65)
TINY = Shape(heads=4, kv_heads=4, head_dim=2, hidden=8, ffn=3)
CASES = {"smollm2": (SMOLLM2, 1), "2-threads": (SMOLLM2, 2), "odd": (ODD, 1), "tiny": (TINY, 1)}


@pytest.fixture(params=CASES)
def shape(request: pytest.FixtureRequest) -> Iterator[Shape]:
    """A model's shape, while torch has the case's number of threads."""
    shape, threads = CASES[request.param]
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    yield shape
    torch.set_num_threads(before)


over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def reference(dtype: torch.dtype) -> ReferenceOps:
    return ReferenceOps(dtype, torch.zeros(40_000))  # small: several slabs to a matrix


def int8_weight(rows: int, columns: int, group: int = 32) -> Int8Weight:
    values = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    groups = -(-columns // group)
    return Int8Weight(values, torch.rand(rows, groups) / (40 * columns**0.5), group, 0)


def float_weight(rows: int, columns: int, dtype: torch.dtype) -> FloatWeight:
    return FloatWeight((torch.randn(rows, columns) / columns**0.5).to(dtype))


def weights(rows: int, columns: int, dtype: torch.dtype) -> list[Weight]:
    return [int8_weight(rows, columns), float_weight(rows, columns, dtype)]


def assert_bits_do_not_depend_on_the_batch(run: Callable[[Tensor], Tensor]) -> None:
    """`run` computes some of the 70 tokens, named by index, and returns one result for each."""
    together = run(torch.arange(TOKENS))
    for token in (0, 7, 15, 16, 68, 69):
        assert torch.equal(run(torch.tensor([token])), together[token : token + 1]), token
    for size in (2, 17, TOKENS):
        picked = torch.randperm(TOKENS)[:size]
        assert torch.equal(run(picked), together[picked]), size
    for place in range(16):  # of token 0 in its tile
        batch = torch.arange(1, 18)
        batch[place] = 0
        assert torch.equal(run(batch)[place], together[0]), place


@over_dtypes
def test_embed(shape: Shape, dtype: torch.dtype) -> None:
    ids = torch.randint(0, shape.vocab + 20, (TOKENS,))
    for table in weights(shape.vocab, shape.hidden, dtype):

        def run(picked: Tensor, table: Weight = table) -> Tensor:
            out = torch.full((len(picked), shape.hidden), torch.nan)
            reference(dtype).embed(ids[picked], table, 10, out)
            return out

        assert_bits_do_not_depend_on_the_batch(run)


@over_dtypes
def test_linear(shape: Shape, dtype: torch.dtype) -> None:
    x = torch.randn(TOKENS, shape.ffn).to(dtype)
    for weight in weights(shape.hidden, shape.ffn, dtype):

        def run(picked: Tensor, weight: Weight = weight) -> Tensor:
            out = torch.full((len(picked), shape.hidden), torch.nan)
            reference(dtype).linear(x[picked], weight, out)
            return out

        assert_bits_do_not_depend_on_the_batch(run)


@over_dtypes
def test_norm_gate_up_swiglu(shape: Shape, dtype: torch.dtype) -> None:
    residual, delta = torch.randn(2, TOKENS, shape.hidden)
    norm = torch.rand(shape.hidden) + 1
    for weight in weights(2 * shape.ffn, shape.hidden, dtype):

        def run(picked: Tensor, weight: Weight = weight) -> Tensor:
            out = torch.full((len(picked), shape.ffn), torch.nan, dtype=dtype)
            changed = residual[picked]
            reference(dtype).norm_gate_up_swiglu(changed, delta[picked], norm, 1e-5, weight, out)
            return torch.cat((out.float(), changed), dim=1)

        assert_bits_do_not_depend_on_the_batch(run)


@over_dtypes
def test_norm_head(shape: Shape, dtype: torch.dtype) -> None:
    residual, delta = torch.randn(2, TOKENS, shape.hidden)
    norm = torch.rand(shape.hidden) + 1
    for weight in weights(shape.vocab, shape.hidden, dtype):

        def run(picked: Tensor, weight: Weight = weight) -> Tensor:
            out = torch.full((len(picked), shape.vocab), torch.nan)
            reference(dtype).norm_head(residual, delta, picked, norm, 1e-5, weight, out)
            return out

        assert_bits_do_not_depend_on_the_batch(run)


@over_dtypes
@pytest.mark.parametrize("flagged", [False, True], ids=["plain", "bias-and-head-norms"])
def test_norm_qkv_rope_store(shape: Shape, flagged: bool, dtype: torch.dtype) -> None:
    residual, delta = torch.randn(2, TOKENS, shape.hidden)
    norm, positions = torch.rand(shape.hidden) + 1, torch.randint(0, 50, (TOKENS,))
    rope = torch.randn(2, 50, shape.head_dim // 2)
    unused = torch.zeros(1, dtype=torch.int32)
    channels = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    bias = torch.randn(channels) if flagged else None
    q_norm, k_norm = torch.rand(2, shape.head_dim) + 1 if flagged else (None, None)
    for weight in weights(channels, shape.hidden, dtype):

        def run(picked: Tensor, weight: Weight = weight) -> Tensor:
            count = len(picked)
            pool = torch.zeros(1, 2, 5, shape.kv_heads, 16, shape.head_dim, dtype=dtype)
            slots = torch.arange(3, 3 + count)
            inputs = StepInputs(picked, positions[picked], slots, unused, unused, unused)
            out = torch.full((count, shape.heads, shape.head_dim), torch.nan, dtype=dtype)
            reference(dtype).norm_qkv_rope_store(
                residual[picked], delta[picked], norm, 1e-5, weight, bias, q_norm, k_norm,
                rope, inputs, KvCache(pool, None), 0, out,
            )  # fmt: skip
            written = pool[0].permute(1, 3, 0, 2, 4).flatten(0, 1)[slots]
            return torch.cat((out.flatten(1), written.flatten(1)), dim=1)

        assert_bits_do_not_depend_on_the_batch(run)


@dataclass(frozen=True)
class Row:
    """A request's context, and the queries of all its tokens."""

    query: Tensor  # [context, Hq, D]
    blocks: Tensor  # [B] int32

    def attend(
        self, dtype: torch.dtype, pool: Tensor, window: int | None, start: int, stop: int
    ) -> Tensor:
        """Attention of tokens start..stop, alone in a step."""
        query = self.query[start:stop]
        bounds, context = torch.tensor([0, stop - start]), torch.tensor([stop])
        out = torch.full_like(query, torch.nan)
        scale = query.shape[2] ** -0.5
        reference(dtype).attention(
            query,
            KvCache(pool, None),
            0,
            self.blocks[None],
            bounds.int(),
            context.int(),
            scale,
            window,
            out,
        )
        return out


def rows_in_a_pool(
    contexts: list[int], shape: Shape, block_tokens: int, dtype: torch.dtype
) -> tuple[list[Row], Tensor]:
    """Rows whose blocks lie anywhere in one pool."""
    counts = [-(-context // block_tokens) for context in contexts]
    blocks = (torch.randperm(sum(counts)) + 1).int().split(counts)
    pool_shape = (1, 2, sum(counts) + 1, shape.kv_heads, block_tokens, shape.head_dim)
    queries = [torch.randn(context, shape.heads, shape.head_dim).to(dtype) for context in contexts]
    rows = [Row(*parts) for parts in zip(queries, blocks, strict=True)]
    return rows, torch.randn(pool_shape).to(dtype)


@over_dtypes
@pytest.mark.parametrize(("block_tokens", "window"), [(16, None), (7, 40), (64, 260)])
def test_attention_at_any_chunking(
    shape: Shape, block_tokens: int, window: int | None, dtype: torch.dtype
) -> None:
    (row,), pool = rows_in_a_pool([531], shape, block_tokens, dtype)
    together = row.attend(dtype, pool, window, 0, 531)
    for chunk in (7, 64):
        for start in range(0, 531, chunk):
            stop = min(start + chunk, 531)
            assert torch.equal(row.attend(dtype, pool, window, start, stop), together[start:stop])
    for token in (0, 1, 15, 16, 255, 256, 300, 511, 512, 530):
        alone = row.attend(dtype, pool, window, token, token + 1)
        assert torch.equal(alone, together[token : token + 1]), token


@over_dtypes
def test_attention_among_other_rows(shape: Shape, dtype: torch.dtype) -> None:
    contexts, counts = [1, 40, 700, 5, 300, 2100], [1, 33, 1, 0, 20, 16]
    rows, pool = rows_in_a_pool(contexts, shape, 16, dtype)
    table = torch.zeros(len(rows), max(len(row.blocks) for row in rows), dtype=torch.int32)
    for line, row in zip(table, rows, strict=True):
        line[: len(row.blocks)] = row.blocks
    parts = [row.query[len(row.query) - count :] for row, count in zip(rows, counts, strict=True)]
    query = torch.cat(parts)
    start = torch.tensor([0, *counts]).cumsum(0).int()
    out = torch.full_like(query, torch.nan)
    scale = shape.head_dim**-0.5
    reference(dtype).attention(
        query, KvCache(pool, None), 0, table, start, torch.tensor(contexts).int(), scale, None, out
    )
    for row, context, mine in zip(rows, contexts, out.split(counts), strict=True):
        alone = row.attend(dtype, pool, None, context - len(mine), context)
        assert torch.equal(alone, mine)


@over_dtypes
def test_attention_wherever_the_blocks_lie(shape: Shape, dtype: torch.dtype) -> None:
    (row,), pool = rows_in_a_pool([600], shape, 16, dtype)
    here = row.attend(dtype, pool, None, 560, 600)
    for _ in range(3):
        place = torch.randperm(pool.shape[2])  # new block i is old block place[i]
        moved = Row(row.query, torch.argsort(place)[row.blocks.long()].int())
        assert torch.equal(moved.attend(dtype, pool[:, :, place], None, 560, 600), here)
