"""Paged attention against softmax(QK)V in NumPy float64, one query at a time."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from roofline.ops.reference import ReferenceOps

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
over_dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@dataclass
class Step:
    """Rows of (context, new tokens) in a pool that is NaN wherever no row's context lies."""

    rows: list[tuple[int, int]]
    heads: int
    kv_heads: int
    dim: int
    block_tokens: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        counts = [-(-context // self.block_tokens) for context, _ in self.rows]
        num_blocks = sum(counts) + 3
        shape = (2, 2, num_blocks, self.kv_heads, self.block_tokens, self.dim)
        self.pool = torch.full(shape, torch.nan, dtype=self.dtype)
        # What a table holds beyond its row's blocks is stale: any block id.
        width = max(counts) + 2
        self.table = torch.randint(0, num_blocks, (len(self.rows), width), dtype=torch.int32)
        free = torch.randperm(num_blocks).int()
        self.keys_values = []  # of each row: [2, context, Hkv, D]
        for row, (context, _) in enumerate(self.rows):
            mine, free = free[: counts[row]], free[counts[row] :]
            self.table[row, : len(mine)] = mine
            both = torch.randn(2, context, self.kv_heads, self.dim).to(self.dtype)
            for position in range(context):
                block, place = mine[position // self.block_tokens], position % self.block_tokens
                self.pool[1, :, block, :, place] = both[:, position]
            self.keys_values.append(both)
        news = torch.tensor([0, *(new for _, new in self.rows)])
        self.query_start = news.cumsum(0).int()
        self.query = torch.randn(int(news.sum()), self.heads, self.dim).to(self.dtype)

    def run(self, window: int | None) -> Tensor:
        contexts = torch.tensor([context if new else 0 for context, new in self.rows]).int()
        out = torch.full_like(self.query, torch.nan)
        ReferenceOps(self.dtype, torch.zeros(1)).attention(
            self.query, self.pool, 1, self.table, self.query_start, contexts,
            self.dim**-0.5, window, out,
        )  # fmt: skip
        return out

    def oracle(self, window: int | None) -> np.ndarray:
        group, query = self.heads // self.kv_heads, self.query.double().numpy()
        answers: list[list[np.ndarray]] = []
        for (context, new), both in zip(self.rows, self.keys_values, strict=True):
            keys, values = both.double().numpy()
            for position in range(context - new, context):
                first = 0 if window is None else max(0, position + 1 - window)
                answer = []
                for head in range(self.heads):
                    seen = slice(first, position + 1), head // group
                    scores = keys[seen] @ query[len(answers), head] / np.sqrt(self.dim)
                    weights = np.exp(scores - scores.max())
                    answer.append(weights @ values[seen] / weights.sum())
                answers.append(answer)
        return np.array(answers)

    def check(self, window: int | None = None) -> None:
        actual, wanted = self.run(window).double().numpy(), self.oracle(window)
        assert actual.shape == wanted.shape
        assert np.abs(actual - wanted).max() <= TOLERANCE[self.dtype] * np.abs(wanted).max()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(2)


MIXED = [(1, 1), (37, 37), (0, 0), (300, 1), (90, 33), (40, 0), (64, 16), (257, 2)]


@over_dtypes
@pytest.mark.parametrize("block_tokens", [1, 7, 16, 64, 300])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(2, 2, 64), (9, 3, 64), (4, 1, 80), (8, 1, 128)]
)
def test_prompts_and_decodes_in_one_step(
    heads: int, kv_heads: int, dim: int, block_tokens: int, dtype: torch.dtype
) -> None:
    Step(MIXED, heads, kv_heads, dim, block_tokens, dtype).check()


@pytest.mark.parametrize("context", [1, 255, 256, 257, 4099])
def test_context_of_one_span_edge_or_thousands(context: int) -> None:
    Step([(context, min(context, 3))], 3, 1, 64, 16, torch.float32).check()


@pytest.mark.parametrize("window", [1, 2, 16, 100, 255, 256, 5000])
@pytest.mark.parametrize("block_tokens", [7, 16])
def test_sliding_window(window: int, block_tokens: int) -> None:
    Step([(600, 40), (20, 20), (700, 1)], 4, 2, 64, block_tokens, torch.float32).check(window)


def test_large_scores_do_not_overflow() -> None:
    step = Step([(300, 20)], 2, 1, 64, 16, torch.float32)
    step.query *= 1e4
    step.check()


def test_a_step_without_tokens() -> None:
    step = Step([(5, 0), (0, 0)], 2, 1, 4, 16, torch.float32)
    assert step.run(None).shape == (0, 2, 4)
