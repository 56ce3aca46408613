"""From logits to tokens: masks, penalties, then the ops `truncate` and `choose`.

A token depends on its own logits, its request's parameters, seed and position, and on nothing
else: noise[v] = Gumbel(Philox(key = seed, counter = (position, v))), token = argmax of
logits / temperature + noise over the tokens allowed, the lowest id winning ties.
Order of steps as vLLM's sampler; logprobs are of the raw logits.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from roofline.errors import RooflineError
from roofline.request import TokenLogprobs
from roofline.scheduling.plan import NONE, RowStart

# [256, 8] float32: what to add to eight logits for each byte of a mask. Five times as fast as
# unpacking the bits and filling by them.
_EIGHT = np.where(np.arange(256)[:, None] >> np.arange(8) & 1, 0, -np.inf).astype(np.float32)


class Limits(NamedTuple):
    """What `Ops.truncate` is told of a row."""

    min_p: float
    top_k: int
    top_p: float


OFF = Limits(0.0, 0, 1.0)


class RowSampler:
    """The sampling state of one row: its parameters, and its tokens where those need them."""

    def __init__(self, start: RowStart) -> None:
        self.params = start
        self.signed_seed = start.seed - (1 << 64) if start.seed >= 1 << 63 else start.seed
        self.history = list(start.history)  # prompt and output, where the plan says they are needed
        given = Limits(start.min_p, start.top_k, start.top_p)
        self.limits = given if start.temperature else OFF  # for `Ops.truncate`
        # Whether the token depends on nothing but logits, limits, temperature and noise.
        self.is_free = start == RowStart(
            row=start.row,
            num_prompt=start.num_prompt,
            seed=start.seed,
            temperature=start.temperature,
            min_p=start.min_p,
            top_k=start.top_k,
            top_p=start.top_p,
            logprobs=start.logprobs,
            prompt_logprobs=start.prompt_logprobs,
            history=start.history,
        )
        # Whether logits, once computed, are ready for `Ops.choose`, and nobody else wants them.
        self.is_plain = self.is_free and self.limits == OFF and start.logprobs == NONE

    def prepare(self, logits: Tensor, position: int, mask: bytes | None = None) -> float:
        """Make logits [V] float32 ready for `Ops.truncate` and `Ops.choose`.

        Returns the temperature to choose at, which the limits do not change. Bit i % 8 of byte
        i // 8 of a mask says whether the token at `position` may be token i.
        """
        params = self.params
        _keep_allowed(logits, params, mask)
        if self.is_free and (mask is None or _is_any_left(logits)):
            return self._heat(logits)
        if params.logit_bias:
            tokens, biases = zip(*params.logit_bias, strict=True)
            logits[list(tokens)] += torch.tensor(biases)
        before = logits.clone()
        _forbid(logits, params, self.history, position)
        if not _is_any_left(logits):  # what must come beats what may not
            logits.copy_(before)
        if not _is_any_left(logits):  # the model itself rules out all that is allowed
            _keep_allowed(logits.zero_(), params, mask)
            return 0.0
        _penalize(logits, params, self.history)
        return self._heat(logits)

    def _heat(self, logits: Tensor) -> float:
        """Divide by the temperature where limits are to come; return what is left of it."""
        if self.limits == OFF:
            return self.params.temperature
        logits /= self.params.temperature
        return 1.0

    def take(self, token: int) -> None:
        """Remember the token that was chosen, where that matters."""
        if self.history:
            self.history.append(token)


def logprobs_of(logits: Tensor, token: int, count: int) -> TokenLogprobs:
    """Log-probabilities of a token and of the `count` likeliest, from raw logits [V]."""
    raw = torch.log_softmax(logits, dim=0)
    chosen = float(raw[token])
    rank = int((raw > raw[token]).sum()) + 1
    values, ids = torch.topk(raw, min(count, len(raw)))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprobs(token, chosen, rank, top)


def not_finite() -> RooflineError:
    """What a step ends with whose logits are NaN or infinite."""
    return RooflineError(
        "the model's logits are NaN or infinite: its weights or its config are wrong"
    )


def _keep_allowed(logits: Tensor, params: RowStart, mask: bytes | None) -> None:
    """Leave only the tokens that the mask and the request allow."""
    if mask is not None:
        bits = np.frombuffer(mask, dtype=np.uint8)
        row = logits.numpy()
        row += np.take(_EIGHT, bits, axis=0, mode="clip").reshape(-1)[: len(row)]
    if params.allowed_token_ids:
        allowed = torch.tensor(params.allowed_token_ids)
        kept = logits[allowed]
        logits.fill_(-torch.inf)
        logits[allowed] = kept


def _is_any_left(logits: Tensor) -> bool:
    return bool(logits.numpy().max() > -np.inf)  # numpy: no threads are woken for so little


def _forbid(logits: Tensor, params: RowStart, history: Sequence[int], position: int) -> None:
    """Take out stop tokens before min_tokens, and what would complete a bad word."""
    early = position - params.num_prompt < params.min_tokens
    forbidden = list(params.stop_ids) if early else []
    for word in params.bad_words:
        before = len(word) - 1
        if not before or tuple(history[-before:]) == word[:-1]:
            forbidden.append(word[-1])
    if forbidden:
        logits[forbidden] = -torch.inf


def _penalize(logits: Tensor, params: RowStart, history: Sequence[int]) -> None:
    """Repetition (Keskar et al. 2019) over prompt and output; presence, frequency over output."""
    factor = params.repetition_penalty
    if factor != 1:
        seen = torch.tensor(sorted(set(history)), dtype=torch.int64)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / factor, values * factor)
    if params.frequency_penalty or params.presence_penalty:
        output = torch.tensor(history[params.num_prompt :], dtype=torch.int64)
        ids, counts = torch.unique(output, return_counts=True)
        logits[ids] -= params.frequency_penalty * counts + params.presence_penalty
