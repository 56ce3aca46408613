"""Paged attention against softmax(QK)V in NumPy float64, one query at a time."""

import numpy as np
import pytest
import torch

from roofline.ops.reference import ReferenceOps
from tests.paged_step import MIXED, PagedStep

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
over_dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


class Step(PagedStep):
    """A step that the reference runs, and the answer one query at a time."""

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
        ops = ReferenceOps(self.dtype, torch.zeros(1))
        actual, wanted = self.run(ops, window).double().numpy(), self.oracle(window)
        assert actual.shape == wanted.shape
        assert np.abs(actual - wanted).max() <= TOLERANCE[self.dtype] * np.abs(wanted).max()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(2)


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
    assert step.run(ReferenceOps(step.dtype, torch.zeros(1)), None).shape == (0, 2, 4)
