"""What is asked of the engine and what it answers, in token ids.

No text and no torch here: strings are tokenised before a request exists, and ids become text after
it has answered. The bounds of every number a caller may send are the tables at the top.
"""

import dataclasses
import difflib
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self

from roofline.errors import RequestError, shown
from roofline.structured_outputs import StructuredOutputsParams, TokenMatcher

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_TOKENS = 2**31 - 1
MAX_SEED = 2**64 - 1
MAX_IDS = 1 << 20  # ids in one list: more than any vocabulary has

_INTEGERS = {  # inclusive bounds
    "n": (1, 128),
    "top_k": (-1, MAX_TOKENS),
    "seed": (0, MAX_SEED),
    "min_tokens": (0, MAX_TOKENS),
    "max_tokens": (1, MAX_TOKENS),
    "logprobs": (0, 20),
    "prompt_logprobs": (0, 20),
}
_NUMBERS = {  # inclusive bounds
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}
_MIN_TEMPERATURE = 1e-6  # logits divided by less than this leave float32
_FLAGS = ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output")
_MAX_STOP_STRINGS, _MAX_BAD_WORDS, _MAX_STRING = 16, 1024, 1024
_MAX_STOP_IDS, _MAX_BIASES, _MAX_BIAS = 1024, 1024, 100.0


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are chosen and when it ends: vLLM's names and meanings.

    One default differs: `max_tokens` is the rest of the context, where vLLM stops at 16.
    """

    n: int = 1
    temperature: float = 1.0  # 0 = greedy
    top_k: int = 0  # 0 or -1 = off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int | None = None  # None = the rest of the context
    logprobs: int | None = None  # 0 = the sampled token's only
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in _INTEGERS.items():
            _check_integer(name, getattr(self, name), low, high, optional=name in _OPTIONAL)
        for name, (low, high) in _NUMBERS.items():
            _check_number(name, getattr(self, name), low, high)
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise _refused(name, getattr(self, name), "True or False")
        if not isinstance(self.structured_outputs, StructuredOutputsParams | None):
            wanted = "StructuredOutputsParams or None"
            raise _refused("structured_outputs", self.structured_outputs, wanted)
        self._check_relations()
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        self._freeze("stop", _strings("stop", stop, _MAX_STOP_STRINGS))
        self._freeze("bad_words", _strings("bad_words", self.bad_words, _MAX_BAD_WORDS))
        self._freeze("stop_token_ids", _ids("stop_token_ids", self.stop_token_ids, _MAX_STOP_IDS))
        self._freeze(
            "allowed_token_ids", _ids("allowed_token_ids", self.allowed_token_ids, MAX_IDS)
        )
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise _refused("allowed_token_ids", [], "at least one token id, or None for all")
        self._freeze("logit_bias", _biases(self.logit_bias))

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Build from named options; an unknown name is refused with the nearest that exists."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(f"{name}"[:_MAX_STRING], known, n=1)
                advice = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
                raise RequestError(f"unknown sampling option {shown(name)}; {advice}")
        return cls(**options)

    def check(self, vocab_size: int) -> None:
        """Refuse token ids outside a vocabulary of `vocab_size`."""
        _check_in_vocabulary("logit_bias", self.logit_bias, vocab_size)
        _check_in_vocabulary("allowed_token_ids", self.allowed_token_ids, vocab_size)
        _check_in_vocabulary("stop_token_ids", self.stop_token_ids, vocab_size)

    @property
    def has_penalties(self) -> bool:
        """Whether sampling looks back at the tokens so far."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    def _check_relations(self) -> None:
        if self.top_p == 0:
            raise _refused("top_p", self.top_p, "a number above 0 and at most 1")
        if 0 < self.temperature < _MIN_TEMPERATURE:
            raise _refused(
                "temperature", self.temperature, f"0 (greedy) or at least {_MIN_TEMPERATURE}"
            )
        if self.n > 1 and self.temperature == 0:
            raise _refused("n", self.n, "1 at temperature 0, where all n answers would be the same")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _refused("min_tokens", self.min_tokens, f"at most max_tokens, {self.max_tokens}")

    def _freeze(self, name: str, value: object) -> None:
        """Keep a private copy, so that what was checked cannot change afterwards."""
        object.__setattr__(self, name, value)


_OPTIONAL = ("seed", "max_tokens", "logprobs", "prompt_logprobs")


class TokenLogprobs(NamedTuple):
    """The log-probability of one token under the raw logits, and the likeliest beside it."""

    token_id: int
    logprob: float
    rank: int  # 1 = the likeliest
    top: tuple[tuple[int, float], ...]  # (token id, logprob), the likeliest first


@dataclasses.dataclass(slots=True)
class TokenOutput:
    """What one step brought to one request."""

    request_id: str
    token_ids: list[int]  # new ones only, a stop token included
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0  # prompt tokens whose KV was found in the prefix cache
    finish_reason: FinishReason | None = None
    # The stop_token_ids entry that ended it, or what went wrong; None for EOS and a grammar's end.
    stop_reason: int | str | None = None
    ends_with_stop_token: bool = False  # the last of token_ids is no part of the text
    logprobs: list[TokenLogprobs] | None = None  # one for each of token_ids
    prompt_logprobs: list[TokenLogprobs] | None = None  # of prompt[1:], once, with the first token


class Request:
    """One sequence on its way through the engine; the scheduler alone writes to it.

    Of its tokens (prompt + output), the steps planned so far compute the first `num_computed`.
    """

    __slots__ = (
        "arrival",
        "bad_words_ids",
        "blocks",
        "chain",
        "ends_with_stop_token",
        "epoch",
        "finish_reason",
        "matcher",
        "max_total_tokens",
        "num_cached",
        "num_computed",
        "num_in_flight",
        "num_prompt",
        "num_published",
        "order",
        "priority",
        "prompt_logprobs",
        "request_id",
        "row",
        "sampling",
        "seed",
        "stop_ids",
        "stop_reason",
        "tokens",
    )

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        seed: int,
        eos_token_ids: Iterable[int] = (),
        bad_words_ids: Sequence[Sequence[int]] = (),
        priority: int = 0,
        matcher: TokenMatcher | None = None,
    ) -> None:
        _check_integer("seed", seed, 0, MAX_SEED)
        _check_integer("priority", priority, -MAX_TOKENS, MAX_TOKENS)
        self.request_id = request_id
        self.tokens = list(prompt_token_ids)  # the prompt, then the output as it arrives
        self.num_prompt = len(self.tokens)
        self.sampling = sampling
        self.seed = seed
        ends = () if sampling.ignore_eos else eos_token_ids
        self.stop_ids = frozenset(ends) | frozenset(sampling.stop_token_ids or ())
        self.bad_words_ids = tuple(tuple(word) for word in bad_words_ids)
        self.priority = priority  # lower goes first
        self.matcher = matcher  # what its text must be like; None once it has finished
        self.arrival = 0  # counted by the scheduler
        self.order = (priority, 0)  # (priority, arrival)
        self.max_total_tokens = 0  # it ends when it has this many
        self.row = -1  # -1 = waiting
        self.epoch = 0  # counts the rows it has left: results of an earlier epoch are dropped
        self.blocks: list[int] = []
        self.chain: list[bytes] = []  # digests of its full blocks, as far as they were needed
        self.num_published = 0  # of its blocks, those offered to the prefix cache or taken from it
        self.num_computed = 0
        self.num_in_flight = 0  # tokens sampled by steps whose results have not arrived
        self.num_cached = -1  # prefix-cache tokens at its first admission; -1 before
        # The log-probabilities of prompt[1:] while they are being collected.
        wanted = sampling.prompt_logprobs is not None
        self.prompt_logprobs: list[TokenLogprobs] | None = [] if wanted else None
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.ends_with_stop_token = False

    @property
    def num_output(self) -> int:
        """Output tokens that have arrived."""
        return len(self.tokens) - self.num_prompt

    def append(self, token: int) -> FinishReason | None:
        """Add an output token; say how it ends the request, if it does."""
        self.tokens.append(token)
        if token in self.stop_ids and self.num_output > self.sampling.min_tokens:
            self.ends_with_stop_token = True
            named = token in (self.sampling.stop_token_ids or ())  # EOS is the model's own end
            self.finish("stop", token if named else None)
        elif self.matcher is not None:
            self._match(self.matcher, token)
        if self.finish_reason is None and len(self.tokens) >= self.max_total_tokens:
            self.finish("length")
        return self.finish_reason

    def finish(self, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """End it; what its text had to be like is no longer needed."""
        self.finish_reason, self.stop_reason, self.matcher = reason, stop_reason, None

    def leave_row(self) -> None:
        """Forget where it ran and what was computed there; what is in flight will not be heard."""
        self.row = -1
        self.blocks = []
        self.num_published = self.num_computed = self.num_in_flight = 0
        self.epoch += 1

    def _match(self, matcher: TokenMatcher, token: int) -> None:
        """Tell the matcher of a token; a matcher that gives up ends this request alone."""
        try:
            if matcher.accept(token):
                self.finish("stop")
        except RequestError as error:
            self.finish("error", error.message)


def child_seed(seed: int, index: int) -> int:
    """Return the seed of the `index`-th of n > 1 children.

    It is the 8-byte blake2b digest of seed and index, all three numbers little-endian.
    """
    data = seed.to_bytes(8, "little") + index.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def check_token_ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
    """Refuse no ids at all, and what is no integer in [0, vocab_size), naming the first."""
    if not ids:
        raise RequestError(f"{name} is empty; it must have at least one token", param=name)
    if set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocab_size:
        return
    for index, token in enumerate(ids):
        if type(token) is not int or not 0 <= token < vocab_size:
            raise _refused(f"{name}[{index}]", token, f"a token id from 0 to {vocab_size - 1}")


def _check_in_vocabulary(name: str, ids: Iterable[int] | None, vocab_size: int) -> None:
    for token in ids or ():
        if token >= vocab_size:
            raise _refused(f"{name} token id", token, f"from 0 to {vocab_size - 1}, the vocabulary")


def _check_integer(
    name: str, value: object, low: int, high: int, *, optional: bool = False
) -> None:
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        none = ", or None" if optional else ""
        raise _refused(name, value, f"an integer from {low} to {high}{none}")


def _check_number(name: str, value: object, low: float, high: float) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # Bounds come first: whether an integer beyond float's range is finite cannot be asked.
    if not (number and low <= value <= high and math.isfinite(value)):
        raise _refused(name, value, f"a number from {low:g} to {high:g}")


def _strings(name: str, value: object, limit: int) -> tuple[str, ...] | None:
    if value is None:
        return None
    wanted = f"at most {limit} strings of 1 to {_MAX_STRING} characters"
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) > limit:
        raise _refused(name, value, wanted)
    for entry in value:
        if not isinstance(entry, str) or not 1 <= len(entry) <= _MAX_STRING:
            raise _refused(name, entry, wanted)
    return tuple(value)


def _ids(name: str, value: object, limit: int) -> tuple[int, ...] | None:
    if value is None:
        return None
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or len(value) > limit:
        raise _refused(name, value, f"a list of at most {limit} token ids")
    for index, token in enumerate(value):
        _check_integer(f"{name}[{index}]", token, 0, MAX_TOKENS)
    return tuple(value)


def _biases(value: object) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping) or len(value) > _MAX_BIASES:
        raise _refused("logit_bias", value, f"a map of at most {_MAX_BIASES} token ids to numbers")
    for token, bias in value.items():
        _check_integer("logit_bias token id", token, 0, MAX_TOKENS)
        _check_number(f"logit_bias[{token}]", bias, -_MAX_BIAS, _MAX_BIAS)
    return {token: float(bias) for token, bias in value.items()}


def _refused(name: str, value: object, wanted: str) -> RequestError:
    return RequestError(f"{name} is {shown(value)}; it must be {wanted}", param=name.split()[0])
