import random
import subprocess
import sys

import pytest

from roofline.engine import Engine
from roofline.errors import RequestError
from roofline.request import Request, SamplingParams, child_seed
from roofline.scheduling.limits import SchedulerConfig
from roofline.scheduling.plan import StepPlan, StepResult
from roofline.scheduling.scheduler import Scheduler
from roofline.scheduling.scheduler_test import KvWorkers, answer, config_of

CONFIG = config_of(num_blocks=20)


def engine_of(config: SchedulerConfig, max_in_flight: int = 1) -> tuple[Engine, KvWorkers]:
    workers = KvWorkers(config, max_in_flight)
    return Engine(Scheduler(config), workers), workers


def run_all(engine: Engine) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    while engine.has_unfinished:
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
    return tokens


@pytest.mark.parametrize("max_in_flight", [1, 2, 3])
def test_every_request_gets_its_own_answer_however_many_plans_are_in_flight(
    max_in_flight: int,
) -> None:
    chance = random.Random(max_in_flight)
    engine, workers = engine_of(CONFIG, max_in_flight)
    wanted: dict[str, list[int]] = {}
    for index in range(30):
        prompt = [chance.randrange(4, 60) for _ in range(chance.randint(1, 40))]
        sampling = SamplingParams(max_tokens=chance.choice((1, 5, 20)))
        request = Request(f"r{index}", prompt, sampling, seed=index, eos_token_ids=[3])
        engine.add(workers.expect(request))
        wanted[request.request_id], _ = answer(request, CONFIG, prompt)
    assert run_all(engine) == wanted
    stats = engine.stats()
    assert stats.num_preemptions > 0
    assert stats.generation_tokens == sum(map(len, wanted.values()))
    assert stats.num_requests == 30


def test_children_of_one_request_answer_differently_and_always_the_same() -> None:
    def answers() -> dict[str, list[int]]:
        engine, workers = engine_of(CONFIG)
        sampling = SamplingParams(n=3, max_tokens=8, ignore_eos=True)
        for index in range(sampling.n):
            seed = child_seed(11, index)
            engine.add(workers.expect(Request(f"c{index}", [1, 2, 3], sampling, seed=seed)))
        return run_all(engine)

    first = answers()
    assert answers() == first
    assert len({tuple(tokens) for tokens in first.values()}) == 3


def test_a_request_may_be_ended_from_outside_between_two_steps() -> None:
    engine, workers = engine_of(CONFIG, max_in_flight=2)
    for index in range(2):
        sampling = SamplingParams(max_tokens=30, ignore_eos=True)
        engine.add(workers.expect(Request(f"r{index}", [1, index], sampling, seed=index)))
    engine.step()
    assert engine.abort("r0")
    assert not engine.abort("r0")
    tokens = run_all(engine)
    assert "r0" not in tokens
    assert len(tokens["r1"]) == 29
    assert engine.stats().num_used_blocks == 0


def test_a_step_without_requests_does_nothing() -> None:
    engine, workers = engine_of(CONFIG)
    assert engine.step() == []
    assert not engine.has_unfinished
    assert not workers.plans


def test_plans_in_flight_are_collected_before_the_engine_is_done() -> None:
    engine, workers = engine_of(CONFIG, max_in_flight=3)
    request = Request("a", [1], SamplingParams(ignore_eos=True), seed=0)
    engine.add(workers.expect(request))
    engine.step()
    engine.abort("a")
    assert engine.has_unfinished
    run_all(engine)
    assert not workers.plans


def test_a_refused_request_leaves_the_engine_as_it_was() -> None:
    engine, workers = engine_of(CONFIG)
    before = engine.stats()
    with pytest.raises(RequestError):
        engine.add(Request("a", [], SamplingParams(), seed=0))
    assert engine.stats() == before
    engine.add(workers.expect(Request("a", [1], SamplingParams(max_tokens=2), seed=0)))
    assert len(run_all(engine)["a"]) == 2


class DeadRankError(Exception):
    pass


class FailingWorkers:
    """A group whose rank dies while it is handed a plan, or while its result is awaited."""

    max_in_flight = 1

    def __init__(self, dies_at: str) -> None:
        self.dies_at = dies_at
        self.closed = False

    def submit(self, plan: StepPlan) -> None:
        self.die("submit")

    def collect(self) -> StepResult:
        self.die("collect")
        return StepResult([1], [1])

    def reset(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True

    def die(self, here: str) -> None:
        if here == self.dies_at:
            raise DeadRankError(f"rank 3 died at {here}")


@pytest.mark.parametrize("dies_at", ["submit", "collect"])
def test_a_failure_of_the_workers_reaches_the_caller_as_it_is(dies_at: str) -> None:
    workers = FailingWorkers(dies_at)
    engine = Engine(Scheduler(CONFIG), workers)
    engine.add(Request("a", [1], SamplingParams(), seed=0))
    with pytest.raises(DeadRankError, match=f"rank 3 died at {dies_at}"):
        engine.step()
    engine.close()
    assert workers.closed


class StumblingWorkers(KvWorkers):
    """Fail the n-th call, as an interrupt would, before anything is computed."""

    fails_in = 0

    def submit(self, plan: StepPlan) -> None:
        self.stumble()
        super().submit(plan)

    def collect(self) -> StepResult:
        self.stumble()
        return super().collect()

    def stumble(self) -> None:
        self.fails_in -= 1
        if not self.fails_in:
            raise KeyboardInterrupt


@pytest.mark.parametrize("max_in_flight", [1, 2])
@pytest.mark.parametrize("fails_in", range(1, 12))
def test_after_a_failed_step_the_next_request_reads_nothing_that_was_not_computed(
    max_in_flight: int, fails_in: int
) -> None:
    workers = StumblingWorkers(CONFIG, max_in_flight)
    scheduler = Scheduler(CONFIG)
    engine = Engine(scheduler, workers)
    prompt, sampling = [7] * 40, SamplingParams(max_tokens=5)
    for turn in range(3):
        request = Request(f"r{turn}", prompt, sampling, seed=turn)
        engine.add(workers.expect(request))
        workers.fails_in = 0 if turn == 2 else fails_in
        try:
            tokens = run_all(engine)
        except KeyboardInterrupt:
            scheduler.check()
            assert not engine.has_unfinished and engine.stats().num_used_blocks == 0
            continue
        wanted, _ = answer(request, CONFIG, prompt)
        assert tokens == {request.request_id: wanted}


def test_the_engine_imports_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, roofline.engine\n"
        "sys.exit(', '.join({'torch', 'numpy'} & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
