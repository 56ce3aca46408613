"""Sampling kernels against their definitions, in Triton's interpreter where there is no GPU."""

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

from roofline.ops.gpu import sampling
from roofline.ops.gpu.triton_support import supports_pdl
from roofline.ops.reference import ReferenceOps
from roofline.ops.truncation import truncate

# Of NumPy, in the interpreter: bounds of loops, and infinities on their way.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Conversion of an array:DeprecationWarning", "ignore::RuntimeWarning"
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PDL = supports_pdl(DEVICE)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(4)
    yield


def choices(logits: torch.Tensor, *columns: torch.Tensor) -> list[int]:
    rows, vocab = logits.shape
    out = torch.full((rows,), -1, device=DEVICE)
    scratch = torch.empty(sampling.choose_scratch_floats(rows, vocab), device=DEVICE)
    heat, seed, position = (column.to(DEVICE) for column in columns)
    sampling.choose(logits.to(DEVICE), heat, seed, position, out, scratch, pdl=PDL)
    return out.tolist()


@pytest.mark.parametrize("vocab", [1, 15, 300, 4099])
def test_the_reference_chooses_the_same_tokens(vocab: int) -> None:
    rows = 12
    logits = torch.randn(rows, vocab) * torch.linspace(0, 5, rows).unsqueeze(1)
    logits[rows // 2 :, 1::2] = -torch.inf
    temperature = torch.linspace(0, 2, rows, dtype=torch.float64)
    seed = torch.randint(-(2**63), 2**63 - 1, (rows,))
    position = torch.randint(0, 1 << 20, (rows,))
    wanted = torch.zeros(rows, dtype=torch.int64)
    ReferenceOps(torch.float32, torch.empty(1)).choose(logits, temperature, seed, position, wanted)
    assert choices(logits, temperature, seed, position) == wanted.tolist()


def test_the_lowest_id_wins_ties_and_nan_never() -> None:
    logits = torch.full((3, 5000), -torch.inf)
    logits[0, [4, 4500]] = 3.0
    logits[1, 4999] = -1.0
    logits[2, :2] = torch.tensor([torch.nan, 0.0])
    none = torch.zeros(3, dtype=torch.int64)
    assert choices(logits, none.double(), none, none) == [4, 4999, 1]


@pytest.mark.parametrize(("vocab", "tied"), [(1, False), (7, True), (300, False), (9001, True)])
def test_truncation_leaves_what_its_definition_leaves(vocab: int, tied: bool) -> None:
    rows = [
        (0.0, 0, 0.9), (0.1, 0, 1.0), (0.0, 3, 1.0), (0.05, 20, 0.7), (0.0, 0, 1.0), (0.0, 9, 1e-9),
    ]  # fmt: skip
    logits = torch.randn(len(rows), vocab) * 3
    logits[:, ::3] = -0.0
    if tied:
        logits = logits.round()
        logits[:, 1::4] = -torch.inf
    min_p, top_k, top_p = (torch.tensor(column) for column in zip(*rows, strict=True))
    actual = logits.to(DEVICE)
    columns = min_p.float().to(DEVICE), top_k.to(DEVICE), top_p.double().to(DEVICE)
    sampling.truncate(actual, *columns, pdl=PDL)
    for row, (_, kept, mass) in enumerate(rows):
        truncate(logits[row], float(min_p[row]), kept, mass)
    assert torch.equal(actual.cpu(), logits)


def test_equal_logits_fill_a_mass_from_the_lowest_id() -> None:
    logits = torch.zeros(1, 5000)
    actual = logits.to(DEVICE)
    off = torch.zeros(1, device=DEVICE)
    sampling.truncate(actual, off, off.long(), torch.tensor([0.25]).double().to(DEVICE), pdl=PDL)
    assert actual.isfinite().nonzero()[:, 1].tolist() == list(range(1250))


@pytest.mark.parametrize("vocab", [1, 13, 5003])
def test_masks_keep_what_their_bits_allow(vocab: int) -> None:
    logits = torch.randn(3, vocab)
    masks = torch.randint(0, 256, (2, -(-vocab // 8)), dtype=torch.uint8)
    actual = logits.to(DEVICE)
    of = torch.tensor([1, -1, 0])
    sampling.keep_allowed(actual, masks.to(DEVICE), of.to(DEVICE), pdl=PDL)
    tokens = torch.arange(vocab)
    for row, mask in ((0, 1), (2, 0)):
        allowed = (masks[mask, tokens // 8].int() >> (tokens % 8)) & 1
        logits[row, allowed == 0] = -torch.inf
    assert torch.equal(actual.cpu(), logits)


def test_penalties_go_by_what_was_counted() -> None:
    vocab = 5003
    logits = torch.randn(3, vocab)
    counts = torch.zeros(4, vocab, dtype=torch.int16)
    counts[2, [1, 5, 4999]] = torch.tensor(
        [sampling.PROMPT_BIT, 2, sampling.PROMPT_BIT + 1]
    ).short()
    on_device = counts.to(DEVICE)
    for token in (7, 5):
        columns = torch.tensor([2, -1]), torch.tensor([token, 1])
        sampling.count_tokens(on_device, *(c.to(DEVICE) for c in columns), pdl=PDL)
    counts[2, [7, 5]] += 1
    assert torch.equal(on_device.cpu(), counts)
    actual = logits.to(DEVICE)
    row, off = torch.tensor([0, 2, 2]), torch.zeros(3)
    penalties = [torch.tensor([1.3, 1.3, 1.0]), torch.tensor([0.5, 0.5, 0.0]), off + 0.25]
    sampling.penalize(
        actual, on_device, row.to(DEVICE), *(p.to(DEVICE) for p in penalties), pdl=PDL
    )
    for sampled, factor, each in ((1, 1.3, 0.5), (2, 1.0, 0.0)):
        for token, output in ((1, 0), (5, 3), (7, 1), (4999, 1)):
            value = logits[sampled, token]
            value = value / factor if value > 0 else value * factor
            logits[sampled, token] = value - (each * output + 0.25 if output else 0.0)
    torch.testing.assert_close(actual.cpu(), logits)
