"""What min_p, top_k and top_p keep, by the definition, by hand, and by the native kernel."""

import math

import pytest
import torch
from torch import Tensor

from roofline.ops.cpu.native import NativeOps, Pool
from roofline.ops.truncation import truncate
from tests.native_library import ISAS, open_native

INF, NAN = torch.inf, torch.nan
# min_p, top_k, top_p
LIMITS = [
    (0.0, 0, 1.0), (0.1, 0, 1.0), (0.0, 1, 1.0), (0.0, 50, 1.0), (0.0, 10_000_000, 1.0),
    (0.0, 0, 0.9), (0.0, 0, 0.5), (0.0, 0, 1e-9), (0.0, 0, 1 - 1e-6), (0.02, 200, 0.95),
    (1.0, 0, 1.0), (1e-30, 7, 0.3), (0.5, 3, 0.999),
]  # fmt: skip


def kept(logits: list[float], min_p: float = 0, top_k: int = 0, top_p: float = 1) -> list[int]:
    row = torch.tensor(logits)
    truncate(row, min_p, top_k, top_p)
    return torch.nonzero(row != -INF).squeeze(1).tolist()


def logs(probabilities: list[float]) -> list[float]:
    return [math.log(p) if p else -INF for p in probabilities]


def test_each_limit_keeps_what_it_says() -> None:
    row = logs([0.1, 0.4, 0.2, 0.3])
    assert kept(row) == [0, 1, 2, 3]
    assert kept(row, min_p=0.6) == [1, 3]
    assert kept(row, top_k=2) == [1, 3]
    assert kept(row, top_k=4) == kept(row, top_k=5) == [0, 1, 2, 3]
    assert kept(row, top_p=0.35) == [1]
    assert kept(row, top_p=0.45) == kept(row, top_p=0.65) == [1, 3]
    assert kept(row, top_p=0.95) == [0, 1, 2, 3]
    assert kept(row, top_p=1e-300) == [1]


def test_each_limit_sees_what_the_one_before_it_left() -> None:
    row = logs([0.1, 0.4, 0.2, 0.3])
    assert kept(row, top_k=2, top_p=0.5) == [1]  # 0.4 / 0.7 of what is left
    assert kept(row, min_p=0.6, top_p=0.5) == [1]
    assert kept(row, min_p=0.6, top_k=3) == [1, 3]


def test_ties_stay_in_at_top_k_and_the_lower_id_goes_first_at_top_p() -> None:
    assert kept([1.0, 2.0, 1.0, 0.0, 1.0], top_k=2) == [0, 1, 2, 4]
    assert kept([0.0, -0.0, -1.0], top_k=1) == [0, 1]
    assert kept([5.0] * 4, top_p=0.5) == [0, 1]
    assert kept([5.0] * 4, top_p=0.51) == [0, 1, 2]


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_row_without_a_finite_maximum_has_no_probabilities(bad: float) -> None:
    assert kept([0.0, bad, -9.0], min_p=0.5, top_p=0.5) == [0, 1, 2]
    assert kept([0.0, bad, -9.0], top_k=2) == [0, 1]
    assert kept([-INF] * 3, min_p=0.5, top_k=1, top_p=0.5) == []


def rows(vocab: int) -> Tensor:
    """Random, peaked, flat, tied, sparse and broken rows."""
    torch.manual_seed(vocab)
    noise = torch.randn(vocab)
    tied = (torch.randn(vocab) * 2).round()
    sparse = torch.where(torch.rand(vocab) < 0.9, -INF, noise)
    broken = torch.where(torch.rand(vocab) < 0.01, NAN, noise)
    infinite = torch.where(torch.rand(vocab) < 0.01, INF, noise)
    zeros = torch.zeros(vocab) * torch.randn(vocab).sign()
    tiny = noise * 1e-40  # denormal
    nothing, one = torch.full((vocab,), -INF), torch.full((vocab,), -INF)
    one[vocab // 2] = -3.0
    return torch.stack(
        [noise, noise * 4, noise * 1e-3, noise * 40, tied, tied / 8, sparse, broken, infinite]
        + [zeros, tiny, noise + 1000, noise * 1e30, nothing, one, torch.sort(noise).values]
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("vocab", [1, 15, 16, 300, 4099, 49152])
def test_native_keeps_the_tokens_of_the_definition(isa: str, vocab: int) -> None:
    pool, size = Pool(open_native(isa), 2), vocab + 5
    ops = NativeOps(torch.float32, torch.empty(1), torch.zeros(4, dtype=torch.int64), pool)
    for min_p, top_k, top_p in LIMITS:
        expected = rows(vocab)
        for row in expected:
            truncate(row, float(torch.tensor(min_p)), top_k, top_p)
        wide = torch.zeros(len(expected), size)  # beyond the vocabulary: not to be touched
        wide[:, :vocab] = rows(vocab)
        count = len(expected)
        ops.truncate(
            wide[:, :vocab],
            torch.full((count,), min_p),
            torch.full((count,), top_k),
            torch.full((count,), top_p, dtype=torch.float64),
        )
        assert torch.equal(wide[:, :vocab].isnan(), expected.isnan())
        assert torch.equal(wide[:, :vocab].nan_to_num(9.0), expected.nan_to_num(9.0))
        assert not wide[:, vocab:].any()


@pytest.mark.parametrize("isa", ISAS)
def test_every_row_has_limits_of_its_own(isa: str) -> None:
    torch.manual_seed(1)
    logits = torch.randn(len(LIMITS), 700) * 3
    expected = logits.clone()
    for row, (min_p, top_k, top_p) in zip(expected, LIMITS, strict=True):
        truncate(row, float(torch.tensor(min_p)), top_k, top_p)
    columns = list(zip(*LIMITS, strict=True))
    step = torch.zeros(4, dtype=torch.int64)
    ops = NativeOps(torch.float32, torch.empty(1), step, Pool(open_native(isa), 3))
    min_p, top_k = torch.tensor(columns[0]), torch.tensor(columns[1])
    ops.truncate(logits, min_p, top_k, torch.tensor(columns[2], dtype=torch.float64))
    assert torch.equal(logits, expected)
