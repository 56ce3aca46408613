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


class RowSampler:
    """The sampling state of one row: its parameters, and its tokens where those need them."""

    def __init__(self, start: RowStart) -> None:
        self.params = start
        self.history = list(start.history)  # prompt and output, where the plan says they are needed

    def sample(self, logits: Tensor, position: int, mask: bytes | None = None) -> int:
        """The token at `position` from logits [V] float32, which are overwritten.

        Bit i % 8 of byte i // 8 of a mask says whether it may be token i.
        """
        token = self._choose(logits, position, mask)
        if self.history:
            self.history.append(token)
        return token

    def _choose(self, logits: Tensor, position: int, mask: bytes | None) -> int:
        params = self.params
        _keep_allowed(logits, params, mask)
        if params.logit_bias:
            tokens, biases = zip(*params.logit_bias, strict=True)
            logits[list(tokens)] += torch.tensor(biases)
        unmasked = logits.clone() if params.stop_ids or params.bad_words else logits
        _forbid(logits, params, self.history, position)
        if logits.max() == -torch.inf:  # nothing is left: what must come beats what may not
            logits = unmasked
        if logits.max() == -torch.inf:  # the model itself rules out all that is allowed
            _keep_allowed(logits.zero_(), params, mask)
            return lowest_argmax(logits)
        _penalize(logits, params, self.history)
        if params.temperature == 0:
            return lowest_argmax(logits)
        logits /= params.temperature
        _truncate(logits, params)
        allowed = torch.nonzero(logits > -torch.inf).squeeze(1)
        noise = gumbel(params.seed, position, allowed.numpy())
        return int(allowed[lowest_argmax(logits[allowed] + torch.from_numpy(noise))])


def lowest_argmax(values: Tensor) -> int:
    """The first index of the largest value of a vector."""
    return int(torch.nonzero(values == values.max())[0])


def gumbel(seed: int, position: int, tokens: np.ndarray) -> np.ndarray:
    """Standard Gumbel noise [n] float32 for token ids [n] at a position.

    The exponential draw is -log(1 - u) with u = (word + 1/2) / 2**32: finest where the noise is
    largest, which is what an argmax looks at.
    """
    word = philox((position, tokens, 0, 0), (seed & _LOW, seed >> 32))[0]
    uniform = (word.astype(np.float64) + 0.5) * 2.0**-32
    return (-np.log(-np.log1p(-uniform))).astype(np.float32)


_LOW = (1 << 32) - 1
_PHILOX_FACTORS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_PHILOX_STEPS = 0x9E3779B9, 0xBB67AE85
Words = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # of 32 bits each, as uint64


def philox(counter: Sequence[int | np.ndarray], key: tuple[int, int]) -> Words:
    """Philox4x32-10 (Salmon et al. 2011) of counters of four words, which broadcast, and a key."""
    first, second, third, fourth = (np.asarray(word, np.uint64) for word in counter)
    low, high = np.uint64(_LOW), np.uint64(32)
    for turn in range(10):
        bump = [(k + turn * step) & _LOW for k, step in zip(key, _PHILOX_STEPS, strict=True)]
        one, other = first * _PHILOX_FACTORS[0], third * _PHILOX_FACTORS[1]
        first, second, third, fourth = (
            (other >> high) ^ second ^ np.uint64(bump[0]),
            other & low,
            (one >> high) ^ fourth ^ np.uint64(bump[1]),
            one & low,
        )
    return first, second, third, fourth


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
        out = np.unpackbits(bits, count=len(logits), bitorder="little") == 0
        logits.masked_fill_(torch.from_numpy(out), -torch.inf)
    if params.allowed_token_ids:
        allowed = torch.tensor(params.allowed_token_ids)
        kept = logits[allowed]
        logits.fill_(-torch.inf)
        logits[allowed] = kept


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
