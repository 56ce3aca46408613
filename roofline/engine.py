"""The loop: plan a step, hand it to the workers, give what comes back to the requests.

It is given its workers and knows of them only this protocol: no torch, no devices, no text.
"""

from collections import deque
from typing import Protocol

from roofline.request import Request, TokenOutput
from roofline.scheduling.plan import StepPlan, StepResult
from roofline.scheduling.scheduler import Scheduler, SchedulerStats


class WorkerGroup(Protocol):
    """Every rank of one model, as the loop sees it: plans in, results out, in the same order."""

    max_in_flight: int  # plans it can take before a result must be collected

    def submit(self, plan: StepPlan) -> None:
        """Start a step; returns before it is done where the workers can run ahead."""
        ...

    def collect(self) -> StepResult:
        """Wait for the oldest submitted step; a failure of any rank is raised here."""
        ...

    def reset(self) -> None:
        """Drop the results that were not collected."""
        ...

    def close(self) -> None:
        """Stop the ranks and free their memory."""
        ...


class Engine:
    """Continuous batching over a scheduler and a group of workers; one thread at a time."""

    def __init__(self, scheduler: Scheduler, workers: WorkerGroup) -> None:
        self._scheduler = scheduler
        self._workers = workers
        self._in_flight: deque[StepPlan] = deque()

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has anything left to do."""
        return self._scheduler.has_unfinished or bool(self._in_flight)

    def check_request(self, request: Request) -> None:
        """RequestError or CapacityError if it could never finish; from any thread."""
        self._scheduler.config.check_request(request)

    def add(self, request: Request) -> None:
        """Queue a request; RequestError or CapacityError if it could never finish."""
        self._scheduler.add(request)

    def abort(self, request_id: str) -> bool:
        """End a request without another output; False if it was not alive."""
        return self._scheduler.abort(request_id)

    def step(self) -> list[TokenOutput]:
        """Keep the workers supplied with plans, and return what the oldest one brought.

        A step that fails ends every request, without another output; the next one starts afresh.
        """
        try:
            while len(self._in_flight) < self._workers.max_in_flight:
                plan = self._scheduler.schedule()
                if plan is None:
                    break
                self._in_flight.append(plan)
                self._workers.submit(plan)
            if not self._in_flight:
                return []
            result = self._workers.collect()
            return self._scheduler.update(self._in_flight.popleft(), result)
        except BaseException:  # an interrupt too: not all that was planned has been computed
            self._scheduler.reset()
            self._workers.reset()
            self._in_flight.clear()
            raise

    def stats(self) -> SchedulerStats:
        """Count where every request and block is; from any thread."""
        return self._scheduler.stats()

    def close(self) -> None:
        """Stop the workers; requests still alive are lost."""
        self._workers.close()
