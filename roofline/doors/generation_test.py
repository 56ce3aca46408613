"""A generation by itself, fed by hand: no model, no engine."""

from collections.abc import Sequence
from typing import Any

import pytest

from roofline.doors.generation import Generation
from roofline.errors import RequestError
from roofline.request import FinishReason, Request, SamplingParams, TokenLogprobs, TokenOutput


def generation(n: int = 1, **options: Any) -> Generation:
    params = SamplingParams(n=n, **options)
    return Generation([Request(f"7-{i}", [1, 2], params, seed=i) for i in range(n)], None, None)


def new(child: int, ids: Sequence[int], end: FinishReason | None = None) -> TokenOutput:
    return TokenOutput(f"7-{child}", list(ids), 2, num_cached_tokens=child, finish_reason=end)


def test_an_output_is_finished_with_its_last_answer() -> None:
    growing = generation(2)
    assert growing.output.request_id == "7" and growing.output.prompt_token_ids == [1, 2]
    growing.take(new(0, [5], "stop"))
    assert growing.ended("7-0") and not growing.ended("7-1") and not growing.output.finished
    growing.take(new(1, [6]))
    growing.take(new(1, [7], "length"))
    assert growing.output.finished and growing.output.num_cached_tokens == 1
    assert [answer.token_ids for answer in growing.output.outputs] == [[5], [6, 7]]
    assert [answer.finish_reason for answer in growing.output.outputs] == ["stop", "length"]


def test_moments_are_those_of_the_first_and_the_last_token() -> None:
    growing = generation()
    metrics = growing.output.metrics
    growing.take(new(0, [5]))
    first = metrics.first_token_time
    growing.take(new(0, [6]))
    end = metrics.last_token_time
    assert first is not None and first == metrics.first_token_time and end is not None
    assert metrics.arrival_time <= first <= end


def test_what_is_aborted_says_so_and_keeps_what_it_has() -> None:
    growing = generation()
    growing.take(new(0, [5]))
    growing.has_news = False
    growing.abort("7-0")
    assert growing.has_news and growing.output.finished
    assert growing.output.outputs[0].finish_reason == "abort"
    assert growing.output.outputs[0].token_ids == [5]


def test_logprobs_add_up_and_name_the_sampled_token_first() -> None:
    growing = generation(logprobs=1)
    for token, logprob, rank in ((5, -1.0, 2), (6, -0.5, 1)):
        output = new(0, [token])
        output.logprobs = [TokenLogprobs(token, logprob, rank, ((6, -0.5),))]
        growing.take(output)
    answer = growing.output.outputs[0]
    assert answer.cumulative_logprob == -1.5 and answer.logprobs is not None
    assert [list(entry) for entry in answer.logprobs] == [[5, 6], [6]]
    assert answer.logprobs[0][5].rank == 2 and answer.logprobs[0][5].decoded_token is None


def test_stop_strings_without_a_tokenizer_are_refused() -> None:
    with pytest.raises(RequestError, match="stop strings need a tokenizer"):
        generation(stop="x")
