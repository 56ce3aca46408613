from typing import Any

import pytest

from roofline.errors import RequestError
from roofline.request import SamplingParams
from roofline.server import openai
from roofline.server.openai import ChatRequest, CompletionRequest

USER: dict[str, Any] = {"role": "user", "content": "Hello"}
DEFAULTS = SamplingParams()


def chat(**fields: Any) -> ChatRequest:
    return ChatRequest.from_body({"messages": [USER], **fields})


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.from_body({"prompt": "Hello", **fields})


def refusal(**fields: Any) -> RequestError:
    with pytest.raises(RequestError) as refused:
        chat(**fields).to_params(DEFAULTS)
    return refused.value


SAMPLING = {
    "n": 2,
    "temperature": 0.5,
    "top_k": 3,
    "top_p": 0.9,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "allowed_token_ids": [1, 2],
    "bad_words": ["no"],
    "seed": 7,
    "stop": ["END"],
    "stop_token_ids": [3],
    "ignore_eos": True,
    "min_tokens": 1,
    "max_tokens": 9,
    "skip_special_tokens": False,
    "include_stop_str_in_output": True,
}


def test_every_sampling_field_has_its_own_name() -> None:
    asked = SamplingParams(**SAMPLING)
    assert chat(**SAMPLING).to_params(DEFAULTS) == asked
    assert completion(**SAMPLING).to_params(DEFAULTS) == asked
    assert set(SAMPLING) == openai._SAMPLING - {"logit_bias"}  # a map, below


def test_what_is_not_given_is_the_models_own() -> None:
    defaults = SamplingParams(temperature=0.6, top_p=0.9, top_k=20, max_tokens=77)
    assert chat().to_params(defaults) == defaults
    assert completion(top_k=5).to_params(defaults).top_p == 0.9
    assert chat(temperature=0).to_params(defaults).temperature == 0


def test_logit_bias_has_ids_for_keys() -> None:
    assert chat(logit_bias={"5": -100, "07": 1.5}).to_params(DEFAULTS).logit_bias == {
        5: -100.0,
        7: 1.5,
    }
    for key in ("abc", "-1", "1.0", "٣", " 1", "9" * 30, ""):
        assert "logit_bias" in refusal(logit_bias={key: 1}).message


def test_an_answer_may_take_the_context_and_a_continuation_sixteen_tokens() -> None:
    assert chat().to_params(DEFAULTS).max_tokens is None
    assert chat(max_tokens=5).to_params(DEFAULTS).max_tokens == 5
    both = chat(max_tokens=5, max_completion_tokens=6)
    assert (both.to_params(DEFAULTS).max_tokens, both.max_tokens) == (6, 6)
    assert completion().to_params(DEFAULTS).max_tokens == 16
    assert completion().to_params(SamplingParams(max_tokens=9)).max_tokens == 9


def test_logprobs_of_both_kinds() -> None:
    assert chat().to_params(DEFAULTS).logprobs is None
    assert chat(logprobs=True).to_params(DEFAULTS).logprobs == 0
    assert chat(logprobs=True, top_logprobs=5).to_params(DEFAULTS).logprobs == 5
    assert completion(logprobs=3).to_params(DEFAULTS).logprobs == 3
    scored = completion(logprobs=1, echo=True, max_tokens=0)
    assert scored.echoes_alone and scored.max_tokens == 0
    params = scored.to_params(DEFAULTS)
    assert (params.logprobs, params.prompt_logprobs, params.max_tokens) == (1, 1, 1)
    with pytest.raises(RequestError, match="max_tokens is 0"):
        completion(max_tokens=0).to_params(DEFAULTS)


def test_null_says_nothing() -> None:
    names = [*SAMPLING, *openai._UNSUPPORTED, *openai._NO_EFFECT, "model", "stream", "logprobs"]
    assert chat(**dict.fromkeys(names)) == chat()
    with pytest.raises(RequestError, match="messages is missing"):
        ChatRequest.from_body({"messages": None})
    with pytest.raises(RequestError, match="prompt is missing"):
        CompletionRequest.from_body({"prompt": None})


@pytest.mark.parametrize("name", sorted(openai._UNSUPPORTED))
def test_what_is_not_supported_is_refused_by_name_and_what_asks_for_nothing_is_not(
    name: str,
) -> None:
    error = refusal(**{name: {"a": 1}})
    assert error.param == name and f"{name} is not supported" in error.message
    assert chat(**{name: openai._UNSUPPORTED[name]}) == chat()


@pytest.mark.parametrize("name", sorted(openai._NO_EFFECT))
def test_what_changes_no_answer_is_accepted(name: str) -> None:
    assert chat(**{name: "x" * 1000}) == chat()


def test_an_unknown_field_is_refused_with_the_nearest() -> None:
    assert refusal(temprature=1).message == "unknown field 'temprature'; did you mean temperature?"
    assert refusal(temprature=1).param == "temprature"
    assert "known: " in refusal(zzz=1).message
    assert "unknown field 'sampling'" in refusal(sampling={"n": 2}).message
    assert "unknown field 'prompt'" in refusal(prompt="x").message
    long = refusal(**{"x" * 10_000: 1})
    assert len(long.message) < 1000 and len(long.param or "") <= 200


WRONG: list[Any] = [float("nan"), "1", True, [], {}, -1, 2**80, 1e300]
ACCEPTED: dict[str, list[Any]] = {
    "stream": [True],
    "logprobs": [True],
    "ignore_eos": [True],
    "skip_special_tokens": [True],
    "include_stop_str_in_output": [True],
    "stop": ["1", []],
    "bad_words": [[]],
    "stop_token_ids": [[]],
    "chat_template_kwargs": [{}],
    "logit_bias": [{}],
    "model": ["1"],
    "presence_penalty": [-1],
    "frequency_penalty": [-1],
    "priority": [-1, 2**80],  # bounded where a request is made
    "top_k": [-1],
}
FIELDS = [*SAMPLING, "logit_bias", "stream", "logprobs", "top_logprobs", "max_completion_tokens"]
FIELDS += ["model", "priority", "stream_options", "chat_template_kwargs", "messages"]
FIELDS += ["add_generation_prompt", "continue_final_message"]


@pytest.mark.parametrize("name", FIELDS)
def test_each_field_refuses_what_it_cannot_mean_and_says_its_name(name: str) -> None:
    flags = ("add_generation_prompt", "continue_final_message")
    right = [True] if name in flags else ACCEPTED.get(name, [])
    for value in WRONG:
        if any(type(value) is type(good) and value == good for good in right):
            chat(**{name: value}).to_params(DEFAULTS)
        elif name == "stream_options" and value == {}:
            assert "stream_options needs stream" in refusal(stream_options={}).message
        else:
            error = refusal(**{name: value})
            assert name in error.message, (value, error)
            assert (error.param or "").startswith(name), (value, error.param)


BOUNDS: dict[str, tuple[float, float]] = {
    "n": (1, 128),
    "temperature": (0, 100),
    "top_p": (1e-9, 1),
    "min_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "seed": (0, 2**64 - 1),
    "max_tokens": (1, 2**31 - 1),
    "max_completion_tokens": (1, 2**31 - 1),
    "top_logprobs": (0, 20),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_bounds_are_where_they_are_said_to_be(name: str) -> None:
    low, high = BOUNDS[name]
    for value in (low, high):
        chat(logprobs=True, **{name: value}).to_params(DEFAULTS)
    for value in (low - 1, high + 1):
        assert refusal(logprobs=True, **{name: value}).param in (name, "max_tokens")


def test_contradictions_are_refused() -> None:
    assert refusal(top_logprobs=1).param == "top_logprobs"
    assert refusal(stream_options={"include_usage": True}).param == "stream_options"
    assert refusal(min_tokens=5, max_tokens=2).param == "min_tokens"
    with pytest.raises(RequestError, match="best_of"):
        completion(best_of=2)
    assert completion(best_of=2, n=2).best_of == 2


def test_stream_options_are_known_by_name() -> None:
    options = chat(stream=True, stream_options={"include_usage": True}).stream_options
    assert options is not None and options.include_usage and not options.continuous_usage_stats
    assert refusal(stream=True, stream_options={"usage": True}).param == "stream_options"


def messages(*given: dict[str, Any]) -> list[dict[str, Any]]:
    return chat(messages=list(given)).to_messages()


def test_messages_are_roles_and_text() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert messages(
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts, "name": "ann"},
        {"role": "assistant", "content": "", "refusal": None, "tool_calls": [], "audio": None},
    ) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": parts, "name": "ann"},
        {"role": "assistant", "content": ""},
    ]


@pytest.mark.parametrize(
    ("message", "where"),
    [
        ({"content": "x"}, "messages[1].role is missing"),
        ({"role": "user"}, "messages[1].content is missing"),
        ({"role": "user", "content": None}, "messages[1].content"),
        ({"role": "user", "content": 5}, "messages[1].content"),
        ({"role": "tool", "content": "x"}, "messages[1].role is 'tool'"),
        ({"role": "tool", "content": "x", "tool_call_id": "1"}, "messages[1].role is 'tool'"),
        ({"role": "user", "content": "x", "tool_call_id": "1"}, "messages[1].tool_call_id"),
        ({"role": "x" * 9999, "content": "x"}, "messages[1].role"),
        ({"role": 1, "content": "x"}, "messages[1].role"),
        ({"role": "user", "content": "x", "name": "a\nb"}, "messages[1].name"),
        ({"role": "user", "content": "x", "nmae": "a"}, "messages[1]: object contains unknown"),
        ({"role": "assistant", "content": "x", "tool_calls": [{}]}, "messages[1].tool_calls"),
        ({"role": "assistant", "content": "x", "audio": {}}, "messages[1].audio"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages[1].content[0].type"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[1].content[0].text"),
        ({"role": "user", "content": [{"text": "x"}]}, "messages[1].content[0].type"),
        ({"role": "user", "content": ["x"]}, "messages[1].content[0]"),
        ("x", "messages[1]"),
    ],
)
def test_a_message_that_is_none_is_refused_by_its_place(message: Any, where: str) -> None:
    with pytest.raises(RequestError) as refused:
        messages(USER, message)
    assert refused.value.message.startswith(where) and len(refused.value.message) < 300
    assert (refused.value.param or "").startswith("messages[1]")


def test_there_are_messages_and_not_too_many() -> None:
    assert refusal(messages=[]).param == "messages"
    assert refusal(messages=[USER] * (openai.MAX_MESSAGES + 1)).param == "messages"


def test_a_template_gets_its_options_and_scalars_of_its_own() -> None:
    asked = chat(chat_template_kwargs={"enable_thinking": False, "date_string": "1 May"})
    assert asked.to_template_options() == {
        "add_generation_prompt": None,
        "continue_final_message": False,
        "enable_thinking": False,
        "date_string": "1 May",
    }
    for name, value in (("messages", 1), ("tools", "x"), ("enable_thinking", [1])):
        assert "chat_template_kwargs" in refusal(chat_template_kwargs={name: value}).message


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        ([[]], [[]]),
    ],
)
def test_prompts_are_text_or_ids_one_or_many(prompt: Any, prompts: Any) -> None:
    assert completion(prompt=prompt).to_prompts() == prompts


@pytest.mark.parametrize(
    "prompt", [1, {}, [], [1, "a"], [[1], 2], [["a"]], [[[1]]], [1.5], [True], ["a"] * 1025, [None]]
)
def test_other_prompts_are_refused(prompt: Any) -> None:
    with pytest.raises(RequestError, match="prompt"):
        completion(prompt=prompt).to_prompts()
