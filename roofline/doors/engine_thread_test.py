"""The engine's thread on workers without a model: its order, its sleep, its failures, its end."""

import time
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any

import pytest

from roofline.doors.engine_thread import EngineThread
from roofline.engine import Engine
from roofline.request import Request, SamplingParams
from roofline.scheduling.plan import StepPlan, StepResult
from roofline.scheduling.scheduler import Scheduler
from roofline.scheduling.scheduler_test import KvWorkers, answer, config_of

CONFIG = config_of()
PROMPT = [1, 2, 3]


class Workers(KvWorkers):
    """Counts steps, and fails the next one if told to."""

    def __init__(self) -> None:
        super().__init__(CONFIG)
        self.steps, self.fails = 0, False

    def submit(self, plan: StepPlan) -> None:
        self.steps += 1
        super().submit(plan)

    def collect(self) -> StepResult:
        if self.fails:
            self.fails = False
            raise SystemExit("a rank is gone")
        return super().collect()


class Served:
    """A thread and all it brought."""

    def __init__(self) -> None:
        self.workers = Workers()
        self.engine = Engine(Scheduler(CONFIG), self.workers)
        self.heard: SimpleQueue[Any] = SimpleQueue()
        self.thread = EngineThread(self.engine, self.heard.put, self.heard.put)

    def request(self, name: str, max_tokens: int = 5) -> Request:
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        return self.workers.expect(Request(name, PROMPT, sampling, seed=len(name)))

    def tokens_until_finished(self, count: int) -> dict[str, list[int]]:
        tokens: dict[str, list[int]] = {}
        while count:
            for output in self.heard.get(timeout=20):
                tokens.setdefault(output.request_id, []).extend(output.token_ids)
                count -= output.finish_reason is not None
        return tokens


@pytest.fixture
def served() -> Iterator[Served]:
    made = Served()
    yield made
    made.thread.close()


def test_requests_are_answered_and_then_the_thread_sleeps(served: Served) -> None:
    one, two = served.request("a"), served.request("bb")
    served.thread.add([one, two])
    wanted = {request.request_id: answer(request, CONFIG, PROMPT)[0] for request in (one, two)}
    assert served.tokens_until_finished(2) == wanted
    own = served.thread._thread.ident
    assert served.workers.steps == 5 and own is not None
    clock = time.pthread_getcpuclockid(own)
    time.sleep(0.1)  # it comes to its wait
    started = time.clock_gettime(clock)
    time.sleep(0.2)
    assert served.workers.steps == 5
    assert time.clock_gettime(clock) - started < 0.05


def test_what_is_aborted_before_its_first_step_never_runs(served: Served) -> None:
    served.thread.add([served.request("a", 30)])
    for name in ("bb", "ccc"):
        served.thread.add([served.request(name)])
        served.thread.abort(name)
    served.thread.abort("unknown")
    assert served.tokens_until_finished(1).keys() == {"a"}
    assert served.engine.stats().num_used_blocks == 0


def test_whatever_ends_a_step_is_reported_and_the_next_request_runs(served: Served) -> None:
    served.workers.fails = True
    served.thread.add([served.request("a"), served.request("bb")])
    assert str(served.heard.get(timeout=20)) == "a rank is gone"
    again = served.request("ccc")
    served.thread.add([again])
    assert served.tokens_until_finished(1) == {"ccc": answer(again, CONFIG, PROMPT)[0]}


def test_closing_stops_in_the_middle_once_and_for_all(served: Served) -> None:
    served.thread.add([served.request("a", 60)])
    served.heard.get(timeout=20)
    served.thread.close()
    assert not served.thread._thread.is_alive()
    served.thread.abort("a")  # a stream forgotten later asks nobody
    served.thread.close()
