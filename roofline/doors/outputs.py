"""What a request answers, with text: vLLM's names and shapes.

Data only; what fills it in is `generation.py`.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Logprob:
    """The log-probability of one token at one position, under the raw logits."""

    logprob: float
    rank: int  # 1 = the likeliest
    decoded_token: str | None


@dataclasses.dataclass
class CompletionOutput:
    """One answer to a prompt."""

    index: int
    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None  # for each of token_ids
    finish_reason: str | None = None  # stop, length, abort or error
    # The stop token id or stop string that ended it, or what the error was.
    stop_reason: int | str | None = None


@dataclasses.dataclass
class RequestMetrics:
    """Moments of a request, seconds of `time.monotonic`."""

    arrival_time: float
    first_token_time: float | None = None
    last_token_time: float | None = None


@dataclasses.dataclass
class RequestOutput:
    """A prompt and its n answers."""

    request_id: str
    prompt: str | None  # None where ids were given
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None  # the first is None
    num_cached_tokens: int = 0
    finished: bool = False
