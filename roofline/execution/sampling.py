"""From logits to tokens: masks, penalties, truncation, and counter-based noise.

A token depends on its own logits, its request's parameters, seed and position, and on nothing
else: noise[v] = Gumbel(Philox(key = seed, counter = (position, v))), token = argmax of
logits / temperature + noise over the tokens allowed, the lowest id winning ties.
Order of steps as vLLM's sampler; logprobs are of the raw logits.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from roofline.request import TokenLogprobs
from roofline.scheduling.plan import RowStart

# [256, 8] float32: what to add to eight logits for each byte of a mask. Five times as fast as
# unpacking the bits and filling by them.
_EIGHT = np.where(np.arange(256)[:, None] >> np.arange(8) & 1, 0, -np.inf).astype(np.float32)


class RowSampler:
    """The sampling state of one row: its parameters, and its tokens where those need them."""

    def __init__(self, start: RowStart) -> None:
        self.params = start
        self.history = list(start.history)  # prompt and output, where the plan says they are needed
        # Whether the token depends on nothing but logits, temperature and noise.
        self.is_plain = start == RowStart(
            row=start.row,
            num_prompt=start.num_prompt,
            seed=start.seed,
            temperature=start.temperature,
            logprobs=start.logprobs,
            prompt_logprobs=start.prompt_logprobs,
            history=start.history,
        )

    def prepare(self, logits: Tensor, position: int, mask: bytes | None = None) -> float:
        """Make logits [V] float32 ready for `Ops.choose`; return the temperature to give it.

        Bit i % 8 of byte i // 8 of a mask says whether the token at `position` may be token i.
        """
        params = self.params
        _keep_allowed(logits, params, mask)
        if self.is_plain and (mask is None or _is_any_left(logits)):
            return params.temperature
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
        if params.temperature == 0:
            return 0.0
        logits /= params.temperature
        _truncate(logits, params)
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


def _truncate(logits: Tensor, params: RowStart) -> None:
    """Set to -inf what min_p, top_k and top_p leave out.

    Ties at the border of top_k stay in; at that of top_p the lower id goes first.
    """
    if params.min_p > 0:
        probabilities = torch.softmax(logits, dim=0)
        logits[probabilities < params.min_p * probabilities.max()] = -torch.inf
    if 0 < params.top_k < len(logits):
        logits[logits < torch.topk(logits, params.top_k).values[-1]] = -torch.inf
    if params.top_p < 1:
        ordered, ids = torch.sort(logits, descending=True, stable=True)
        probabilities = torch.softmax(ordered, dim=0, dtype=torch.float64)
        before = probabilities.cumsum(dim=0) - probabilities  # mass above each token
        logits[ids[before >= params.top_p]] = -torch.inf
