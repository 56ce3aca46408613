from roofline.doors.outputs import CompletionOutput, RequestMetrics, RequestOutput


def test_answers_share_nothing_they_grow_by() -> None:
    one, two = CompletionOutput(0), CompletionOutput(1)
    one.token_ids.append(5)
    assert two.token_ids == []


def test_an_output_that_has_just_begun_has_no_moments_and_no_end() -> None:
    output = RequestOutput("0", None, [1], [CompletionOutput(0)], RequestMetrics(1.0))
    assert not output.finished and output.outputs[0].finish_reason is None
    assert output.metrics.first_token_time is None and output.prompt_logprobs is None
