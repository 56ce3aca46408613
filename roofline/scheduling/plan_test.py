import math
import sys
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roofline.errors import RooflineError
from roofline.request import Request, SamplingParams
from roofline.scheduling.plan import NONE, ON_DEVICE, RowStart, StepPlan

ids = st.integers(0, 2**31)
some_ids = st.lists(ids, max_size=6).map(tuple)
numbers = st.floats(allow_nan=False)


def row_starts(row: int) -> st.SearchStrategy[RowStart]:
    return st.builds(
        RowStart,
        row=st.just(row),
        num_prompt=st.integers(1, 2**40),
        seed=st.integers(0, 2**64 - 1),
        temperature=numbers,
        top_k=ids,
        top_p=numbers,
        min_p=numbers,
        repetition_penalty=numbers,
        presence_penalty=numbers,
        frequency_penalty=numbers,
        min_tokens=ids,
        logprobs=st.integers(NONE, 20),
        prompt_logprobs=st.integers(NONE, 20),
        stop_ids=some_ids,
        allowed_token_ids=some_ids,
        history=some_ids,
        bad_words=st.lists(some_ids, max_size=4).map(tuple),
        logit_bias=st.lists(st.tuples(ids, numbers), max_size=4).map(tuple),
    )


@st.composite
def plans(draw: st.DrawFn) -> StepPlan:
    plan = StepPlan(draw(st.integers(0, 2**62)))
    mask_size = 8 * draw(st.integers(1, 3))
    for row in draw(st.lists(st.integers(0, 4096), max_size=6, unique=True)):
        tokens = draw(st.lists(st.integers(ON_DEVICE, 2**31), min_size=1, max_size=5))
        samples = draw(st.integers(0, len(tokens)))
        blocks = draw(st.lists(ids, max_size=3))
        masked = samples == 1 and draw(st.booleans())
        mask = draw(st.binary(min_size=mask_size, max_size=mask_size)) if masked else None
        plan.add(row, draw(st.integers(0, 2**40)), tokens, samples, blocks, mask)
        if draw(st.booleans()):
            plan.starts.append(draw(row_starts(row)))
    return plan


@given(plans())
def test_a_plan_is_the_same_after_the_wire(plan: StepPlan) -> None:
    assert StepPlan.decode(plan.encode()) == plan


@given(plans(), st.data())
@settings(max_examples=300)
def test_a_changed_plan_is_refused_or_is_another_sound_plan(
    plan: StepPlan, data: st.DataObject
) -> None:
    words = array("q", plan.encode())
    index = data.draw(st.integers(0, len(words) - 1))
    words[index] = data.draw(st.sampled_from([-(2**63), -2, -1, 0, 1, 7, 2**62, 2**63 - 1]))
    try:
        decoded = StepPlan.decode(words.tobytes())
    except RooflineError as error:
        assert "step plan" in error.message
        return
    decoded._check()
    assert decoded.encode() == words.tobytes()


@given(plans(), st.data())
def test_a_plan_cut_short_or_run_on_is_refused(plan: StepPlan, data: st.DataObject) -> None:
    whole = plan.encode()
    for broken in (whole[: data.draw(st.integers(0, len(whole) - 1))], whole + b"\0" * 8):
        with pytest.raises(RooflineError, match="step plan"):
            StepPlan.decode(broken)


@given(st.binary(max_size=400))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(RooflineError, match="step plan"):
        StepPlan.decode(data)


def test_the_other_byte_order_is_refused_by_name() -> None:
    words = array("q", StepPlan(1).encode())
    words.byteswap()
    with pytest.raises(RooflineError, match=rf"first word .*\({sys.byteorder} endian"):
        StepPlan.decode(words.tobytes())


def test_a_lying_count_allocates_nothing() -> None:
    words = array("q", StepPlan(1).encode())
    for field in range(2, 8):
        lying = words[:]
        lying[field] = 2**62
        with pytest.raises(RooflineError, match="claims"):
            StepPlan.decode(lying.tobytes())


def two_entries() -> StepPlan:
    plan = StepPlan(3, starts=[RowStart(row=1, num_prompt=2, seed=5)])
    plan.add(0, 7, [ON_DEVICE], 1, [4])
    plan.add(1, 0, [8, 9], 1, [5], mask=b"12345678")
    return plan


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("step", -1),
        ("rows", [0, 0]),
        ("rows", [0, -1]),
        ("rows", [0, 2]),  # the start's row has no entry
        ("positions", [0, -1]),
        ("counts", [0, 3]),
        ("counts", [2, 2]),
        ("counts", [1, 1]),
        ("samples", [2, 1]),
        ("samples", [1, -1]),
        ("masks", [-2, 0]),
        ("masks", [-1, -1]),  # a mask of nobody
        ("masks", [0, 0]),
        ("masks", [-1, 1]),
        ("samples", [1, 0]),  # a mask where nothing is sampled
        ("samples", [1, 2]),
        ("block_counts", [3, -1]),
        ("block_counts", [1, 0]),
        ("token_ids", [-2, 8, 9]),
        ("block_ids", [4, -1]),
        ("starts", [RowStart(row=1, num_prompt=2, seed=5)] * 2),
        ("starts", [RowStart(row=-1, num_prompt=2, seed=5)]),
        ("starts", [RowStart(row=1, num_prompt=0, seed=5)]),
        ("starts", [RowStart(row=1, num_prompt=1, seed=5, top_k=-1)]),
    ],
)
def test_numbers_outside_a_workers_tables_are_refused(column: str, values: object) -> None:
    plan = two_entries()
    assert StepPlan.decode(plan.encode()) == plan
    object.__setattr__(plan, column, values)
    with pytest.raises(RooflineError, match="out of bounds"):
        StepPlan.decode(plan.encode())


def test_masks_cross_bit_for_bit() -> None:
    plan = two_entries()
    plan.add(2, 0, [1], 1, [], mask=bytes(range(100, 108)))
    again = StepPlan.decode(plan.encode())
    assert again.masks == [NONE, 0, 1]
    assert again.mask_bits == [b"12345678", bytes(range(100, 108))]


@pytest.mark.parametrize(("masks", "words"), [(2, 1), (1, 2), (0, 1), (1, 0), (-1, -1), (0, 0)])
def test_masks_that_are_not_there_are_refused(masks: int, words: int) -> None:
    data = array("q", two_entries().encode())
    data[6:8] = array("q", (masks, words))
    with pytest.raises(RooflineError, match="step plan"):
        StepPlan.decode(data.tobytes())


def test_floats_cross_bit_for_bit() -> None:
    plan = two_entries()
    for value in (0.1, -0.0, 5e-324, math.inf):
        plan.starts = [RowStart(row=0, num_prompt=1, seed=2**64 - 1, temperature=value)]
        (start,) = StepPlan.decode(plan.encode()).starts
        assert start.temperature.hex() == value.hex()
        assert start.seed == 2**64 - 1


def request_of(**options: object) -> Request:
    sampling = SamplingParams.from_options(options)
    words = [(7,)] if sampling.bad_words else []
    request = Request("a", [4, 5], sampling, seed=9, eos_token_ids=[2], bad_words_ids=words)
    request.row = 3
    return request


def start_of(**options: object) -> RowStart:
    return RowStart.of(request_of(**options))


def test_a_start_tells_only_what_its_row_needs() -> None:
    assert start_of() == RowStart(row=3, num_prompt=2, seed=9)
    assert start_of(top_k=-1).top_k == 0
    assert start_of(min_tokens=2).stop_ids == (2,)
    assert start_of(logprobs=0).logprobs == 0
    assert start_of(logit_bias={1: 2}).logit_bias == ((1, 2.0),)
    assert start_of(allowed_token_ids=[6]).allowed_token_ids == (6,)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"bad_words": ["x"]},
        {"prompt_logprobs": 0},
    ],
)
def test_history_is_sent_to_whoever_looks_back(options: dict[str, object]) -> None:
    assert start_of(**options).history == (4, 5)


def test_prompt_logprobs_once_delivered_are_not_computed_again() -> None:
    request = request_of(prompt_logprobs=2)
    assert RowStart.of(request).prompt_logprobs == 2
    request.prompt_logprobs = None
    again = RowStart.of(request)
    assert (again.prompt_logprobs, again.history) == (NONE, ())
