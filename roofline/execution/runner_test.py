"""One rank runs plans: what it samples and scores is what its own logits say."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from roofline.budget import Rank, StepShape, plan_model, plan_step_buffers
from roofline.config import ModelConfig, WeightFormat
from roofline.errors import RooflineError
from roofline.execution import arena, kv_cache
from roofline.execution.runner import ModelRunner
from roofline.execution.sampling import logprobs_of
from roofline.models.checkpoints.dummy import DummyCheckpoint
from roofline.models.decoder import Decoder
from roofline.models.layers import Source
from roofline.ops.reference import ReferenceOps
from roofline.parallel.mesh import Mesh
from roofline.request import TokenLogprobs
from roofline.scheduling.plan import ON_DEVICE, RowStart, StepPlan, StepResult

MODEL = ModelConfig(
    hidden_size=48,
    intermediate_size=80,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=150,
    max_position=64,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    tie_word_embeddings=False,
)
BLOCK, BLOCKS_A_ROW = 8, 8
PROMPT = [(i * 53 + 7) % 150 for i in range(37)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Of torch: models this small only wait for a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Driver:
    """A runner, and plans for it: row r owns blocks 8 r to 8 r + 7."""

    def __init__(self, rows: int = 3) -> None:
        checkpoint = DummyCheckpoint(MODEL, 3)
        weights = WeightFormat("int8", 32)
        plan = plan_model(MODEL, weights, Rank(), checkpoint.native_groups)
        self.decoder = Decoder(MODEL, plan, Mesh.single(), Source(checkpoint, lambda name: None))
        step = StepShape(128, rows, MODEL.max_position, BLOCK)
        buffers = arena.allocate(plan_step_buffers(MODEL, "bfloat16", Rank(), step))
        pool = kv_cache.allocate(MODEL, "bfloat16", Rank(), rows * BLOCKS_A_ROW, BLOCK)
        ops = ReferenceOps(torch.bfloat16, buffers["scratch"])
        self.runner = ModelRunner(self.decoder, ops, pool, buffers)
        self.seen: list[Tensor] = []  # logits of every call of the head

    def start(self, row: int, num_prompt: int = len(PROMPT), **params: Any) -> RowStart:
        defaults: dict[str, Any] = {"seed": 5, "temperature": 0.0}
        return RowStart(row=row, num_prompt=num_prompt, **defaults | params)

    def step(self, *entries: tuple[int, int, list[int], int], starts: Any = ()) -> StepResult:
        """Entries of (row, position, token ids, samples)."""
        plan = StepPlan(0, list(starts))
        for row, position, ids, samples in entries:
            first, last = -(-position // BLOCK), -(-(position + len(ids)) // BLOCK)
            blocks = [row * BLOCKS_A_ROW + block for block in range(first, last)]
            plan.add(row, position, ids, samples, blocks)
        return self.runner.run(plan)

    def generate(self, row: int, count: int, start: RowStart, chunk: int = 64) -> list[StepResult]:
        """A prompt in chunks, then decoding of the last token where it lies."""
        results = []
        for first in range(0, len(PROMPT), chunk):
            ids = PROMPT[first : first + chunk]
            last = first + len(ids) == len(PROMPT)
            starts = [start] if first == 0 else []
            results.append(self.step((row, first, ids, int(last)), starts=starts))
        for position in range(len(PROMPT), len(PROMPT) + count - 1):
            results.append(self.step((row, position, [ON_DEVICE], 1)))
        return results


def sampled(results: list[StepResult]) -> list[int]:
    return [token for result in results for token in result.token_ids]


def logits_at_every_position(ids: list[int]) -> Tensor:
    """Logits [n, V] of a sequence, one token at a time, from a runner of its own."""
    driver = Driver()
    rows = []
    for position, token in enumerate(ids):
        start = [driver.start(0, num_prompt=1)] if position == 0 else []
        driver.step((0, position, [token], 1), starts=start)
        rows.append(driver.runner._arena["logits"][0].clone())
    return torch.stack(rows)


def test_greedy_tokens_are_the_argmax_of_the_logits() -> None:
    driver = Driver()
    tokens = sampled(driver.generate(1, 12, driver.start(1)))
    logits = logits_at_every_position(PROMPT + tokens)
    assert tokens == logits[len(PROMPT) - 1 : -1].argmax(dim=1).tolist()
    assert len(set(tokens)) > 2


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_logprobs_are_those_of_the_models_own_logits(chunk: int, rows: int) -> None:
    """The head scores prompts in slices of 16 tokens, or of as many as there are rows."""
    driver = Driver(rows)
    start = driver.start(0, prompt_logprobs=3, logprobs=2, history=tuple(PROMPT))
    results = driver.generate(0, 4, start, chunk)
    tokens = sampled(results)
    expected = logits_at_every_position(PROMPT + tokens)
    scored = [score for result in results for score in result.prompt_logprobs.get(0, [])]
    assert scored == [
        logprobs_of(logits, target, 3) for logits, target in zip(expected, PROMPT[1:], strict=False)
    ]
    answers = [score for result in results for score in result.logprobs.get(0, [])]
    after = expected[len(PROMPT) - 1 :]
    assert answers == [logprobs_of(lo, t, 2) for lo, t in zip(after, tokens, strict=False)]


def test_logprobs_are_raw_whatever_the_sampling_does_to_the_logits() -> None:
    driver, biased = Driver(), Driver()
    plain = driver.generate(0, 1, driver.start(0, logprobs=5))
    twisted = biased.start(
        0,
        logprobs=5,
        temperature=3.0,
        logit_bias=((4, 50.0),),
        repetition_penalty=2.0,
        top_k=1,
        history=tuple(PROMPT),
    )
    answer = biased.generate(0, 1, twisted)
    (raw,), (found,) = plain[-1].logprobs[0], answer[-1].logprobs[0]
    assert sampled(answer) == [4] != [raw.token_id]
    assert found.top == raw.top
    assert isinstance(found, TokenLogprobs) and found.rank > 1


def test_results_follow_the_plans_order_and_not_that_of_rows() -> None:
    driver = Driver()
    starts = [driver.start(row, logprobs=0) for row in (2, 0, 1)]
    result = driver.step(
        (2, 0, PROMPT, 1), (0, 0, PROMPT[:5], 0), (1, 0, PROMPT[3:], 1), starts=starts
    )
    alone, other = Driver(), Driver()
    first = alone.step((0, 0, PROMPT, 1), starts=[alone.start(0)])
    second = other.step((0, 0, PROMPT[3:], 1), starts=[other.start(0)])
    assert result.counts == [1, 0, 1]
    assert result.token_ids == first.token_ids + second.token_ids
    assert sorted(result.logprobs) == [0, 2]
    assert [result.logprobs[i][0].token_id for i in (0, 2)] == result.token_ids


def test_a_row_started_again_knows_nothing_of_its_last_request() -> None:
    driver = Driver()
    looks_back = {"history": tuple(PROMPT), "bad_words": ((1, 2),), "presence_penalty": 1.0}
    driver.generate(0, 20, driver.start(0, **looks_back))
    again = sampled(driver.generate(0, 6, driver.start(0)))
    fresh = Driver()
    assert again == sampled(fresh.generate(0, 6, fresh.start(0)))


def test_a_request_that_goes_on_after_preemption_samples_the_same_tokens() -> None:
    params = {"temperature": 1.0, "seed": 2**64 - 1, "presence_penalty": 0.5}
    driver = Driver()
    whole = sampled(driver.generate(0, 10, driver.start(0, history=tuple(PROMPT), **params)))
    known = PROMPT + whole[:4]
    again = Driver()
    start = again.start(2, history=tuple(known), **params)
    first = again.step((2, 0, known, 1), starts=[start])
    rest = [again.step((2, len(known) + i, [ON_DEVICE], 1)) for i in range(5)]
    assert sampled([first, *rest]) == whole[4:]


def test_a_step_that_samples_nothing_leaves_the_head_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = Driver()
    monkeypatch.setattr(driver.decoder, "logits", None)
    result = driver.step((0, 0, PROMPT[:4], 0), starts=[driver.start(0)])
    assert (result.counts, result.token_ids, result.logprobs) == ([0], [], {})


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_are_an_error_that_says_so(poison: float) -> None:
    driver = Driver()
    norm = driver.decoder.norm
    assert norm is not None
    norm.fill_(poison)
    with pytest.raises(
        RooflineError, match="logits are NaN or infinite: its weights or its config"
    ):
        driver.step((0, 0, PROMPT, 1), starts=[driver.start(0)])


def test_the_prompt_is_scored_by_the_request_alone() -> None:
    """A row without prompt_logprobs beside one with them."""
    driver = Driver()
    asking = dataclasses.replace(driver.start(1), prompt_logprobs=0, history=tuple(PROMPT))
    result = driver.step((0, 0, PROMPT, 1), (1, 0, PROMPT, 1), starts=[driver.start(0), asking])
    assert list(result.prompt_logprobs) == [1]
    assert [score.token_id for score in result.prompt_logprobs[1]] == PROMPT[1:]
    later = driver.step((0, 37, [ON_DEVICE], 1), (1, 37, [ON_DEVICE], 1))
    assert later.prompt_logprobs == {1: []}
