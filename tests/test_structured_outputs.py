"""Answers that keep to what was asked of them, whole and on the real model.

What a grammar becomes and which are refused is tested beside `roofline/grammars/`.
"""

import asyncio
import itertools
import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from roofline import LLM, AsyncLLM, RequestOutput, SamplingParams, StructuredOutputsParams
from roofline.errors import RequestError
from tests.json_schemas import Schema, schemas

PROMPT = "Here is an example as JSON:\n"
LIST = 'start: item ("," item)* "."\nitem: /[a-z]{2,5}/'
PERSON: Schema = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"enum": [7, 8, 9]}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
Asked = list[tuple[Schema, SamplingParams, RequestOutput]]


@pytest.fixture(scope="module")
def llm(smollm2_path: Path) -> Iterator[LLM]:
    with LLM(str(smollm2_path), max_model_len=512, max_num_seqs=32) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def answered(llm: LLM) -> Asked:
    """200 schemas, each with its answer in one large batch; every other without whitespace."""
    asked = [schema for _, schema in schemas()]
    params = [
        like(json=schema, disable_any_whitespace=index % 2 == 0, seed=index, max_tokens=96)
        for index, schema in enumerate(asked)
    ]
    return list(zip(asked, params, llm.generate([PROMPT] * len(asked), params), strict=True))


def like(
    *, n: int = 1, temperature: float = 0.7, seed: int = 1, max_tokens: int = 64, **asked: Any
) -> SamplingParams:
    """Parameters of an answer that is like what is asked."""
    options = {"stop", "ignore_eos", "min_tokens", "skip_special_tokens"} & asked.keys()
    return SamplingParams(
        n=n,
        temperature=temperature,
        seed=seed,
        max_tokens=max_tokens,
        **{name: asked.pop(name) for name in options},
        structured_outputs=StructuredOutputsParams(**asked),
    )


def answer(llm: LLM, params: SamplingParams, prompt: str = PROMPT) -> tuple[str, str | None]:
    (output,) = llm.generate(prompt, params)[0].outputs
    return output.text, output.finish_reason


@pytest.mark.timeout(900)  # without native kernels the answers take some 280 s on a busy machine
def test_every_finished_answer_to_200_schemas_is_valid(answered: Asked) -> None:
    assert len(answered) == 200
    ends = Counter(output.outputs[0].finish_reason for _, _, output in answered)
    assert set(ends) <= {"stop", "length"}
    assert ends["stop"] >= 100, f"{ends['stop']} of 200 came to an end; usually 160 or more"
    checker = jsonschema.FormatChecker()
    for schema, _, output in answered:
        if output.outputs[0].finish_reason == "stop":
            jsonschema.Draft202012Validator(schema, format_checker=checker).validate(
                json.loads(output.outputs[0].text)
            )


def test_an_answer_alone_is_the_answer_in_a_batch(llm: LLM, answered: Asked) -> None:
    for _, params, output in answered[3::37]:
        alone = llm.generate(PROMPT, params)[0].outputs[0]
        assert alone.token_ids == output.outputs[0].token_ids
        assert alone.finish_reason == output.outputs[0].finish_reason


def test_each_kind_is_kept_to_side_by_side_with_free_text(llm: LLM) -> None:
    params = [
        like(regex=r"\d{4}-\d{2}"),
        like(choice=["Paris", "the city of Paris"]),
        like(grammar=LIST, max_tokens=200, temperature=1.0),
        like(grammar='root ::= "<" [a-c]+ ">"', max_tokens=200),
        like(json_object=True, max_tokens=150),
        SamplingParams(max_tokens=20, seed=1),
        like(json=PERSON),
    ]
    question = [{"role": "user", "content": "What is the capital of France? Answer briefly."}]
    outputs = [each.outputs[0] for each in llm.chat([question] * len(params), params)]
    whole = [r"\d{4}-\d{2}", "(the city of )?Paris", r"[a-z]{2,5}(,[a-z]{2,5})*\.", "<[abc]+>"]
    for pattern, output in zip(whole, outputs, strict=False):
        if output.finish_reason == "stop":
            assert re.fullmatch(pattern, output.text)
    assert [output.finish_reason for output in outputs[:2]] == ["stop", "stop"]
    assert outputs[4].text.startswith("{")
    if outputs[4].finish_reason == "stop":
        assert isinstance(json.loads(outputs[4].text), dict)
    assert outputs[5].token_ids == llm.chat(question, params[5])[0].outputs[0].token_ids
    assert set(json.loads(outputs[6].text)) == {"name", "age"}


def test_all_of_n_answers_are_like_it_and_differ(llm: LLM) -> None:
    outputs = llm.generate(PROMPT, like(n=4, regex="[a-z]{6}[0-9]{6}", temperature=1.5))[0].outputs
    assert all(re.fullmatch("[a-z]{6}[0-9]{6}", output.text) for output in outputs)
    assert len({output.text for output in outputs}) == 4


def test_a_stop_string_ends_the_text_before_the_grammar_does(llm: LLM) -> None:
    (output,) = llm.generate(PROMPT, like(regex="[ab]{4}-[ab]{40}", stop="-"))[0].outputs
    assert (output.finish_reason, output.stop_reason) == ("stop", "-")
    assert re.fullmatch("[ab]{4}", output.text)


def test_preemption_changes_no_answer(smollm2_path: Path, llm: LLM) -> None:
    params = [like(json=PERSON, seed=seed, max_tokens=40) for seed in range(3)]
    params += [like(regex="[a-z0-9]{60}", seed=3)]
    usual = [each.outputs[0].token_ids for each in llm.generate([PROMPT] * 4, params)]
    block_bytes = 30 * 2 * 3 * 16 * 64 * 2
    with LLM(
        str(smollm2_path),
        max_model_len=80,
        max_num_seqs=4,
        kv_cache_memory_bytes=5 * block_bytes,
        enable_prefix_caching=False,
    ) as small:
        answers = small.generate([PROMPT] * 4, params)
        assert small.stats()["num_preemptions"] > 0
    assert [each.outputs[0].token_ids for each in answers] == usual


def test_a_stream_grows_to_the_same_answer(llm: LLM) -> None:
    params = like(json=PERSON)
    texts = [output.outputs[0].text for output in llm.generate(PROMPT, params, stream=True)]
    assert len(set(texts)) > 3
    assert all(later.startswith(text) for text, later in itertools.pairwise(texts))
    assert texts[-1] == answer(llm, params)[0]


def test_eos_is_ignored_until_the_grammar_has_ended(llm: LLM) -> None:
    text, reason = answer(llm, like(regex="(ab)+", ignore_eos=True, max_tokens=30))
    assert reason == "length" and re.fullmatch("(ab)+a?", text)
    assert answer(llm, like(regex="(ab){3}", ignore_eos=True)) == ("ababab", "stop")


def test_min_tokens_hold_as_far_as_the_grammar_has_text(llm: LLM) -> None:
    (output,) = llm.generate(PROMPT, like(regex="[ab]*", min_tokens=12))[0].outputs
    assert len(output.token_ids) > 12 and re.fullmatch("[ab]*", output.text)
    assert answer(llm, like(choice=["yes"], min_tokens=40)) == ("yes", "stop")


def test_no_special_token_comes_inside_a_text(llm: LLM) -> None:
    special = llm.get_tokenizer().special_ids
    params = like(n=16, regex="(?s:.*)", temperature=3.0, skip_special_tokens=False, max_tokens=32)
    for output in llm.generate(PROMPT, params)[0].outputs:
        ended = output.finish_reason == "stop"
        assert not special.intersection(output.token_ids[: -1 if ended else None])
        assert "<|im_end|>" not in output.text


def test_a_grammar_too_hard_to_follow_ends_its_own_request_alone(llm: LLM) -> None:
    hard = like(grammar="start: s\ns: s s s | /[a-z ]/ ", seed=5, max_tokens=300)
    beside = [like(json=PERSON, seed=seed) for seed in range(3)]
    first, *others = llm.generate([PROMPT] * 4, [hard, *beside])
    assert first.outputs[0].finish_reason == "error"
    assert "the structured output cannot go on: " in str(first.outputs[0].stop_reason)
    for params, other in zip(beside, others, strict=True):
        assert answer(llm, params) == (other.outputs[0].text, "stop")


DEEP: Schema = {}
for _ in range(1000):
    DEEP = {"items": DEEP}


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"regex": "a?" * 30_000}, "to compile; make it simpler"),
        ({"grammar": "start: start"}, "no text can match it"),
        ({"json": DEEP}, "nested deeper than 64"),
        ({"json": json.dumps({"description": "x" * (5 << 20)})}, "at most 65536"),
        ({"json": {"$ref": "http://127.0.0.1:9/schema.json"}}, "not present in a registry"),
        ({"json": {"not": {"type": "string"}}}, "not"),
    ],
    ids=["regex that explodes", "grammar without text", "depth 1000", "5 MB", "remote", "not"],
)
def test_what_is_refused_costs_a_line_and_no_other_request(
    llm: LLM, asked: dict[str, Any], reason: str
) -> None:
    before, started = llm.stats()["num_requests"], time.monotonic()
    with pytest.raises(RequestError) as caught:
        llm.generate([PROMPT, PROMPT], [like(json=PERSON), like(**asked)])
    assert time.monotonic() - started < 20, "1.5 s, and what a busy machine adds"
    assert reason in caught.value.message and "\n" not in caught.value.message
    assert llm.stats()["num_requests"] == before
    assert answer(llm, like(regex="[0-9]{3} ok"))[0].endswith(" ok")


def test_streams_side_by_side_are_each_like_their_own(smollm2_path: Path) -> None:
    async def text(llm: AsyncLLM, index: int) -> str:
        stream = llm.generate(PROMPT, like(regex=f"[a-z]{{{index + 1}}}-{index}", seed=index))
        found = ""
        async for output in stream:
            found = output.outputs[0].text
            if index == 5:
                await stream.aclose()
        return found

    async def main() -> list[str]:
        async with AsyncLLM(str(smollm2_path), max_model_len=128) as llm:
            with pytest.raises(RequestError, match="cannot be enforced"):
                await anext(llm.generate(PROMPT, like(regex="(")))
            return list(await asyncio.gather(*(text(llm, index) for index in range(12))))

    for index, found in enumerate(asyncio.run(main())):
        pattern = f"[a-z]{{{index + 1}}}-{index}"
        assert re.fullmatch("[a-z]*" if index == 5 else pattern, found)
