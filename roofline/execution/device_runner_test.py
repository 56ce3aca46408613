"""A device that runs ahead gives the tokens of the runner that does not, whatever is asked of it.

The device is the CPU and the ops are the reference; a captured graph is a function that runs again.
"""

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from roofline.budget import RankBudget, plan_device_buffers, plan_rank
from roofline.config import EngineConfig
from roofline.engine import Engine, WorkerGroup
from roofline.errors import RooflineError
from roofline.execution import arena, kv_cache
from roofline.execution.device_program import padded_sizes
from roofline.execution.device_runner import MAX_IN_FLIGHT, DeviceRunner
from roofline.execution.runner_test import MODEL
from roofline.execution.workers import InProcessWorkers
from roofline.models.checkpoints.dummy import DummyCheckpoint
from roofline.models.decoder import Decoder
from roofline.models.layers import Source
from roofline.ops import StepInputs
from roofline.ops.reference import ReferenceOps
from roofline.parallel.mesh import Mesh
from roofline.request import Request, SamplingParams, TokenOutput
from roofline.scheduling.limits import SchedulerConfig
from roofline.scheduling.plan import StepPlan, StepResult
from roofline.scheduling.scheduler import Scheduler
from roofline.structured_outputs import mask_bytes

OPTIONS: dict[str, Any] = {
    "block_size": 8, "max_num_seqs": 5, "max_num_batched_tokens": 24, "max_model_len": 64,
    "kv_cache_memory_bytes": 10 * 2 * 2 * 2 * 8 * 16 * 2,  # 10 blocks: requests are preempted
    "cpu_isa": "reference", "group_size": 32,
}  # fmt: skip
ON_GPU: dict[str, Any] = {name: value for name, value in OPTIONS.items() if name != "cpu_isa"} | {
    "device": "cuda"
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Of torch: models this small only wait for a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Replays:
    """In place of CUDA graphs: what is captured is not run, and runs whenever it is replayed."""

    def __init__(self) -> None:
        self.captured = 0

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        self.captured += 1
        return run


class Watched(ReferenceOps):
    """The reference, writing down how large steps are; its padding may hold anything."""

    sizes: list[tuple[int, int]]

    def prepare_step(self, inputs: StepInputs) -> None:
        tokens, real = len(inputs.token_ids), int(inputs.query_start[-1])
        assert (inputs.slots[real:] == -1).all() and (inputs.slots[:real] >= 0).all()
        assert (inputs.token_ids >= 0).all()
        longest = int(inputs.query_start.diff().max())
        assert inputs.longest == longest or not real
        self.sizes.append((tokens, real))


class RunsAhead:
    """A `WorkerGroup` of one `DeviceRunner` on the CPU, with a GPU's memory plan."""

    max_in_flight = MAX_IN_FLIGHT

    def __init__(self, graphs: Any = None, **options: Any) -> None:
        checkpoint = DummyCheckpoint(MODEL, 0)
        config = EngineConfig(**ON_GPU | options)
        native = checkpoint.native_groups
        self.budget = plan_rank(MODEL, config, Mesh.single().rank, native, 1 << 40)
        source = Source(checkpoint, lambda name: None)
        decoder = Decoder(MODEL, self.budget.model, Mesh.single(), source)
        rank, step = Mesh.single().rank, self.budget.step
        self.cache = kv_cache.allocate(MODEL, config.kv_dtype, rank, self.budget.num_blocks, 8)
        buffers = arena.allocate(plan_device_buffers(MODEL, config, rank, step, self.budget.model))
        self.ops = Watched(torch.bfloat16, buffers["scratch"])
        self.ops.sizes = []
        self.runner = DeviceRunner(decoder, self.ops, self.cache, buffers, graphs=graphs)
        self.arena = buffers
        warmed: list[int] = []
        self.runner.warm_up(warmed.append)
        assert warmed == [1, 2, 16, 24] and not self.cache.values.float().any()
        self.ops.sizes.clear()

    def submit(self, plan: StepPlan) -> None:
        self.runner.submit(StepPlan.decode(plan.encode()))

    def collect(self) -> StepResult:
        return self.runner.collect()

    def reset(self) -> None:
        self.runner.reset()

    def close(self) -> None:
        pass


def at_once(**options: Any) -> InProcessWorkers:
    config = EngineConfig(**OPTIONS | options)
    return InProcessWorkers(config, DummyCheckpoint(MODEL, 0), lambda name: None)


def engine_of(workers: WorkerGroup, budget: RankBudget) -> Engine:
    config = SchedulerConfig(
        num_blocks=budget.num_blocks,
        block_tokens=8,
        max_num_seqs=5,
        max_num_batched_tokens=24,
        max_model_len=64,
        vocab_size=MODEL.vocab_size,
    )
    return Engine(Scheduler(config), workers)


class EveryThird:
    """A grammar: the token after t is one that leaves the remainder of t + 1 divided by three."""

    def __init__(self) -> None:
        self.state = 0

    def mask(self) -> bytes:
        bits = sum(1 << token for token in range(self.state, MODEL.vocab_size, 3))
        return bits.to_bytes(mask_bytes(MODEL.vocab_size), "little")

    def accept(self, token: int) -> bool:
        assert token % 3 == self.state
        self.state = (token + 1) % 3
        return False


def params_of(chance: random.Random) -> dict[str, Any]:
    """What one request asks for: mostly little, at times everything."""
    wanted: dict[str, Any] = {"temperature": chance.choice((0, 0.7, 1.3))}
    wanted["max_tokens"] = chance.choice((3, 4, 12, 25))
    extras: list[dict[str, Any]] = [
        {"logprobs": 3}, {"prompt_logprobs": 2}, {"top_p": 0.8}, {"top_k": 7, "min_p": 0.02},
        {"repetition_penalty": 1.4, "frequency_penalty": 0.3}, {"presence_penalty": 0.5},
        {"logit_bias": {5: 3.0, 9: -4.0}}, {"allowed_token_ids": [3, 17, 44, 90]},
        {"stop_token_ids": [1, 8, 22], "min_tokens": 3}, {"ignore_eos": True},
    ]  # fmt: skip
    for extra in extras:
        if chance.random() < 0.12:
            wanted |= extra
    return wanted


def requests_of(seed: int) -> list[Request]:
    chance = random.Random(seed)
    shared = [chance.randrange(150) for _ in range(24)]
    found: list[Request] = []
    for number in range(14):
        prompt = shared[: chance.choice((0, 0, 16, 24))]
        prompt = prompt + [chance.randrange(150) for _ in range(chance.randint(1, 12))]
        params = SamplingParams(**params_of(chance))
        matcher = EveryThird() if chance.random() < 0.15 and not params.allowed_token_ids else None
        bad_words = [[3, 4], [77]] if chance.random() < 0.1 else []
        found.append(
            Request(
                str(number),
                prompt,
                params,
                seed=seed + number,
                eos_token_ids=[149],
                bad_words_ids=bad_words,
                matcher=matcher,
            )
        )
    return found


def answers(engine: Engine, seed: int, aborted: set[str]) -> dict[str, list[TokenOutput]]:
    """Every request's outputs; some join late, some are aborted after a token or two."""
    chance = random.Random(seed)
    waiting, found = requests_of(seed), dict[str, list[TokenOutput]]()
    while waiting or engine.has_unfinished:
        while waiting and chance.random() < 0.5:
            engine.add(waiting.pop(0))
        for output in engine.step():
            mine = found.setdefault(output.request_id, [])
            mine.append(output)
            if output.request_id in aborted and len(mine) == 2:
                engine.abort(output.request_id)
    return found


def flat(outputs: list[TokenOutput]) -> list[Any]:
    """Tokens, logprobs and the reason for the end."""
    tokens = [token for output in outputs for token in output.token_ids]
    logprobs = [entry for output in outputs for entry in output.logprobs or ()]
    scored = [entry for output in outputs for entry in output.prompt_logprobs or ()]
    return [tokens, logprobs, scored, outputs[-1].finish_reason, outputs[-1].stop_reason]


@pytest.mark.parametrize("seed", range(1, 5))
def test_running_ahead_changes_no_token(seed: int) -> None:
    group, replays = at_once(), Replays()
    ahead = RunsAhead(replays)
    aborted = {"3", "7"}
    one = answers(engine_of(group, group.budget), seed, aborted)
    engine = engine_of(ahead, ahead.budget)
    other = answers(engine, seed, aborted)
    assert one.keys() == other.keys() == {str(n) for n in range(14)}
    for request_id, outputs in one.items():
        if request_id in aborted:  # one more token may have been on its way
            outputs, other[request_id] = outputs[:2], other[request_id][:2]
        assert flat(other[request_id]) == flat(outputs), request_id
    assert engine.stats().num_preemptions > 0 and engine.stats().prompt_tokens_cached > 0
    assert replays.captured > 2
    assert any(tokens > real for tokens, real in ahead.ops.sizes), "nothing was padded"


def test_two_plans_are_in_flight_and_the_second_does_not_know_the_token_of_the_first() -> None:
    ahead = RunsAhead()
    engine = engine_of(ahead, ahead.budget)
    engine.add(Request("a", [1, 2, 3], SamplingParams(max_tokens=5, ignore_eos=True), seed=0))
    engine.step()
    assert len(ahead.runner._pending) == 1, "a step runs while the last one's tokens are looked at"
    assert ahead.runner._pending[0].tokens is None


def test_logits_that_are_nan_are_told_and_the_next_request_is_answered() -> None:
    ahead = RunsAhead()
    engine = engine_of(ahead, ahead.budget)
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    engine.add(Request("a", [1, 2, 3], params, seed=0))
    kept = ahead.arena["rope"].clone()
    ahead.arena["rope"].fill_(torch.nan)
    with pytest.raises(RooflineError, match="NaN or infinite"):
        engine.step()
    assert not engine.has_unfinished and not ahead.runner._pending
    ahead.arena["rope"].copy_(kept)
    engine.add(Request("b", [1, 2, 3], params, seed=0))
    found: list[TokenOutput] = []
    while engine.has_unfinished:
        found += engine.step()
    assert sum(len(output.token_ids) for output in found) == 3


def test_memory_is_as_planned() -> None:
    for stored in ("auto", "int8", "fp8"):
        ahead = RunsAhead(kv_cache_dtype=stored)
        assert arena.storage_bytes(ahead.arena.values()) == ahead.budget.activation_bytes
        assert arena.storage_bytes(kv_cache.tensors(ahead.cache)) == ahead.budget.kv_bytes


@pytest.mark.parametrize("stored", ["int8", "fp8"])
def test_a_quantized_cache_gives_the_same_tokens_ahead_or_not(stored: str) -> None:
    group, ahead = at_once(kv_cache_dtype=stored), RunsAhead(kv_cache_dtype=stored)
    one = answers(engine_of(group, group.budget), 1, set())
    other = answers(engine_of(ahead, ahead.budget), 1, set())
    assert {k: flat(v) for k, v in one.items()} == {k: flat(v) for k, v in other.items()}


def test_steps_are_padded_to_few_sizes() -> None:
    assert padded_sizes(1) == [1]
    assert padded_sizes(5) == [1, 2, 4, 5]
    assert padded_sizes(30) == [1, 2, 4, 8, 16, 24, 30]
    assert padded_sizes(32) == [1, 2, 4, 8, 16, 24, 32]
