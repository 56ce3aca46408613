"""Where an answer with a grammar ends, and what chooses within it: on random weights over bytes.

Whatever is in order in such a text, the grammar has made so; no file of a model is needed.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from roofline import LLM, SamplingParams, StructuredOutputsParams
from roofline.errors import RequestError
from tests.tiny_model import END, write_tiny_model

WORDS = r"([a-z]{2,5} ){3}[a-z]{2,5}\."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    """Random weights over a vocabulary of bytes: whatever is in order, the grammar has made so."""
    with LLM(str(folder), dtype="float32", max_num_seqs=8) as loaded:
        yield loaded


Options = dict[str, Any]


def params(options: Options | None = None, **asked: Any) -> SamplingParams:
    chosen: Options = {"seed": 3, "max_tokens": 100, **(options or {})}
    return SamplingParams(structured_outputs=StructuredOutputsParams(**asked), **chosen)


def answer(llm: LLM, asked: SamplingParams, prompt: str = "x") -> tuple[str, str | None]:
    output = llm.generate(prompt, asked)[0].outputs[0]
    return output.text, output.finish_reason


def test_a_complete_text_ends_at_its_last_token_which_is_text(llm: LLM) -> None:
    cases: list[Options] = [{}, {"ignore_eos": True}, {"min_tokens": 50}, {"max_tokens": 3}]
    for options in cases:
        output = llm.generate("x", params(options, regex="abc"))[0].outputs[0]
        assert (output.text, output.finish_reason, output.stop_reason) == ("abc", "stop", None)
        assert len(output.token_ids) == 3


def test_eos_ends_a_text_only_where_it_may_end(llm: LLM) -> None:
    eos = llm.model_config.eos_token_ids[0]
    wants_to_end = {"logit_bias": {eos: 100.0}}
    output = llm.generate("x", params(wants_to_end, regex="(ab)*c?"))[0].outputs[0]
    assert (output.text, output.token_ids) == ("", [eos])
    output = llm.generate("x", params(wants_to_end, regex="(ab)+c?"))[0].outputs[0]
    assert (output.text, output.token_ids[2:]) == ("ab", [eos])
    shown = {**wants_to_end, "include_stop_str_in_output": True, "skip_special_tokens": False}
    assert answer(llm, params(shown, regex="(ab)+c?")) == (f"ab{END}", "stop")


def test_min_tokens_and_ignore_eos_hold_as_far_as_the_grammar_lets_them(llm: LLM) -> None:
    eos = llm.model_config.eos_token_ids[0]
    wants_to_end = {"logit_bias": {eos: 100.0}}
    output = llm.generate("x", params({**wants_to_end, "min_tokens": 7}, regex="(ab)*"))[0]
    assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("abababab", "stop")
    asked = params({**wants_to_end, "ignore_eos": True, "max_tokens": 6}, regex="(ab)*")
    assert answer(llm, asked) == ("ababab", "length")
    asked = params({**wants_to_end, "ignore_eos": True}, regex="(ab){0,3}")
    assert answer(llm, asked) == ("ababab", "stop")


def test_stop_strings_and_stop_tokens_cut_a_text_short(llm: LLM) -> None:
    assert answer(llm, params({"stop": ["cd"]}, regex="abcdef")) == ("ab", "stop")
    stops = {"stop": "cd", "include_stop_str_in_output": True}
    assert answer(llm, params(stops, regex="abcdef")) == ("abcd", "stop")
    (token,) = llm.get_tokenizer().encode("d")
    output = llm.generate("x", params({"stop_token_ids": [token]}, regex="abcdef"))[0].outputs[0]
    assert (output.text, output.stop_reason) == ("abc", token)


def test_penalties_bias_and_bad_words_choose_among_what_may_come(llm: LLM) -> None:
    ids = {letter: llm.get_tokenizer().encode(letter)[0] for letter in "abcz"}
    biased = {"logit_bias": {ids["b"]: 100.0, ids["z"]: 100.0}}
    assert answer(llm, params(biased, regex="[abc]{5}"))[0] == "bbbbb"
    assert "a" not in answer(llm, params({"bad_words": ["a"]}, regex="[ab]{9}"))[0]
    assert answer(llm, params({"bad_words": ["a"]}, regex="[a]{9}"))[0] == "a" * 9
    greedy = {"temperature": 0, "presence_penalty": 2.0, "repetition_penalty": 9.0}
    assert len(set(answer(llm, params(greedy, regex="[abc]{3}"))[0])) > 1
    narrow = {"allowed_token_ids": [ids["a"], ids["b"]], "top_k": 1}
    assert set(answer(llm, params(narrow, regex="[bcz]{5}"))[0]) == {"b"}


def test_a_request_that_nothing_can_answer_ends_alone(llm: LLM) -> None:
    """The text may go on with c only, which is not allowed; nobody can know that beforehand."""
    ids = [llm.get_tokenizer().encode(letter)[0] for letter in "ab"]
    stuck = params({"allowed_token_ids": ids}, regex="abc")
    others = [params(regex=WORDS, options={"seed": seed}) for seed in range(3)]
    alone = [answer(llm, other) for other in others]
    outputs = llm.generate(["x"] * 4, [others[0], stuck, *others[1:]])
    (fails,) = outputs.pop(1).outputs
    assert (fails.finish_reason, fails.text) == ("error", "ab")
    assert "allowed_token_ids leaves no token" in str(fails.stop_reason)
    assert [(o.outputs[0].text, o.outputs[0].finish_reason) for o in outputs] == alone


def test_nothing_runs_when_one_question_is_wrong(llm: LLM) -> None:
    before = llm.stats()["num_requests"]
    questions: list[Options] = [
        {"regex": "(a"},
        {"json": {"type": "foo"}},
        {"grammar": "start: nowhere"},
    ]
    for wrong in questions:
        with pytest.raises(RequestError, match="cannot be enforced"):
            llm.generate(["x", "y"], [params(regex="abc"), params(**wrong)])
    with pytest.raises(RequestError, match="allowed_token_ids leaves no token"):
        llm.generate("x", params({"allowed_token_ids": [0]}, regex="abc"))
    assert llm.stats()["num_requests"] == before
    assert answer(llm, params(regex="abc"))[0] == "abc"


def test_logprobs_are_of_the_raw_logits(llm: LLM) -> None:
    (token,) = llm.get_tokenizer().encode("a")
    masked = llm.generate("x", params({"logprobs": 0}, regex="abc"))[0].outputs[0].logprobs
    free = SamplingParams(max_tokens=1, prompt_logprobs=0)
    raw = llm.generate("xa", free)[0].prompt_logprobs
    assert masked is not None and raw is not None and raw[1] is not None
    assert masked[0][token].logprob == pytest.approx(raw[1][token].logprob, abs=1e-5)
    assert masked[0][token].logprob < -1, "a token the mask forces is not a certain one"
