"""Paged attention against the reference, in Triton's interpreter where there is no GPU."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from roofline.ops import KvCache
from roofline.ops.gpu.attention import Heads, Tasks, attention, make_tasks, plan
from roofline.ops.gpu.triton_support import supports_pdl
from roofline.ops.reference import LARGEST, ReferenceOps
from tests.paged_step import PagedStep

# Of NumPy, in the interpreter: bounds of loops, and infinities on their way.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Conversion of an array:DeprecationWarning", "ignore::RuntimeWarning"
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# One token, two, whole prompts, chunks on a context, and no token; a context of several spans.
MIXED = [(1, 1), (0, 0), (37, 37), (330, 1), (90, 33), (40, 0), (64, 16), (129, 2)]


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(3)
    yield


def tasks_for(step: PagedStep, cache: torch.dtype, deterministic: bool = False) -> Tasks:
    heads = Heads(step.heads, step.kv_heads, step.dim)
    rows = len(step.rows)
    return make_tasks(heads, step.dtype, cache, rows, DEVICE, deterministic=deterministic)


def attend(
    step: PagedStep,
    window: int | None = None,
    *,
    cache: KvCache | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tasks]:
    """Attention of a step by the kernels, and the tasks as they left them."""
    cache = cache or KvCache(step.pool, None)
    tasks = tasks_for(step, cache.values.dtype, deterministic)
    scratch = torch.full((tasks.scratch_floats,), torch.nan, device=DEVICE)
    contexts = torch.tensor([context if new else 0 for context, new in step.rows]).int()
    query, table, starts, contexts = (
        x.to(DEVICE) for x in (step.query, step.table, step.query_start, contexts)
    )
    scales = None if cache.scales is None else cache.scales.to(DEVICE)
    out = torch.full_like(query, torch.nan)
    pdl = supports_pdl(DEVICE)
    plan(tasks, starts, contexts, window, pdl=pdl)
    attention(
        query, KvCache(cache.values.to(DEVICE), scales), 1, table, starts, contexts, tasks,
        step.dim**-0.5, window, out, scratch, longest=max(new for _, new in step.rows), pdl=pdl,
    )  # fmt: skip
    assert not tasks.arrivals.any()  # as the next launch needs them
    return out.cpu(), tasks


def assert_close(actual: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert actual.shape == wanted.shape
    error = (actual.double() - wanted.double()).abs().max()
    assert float(error) <= tolerance * float(wanted.double().abs().max())


def check(step: PagedStep, window: int | None = None, *, deterministic: bool = False) -> Tasks:
    wanted = step.run(ReferenceOps(step.dtype, torch.zeros(1)), window)
    actual, tasks = attend(step, window, deterministic=deterministic)
    assert_close(actual, wanted, TOLERANCE[step.dtype])
    return tasks


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_tokens", "dtype"),
    [
        (2, 2, 64, 16, torch.float32),
        (3, 1, 64, 64, torch.bfloat16),
        (4, 1, 80, 16, torch.float32),
        (8, 1, 96, 64, torch.float16),
        (4, 2, 128, 7, torch.float32),
        (4, 1, 256, 64, torch.bfloat16),
        (20, 1, 16, 64, torch.float32),
    ],
)
def test_prompts_and_decodes_in_one_step(
    heads: int, kv_heads: int, dim: int, block_tokens: int, dtype: torch.dtype
) -> None:
    tasks = check(PagedStep(MIXED, heads, kv_heads, dim, block_tokens, dtype))
    decoded = [new for _, new in MIXED if 0 < new * heads // kv_heads <= tasks.decodes[0].rows]
    assert int(tasks.words[0]) > len(decoded)  # some row was cut


def test_rows_of_which_four_programs_a_processor_have_one_each() -> None:
    tasks = make_tasks(
        Heads(8, 4, 128), torch.bfloat16, torch.bfloat16, 1, DEVICE, deterministic=False
    )
    three, four = tasks.decodes
    count = tasks.programs(three) // 4 + 1
    assert tasks.decode_of(count - 1) == three and tasks.decode_of(count) == four
    assert tasks.decode_of(tasks.programs(four) // 4 + 1) == three
    check(PagedStep([(90 - row % 60, 1) for row in range(count)], 8, 4, 128, 16, torch.bfloat16))


@pytest.mark.parametrize("context", [1, 63, 64, 65, 1030])
def test_one_token_on_a_context(context: int) -> None:
    tasks = check(PagedStep([(context, 1)], 4, 1, 64, 16, torch.float32))
    assert (int(tasks.words[0]) > 1) == (context > 64)


@pytest.mark.parametrize("context", [1, 64, 130])
def test_a_whole_prompt(context: int) -> None:
    check(PagedStep([(context, context)], 4, 1, 64, 16, torch.float32))


@pytest.mark.parametrize("window", [1, 17, 64, 100, 5000])
def test_sliding_window(window: int) -> None:
    check(PagedStep([(200, 40), (20, 20), (300, 1)], 4, 2, 64, 16, torch.float32), window)


def test_a_layer_whose_window_is_narrower_than_the_plan() -> None:
    step = PagedStep([(300, 1), (70, 2)], 4, 2, 64, 16, torch.float32)
    tasks = tasks_for(step, step.dtype)
    scratch = torch.full((tasks.scratch_floats,), torch.nan, device=DEVICE)
    contexts = torch.tensor([300, 70]).int().to(DEVICE)
    starts, query = step.query_start.to(DEVICE), step.query.to(DEVICE)
    plan(tasks, starts, contexts, None, pdl=supports_pdl(DEVICE))
    out = torch.full_like(query, torch.nan)
    attention(
        query, KvCache(step.pool.to(DEVICE), None), 1, step.table.to(DEVICE), starts, contexts,
        tasks, 0.125, 100, out, scratch, longest=2, pdl=supports_pdl(DEVICE),
    )  # fmt: skip
    wanted = step.run(ReferenceOps(step.dtype, torch.zeros(1)), 100)
    assert_close(out.cpu(), wanted, TOLERANCE[step.dtype])


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_a_cache_with_scales(dtype: torch.dtype) -> None:
    step = PagedStep([(130, 1), (37, 37), (90, 40)], 4, 2, 64, 16, torch.float32)
    largest = LARGEST[dtype]
    held = step.pool.nan_to_num()
    scales = held.abs().amax(-1).clamp(min=1e-6) / largest
    values = held / scales.unsqueeze(-1)
    values = (values.round() if dtype == torch.int8 else values).to(dtype)
    scales[step.pool[..., 0].isnan()] = torch.nan  # where no context lies
    cache = KvCache(values, scales)
    actual, _ = attend(step, cache=cache)
    step.pool = (values.float() * scales.unsqueeze(-1)).to(step.dtype)
    wanted = step.run(ReferenceOps(step.dtype, torch.zeros(1)), None)
    assert_close(actual, wanted, TOLERANCE[step.dtype])


def test_large_scores_do_not_overflow() -> None:
    step = PagedStep([(130, 20), (100, 1)], 2, 1, 64, 16, torch.float32)
    step.query *= 1e4
    check(step)


def test_steps_without_tokens() -> None:
    check_rows = [(5, 0), (0, 0)]
    actual, tasks = attend(PagedStep(check_rows, 2, 1, 16, 16, torch.float32))
    assert actual.shape == (0, 2, 16) and int(tasks.words[0]) == 0


def test_deterministic_attention_has_one_order_of_sums() -> None:
    rows = [(200, 1), (150, 30), (3, 3)]
    step = PagedStep(rows, 4, 2, 64, 16, torch.float32)
    check(step, deterministic=True)
    together, _ = attend(step, deterministic=True)
    first = int(step.query_start[1])
    for tokens in (1, 30):  # the last ones of the middle row, alone
        alone = PagedStep([(150, tokens)], 4, 2, 64, 16, torch.float32)
        alone.pool, alone.table = step.pool, step.table[1:2]
        alone.query = step.query[first + 30 - tokens : first + 30]
        actual, wanted = (
            attend(alone, deterministic=True)[0],
            together[first + 30 - tokens : first + 30],
        )
        if DEVICE.type == "cuda":
            assert torch.equal(actual, wanted)
        else:  # in the interpreter NumPy's sums depend on a token's place
            assert_close(actual, wanted, 1e-6)


@pytest.mark.parametrize("rows", [1, 5, 130])
def test_every_position_is_in_one_task(rows: int) -> None:
    contexts = torch.randint(1, 3000, (rows,))
    news = torch.randint(0, 6, (rows,)).minimum(contexts)
    starts = torch.cat((torch.zeros(1), news.cumsum(0))).int().to(DEVICE)
    tasks = make_tasks(
        Heads(8, 2, 64), torch.bfloat16, torch.bfloat16, rows, DEVICE, deterministic=False
    )
    tasks.arrivals.fill_(7)
    plan(tasks, starts, contexts.int().to(DEVICE), None, pdl=supports_pdl(DEVICE))
    assert not tasks.arrivals.any()
    count = int(tasks.words[0])
    found = tasks.words.cpu().view(-1, 8)[1 : 1 + count].tolist()
    seen = {row: 0 for row in range(rows) if 0 < news[row] <= 4}
    for index, (row, first, last, start, stop, context, spans, begin) in enumerate(found):
        assert first == seen[row] < last
        assert (start, stop) == (int(starts[row]), int(starts[row + 1]))
        assert context == int(contexts[row])
        assert 0 <= index - begin < spans and found[begin][0] == row
        seen[row] = last
    assert seen == {row: int(contexts[row]) for row in seen}
    assert count <= tasks.capacity
