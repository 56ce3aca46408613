"""What structured outputs cost: masking as a share of a decoding step, every request with a schema.

    python benchmarks/structured_outputs.py [--model smollm2-135m] [--requests 8] [--steps 60]

Masking is all that a step without grammars lacks: matchers take a token and make the next mask, the
plan's encoding carries the masks, and each row of logits is masked. Asked for: under 10 % at batch
8. Also how long the first request waits for the vocabulary. The last line is one JSON document.
"""

import argparse
import json
import statistics
import time

import torch

from roofline.config import EngineConfig, ModelConfig
from roofline.engine import Engine
from roofline.execution.sampling import keep_allowed
from roofline.execution.workers import InProcessWorkers
from roofline.grammars.compiler import GrammarCompiler
from roofline.grammars.matching import Vocabulary
from roofline.models.opening import OpenedModel, open_model
from roofline.request import Request, SamplingParams
from roofline.scheduling.limits import SchedulerConfig
from roofline.scheduling.plan import RowStart, StepPlan
from roofline.scheduling.scheduler import Scheduler
from roofline.structured_outputs import StructuredOutputsParams, TokenMatcher
from roofline.tokenizer import Tokenizer

LIMIT = 0.10
SCHEMA = {
    "type": "array",
    "minItems": 99,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "kind": {"enum": ["bird", "fish", "insect"]},
            "weight": {"type": "number", "minimum": 0, "maximum": 1000},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 8}},
        },
        "required": ["name", "kind", "weight"],
        "additionalProperties": False,
    },
}


class TimedMatcher:
    """A matcher, and what it took."""

    def __init__(self, inner: TokenMatcher) -> None:
        self._inner, self.seconds = inner, list[float]()

    def mask(self) -> bytes | None:
        """As the inner one."""
        return self._inner.mask()

    def accept(self, token: int) -> bool:
        """As the inner one, timed."""
        started = time.perf_counter()
        done = self._inner.accept(token)
        self.seconds.append(time.perf_counter() - started)
        return done


def main() -> None:
    """Measure, print a line for a person and one for a machine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    figures = measure(arguments.model, arguments.requests, arguments.steps)
    print(
        f"masking {figures['masking_ms_p50']} ms of a step of {figures['step_ms_p50']} ms: "
        f"{figures['share']:.2%}, asked under {LIMIT:.0%}"
    )
    print(json.dumps({"benchmark": "structured_outputs", **vars(arguments), **figures}))


def measure(model: str, requests: int, steps: int) -> dict[str, float]:
    """Decode side by side for some steps, then mask logits by themselves; medians."""
    opened = open_model(model, EngineConfig())
    tokenizer, shape = opened.tokenizer, opened.config
    assert tokenizer is not None
    compiler = GrammarCompiler(tokenizer, shape.eos_token_ids, shape.vocab_size)
    params = SamplingParams(
        n=requests, structured_outputs=StructuredOutputsParams(json=SCHEMA), max_tokens=steps + 1
    )
    matchers = [TimedMatcher(each) for each in compiler.matchers(params) if each is not None]
    masks = [matcher.mask() for matcher in matchers]
    prompt = tokenizer.encode("A list of animals as JSON: ")
    step_s = _step_seconds(
        _engine(opened, requests, len(prompt) + steps + 1),
        [
            Request(f"{index}", prompt, params, seed=index, matcher=matcher)
            for index, matcher in enumerate(matchers)
        ],
        steps,
    )
    compiler.close()
    matching_s = [sum(of_step) for of_step in zip(*(m.seconds for m in matchers), strict=True)]
    encode_s = [_encode_seconds(masks) - _encode_seconds([None] * requests) for _ in range(200)]
    apply_s = [requests * _apply_seconds(m, shape.vocab_size) for m in masks for _ in range(25)]
    parts = {
        "matching": statistics.median(matching_s),
        "encode": statistics.median(encode_s),
        "apply": statistics.median(apply_s),
    }
    masking, step = sum(parts.values()), statistics.median(step_s)
    figures = {f"{name}_us_p50": round(1e6 * seconds, 1) for name, seconds in parts.items()}
    figures |= {"masking_ms_p50": round(1e3 * masking, 3), "step_ms_p50": round(1e3 * step, 1)}
    figures |= {"share": round(masking / step, 5), "limit": LIMIT}
    return figures | {"vocabulary_ms": _vocabulary_ms(tokenizer, shape)}


def _engine(opened: OpenedModel, requests: int, max_model_len: int) -> Engine:
    config = EngineConfig(max_model_len=max_model_len, max_num_seqs=requests)
    workers = InProcessWorkers(config, opened.checkpoint, lambda name: None)
    opened.checkpoint.close()
    sizes = SchedulerConfig(
        num_blocks=workers.budget.num_blocks,
        block_tokens=config.block_size,
        max_num_seqs=requests,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=max_model_len,
        vocab_size=opened.config.vocab_size,
    )
    return Engine(Scheduler(sizes), workers)


def _step_seconds(engine: Engine, requests: list[Request], steps: int) -> list[float]:
    for request in requests:
        engine.add(request)
    seconds: list[float] = []
    for _ in range(steps + 1):
        started = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - started)
    assert all(request.num_output == steps + 1 for request in requests)
    return seconds[1:]  # the first is the prompts'


def _encode_seconds(masks: list[bytes | None]) -> float:
    plan = StepPlan(0)
    for row, mask in enumerate(masks):
        plan.add(row, 0, [1], 1, [], mask)
    started = time.perf_counter()
    plan.encode()
    return time.perf_counter() - started


def _apply_seconds(mask: bytes | None, vocab_size: int) -> float:
    logits, start = torch.zeros(vocab_size), RowStart(row=0, num_prompt=1, seed=0)
    started = time.perf_counter()
    keep_allowed(logits, start, mask)
    return time.perf_counter() - started


def _vocabulary_ms(tokenizer: Tokenizer, shape: ModelConfig) -> float:
    seconds: list[float] = []
    for _ in range(5):
        started = time.perf_counter()
        Vocabulary(tokenizer, shape.eos_token_ids, shape.vocab_size)
        seconds.append(time.perf_counter() - started)
    return round(1e3 * statistics.median(seconds), 1)


if __name__ == "__main__":
    main()
