"""Rows of paged context for tests of attention: any mix of prompts, decodes and empty rows."""

from dataclasses import dataclass

import torch
from torch import Tensor

from roofline.ops import KvCache, Ops

MIXED = [(1, 1), (37, 37), (0, 0), (300, 1), (90, 33), (40, 0), (64, 16), (257, 2)]


@dataclass
class PagedStep:
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
        self.keys_values: list[Tensor] = []  # of each row: [2, context, Hkv, D]
        for row, (context, _) in enumerate(self.rows):
            mine, free = free[: counts[row]], free[counts[row] :]
            self.table[row, : len(mine)] = mine
            self.keys_values.append(torch.randn(2, context, self.kv_heads, self.dim).to(self.dtype))
            for position in range(context):
                self.write(row, position, self.keys_values[row][:, position])
        news = torch.tensor([0, *(new for _, new in self.rows)])
        self.query_start = news.cumsum(0).int()
        self.query = torch.randn(int(news.sum()), self.heads, self.dim).to(self.dtype)

    def write(self, row: int, position: int, key_value: Tensor) -> None:
        """Key and value [2, Hkv, D] of a position, into layer 1 of the pool."""
        block = self.table[row, position // self.block_tokens]
        self.pool[1, :, block, :, position % self.block_tokens] = key_value

    def run(self, ops: Ops, window: int | None) -> Tensor:
        """Attention of the whole step [T, Hq, D]."""
        contexts = [context if new else 0 for context, new in self.rows]
        return self._attend(ops, self.query, self.table, self.query_start, contexts, window)

    def run_part(self, ops: Ops, row: int, first: int, last: int, window: int | None) -> Tensor:
        """Attention of new tokens [first, last) of one row, alone in a step."""
        context, new = self.rows[row]
        start = int(self.query_start[row])
        query = self.query[start + first : start + last].clone()
        bounds, contexts = torch.tensor([0, last - first]).int(), [context - new + last]
        return self._attend(ops, query, self.table[row : row + 1], bounds, contexts, window)

    def _attend(
        self,
        ops: Ops,
        query: Tensor,
        table: Tensor,
        query_start: Tensor,
        contexts: list[int],
        window: int | None,
    ) -> Tensor:
        out = torch.full_like(query, torch.nan)
        ops.attention(
            query, KvCache(self.pool, None), 1, table, query_start, torch.tensor(contexts).int(),
            self.dim**-0.5, window, out,
        )  # fmt: skip
        return out
