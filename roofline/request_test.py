import dataclasses
import math

import pytest

from roofline.errors import RequestError
from roofline.request import Request, SamplingParams, check_token_ids, child_seed

HUGE = 10**5000  # Python refuses to print it

INTEGERS = [
    ("n", 1, 128),
    ("top_k", -1, 2**31 - 1),
    ("seed", 0, 2**64 - 1),
    ("min_tokens", 0, 2**31 - 1),
    ("max_tokens", 1, 2**31 - 1),
    ("logprobs", 0, 20),
    ("prompt_logprobs", 0, 20),
]
NUMBERS = [
    ("temperature", 0, 100),
    ("top_p", 1e-9, 1),
    ("min_p", 0, 1),
    ("repetition_penalty", 0.01, 100),
    ("presence_penalty", -2, 2),
    ("frequency_penalty", -2, 2),
]
OPTIONAL = {"seed", "max_tokens", "logprobs", "prompt_logprobs"}
NEVER_NUMBERS: list[object] = [True, False, "1", [], {}, [1], (), b"1", object()]


def refused(**options: object) -> str:
    """The message of the refusal, which must be one short line that names the field."""
    with pytest.raises(RequestError) as caught:
        SamplingParams.from_options(options)
    message = caught.value.message
    assert "\n" not in message and len(message) < 400
    return message


@pytest.mark.parametrize(("name", "low", "high"), INTEGERS)
def test_every_integer_is_taken_within_its_bounds_and_refused_outside(
    name: str, low: int, high: int
) -> None:
    for value in (low, high):
        assert getattr(SamplingParams.from_options({name: value}), name) == value
    for value in (low - 1, high + 1, 1.0, math.nan, HUGE, -HUGE, *NEVER_NUMBERS):
        message = refused(**{name: value})
        assert message.startswith(f"{name} is ")
        assert f"{low} to {high}" in message


@pytest.mark.parametrize(("name", "low", "high"), NUMBERS)
def test_every_number_is_finite_and_within_its_bounds(name: str, low: float, high: float) -> None:
    for value in (low, high):
        assert getattr(SamplingParams.from_options({name: value}), name) == value
    outside = [math.nextafter(low, -math.inf) if low != 1e-9 else 0, math.nextafter(high, math.inf)]
    for value in (*outside, math.nan, math.inf, -math.inf, 1e308, HUGE, -HUGE, *NEVER_NUMBERS):
        assert refused(**{name: value}).startswith(f"{name} is ")


@pytest.mark.parametrize("name", [name for name, _, _ in (*INTEGERS, *NUMBERS)])
def test_none_is_for_optional_fields_only(name: str) -> None:
    if name in OPTIONAL:
        assert getattr(SamplingParams.from_options({name: None}), name) is None
    else:
        refused(**{name: None})


@pytest.mark.parametrize(
    "name", ["ignore_eos", "skip_special_tokens", "include_stop_str_in_output"]
)
def test_a_flag_is_true_or_false_and_nothing_truthy(name: str) -> None:
    for value in (0, 1, None, "yes"):
        assert "True or False" in refused(**{name: value})


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0},
        {"top_p": 0.0},
        {"temperature": 1e-30},
        {"temperature": -1},
        {"n": 2, "temperature": 0},
        {"min_tokens": 5, "max_tokens": 4},
        {"prompt_logprobs": -1},
        {"logprobs": -1},
    ],
)
def test_combinations_that_cannot_be_meant_are_refused(options: dict[str, object]) -> None:
    assert refused(**options).split(" is ")[0] in options


def test_stop_strings_are_bounded_in_count_and_length() -> None:
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a"] * 16).stop == ("a",) * 16
    assert SamplingParams(stop=["a" * 1024]).stop == ("a" * 1024,)
    assert SamplingParams(stop=[]).stop == ()
    for value in ("", [""], ["a"] * 17, ["a" * 1025], [None], [1], 1, {"a": 1}, b"end", [b"end"]):
        assert refused(stop=value).startswith("stop is ")


def test_bad_words_are_a_list_of_words_never_one_string() -> None:
    assert SamplingParams(bad_words=["x", "y"]).bad_words == ("x", "y")
    for value in ("word", [""], [1], ["w"] * 1025, ["w" * 1025], {"w"}):
        assert refused(bad_words=value).startswith("bad_words is ")


@pytest.mark.parametrize("name", ["stop_token_ids", "allowed_token_ids"])
def test_token_id_lists_hold_nonnegative_integers(name: str) -> None:
    assert getattr(SamplingParams.from_options({name: [0, 5]}), name) == (0, 5)
    for value in ([-1], [1.0], [True], ["1"], [None], [2**31], [HUGE], "12", b"12", 5, {1}):
        assert refused(**{name: value}).startswith(name)


def test_id_lists_and_biases_are_bounded_in_count() -> None:
    assert "1024" in refused(stop_token_ids=[1] * 1025)
    assert "1024" in refused(logit_bias=dict.fromkeys(range(1025), 1.0))
    assert "at least one token id" in refused(allowed_token_ids=[])


def test_logit_bias_maps_ids_to_numbers_within_a_hundred() -> None:
    assert SamplingParams(logit_bias={3: 100, 4: -100.0}).logit_bias == {3: 100.0, 4: -100.0}
    for value in ({3: 100.5}, {3: math.nan}, {3: math.inf}, {3: True}, {3: "1"}, {3: None}):
        assert refused(logit_bias=value).startswith("logit_bias[3] is ")
    for value in ({"3": 1.0}, {-1: 1.0}, {1.5: 1.0}, {True: 1.0}, {None: 1.0}, {HUGE: 1.0}):
        assert refused(logit_bias=value).startswith("logit_bias token id is ")
    for value in ([1], 1, "3"):
        assert refused(logit_bias=value).startswith("logit_bias is ")


def test_an_unknown_option_is_refused_with_the_nearest_name() -> None:
    assert "did you mean temperature?" in refused(temprature=1)
    assert "did you mean max_tokens?" in refused(max_token=1)
    assert "known: n, temperature" in refused(zzz=1)
    assert len(refused(**{"z" * 100_000: 1})) < 400


def test_a_refused_value_is_shown_cut_to_one_line() -> None:
    assert "bits" in refused(seed=HUGE)
    refused(stop="a\nb" * 100_000)
    refused(logit_bias=[[[[[HUGE]]]]] * 10_000)


def test_what_was_checked_cannot_change_afterwards() -> None:
    ids, bias, stop = [1], {1: 1.0}, ["a"]
    sampling = SamplingParams(stop_token_ids=ids, logit_bias=bias, stop=stop)
    ids.append(-1)
    bias[1] = math.nan
    stop.append("")
    assert sampling.stop_token_ids == (1,)
    assert sampling.logit_bias == {1: 1.0}
    assert sampling.stop == ("a",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        sampling.temperature = -1.0  # pyrefly: ignore[read-only]


def test_params_can_be_replaced_field_by_field() -> None:
    sampling = SamplingParams(stop="a", bad_words=["b"], logit_bias={1: 2.0}, stop_token_ids=[3])
    assert dataclasses.replace(sampling) == sampling
    assert dataclasses.replace(sampling, n=3).n == 3


@pytest.mark.parametrize("name", ["stop_token_ids", "allowed_token_ids", "logit_bias"])
def test_ids_outside_the_vocabulary_are_refused_by_field(name: str) -> None:
    value = {99: 1.0} if name == "logit_bias" else [99]
    sampling = SamplingParams.from_options({name: value})
    sampling.check(100)
    with pytest.raises(RequestError, match=f"{name} token id is 99; .* 0 to 98"):
        sampling.check(99)


def test_penalties_are_seen_only_when_they_do_something() -> None:
    assert not SamplingParams().has_penalties
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert SamplingParams.from_options({name: 1.5}).has_penalties


def test_prompt_ids_are_integers_in_the_vocabulary_and_the_first_offender_is_named() -> None:
    check_token_ids("prompt", [0, 9], 10)
    for bad in (10, -1, True, 1.0, "1", None, HUGE):
        with pytest.raises(RequestError, match=r"prompt\[1\] is .*; it must be .* from 0 to 9"):
            check_token_ids("prompt", [0, bad, 3, -5], 10)  # pyrefly: ignore[bad-argument-type]
    with pytest.raises(RequestError, match="prompt is empty"):
        check_token_ids("prompt", [], 10)


def test_children_have_distinct_seeds_that_never_change() -> None:
    # Written down, so that a stored seed gives the same answers on every version and machine.
    assert [child_seed(7, index) for index in range(3)] == CHILDREN_OF_SEVEN
    seeds = {child_seed(seed, index) for seed in range(100) for index in range(128)}
    assert len(seeds) == 100 * 128
    assert all(0 <= child_seed(2**64 - 1, index) < 2**64 for index in range(128))


CHILDREN_OF_SEVEN = [13435648307350579764, 14818979533484651488, 4504606891059362275]


def test_a_request_stops_at_eos_and_at_the_callers_ids_unless_told_otherwise() -> None:
    def stop_ids(**options: object) -> frozenset[int]:
        sampling = SamplingParams.from_options(options)
        return Request("a", [1], sampling, seed=0, eos_token_ids=(2, 3)).stop_ids

    assert stop_ids() == {2, 3}
    assert stop_ids(stop_token_ids=[9]) == {2, 3, 9}
    assert stop_ids(stop_token_ids=[9], ignore_eos=True) == {9}


@pytest.mark.parametrize("field", ["seed", "priority"])
@pytest.mark.parametrize("value", [2**64, -(2**64), True, 1.0, None, "1"])
def test_a_seed_or_priority_that_is_no_integer_in_bounds_is_refused(
    field: str, value: object
) -> None:
    numbers = {"seed": 0, field: value}
    with pytest.raises(RequestError, match=f"{field} is "):
        Request("a", [1], SamplingParams(), **numbers)  # pyrefly: ignore[bad-argument-type]


def test_a_request_keeps_its_own_copy_of_the_prompt() -> None:
    prompt = [1, 2]
    request = Request("a", prompt, SamplingParams(), seed=0)
    prompt.append(3)
    assert request.tokens == [1, 2]


def test_a_stop_token_counts_only_after_min_tokens_others() -> None:
    sampling = SamplingParams(min_tokens=2, stop_token_ids=[9])
    request = Request("a", [1], sampling, seed=0, eos_token_ids=[2])
    request.max_total_tokens = 10
    assert [request.append(token) for token in (9, 2, 2)] == [None, None, "stop"]
    assert (request.num_output, request.finish_reason) == (3, "stop")
    assert (request.stop_reason, request.ends_with_stop_token) == (None, True)
    named = Request("a", [1], sampling, seed=0, eos_token_ids=[2])
    named.max_total_tokens = 10
    assert [named.append(token) for token in (5, 5, 9)] == [None, None, "stop"]
    assert (named.stop_reason, named.ends_with_stop_token) == (9, True)


def test_a_request_ends_at_its_limit_and_a_stop_there_is_a_stop() -> None:
    def last(token: int) -> str | None:
        request = Request("a", [1], SamplingParams(), seed=0, eos_token_ids=[2])
        request.max_total_tokens = 3
        assert request.append(5) is None
        return request.append(token)

    assert last(5) == "length"
    assert last(2) == "stop"
