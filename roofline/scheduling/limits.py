"""The sizes the scheduler plans within, and the requests that could never finish within them."""

import dataclasses

from roofline.errors import CapacityError, RequestError, UsageError
from roofline.request import Request, check_token_ids


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """The sizes the scheduler plans within."""

    num_blocks: int
    block_tokens: int
    max_num_seqs: int  # rows: requests in one step
    max_num_batched_tokens: int  # tokens in one step
    max_model_len: int  # tokens of a request, prompt and output
    vocab_size: int
    enable_prefix_caching: bool = True
    prefill_chunk_tokens: int | None = None  # of one request in one step; None = all of the step's

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is bool or (value is None and field.default is None):
                continue
            if type(value) is not int or value < 1:
                raise UsageError(f"{field.name} is {value!r}; it must be an integer of at least 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise UsageError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}; it must be at least "
                f"max_num_seqs, {self.max_num_seqs}, or some requests would never decode"
            )

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_tokens)

    def max_total_tokens(self, request: Request) -> int:
        """Tokens at which a request ends, prompt and output."""
        wanted = request.sampling.max_tokens
        longest = self.max_model_len
        return longest if wanted is None else min(request.num_prompt + wanted, longest)

    def check_request(self, request: Request) -> None:
        """Refuse a request that could never finish."""
        if request.num_prompt >= self.max_model_len:
            raise RequestError(
                f"the prompt has {request.num_prompt} tokens and must leave room for one more; "
                f"max_model_len is {self.max_model_len}"
            )
        check_token_ids("prompt", request.tokens, self.vocab_size)
        for word in request.bad_words_ids:
            check_token_ids("bad_words entry", word, self.vocab_size)
        request.sampling.check(self.vocab_size)
        # The last token is sampled but never computed.
        needed = self.blocks_for(self.max_total_tokens(request) - 1)
        if needed > self.num_blocks:
            raise CapacityError(
                f"the request may grow to {needed} KV blocks of {self.block_tokens} tokens, and "
                f"the pool has {self.num_blocks}; shorten the prompt or lower max_tokens"
            )
