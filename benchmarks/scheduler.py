"""How long planning takes: schedule + update over requests that all decode, in microseconds a step.

    python benchmarks/scheduler.py [--requests 256] [--in-flight 1]

DESIGN.md allows 1 ms at 256 requests. Pure Python on one core; the last line is one JSON document.
"""

import argparse
import gc
import json
import statistics
import time
from collections import deque

from roofline.request import Request, SamplingParams
from roofline.scheduling.plan import StepPlan, StepResult
from roofline.scheduling.scheduler import Scheduler, SchedulerConfig

BLOCK_TOKENS = 16
LIMIT_US = 1000.0


def main() -> None:
    """Measure, print a line for a person and one for a machine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--in-flight", type=int, default=1, help="plans before a result arrives")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=1000)
    arguments = parser.parse_args()
    figures = measure(
        arguments.requests, arguments.in_flight, arguments.prompt_tokens, arguments.steps
    )
    print(f"median {figures['schedule_update_us_p50']:.0f} us a step, limit {LIMIT_US:.0f} us")
    print(json.dumps({"benchmark": "scheduler", **vars(arguments), **figures}))


def measure(requests: int, in_flight: int, prompt_tokens: int, steps: int) -> dict[str, float]:
    """Decode `requests` prompts side by side for `steps` steps, with results `in_flight` late."""
    scheduler = _decoding(requests, prompt_tokens, steps)
    plans: deque[StepPlan] = deque()
    columns: dict[str, list[float]] = {"schedule": [], "update": [], "encode": []}
    for step in range(steps + in_flight):
        started = time.perf_counter()
        plan = scheduler.schedule()
        planned = time.perf_counter()
        assert plan is not None and len(plan.rows) == requests
        plan.encode()
        encoded = time.perf_counter()
        plans.append(plan)
        columns["schedule"].append(planned - started)
        columns["encode"].append(encoded - planned)
        if len(plans) < in_flight:
            continue
        oldest = plans.popleft()
        result = StepResult(list(oldest.samples), [step % 1000] * requests)
        started = time.perf_counter()
        scheduler.update(oldest, result)
        columns["update"].append(time.perf_counter() - started)
    both = [a + b for a, b in zip(columns["schedule"], columns["update"], strict=False)]
    figures = {f"{name}_us_p50": 1e6 * statistics.median(times) for name, times in columns.items()}
    figures["schedule_update_us_p50"] = 1e6 * statistics.median(both)
    figures["schedule_update_us_p99"] = 1e6 * statistics.quantiles(both, n=100)[-1]
    figures["limit_us"] = LIMIT_US
    return {name: round(value, 1) for name, value in figures.items()}


def _decoding(requests: int, prompt_tokens: int, steps: int) -> Scheduler:
    """Return a scheduler whose requests have all computed their prompts but the last token."""
    length = prompt_tokens + steps + 16
    scheduler = Scheduler(
        SchedulerConfig(
            num_blocks=requests * -(-length // BLOCK_TOKENS),
            block_tokens=BLOCK_TOKENS,
            max_num_seqs=requests,
            max_num_batched_tokens=requests * prompt_tokens,
            max_model_len=length,
            vocab_size=50_000,
        )
    )
    for index in range(requests):
        # Prompts of lengths spread over a block, so that block boundaries are spread over steps.
        prompt = [index + 1] * (prompt_tokens - index % BLOCK_TOKENS)
        sampling = SamplingParams(ignore_eos=True)
        scheduler.add(Request(f"request-{index}", prompt, sampling, seed=index))
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.update(plan, StepResult(list(plan.samples), [7] * requests))
    gc.collect()
    return scheduler


if __name__ == "__main__":
    main()
