"""The native choice of a token is the reference's, greedy and with noise."""

import pytest
import torch

from roofline.ops.cpu.library import Library, open_library
from roofline.ops.cpu.native import NativeOps, Pool
from roofline.ops.reference import ReferenceOps

OPENED = open_library()
pytestmark = pytest.mark.skipif(isinstance(OPENED, str), reason=str(OPENED))
ISAS = OPENED.isas if isinstance(OPENED, Library) else ()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("vocab", [1, 15, 300, 49152])
def test_every_isa_chooses_the_tokens_of_the_reference(isa: str, vocab: int) -> None:
    library = open_library(isa)
    assert isinstance(library, Library)
    rows = 24
    torch.manual_seed(vocab)
    logits = torch.randn(rows, vocab) * torch.linspace(0, 5, rows).unsqueeze(1)
    logits[rows // 2 :, 1::2] = -torch.inf
    temperature = torch.linspace(0, 2, rows, dtype=torch.float64)
    seed = torch.randint(-(2**63), 2**63 - 1, (rows,))
    position = torch.randint(0, 1 << 20, (rows,))
    chosen = torch.zeros(rows, dtype=torch.int64)
    expected = torch.zeros_like(chosen)
    scratch, step = torch.empty(1), torch.zeros(3, dtype=torch.int64)
    columns = temperature, seed, position
    NativeOps(torch.float32, scratch, step, Pool(library, 2)).choose(logits, *columns, chosen)
    ReferenceOps(torch.float32, scratch).choose(logits, *columns, expected)
    assert chosen.tolist() == expected.tolist()
    assert chosen.min() >= 0 and chosen.max() < vocab


def test_the_lowest_id_wins_ties() -> None:
    assert isinstance(OPENED, Library)
    logits = torch.tensor([[0.0, 3.0, 3.0], [-torch.inf, -torch.inf, -1.0]])
    chosen = torch.zeros(2, dtype=torch.int64)
    ops = NativeOps(torch.float32, torch.empty(1), torch.zeros(3).long(), Pool(OPENED, 1))
    ops.choose(logits, torch.zeros(2).double(), chosen.clone(), chosen.clone(), chosen)
    assert chosen.tolist() == [1, 2]
