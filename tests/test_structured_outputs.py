"""Structured outputs through the whole engine: what is answered keeps to what was asked for."""

import asyncio
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from roofline import LLM, AsyncLLM, SamplingParams, StructuredOutputsParams
from roofline.doors.outputs import RequestOutput
from roofline.errors import RequestError
from tests.json_schemas import schemas
from tests.tiny_model import END, write_tiny_model

WORDS = r"([a-z]{2,5} ){3}[a-z]{2,5}\."
SCHEMA = {
    "type": "object",
    "properties": {"id": {"type": "string", "maxLength": 5}, "n": {"type": "integer"}},
    "required": ["id"],
    "additionalProperties": False,
}


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


def test_every_kind_of_question_is_kept_to(llm: LLM) -> None:
    assert re.fullmatch(WORDS, answer(llm, params(regex=WORDS))[0])
    assert answer(llm, params(choice=["red", "green"]))[0] in ("red", "green")
    assert answer(llm, params(choice=[END, "<s>"]))[0] in (END, "<s>")  # as text
    text, reason = answer(llm, params(grammar='start: "a" ("b" | "c")+ "."', options={"seed": 9}))
    assert re.fullmatch(r"a[bc]+\.", text) and reason == "stop"
    text, _ = answer(llm, params(grammar='root ::= "<" [0-9]{2} ">"'))
    assert re.fullmatch(r"<\d\d>", text)
    for seed in range(5):
        asked = params({"seed": seed}, json=SCHEMA, disable_any_whitespace=True)
        text, reason = answer(llm, asked)
        if reason == "stop":
            jsonschema.validate(json.loads(text), SCHEMA)
    text, _ = answer(llm, params({"temperature": 0, "max_tokens": 5}, json_object=True))
    assert text.startswith("{")


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
    free = SamplingParams(temperature=0, max_tokens=1, logprobs=20)
    asked = params({"temperature": 0, "logprobs": 20}, regex="abc")
    raw, masked = (llm.generate("x", p)[0].outputs[0].logprobs for p in (free, asked))
    assert raw is not None and masked is not None
    likeliest = {token: entry.logprob for token, entry in raw[0].items()}
    assert {
        t: e.logprob for t, e in masked[0].items() if e.rank <= 20 and t in likeliest
    }.items() <= (likeliest.items())
    assert len(masked) == 3


def test_n_answers_follow_the_grammar_each_by_itself(llm: LLM) -> None:
    outputs = llm.generate("x", params({"n": 4}, regex=WORDS))[0].outputs
    texts = [output.text for output in outputs]
    assert len(set(texts)) == 4 and all(re.fullmatch(WORDS, text) for text in texts)


def test_the_answer_is_the_same_alone_in_company_and_after_preemption(
    llm: LLM, folder: Path
) -> None:
    asked = [params({"seed": seed, "max_tokens": 40}, regex=WORDS) for seed in range(6)]
    asked += [params({"seed": s, "max_tokens": 40}, json=SCHEMA) for s in range(6)]
    asked += [SamplingParams(seed=seed, max_tokens=40, ignore_eos=True) for seed in range(4)]
    prompts = [f"prompt {index}" for index in range(len(asked))]
    alone = [texts(llm.generate(p, a)) for p, a in zip(prompts, asked, strict=True)]
    assert texts(llm.generate(prompts, asked)) == [text for (text,) in alone]
    block_bytes = 2 * 2 * 2 * 16 * 16 * 4  # layers, K and V, heads, tokens, head size, float32
    with LLM(
        str(folder),
        dtype="float32",
        max_num_seqs=8,
        max_model_len=64,
        kv_cache_memory_bytes=block_bytes * 10,
        enable_prefix_caching=False,
    ) as crowded:
        assert texts(crowded.generate(prompts, asked)) == [text for (text,) in alone]
        assert crowded.stats()["num_preemptions"] > 0
        assert crowded.stats()["num_used_blocks"] == 0


def texts(outputs: list[RequestOutput]) -> list[tuple[str, str | None]]:
    return [(output.outputs[0].text, output.outputs[0].finish_reason) for output in outputs]


def test_streams_grow_to_the_same_text(llm: LLM) -> None:
    asked = params(regex=WORDS)
    seen = [output.outputs[0].text for output in llm.generate("x", asked, stream=True)]
    assert seen[-1] == answer(llm, asked)[0]
    assert all(later.startswith(text) for text, later in itertools.pairwise(seen))
    for _ in llm.generate("x", asked, stream=True):
        break  # left in the middle, it is aborted
    assert llm.stats()["num_used_blocks"] == 0


def test_concurrent_streams_each_keep_to_their_own_grammar(folder: Path) -> None:
    async def all_streams() -> list[str]:
        async with AsyncLLM(str(folder), dtype="float32", max_num_seqs=4) as llm:

            async def text(index: int) -> str:
                asked = params({"seed": index}, regex=f"[a-z]{{{index}}}{index}")
                stream = llm.generate("x", asked)
                return [output.outputs[0].text async for output in stream][-1]

            async def wrong() -> str:
                try:
                    async for _ in llm.generate("x", params(regex="(")):
                        pass
                except RequestError as error:
                    return error.message
                return ""

            return await asyncio.gather(*map(text, range(1, 9)), wrong())

    *found, refused = asyncio.run(all_streams())
    assert all(re.fullmatch(f"[a-z]{{{i}}}{i}", text) for i, text in enumerate(found, 1))
    assert "unclosed group" in refused


@pytest.mark.timeout(900)  # some 80 s of one core on the reference ops
def test_two_hundred_schemas_on_the_real_model(smollm2_path: Path) -> None:
    """Values are short, yet some answers do not end in time; all that end must validate."""
    asked = schemas()
    each = [
        SamplingParams(
            temperature=0.7,
            seed=index,
            max_tokens=24,
            structured_outputs=StructuredOutputsParams(
                json=schema, disable_any_whitespace=index % 2 == 0
            ),
        )
        for index, schema in enumerate(asked)
    ]
    with LLM(str(smollm2_path), max_model_len=256, max_num_seqs=64) as llm:
        outputs = llm.generate(["JSON: "] * len(asked), each)
    finished = [
        (schema, output.outputs[0].text)
        for schema, output in zip(asked, outputs, strict=True)
        if output.outputs[0].finish_reason == "stop"
    ]
    wrong = [(schema, text) for schema, text in finished if not validates(schema, text)]
    assert wrong == []
    assert len(finished) >= 100, "too few to mean anything"
    assert {output.outputs[0].finish_reason for output in outputs} <= {"stop", "length"}


def validates(schema: dict[str, Any], text: str) -> bool:
    kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    try:
        kind(schema, format_checker=kind.FORMAT_CHECKER).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError):
        return False
    return True
