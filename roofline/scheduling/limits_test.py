from collections.abc import Sequence
from typing import Any

import pytest

from roofline.errors import RequestError, UsageError
from roofline.request import Request, SamplingParams
from roofline.scheduling.scheduler_test import VOCAB, config_of


def refusal(prompt: Any, bad_words_ids: Sequence[Sequence[int]] = (), **options: Any) -> str:
    request = Request("a", prompt, SamplingParams(**options), seed=0, bad_words_ids=bad_words_ids)
    with pytest.raises(RequestError) as caught:
        config_of().check_request(request)
    return caught.value.message


def test_prompts_without_tokens_or_with_strange_ones_are_refused() -> None:
    assert "prompt is empty" in refusal([])
    for bad in (-1, VOCAB, True, 1.0, "1", None):
        assert "prompt[1]" in refusal([1, bad])


def test_sampling_ids_outside_the_vocabulary_are_refused() -> None:
    assert "stop_token_ids" in refusal([1], stop_token_ids=[VOCAB])
    assert "allowed_token_ids" in refusal([1], allowed_token_ids=[VOCAB])
    assert "logit_bias" in refusal([1], logit_bias={VOCAB: 1.0})
    for word in ((VOCAB,), (-1,), ()):
        assert "bad_words entry" in refusal([1], bad_words_ids=[word])


@pytest.mark.parametrize(
    ("sizes", "field"),
    [
        ({"num_blocks": 0}, "num_blocks"),
        ({"block_tokens": True}, "block_tokens"),
        ({"vocab_size": 1.0}, "vocab_size"),
        ({"max_num_seqs": None}, "max_num_seqs"),
        ({"prefill_chunk_tokens": 0}, "prefill_chunk_tokens"),
        ({"max_num_batched_tokens": 5, "max_num_seqs": 6}, "max_num_batched_tokens"),
    ],
)
def test_sizes_that_cannot_work_are_refused_by_field(sizes: dict[str, Any], field: str) -> None:
    with pytest.raises(UsageError, match=f"^{field} is "):
        config_of(**sizes)
