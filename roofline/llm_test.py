"""The Python door: what it accepts, what it returns, and what it refuses."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from roofline import LLM, SamplingParams
from roofline.errors import CapacityError, RequestError, UnsupportedError, UsageError
from roofline.execution.runner import ModelRunner
from roofline.request import child_seed
from tests.tiny_model import CONTEXT, write_tiny_model

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), dtype="float32", max_num_seqs=8) as loaded:
        yield loaded


def sampled(**options: Any) -> SamplingParams:
    """A seeded request of twelve tokens."""
    defaults: dict[str, Any] = {"seed": 5, "max_tokens": 12, "ignore_eos": True}
    return SamplingParams(**(defaults | options))


def test_text_ids_and_objects_are_the_same_prompt(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode("hello")
    forms: list[Any] = ["hello", ids, {"prompt": "hello"}, {"prompt_token_ids": ids}]
    answers = llm.generate(forms, GREEDY)
    assert len({tuple(answer.outputs[0].token_ids) for answer in answers}) == 1
    assert [answer.prompt for answer in answers] == ["hello", None, "hello", None]
    assert [answer.prompt_token_ids for answer in answers] == [ids] * 4
    assert llm.generate("hello", GREEDY)[0].outputs == answers[0].outputs
    assert llm.generate(ids, GREEDY)[0].outputs == answers[0].outputs


def test_answers_come_in_the_order_of_prompts_whatever_their_length(llm: LLM) -> None:
    prompts = [f"{i}" * (1 + 7 * i % 5) for i in range(20)]
    params = [sampled(max_tokens=1 + 5 * i % 9) for i in range(20)]
    answers = llm.generate(prompts, params)
    assert [answer.prompt for answer in answers] == prompts
    assert [len(a.outputs[0].token_ids) for a in answers] == [p.max_tokens for p in params]
    assert all(answer.finished for answer in answers)
    assert {answer.outputs[0].finish_reason for answer in answers} == {"length"}


def test_text_is_the_decoded_tokens(llm: LLM) -> None:
    answer = llm.generate("abc", sampled(max_tokens=60))[0].outputs[0]
    decoded = llm.get_tokenizer().decode(answer.token_ids)
    assert answer.text == decoded.rstrip("\ufffd") or decoded.startswith(answer.text)


def test_streamed_text_grows_to_the_generated_one(llm: LLM) -> None:
    expected = llm.generate("abc", sampled())[0].outputs[0]
    texts: list[str] = []
    lengths: list[int] = []
    for output in llm.generate("abc", sampled(), stream=True):
        texts.append(output.outputs[0].text)
        lengths.append(len(output.outputs[0].token_ids))
    assert texts[-1] == expected.text and lengths == list(range(1, 13))
    assert all(after.startswith(before) for before, after in itertools.pairwise(texts))


@pytest.mark.parametrize("options", [{"prompts": ["a", "b"]}, {"prompts": []}, {"use_tqdm": True}])
def test_a_stream_is_of_one_prompt_and_without_a_bar(llm: LLM, options: dict[str, Any]) -> None:
    whole: dict[str, Any] = {"prompts": "a", "stream": True} | options
    with pytest.raises(RequestError, match="stream=True takes one prompt and no progress bar"):
        llm.generate(**whole)


def test_a_bar_shows_prompts_and_rates_where_asked_for(
    llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    llm.generate(["a", "b"], GREEDY)
    assert capsys.readouterr() == ("", "")
    llm.generate(["a", "b"], sampled(n=2), use_tqdm=True)
    shown = capsys.readouterr()
    assert shown.out == "" and "2/2" in shown.err and "output:" in shown.err


HELLO = [{"role": "user", "content": "hello"}]
WEATHER = [{"role": "user", "content": "rain?"}, {"role": "assistant", "content": "No."}]


def test_a_chat_is_its_template_s_prompt(llm: LLM) -> None:
    ids = llm.get_tokenizer().apply_chat_template(HELLO)
    (answer,) = llm.chat(HELLO, GREEDY)
    assert answer.prompt_token_ids == ids
    assert answer.outputs == llm.generate([ids], GREEDY)[0].outputs
    *_, streamed = llm.chat(HELLO, GREEDY, stream=True)
    assert streamed.outputs == answer.outputs


def test_conversations_are_answered_in_their_order(llm: LLM) -> None:
    answers = llm.chat([HELLO, WEATHER], [GREEDY, sampled()], use_tqdm=True)
    assert answers[0].outputs == llm.chat(HELLO, GREEDY)[0].outputs
    assert answers[1].outputs == llm.chat(WEATHER, sampled())[0].outputs
    with pytest.raises(RequestError, match="stream=True takes one prompt"):
        llm.chat([HELLO, WEATHER], GREEDY, stream=True)


def test_without_a_generation_prompt_the_conversation_ends_where_it_ends(llm: LLM) -> None:
    ids = llm.get_tokenizer().apply_chat_template(HELLO, add_generation_prompt=False)
    answer = llm.chat(HELLO, GREEDY, add_generation_prompt=False)[0]
    assert answer.prompt_token_ids == ids != llm.chat(HELLO, GREEDY)[0].prompt_token_ids


def test_a_final_message_can_be_gone_on_with(llm: LLM) -> None:
    opened = llm.chat(WEATHER, GREEDY, continue_final_message=True)[0]
    text = llm.get_tokenizer().decode(opened.prompt_token_ids, skip_special_tokens=False)
    assert text.endswith("<|im_start|>assistant\nNo.")


CHAT_REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "no message": ({"messages": []}, "messages"),
    "text for messages": ({"messages": "hello"}, "messages must be a list"),
    "a message without a role": ({"messages": [{"content": "x"}]}, "role"),
    "a conversation that is none": ({"messages": [HELLO, 5]}, "messages"),
    "an unknown option": ({"chat_template_args": {}}, "known: add_generation_prompt"),
    "a new and a continued answer": (
        {"add_generation_prompt": True, "continue_final_message": True},
        "only one of them",
    ),
    "variables that are no mapping": ({"chat_template_kwargs": "x"}, "chat_template_kwargs is 'x'"),
    "a variable that has an option": ({"chat_template_kwargs": {"tools": []}}, "has tools"),
    "a variable of no use": ({"chat_template_kwargs": {"thinking": True}}, "no use for 'thinking'"),
    "a message that is no JSON": ({"messages": [HELLO[0] | {"extra": {1}}]}, "extra is set"),
}


@pytest.mark.parametrize(("asked", "named"), CHAT_REFUSALS.values(), ids=CHAT_REFUSALS.keys())
def test_a_bad_chat_is_refused_by_name(llm: LLM, asked: dict[str, Any], named: str) -> None:
    whole: dict[str, Any] = {"messages": HELLO, "sampling_params": GREEDY} | asked
    with pytest.raises(RequestError) as refusal:
        llm.chat(**whole)
    assert named in refusal.value.message and "\n" not in refusal.value.message


def test_a_stop_string_across_tokens_ends_the_answer_before_it(llm: LLM) -> None:
    whole = _ascii_answer(llm)
    stop = whole[4:7]  # the vocabulary is bytes: three tokens
    answer = llm.generate("abc", _ascii(stop=stop))[0].outputs[0]
    assert answer.text == whole[: whole.index(stop)]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
    kept = llm.generate("abc", _ascii(stop=[stop], include_stop_str_in_output=True))[0].outputs[0]
    assert kept.text == answer.text + stop


def test_streaming_never_shows_the_start_of_a_stop_string(llm: LLM) -> None:
    stop = _ascii_answer(llm)[4:7]
    shown = [
        output.outputs[0].text for output in llm.generate("abc", _ascii(stop=stop), stream=True)
    ]
    assert shown[-1] == _ascii_answer(llm)[: _ascii_answer(llm).index(stop)]
    assert all(shown[-1].startswith(text) for text in shown)


def test_stop_strings_wait_for_min_tokens(llm: LLM) -> None:
    first = _ascii_answer(llm)[0]
    answer = llm.generate("abc", _ascii(stop=first, min_tokens=6))[0].outputs[0]
    assert len(answer.token_ids) > 6


def test_a_stop_token_ends_the_answer_and_its_text_is_dropped(llm: LLM) -> None:
    whole = llm.generate("abc", _ascii())[0].outputs[0]
    stop = whole.token_ids[5]
    answer = llm.generate("abc", _ascii(stop_token_ids=[stop]))[0].outputs[0]
    end = whole.token_ids.index(stop)
    assert answer.token_ids == whole.token_ids[: end + 1]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
    assert answer.text == whole.text[:end]


def _ascii(**options: Any) -> SamplingParams:
    """Only printable letters, one token each, so that text can be counted."""
    letters = list(range(33, 91))
    return sampled(**({"allowed_token_ids": letters, "max_tokens": 24} | options))


def _ascii_answer(llm: LLM) -> str:
    return llm.generate("abc", _ascii())[0].outputs[0].text


def test_n_answers_differ_and_each_is_its_own_seed_s(llm: LLM) -> None:
    several = llm.generate("abc", sampled(n=3))[0]
    assert [output.index for output in several.outputs] == [0, 1, 2]
    assert len({tuple(output.token_ids) for output in several.outputs}) == 3
    for index, output in enumerate(several.outputs):
        alone = llm.generate("abc", sampled(seed=child_seed(5, index)))[0].outputs[0]
        assert alone.token_ids == output.token_ids


def test_requests_without_a_seed_differ_and_repeat_with_the_engine_s(folder: Path) -> None:
    params = SamplingParams(max_tokens=12)
    runs = []
    for _ in range(2):
        with LLM(str(folder), seed=3) as llm:
            runs.append([a.outputs[0].token_ids for a in llm.generate(["abc", "abc"], params)])
    assert runs[0] == runs[1] and runs[0][0] != runs[0][1]


def test_logprobs_have_the_sampled_token_and_the_likeliest(llm: LLM) -> None:
    answer = llm.generate("abc", sampled(logprobs=3, prompt_logprobs=2))[0]
    output = answer.outputs[0]
    assert output.logprobs is not None and answer.prompt_logprobs is not None
    for token, entry in zip(output.token_ids, output.logprobs, strict=True):
        assert next(iter(entry)) == token and 3 <= len(entry) <= 4
        ranks = sorted(e.rank for e in entry.values())
        assert ranks[:3] == [1, 2, 3]
    total = sum(e[t].logprob for t, e in zip(output.token_ids, output.logprobs, strict=True))
    assert output.cumulative_logprob is not None
    assert math.isclose(output.cumulative_logprob, total, rel_tol=1e-6)
    assert answer.prompt_logprobs[0] is None
    scored = zip(answer.prompt_token_ids[1:], answer.prompt_logprobs[1:], strict=True)
    assert all(entry is not None and token in entry for token, entry in scored)


def test_bad_words_never_appear(llm: LLM) -> None:
    whole = _ascii_answer(llm)
    banned = [whole[:2], whole[3]]
    answer = llm.generate("abc", _ascii(bad_words=banned))[0].outputs[0].text
    assert all(word not in answer for word in banned) and answer != whole


def test_an_abandoned_stream_leaves_no_block_behind(llm: LLM) -> None:
    stream = llm.generate("abc", sampled(), stream=True)
    next(stream)
    assert llm.stats()["num_used_blocks"] > 0
    del stream
    assert llm.stats()["num_used_blocks"] == 0 and llm.stats()["num_running"] == 0


def test_two_streams_taken_in_turn_do_not_mix(llm: LLM) -> None:
    prompts = ("abc", "xyz!")
    expected = [llm.generate(p, sampled())[0].outputs[0].text for p in prompts]
    streams = [llm.generate(p, sampled(), stream=True) for p in prompts]
    last = ["", ""]
    for outputs in itertools.zip_longest(*streams):  # either's step may serve both
        for i, output in enumerate(outputs):
            last[i] = output.outputs[0].text if output else last[i]
    assert last == expected


def test_priorities_decide_who_goes_first(folder: Path) -> None:
    with LLM(str(folder), max_num_seqs=1) as llm:
        late, early = llm.generate(["abc", "xyz"], GREEDY, priority=[1, 0])
    assert early.metrics.last_token_time is not None and late.metrics.first_token_time is not None
    assert early.metrics.last_token_time < late.metrics.first_token_time


PROMPT_REFUSALS: dict[str, tuple[Any, str]] = {
    "empty ids": ([[]], "empty"),
    "empty text": ("", "empty"),
    "an id out of range": ([1, 2, 100_000], "100000"),
    "a negative id": ([1, -2], "-2"),
    "an id that is no integer": ([[1, 2.5]], "2.5"),
    "a boolean id": ([[True, 1]], "True"),
    "longer than the context": ([7] * CONTEXT, str(CONTEXT)),
    "an unknown key": ({"text": "abc"}, "prompt_token_ids"),
    "a number": (5, "prompts"),
    "half a surrogate pair": ("\ud800", "surrogate"),
    "a number among prompts": (["abc", 5], "a prompt is 5"),
    "nothing among prompts": ([None], "a prompt is None"),
    "an object of a number": ({"prompt": 5}, "a prompt is 5"),
    "ids that are a number": ({"prompt_token_ids": 5}, "a prompt is 5"),
}


@pytest.mark.parametrize(("prompt", "named"), PROMPT_REFUSALS.values(), ids=PROMPT_REFUSALS.keys())
def test_a_bad_prompt_is_refused_and_the_next_is_right(llm: LLM, prompt: Any, named: str) -> None:
    expected = llm.generate("abc", GREEDY)[0].outputs
    with pytest.raises(RequestError) as refusal:
        llm.generate(prompt, GREEDY)
    assert named in refusal.value.message and "\n" not in refusal.value.message
    assert llm.stats()["num_used_blocks"] == 0
    assert llm.generate("abc", GREEDY)[0].outputs == expected


def test_one_bad_prompt_among_good_ones_runs_none(llm: LLM) -> None:
    steps = llm.stats()["num_steps"]
    with pytest.raises(RequestError, match="max_model_len"):
        llm.generate(["abc", [7] * 1000], GREEDY)
    assert llm.stats()["num_steps"] == steps and llm.stats()["num_waiting"] == 0


PARAMETER_REFUSALS: dict[str, dict[str, Any]] = {
    "a token id beyond the vocabulary": {"stop_token_ids": [100_000]},
    "a bias beyond the vocabulary": {"logit_bias": {100_000: 1.0}},
}


@pytest.mark.parametrize("options", PARAMETER_REFUSALS.values(), ids=PARAMETER_REFUSALS.keys())
def test_parameters_are_held_against_the_vocabulary(llm: LLM, options: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="100000"):
        llm.generate("abc", sampled(**options))


def test_lists_of_parameters_must_match_the_prompts(llm: LLM) -> None:
    with pytest.raises(RequestError, match="sampling_params"):
        llm.generate(["abc", "xyz"], [GREEDY])
    with pytest.raises(RequestError, match="priority"):
        llm.generate(["abc", "xyz"], GREEDY, priority=[1])
    wrong: list[Any] = ["x", [None], []]
    for params in wrong:
        with pytest.raises(RequestError, match="sampling_params"):
            llm.generate("abc", params)


def test_a_blank_bad_word_is_named(llm: LLM) -> None:
    with pytest.raises(RequestError, match="bad_words has ' '"):
        llm.generate("abc", sampled(bad_words=["x", " "]))


def test_an_interrupted_step_ends_what_ran_and_harms_nothing_after(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = "a prompt of some blocks, so that a prefix could be found in the cache"
    with LLM(str(folder), dtype="float32") as llm:
        expected = llm.generate(prompt, GREEDY)[0].outputs
    with LLM(str(folder), dtype="float32") as llm:
        waiting = llm.generate(prompt, GREEDY, stream=True)
        next(waiting)
        with monkeypatch.context() as patch:
            patch.setattr(ModelRunner, "run", _interrupt)
            with pytest.raises(KeyboardInterrupt):
                llm.generate(prompt, GREEDY)
        assert [output.outputs[0].finish_reason for output in waiting] == ["abort"]
        answer = llm.generate(prompt, GREEDY)[0]
        assert answer.num_cached_tokens == 0 and answer.outputs == expected


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_unknown_and_unsupported_options_are_refused_by_name(folder: Path) -> None:
    with pytest.raises(UsageError, match="max_model_len"):
        LLM(str(folder), max_model_length=5)
    with pytest.raises(UnsupportedError, match="tensor_parallel_size"):
        LLM(str(folder), tensor_parallel_size=2)


def test_a_context_that_does_not_fit_is_refused_with_one_that_does(folder: Path) -> None:
    with pytest.raises(CapacityError) as refusal:
        LLM(str(folder), max_model_len=256, kv_cache_memory_bytes=10_000)
    largest = int(refusal.value.message.split("--max-model-len ")[1].split()[0])
    with LLM(str(folder), max_model_len=largest, kv_cache_memory_bytes=10_000) as llm:
        assert llm.max_model_len == largest


def test_a_prompt_may_fill_the_context_but_for_one_token(llm: LLM) -> None:
    answer = llm.generate([[7] * (CONTEXT - 1)], dataclasses.replace(GREEDY, max_tokens=5))[0]
    assert len(answer.outputs[0].token_ids) == 1
    assert answer.outputs[0].finish_reason == "length"


def test_a_shape_without_a_tokenizer_takes_ids_only() -> None:
    with LLM("llama-110m", load_format="dummy", max_model_len=64, max_num_seqs=1) as llm:
        answer = llm.generate([[1, 2, 3]], dataclasses.replace(GREEDY, max_tokens=2))[0]
        assert len(answer.outputs[0].token_ids) == 2 and answer.outputs[0].text == ""
        with pytest.raises(RequestError, match="token ids"):
            llm.generate("text", GREEDY)
        with pytest.raises(RequestError, match="tokenizer"):
            llm.generate([[1]], SamplingParams(stop="x"))
