from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from roofline.doors.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from roofline.server.answers import ChatAnswers, CompletionAnswers, Response
from roofline.server.openai import StreamOptions
from roofline.tokenizer import Tokenizer
from tests.tiny_model import END, write_tiny_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(write_tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def ids(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    """A token for each byte."""
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


def output(prompt: list[int], *texts: str) -> RequestOutput:
    outputs = [CompletionOutput(index, text) for index, text in enumerate(texts)]
    return RequestOutput("0", None, prompt, outputs, RequestMetrics(0.0), num_cached_tokens=1)


def built(response: Response) -> dict[str, Any]:
    return msgspec.json.decode(msgspec.json.encode(response))


def scored(*tokens: int, other: int = 0) -> list[dict[int, Logprob]]:
    """Each token at rank 2, with a likelier one beside it."""
    return [{t: Logprob(-2.0, 2, None), other: Logprob(-1.0, 1, None)} for t in tokens]


def test_a_chat_is_whole(tokenizer: Tokenizer) -> None:
    grown = output([1, 2, 3], "One", "Two")
    for own, reason in zip(grown.outputs, ("stop", "length"), strict=True):
        own.token_ids, own.finish_reason = [5, 6], reason
    response = built(ChatAnswers("m", tokenizer, None, 0).whole([grown]))
    assert response["id"].startswith("chatcmpl-") and response["object"] == "chat.completion"
    message = {"role": "assistant", "content": "Two", "refusal": None}
    assert response["choices"][1] == {
        "index": 1,
        "message": message,
        "logprobs": None,
        "finish_reason": "length",
    }
    assert response["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 1},
    }


def test_a_stream_is_role_pieces_and_one_end_for_each_choice(tokenizer: Tokenizer) -> None:
    answers = ChatAnswers("m", tokenizer, None, 0)
    grown = output([1], "", "")
    chunks = [*answers.chunks(0, grown)]
    grown.outputs[0].text = "He"
    chunks += answers.chunks(0, grown)
    grown.outputs[0].text, grown.outputs[1].text = "Hello", "B"
    grown.outputs[1].finish_reason = "stop"
    chunks += answers.chunks(0, grown)
    chunks += answers.chunks(0, grown)  # nothing new
    grown.outputs[0].finish_reason = "length"
    chunks += answers.chunks(0, grown)
    chunks += answers.chunks(0, grown)  # over
    choices = [choice for chunk in chunks for choice in built(chunk)["choices"]]
    assert [(c["index"], c["delta"], c["finish_reason"]) for c in choices] == [
        (0, {"role": "assistant", "content": ""}, None),
        (1, {"role": "assistant", "content": ""}, None),
        (0, {"content": "He"}, None),
        (0, {"content": "llo"}, None),
        (1, {"content": "B"}, "stop"),
        (0, {}, "length"),
    ]
    assert all("usage" not in built(chunk) for chunk in chunks)
    assert [*answers.closing()] == []


def test_usage_is_told_when_asked_for(tokenizer: Tokenizer) -> None:
    grown = output([1, 2], "a")
    grown.outputs[0].token_ids = [5]
    for continuous in (False, True):
        options = StreamOptions(include_usage=True, continuous_usage_stats=continuous)
        answers = ChatAnswers("m", tokenizer, options, 0)
        told = [built(chunk)["usage"] for chunk in answers.chunks(0, grown)]
        (last,) = map(built, answers.closing())
        assert last["choices"] == [] and last["usage"]["total_tokens"] == 3
        assert told == ([last["usage"]] * 2 if continuous else [None] * 2)


def test_bytes_are_true_where_a_token_is_half_a_character(
    tokenizer: Tokenizer, ids: Callable[[str], list[int]]
) -> None:
    grown = output([1], "€")
    own = grown.outputs[0]
    own.token_ids = ids("€")
    own.logprobs = [*scored(*own.token_ids, other=ids("x")[0])]
    (choice,) = built(ChatAnswers("m", tokenizer, None, 1).whole([grown]))["choices"]
    content = choice["logprobs"]["content"]
    assert bytes(byte for token in content for byte in token["bytes"]).decode() == "€"
    assert [token["token"] for token in content] == ["\ufffd"] * 3
    best = {"token": "x", "logprob": -1.0, "bytes": [120]}
    assert [token["top_logprobs"] for token in content] == [[best]] * 3
    (choice,) = built(CompletionAnswers("m", tokenizer, None).whole([grown]))["choices"]
    assert choice["logprobs"] == {
        "tokens": ["bytes:\\xe2", "bytes:\\x82", "bytes:\\xac"],
        "token_logprobs": [-2.0] * 3,
        "top_logprobs": [{name: -2.0, "x": -1.0} for name in choice["logprobs"]["tokens"]],
        "text_offset": [0, 1, 1],
    }


def test_an_echo_is_scored_from_its_second_token_on(
    tokenizer: Tokenizer, ids: Callable[[str], list[int]]
) -> None:
    def grown() -> RequestOutput:
        found = output(ids("día"), "s")
        found.prompt_logprobs = [None, *scored(*ids("día")[1:])]
        own = found.outputs[0]
        own.token_ids = [*ids("s"), *tokenizer.encode(END, parse_special=True)]
        own.logprobs, own.finish_reason = [*scored(*own.token_ids)], "stop"
        return found

    def answers(*, alone: bool) -> CompletionAnswers:
        hidden = tokenizer.eos_token_ids
        return CompletionAnswers(
            "m", tokenizer, None, hidden=hidden, echo=["día"], echo_alone=alone
        )

    response = built(answers(alone=False).whole([grown()]))
    (choice,) = response["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("días", "stop")
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["d", "bytes:\\xc3", "bytes:\\xad", "a", "s", END]
    assert logprobs["token_logprobs"] == [None] + [-2.0] * 5
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["text_offset"] == [0, 1, 2, 2, 3, 4]
    assert response["usage"]["completion_tokens"] == 2

    response = built(answers(alone=True).whole([grown()]))
    (choice,) = response["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("día", "length")
    assert len(choice["logprobs"]["tokens"]) == len(choice["logprobs"]["text_offset"]) == 4
    assert response["usage"]["completion_tokens"] == 0


def test_pieces_of_a_continuation_join_to_the_whole(
    tokenizer: Tokenizer, ids: Callable[[str], list[int]]
) -> None:
    text, grown = "Grüße", output([1, 2], "")
    own = grown.outputs[0]
    own.logprobs, grown.prompt_logprobs = scored(), [None, *scored(2)]
    answers = CompletionAnswers("m", tokenizer, None, echo=["ab"])
    chunks = [*answers.chunks(0, grown)]
    for token in ids(text):
        own.token_ids.append(token)
        own.text = tokenizer.decode(own.token_ids).rstrip("\ufffd")
        own.logprobs += scored(token)
        chunks += answers.chunks(0, grown)
    own.finish_reason = "length"
    chunks += answers.chunks(0, grown)
    pieces = [built(chunk)["choices"][0] for chunk in chunks]
    (whole,) = built(CompletionAnswers("m", tokenizer, None, echo=["ab"]).whole([grown]))["choices"]
    assert "".join(piece["text"] for piece in pieces) == whole["text"] == "ab" + text
    for name, values in whole["logprobs"].items():
        assert [value for piece in pieces for value in piece["logprobs"][name]] == values, name
    assert [piece["finish_reason"] for piece in pieces[:-1]] == [None] * (len(pieces) - 1)


def test_choices_of_several_prompts_are_counted_through(tokenizer: Tokenizer) -> None:
    outputs = [output([1], "a", "b"), output([1, 2], "c", "d")]
    response = built(CompletionAnswers("m", tokenizer, None).whole(outputs))
    assert [(c["index"], c["text"]) for c in response["choices"]] == [*enumerate("abcd")]
    assert response["usage"]["prompt_tokens"] == 3
