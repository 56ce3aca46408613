"""The native choice of a token is the reference's, greedy and with noise."""

import pytest
import torch

from roofline.ops.cpu.library import Library
from roofline.ops.cpu.native import NativeOps, Pool
from roofline.ops.reference import ReferenceOps
from tests.native_library import ISAS, open_native


@pytest.fixture(scope="module", params=ISAS)
def library(request: pytest.FixtureRequest) -> Library:
    return open_native(request.param)


@pytest.mark.parametrize("vocab", [1, 15, 300, 49152])
def test_every_isa_chooses_the_tokens_of_the_reference(library: Library, vocab: int) -> None:
    rows = 24
    torch.manual_seed(vocab)
    logits = torch.randn(rows, vocab) * torch.linspace(0, 5, rows).unsqueeze(1)
    logits[rows // 2 :, 1::2] = -torch.inf
    temperature = torch.linspace(0, 2, rows, dtype=torch.float64)
    seed = torch.randint(-(2**63), 2**63 - 1, (rows,))
    position = torch.randint(0, 1 << 20, (rows,))
    chosen = torch.zeros(rows, dtype=torch.int64)
    expected = torch.zeros_like(chosen)
    scratch, step = torch.empty(1), torch.zeros(4, dtype=torch.int64)
    columns = temperature, seed, position
    NativeOps(torch.float32, scratch, step, Pool(library, 2)).choose(logits, *columns, chosen)
    ReferenceOps(torch.float32, scratch).choose(logits, *columns, expected)
    assert chosen.tolist() == expected.tolist()
    assert chosen.min() >= 0 and chosen.max() < vocab


def test_the_lowest_id_wins_ties(library: Library) -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [-torch.inf, -torch.inf, -1.0]])
    chosen = torch.zeros(2, dtype=torch.int64)
    ops = NativeOps(torch.float32, torch.empty(1), torch.zeros(4).long(), Pool(library, 1))
    ops.choose(logits, torch.zeros(2).double(), chosen.clone(), chosen.clone(), chosen)
    assert chosen.tolist() == [1, 2]
