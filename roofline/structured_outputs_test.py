from typing import Any

import pytest

from roofline.errors import RequestError
from roofline.request import SamplingParams
from roofline.structured_outputs import StructuredOutputsParams, mask_bytes


def refusal(**options: Any) -> str:
    with pytest.raises(RequestError) as caught:
        StructuredOutputsParams(**options)
    assert "\n" not in caught.value.message and len(caught.value.message) < 300
    return caught.value.message


def test_exactly_one_kind_is_asked_for() -> None:
    assert "has nothing" in refusal()
    assert "has nothing" in refusal(whitespace_pattern=" ")
    assert "has json, json_object" in refusal(json={}, json_object=True)
    assert "has regex, choice" in refusal(regex="a", choice=["a"])


def test_equal_questions_are_equal_and_can_be_looked_up() -> None:
    asked = [
        StructuredOutputsParams(json={"type": "null"}),
        StructuredOutputsParams(json='{ "type" : "null" }'),
    ]
    assert len(set(asked)) == 1
    assert StructuredOutputsParams(choice=["a"]).choice == ("a",)
    assert hash(StructuredOutputsParams(choice=["a", "b"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"json": True}, "json is True"),
        ({"json": []}, "json is []"),
        ({"json_object": False}, "json_object is False"),
        ({"json_object": 1}, "json_object is 1"),
        ({"regex": ""}, "regex is ''"),
        ({"regex": 3}, "regex is 3"),
        ({"regex": "a" * 65537}, "regex has 65537 bytes"),
        ({"regex": "\udfff"}, "half a surrogate pair"),
        ({"grammar": b"x"}, "grammar is b'x'"),
        ({"grammar": "é" * 40_000}, "grammar has 80000 bytes"),
        ({"choice": "abc"}, "choice is 'abc'"),
        ({"choice": []}, "choice has 0 entries"),
        ({"choice": ["a"] * 1025}, "choice has 1025 entries"),
        ({"choice": ["a", ""]}, "choice[1] is ''"),
        ({"choice": [None]}, "choice[0] is None"),
        ({"choice": ["a" * 1025]}, "choice[0] is"),
        ({"choice": ["a", "\ud800"]}, "choice[1] holds half"),
        ({"choice": ["é" * 1000] * 50}, "longer than 65536"),
        ({"choice": {"a": 1}}, "choice is {'a': 1}"),
        ({"regex": "a", "whitespace_pattern": " "}, "json and json_object only"),
        ({"choice": ["a"], "disable_any_whitespace": True}, "json and json_object only"),
        ({"json": {}, "disable_any_whitespace": "no"}, "disable_any_whitespace is 'no'"),
        ({"json": {}, "whitespace_pattern": " " * 257}, "whitespace_pattern has 257"),
        (
            {"json": {}, "whitespace_pattern": " ", "disable_any_whitespace": True},
            "exclude each other",
        ),
    ],
)
def test_values_out_of_bounds_are_refused_by_field(options: dict[str, Any], message: str) -> None:
    assert message in refusal(**options)


def test_unknown_options_are_refused_with_the_nearest() -> None:
    with pytest.raises(RequestError, match="'chioce'; did you mean choice"):
        StructuredOutputsParams.from_options({"chioce": ["a"]})
    with pytest.raises(RequestError, match="known: json, regex"):
        StructuredOutputsParams.from_options({"structural_tag": "x"})
    assert StructuredOutputsParams.from_options({"regex": "a"}).regex == "a"


def test_sampling_takes_no_other_shape() -> None:
    for wrong in ({"regex": "a"}, "a", True):
        with pytest.raises(RequestError, match="structured_outputs is"):
            SamplingParams(structured_outputs=wrong)  # type: ignore
    assert SamplingParams(structured_outputs=StructuredOutputsParams(regex="a")).n == 1


def test_a_mask_has_a_bit_for_every_token_in_whole_words() -> None:
    assert [mask_bytes(size) for size in (1, 64, 65, 49152, 151936)] == [8, 8, 16, 6144, 18992]
