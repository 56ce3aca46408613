import dataclasses
import math
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from roofline.execution.sampling import RowSampler, logprobs_of
from roofline.ops.noise import choose, gumbel, lowest_argmax, philox
from roofline.ops.truncation import truncate
from roofline.scheduling.plan import RowStart

ALL_ONES = 2**32 - 1
PI_COUNTER = 0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344
PI_KEY = 0xA4093822, 0x299F31D0


def sampler(**params: Any) -> RowSampler:
    defaults: dict[str, Any] = {"row": 0, "num_prompt": 1, "seed": 11}
    return RowSampler(RowStart(**defaults | params))


def sample(row: RowSampler, logits: Tensor, position: int, mask: bytes | None = None) -> int:
    """What a runner does with one row."""
    temperature = row.prepare(logits, position, mask)
    truncate(logits, *row.limits)
    token = choose(logits, temperature, row.params.seed, position)
    row.take(token)
    return token


def greedy(logits: list[float], position: int = 1, **params: Any) -> int:
    return sample(sampler(temperature=0.0, **params), torch.tensor(logits), position)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ALL_ONES,) * 4, (ALL_ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (PI_COUNTER, PI_KEY, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_philox_gives_the_published_words(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    assert tuple(map(int, philox(counter, key))) == expected
    as_arrays = philox([np.full(3, word) for word in counter], key)
    assert [words.tolist() for words in as_arrays] == [[word] * 3 for word in expected]


def test_noise_is_a_function_of_seed_position_and_token() -> None:
    noise = gumbel(2**64 - 1, 9, np.arange(100))
    for stop in range(1, 100):  # in whatever company
        assert np.array_equal(
            gumbel(2**64 - 1, 9, np.arange(stop // 2, stop)), noise[stop // 2 : stop]
        )
    word = int(philox((9, 41, 0, 0), (ALL_ONES, ALL_ONES))[0])
    assert noise[41] == np.float32(-math.log(-math.log1p(-(word + 0.5) / 2**32)))
    for other in (gumbel(2**63 - 1, 9, np.arange(100)), gumbel(2**64 - 1, 8, np.arange(100))):
        assert not np.any(other == noise)


def test_noise_has_the_gumbel_distribution() -> None:
    noise = np.sort(gumbel(3, 5, np.arange(100_000)).astype(np.float64))
    expected = np.exp(-np.exp(-noise))
    steps = np.arange(len(noise)) / len(noise)
    # Kolmogorov-Smirnov: above 2 / sqrt(n) once in 1,500 seeds
    assert np.abs(expected - steps).max() < 2 / math.sqrt(len(noise))
    assert np.isfinite(noise).all()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_tokens_are_drawn_by_the_softmax_of_their_logits(temperature: float) -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, -torch.inf, 1.5, 0.3])
    draws = 4000
    row = sampler(temperature=temperature)
    counts = Counter(sample(row, logits.clone(), position) for position in range(draws))
    expected = draws * torch.softmax(logits / temperature, dim=0)
    assert counts[4] == 0
    possible = [token for token in range(7) if expected[token] > 5]
    squares = [(counts[t] - float(expected[t])) ** 2 / float(expected[t]) for t in possible]
    freedom = len(possible) - 1
    assert sum(squares) < freedom + 4 * math.sqrt(2 * freedom)


def test_another_seed_draws_other_tokens_and_the_same_seed_the_same() -> None:
    def tokens(seed: int) -> list[int]:
        row = sampler(seed=seed)
        return [sample(row, torch.zeros(1000), position) for position in range(50)]

    assert tokens(1) == tokens(1)
    assert len(set(tokens(1)) & set(tokens(2))) < 10
    assert len(set(tokens(1)) & set(tokens(1 + 2**32))) < 10  # the seed's high word counts


def test_greedy_ties_go_to_the_lowest_id() -> None:
    assert greedy([0.0, 3.0, 1.0, 3.0, 3.0]) == 1
    assert lowest_argmax(torch.full((100_000,), -1.0)) == 0


def test_a_vanishing_temperature_is_greedy() -> None:
    logits = torch.randn(500)
    row = sampler(temperature=1e-6)
    assert {sample(row, logits.clone(), p) for p in range(20)} == {int(logits.argmax())}


# Logits tie or are far apart, also after penalties: float32 and the oracle see the same order.
numbers = st.integers(-36, 36).map(lambda quarters: quarters / 4) | st.just(-math.inf)
VOCABULARY = 12
tokens = st.integers(0, VOCABULARY - 1)
lists = st.lists(tokens, max_size=4).map(tuple)
random_params = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.7, 1.0, 3.0]),
        "top_k": st.integers(0, VOCABULARY + 2),
        "top_p": st.sampled_from([1.0, 0.999, 0.83, 0.41, 0.01]),
        "min_p": st.sampled_from([0.0, 0.013, 0.37, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.6]),
        "presence_penalty": st.sampled_from([0.0, 0.7071, -1.113]),
        "frequency_penalty": st.sampled_from([0.0, 0.4142, -0.9137]),
        "min_tokens": st.integers(0, 3),
        "stop_ids": lists,
        "allowed_token_ids": lists,
        "bad_words": st.lists(st.lists(tokens, min_size=1, max_size=3).map(tuple)).map(tuple),
        "logit_bias": st.dictionaries(tokens, st.sampled_from([-100.0, -1.0, 0.5, 100.0])).map(
            lambda biases: tuple(biases.items())
        ),
        "history": st.lists(tokens, min_size=3, max_size=9).map(tuple),
        "num_prompt": st.integers(1, 3),
        "seed": st.integers(0, 2**64 - 1),
    }
)


def vllm_scores(logits: list[float], start: RowStart, allowed: set[int]) -> list[float]:
    """Logits after all that vLLM documents, one token at a time: softmax of these is drawn from."""
    output = start.history[start.num_prompt :]
    scores = dict(enumerate(logits))
    for v in scores:
        if v not in allowed:
            scores[v] = -math.inf
        scores[v] += dict(start.logit_bias).get(v, 0.0)
    forbidden = set(start.stop_ids if len(output) < start.min_tokens else ())
    for word in start.bad_words:
        known = len(start.history) + 1 - len(word)
        if known >= 0 and start.history[known:] == word[:-1]:
            forbidden.add(word[-1])
    if any(scores[v] > -math.inf for v in scores.keys() - forbidden):
        scores |= dict.fromkeys(forbidden, -math.inf)
    for v in scores:
        if v in start.history:
            penalty = start.repetition_penalty
            scores[v] = scores[v] / penalty if scores[v] > 0 else scores[v] * penalty
        scores[v] -= start.frequency_penalty * output.count(v)
        scores[v] -= start.presence_penalty * (v in output)
    if start.temperature == 0:
        return list(scores.values())
    scores = {v: x / start.temperature for v, x in scores.items()}

    def keep(good: set[int]) -> None:
        scores.update((v, -math.inf) for v in scores.keys() - good)

    def probabilities() -> dict[int, float]:
        weights = {v: math.exp(x - max(scores.values())) for v, x in scores.items()}
        return {v: w / sum(weights.values()) for v, w in weights.items()}

    likely = probabilities()
    keep({v for v, p in likely.items() if p >= start.min_p * max(likely.values())})
    if start.top_k:
        border = sorted(scores.values(), reverse=True)[: start.top_k][-1]
        keep({v for v, x in scores.items() if x >= border})
    likely, above, nucleus = probabilities(), 0.0, set[int]()
    for v in sorted(scores, key=lambda v: (-scores[v], v)):
        if above < start.top_p or start.top_p == 1:
            nucleus.add(v)
        above += likely[v]
    keep(nucleus)
    return list(scores.values())


@settings(deadline=None)
@given(
    st.lists(numbers, min_size=VOCABULARY, max_size=VOCABULARY),
    random_params,
    st.none() | st.integers(1, 2**VOCABULARY - 1),
)
def test_any_parameters_choose_as_documented(
    logits: list[float], params: dict[str, Any], bits: int | None
) -> None:
    start = RowStart(row=0, **params)
    position = len(start.history)
    allowed = set(start.allowed_token_ids or range(VOCABULARY))
    mask = None
    if bits is not None:
        masked = {token for token in range(VOCABULARY) if bits >> token & 1}
        allowed = allowed & masked or masked  # a mask never leaves nothing of what is allowed
        start = dataclasses.replace(start, allowed_token_ids=tuple(sorted(allowed)))
        mask = bits.to_bytes(8, "little")
    token = sample(RowSampler(start), torch.tensor(logits), position, mask)
    assert token in allowed
    scores = vllm_scores(logits, start, allowed)
    if max(scores) == -math.inf:
        assert token == min(allowed)
        return
    if start.temperature:
        noise = gumbel(start.seed, position, np.arange(VOCABULARY)).tolist()
        scores = [x + n for x, n in zip(scores, noise, strict=True)]
    assert scores[token] >= max(scores) - 1e-4


def test_a_bad_word_is_completed_neither_from_the_prompt_nor_from_the_output() -> None:
    row = sampler(
        temperature=0.0, history=(5, 1), num_prompt=2, bad_words=((1, 2), (3, 4, 2), (6,))
    )
    best_is_2 = torch.tensor([0.0, 1.0, 9.0, 8.0, 7.0, 0.0, 10.0])
    assert sample(row, best_is_2.clone(), 2) == 3  # 1 2 would be bad
    assert sample(row, best_is_2.clone(), 3) == 2
    row = sampler(temperature=0.0, history=(3,), bad_words=((3, 4, 2),))
    assert sample(row, torch.tensor([0.0, 1.0, 9.0, 8.0, 10.0]), 1) == 4
    assert sample(row, best_is_2[:5].clone(), 2) == 3
    assert row.history == [3, 4, 3]


def test_a_row_without_history_keeps_none() -> None:
    row = sampler(temperature=0.0, stop_ids=(1,), min_tokens=1, bad_words=((0,),))
    assert sample(row, torch.tensor([9.0, 8.0, 7.0]), 1) == 2
    assert sample(row, torch.tensor([9.0, 8.0, 7.0]), 2) == 1
    assert row.history == []


def test_stop_tokens_wait_for_min_tokens() -> None:
    ends = {"stop_ids": (1, 2), "min_tokens": 3, "num_prompt": 10}
    chosen = [greedy([0.0, 9.0, 8.0, 1.0], position, **ends) for position in range(10, 15)]
    assert chosen == [3, 3, 3, 1, 1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_masks_that_leave_nothing_yield_to_the_allowed_tokens(temperature: float) -> None:
    logits = torch.tensor([9.0, 1.0, 2.0, -torch.inf, -torch.inf])

    def choose(**params: Any) -> int:
        return sample(sampler(temperature=temperature, **params), logits.clone(), 1)

    assert choose(allowed_token_ids=(2,), stop_ids=(2,), min_tokens=5) == 2
    assert choose(allowed_token_ids=(1,), bad_words=((1,),)) == 1
    assert choose(allowed_token_ids=(4, 3)) == 3  # the model rules out both
    assert choose(allowed_token_ids=(4, 3), stop_ids=(3,), min_tokens=5) == 3


def test_a_mask_yields_neither_to_min_tokens_nor_to_bad_words_nor_to_bias() -> None:
    logits = [9.0, 8.0, 7.0, 6.0]
    only_2 = bytes([0b0100]) + bytes(7)
    bias = ((2, -100.0), (0, 100.0))
    for row in (
        sampler(logit_bias=bias, stop_ids=(2,), min_tokens=5),
        sampler(logit_bias=bias, bad_words=((2,),)),
        sampler(logit_bias=bias),
    ):
        assert sample(row, torch.tensor(logits), 1, only_2) == 2
    two_or_3 = bytes([0b1100]) + bytes(7)
    row = sampler(stop_ids=(2,), min_tokens=5)
    assert sample(row, torch.tensor(logits), 1, two_or_3) == 3
    assert sample(sampler(top_k=1), torch.tensor(logits), 1, two_or_3) == 2


def test_a_mask_over_words_reaches_the_last_token_of_the_vocabulary() -> None:
    for size in (63, 64, 65, 130):
        for token in (0, size // 2, size - 1):
            mask = (1 << token).to_bytes(-(-size // 64) * 8, "little")
            assert sample(sampler(), torch.zeros(size), 1, mask) == token


def test_penalties_count_the_output_but_repetition_the_prompt_too() -> None:
    logits = [3.0, 2.9, 2.0, 1.0]
    assert greedy(logits, history=(0,), num_prompt=1, presence_penalty=2.0) == 0
    assert greedy(logits, history=(0,), num_prompt=1, repetition_penalty=2.0) == 1
    assert greedy(logits, history=(2, 0, 1), num_prompt=1, presence_penalty=1.5) == 2
    assert greedy(logits, history=(2, 0, 0, 1), num_prompt=1, frequency_penalty=0.5) == 1


def test_logprobs_are_the_log_softmax_with_rank_and_the_likeliest() -> None:
    logits = torch.tensor([1.0, 4.0, -torch.inf, 2.5, 4.0])
    expected = torch.log_softmax(logits, dim=0)
    found = logprobs_of(logits, 3, 3)
    assert (found.token_id, found.rank) == (3, 3)
    assert found.logprob == float(expected[3])
    assert {i for i, _ in found.top[:2]} == {1, 4}
    assert found.top[2] == (3, float(expected[3]))
    assert logprobs_of(logits, 1, 0).top == ()
    assert logprobs_of(logits, 1, 0).rank == 1
    assert logprobs_of(logits, 2, 20).logprob == -math.inf
    assert len(logprobs_of(logits, 2, 20).top) == 5, "a vocabulary smaller than asked for"


def test_sampling_one_token_of_a_real_vocabulary_takes_milliseconds() -> None:
    logits, row = torch.randn(49152), sampler()
    seconds = []
    for position in range(10):
        mine = logits.clone()
        start = time.thread_time()
        sample(row, mine, position)
        seconds.append(time.thread_time() - start)
    assert min(seconds) < 0.050
