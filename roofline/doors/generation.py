"""A prompt on its way through the engine: its n requests, and the output they grow.

Token ids come in as steps bring them; text, stop strings and log-probabilities are made here.
"""

import time
from collections.abc import Sequence

from roofline.doors.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from roofline.errors import RequestError
from roofline.request import Request, TokenLogprobs, TokenOutput
from roofline.tokenizer import TextStream, Tokenizer


class Generation:
    """A prompt in the engine: its n requests, and the output they grow."""

    def __init__(
        self, requests: Sequence[Request], prompt: str | None, tokenizer: Tokenizer | None
    ) -> None:
        self.requests = requests
        first = requests[0]
        self._params, self._tokenizer = first.sampling, tokenizer
        self._children = {r.request_id: index for index, r in enumerate(requests)}
        self._streams = [self._text_stream() for _ in requests]
        self.has_news = False  # the output has grown since it was last given out
        self.output = RequestOutput(
            request_id=first.request_id.partition("-")[0],
            prompt=prompt,
            prompt_token_ids=list(first.tokens),
            outputs=[CompletionOutput(index) for index in range(len(requests))],
            metrics=RequestMetrics(time.monotonic()),
        )

    def abort(self, request_id: str) -> None:
        """End a child whose step has failed."""
        self.output.outputs[self._children[request_id]].finish_reason = "abort"
        self.output.finished = all(o.finish_reason is not None for o in self.output.outputs)
        self.has_news = True

    def ended(self, request_id: str) -> bool:
        """Whether a child has its finish reason."""
        return self.output.outputs[self._children[request_id]].finish_reason is not None

    def take(self, new: TokenOutput) -> None:
        """Add what a step brought to one child: ids, text, log-probabilities, its end."""
        child = self._children[new.request_id]
        answer, metrics = self.output.outputs[child], self.output.metrics
        self.has_news = True
        metrics.last_token_time = time.monotonic()
        metrics.first_token_time = metrics.first_token_time or metrics.last_token_time
        self.output.num_cached_tokens = max(self.output.num_cached_tokens, new.num_cached_tokens)
        answer.token_ids += new.token_ids
        self._take_logprobs(answer, new)
        answer.finish_reason, answer.stop_reason = new.finish_reason, new.stop_reason
        stream = self._streams[child]
        if stream is not None:
            self._take_text(answer, stream, new)
        self.output.finished = all(o.finish_reason is not None for o in self.output.outputs)

    def _text_stream(self) -> TextStream | None:
        if self._tokenizer is None:
            if self._params.stop:
                raise RequestError("stop strings need a tokenizer, and this model has none")
            return None
        return TextStream(
            self._tokenizer,
            stop=self._params.stop or (),
            include_stop_str_in_output=self._params.include_stop_str_in_output,
            skip_special_tokens=self._params.skip_special_tokens,
            after=self.requests[0].tokens,
        )

    def _take_text(self, answer: CompletionOutput, stream: TextStream, new: TokenOutput) -> None:
        """Add the text of new ids; a stop token's own is dropped, a stop string ends it."""
        params, ids = self._params, new.token_ids
        if new.ends_with_stop_token and not params.include_stop_str_in_output:
            ids = ids[:-1]
        may_stop = len(answer.token_ids) > params.min_tokens
        answer.text += stream.push(ids, may_stop=may_stop)
        if stream.stopped_by is not None:
            answer.finish_reason, answer.stop_reason = "stop", stream.stopped_by
        elif new.finish_reason is not None:
            answer.text += stream.finish()

    def _take_logprobs(self, answer: CompletionOutput, new: TokenOutput) -> None:
        if new.logprobs is not None:
            answer.logprobs = (answer.logprobs or []) + [self._logprobs(t) for t in new.logprobs]
            total = sum(token.logprob for token in new.logprobs)
            answer.cumulative_logprob = (answer.cumulative_logprob or 0.0) + total
        if new.prompt_logprobs is not None:
            self.output.prompt_logprobs = [None, *map(self._logprobs, new.prompt_logprobs)]

    def _logprobs(self, token: TokenLogprobs) -> dict[int, Logprob]:
        """The token itself first, then the likeliest; the shape vLLM returns."""
        ranked = [(token.token_id, token.logprob, token.rank)]
        ranked += [(i, logprob, rank) for rank, (i, logprob) in enumerate(token.top, 1)]
        found: dict[int, Logprob] = {}
        for token_id, logprob, rank in ranked:
            if token_id not in found:
                found[token_id] = Logprob(logprob, rank, self._token_text(token_id))
        return found

    def _token_text(self, token_id: int) -> str | None:
        """A token as text; None for a padding row of the embedding, or without a tokenizer."""
        if self._tokenizer is None or token_id >= self._tokenizer.vocab_size:
            return None
        return self._tokenizer.token_text(token_id)
