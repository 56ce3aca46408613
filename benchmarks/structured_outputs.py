"""What masking costs a decoding step: following grammars, masks in the plan, masks over logits.

    python benchmarks/structured_outputs.py [MODEL] [--batch-size 8] [--output-len 96]

Asked for is less than 10 % of a step. Rounds with and without a grammar take turns; the parts are
timed one by one over what was answered. The last line is one JSON document.
"""

import argparse
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from roofline import LLM, SamplingParams, StructuredOutputsParams
from roofline.execution.sampling import RowSampler
from roofline.grammars.compiler import GrammarCompiler
from roofline.request import Request
from roofline.scheduling.plan import RowStart, StepPlan
from roofline.structured_outputs import TokenMatcher

LIMIT = 0.10
# No answer is done before it is cut off, and most of what people ask for is met on the way.
SCHEMA: dict[str, Any] = {
    "type": "array",
    "minItems": 50,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 24},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "role": {"enum": ["admin", "editor", "reader"]},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 4},
        },
        "required": ["name", "age", "role", "tags"],
        "additionalProperties": False,
    },
}


def main() -> None:
    """Measure, print a line for a person and one for a machine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--output-len", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with LLM(arguments.model, max_model_len=512, max_num_seqs=arguments.batch_size) as llm:
        figures = measure(llm, arguments.batch_size, arguments.output_len, arguments.rounds)
    print(
        f"masking takes {figures['masking_ms_p50']:.2f} ms of a step of "
        f"{figures['masked_step_ms_p50']:.1f} ms: {figures['share']:.1%}, limit {LIMIT:.0%}"
    )
    print(json.dumps({"benchmark": "structured_outputs", **vars(arguments), **figures}))


def measure(llm: LLM, batch_size: int, output_len: int, rounds: int) -> dict[str, float]:
    """Medians over `rounds`, after one that is not counted."""
    free = SamplingParams(n=batch_size, seed=1, max_tokens=output_len, ignore_eos=True)
    asked = StructuredOutputsParams(json=SCHEMA)
    masked = SamplingParams(
        n=batch_size, seed=1, max_tokens=output_len, ignore_eos=True, structured_outputs=asked
    )
    _round(llm, free), _round(llm, masked)
    free_ms, masked_ms, answers = list[float](), list[float](), list[list[int]]()
    for _ in range(rounds):
        free_ms += _round(llm, free)[0]
        times, answers = _round(llm, masked)
        masked_ms += times
    parts = _parts(llm, masked, answers)
    masking_ms = sum(parts.values())
    step_ms = statistics.median(masked_ms)
    return {
        "free_step_ms_p50": round(statistics.median(free_ms), 3),
        "masked_step_ms_p50": round(step_ms, 3),
        "fastest_step_ms": round(min(free_ms), 3),
        **{f"{name}_ms_p50": round(part, 4) for name, part in parts.items()},
        "masking_ms_p50": round(masking_ms, 4),
        "share": round(masking_ms / step_ms, 4),
        "share_of_fastest_step": round(masking_ms / min(free_ms), 4),
        "limit": LIMIT,
    }


def _round(llm: LLM, params: SamplingParams) -> tuple[list[float], list[list[int]]]:
    """Milliseconds of each decoding step, in which all n answers grow together, and their ids."""
    arrivals, answers = list[float](), list[list[int]]()
    for output in llm.generate("Some people, as JSON:\n", params, stream=True):
        arrivals.append(1e3 * time.perf_counter())
        answers = [list(each.token_ids) for each in output.outputs]
    decoding = arrivals[1:]  # the first step computes the prompts
    return [end - start for start, end in itertools.pairwise(decoding)], answers


def _parts(llm: LLM, params: SamplingParams, answers: list[list[int]]) -> dict[str, float]:
    """Median milliseconds of a step for each thing that a grammar adds to it."""
    shape = llm.model_config
    compiler = GrammarCompiler(llm.get_tokenizer(), shape.eos_token_ids, shape.vocab_size)
    matchers = [matcher for matcher in compiler.matchers(params) if matcher is not None]
    compiler.close()
    follow, encode, apply = list[float](), list[float](), list[float]()
    for tokens in zip(*answers, strict=True):
        follow.append(_ms(functools.partial(_accept, matchers, tokens)))
        masks = [matcher.mask() for matcher in matchers]
        encode.append(_ms(_plan(masks).encode) - _ms(_plan([None] * len(masks)).encode))
        apply.append(_applied(shape.vocab_size, masks))
    parts = {"follow": follow, "encode": encode, "apply": apply}
    return {name: statistics.median(times) for name, times in parts.items()}


def _accept(matchers: list[TokenMatcher], tokens: tuple[int, ...]) -> None:
    for matcher, token in zip(matchers, tokens, strict=True):
        matcher.accept(token)


def _plan(masks: list[bytes | None]) -> StepPlan:
    plan = StepPlan(0)
    for row, mask in enumerate(masks):
        plan.add(row, 100, [7], 1, [], mask)
    return plan


def _applied(vocab_size: int, masks: list[bytes | None]) -> float:
    """Milliseconds to prepare rows of logits with masks, beyond those it takes without."""
    logits = torch.randn(len(masks), vocab_size)
    request = Request("0-0", [1], SamplingParams(), seed=1)
    samplers = [RowSampler(RowStart.of(request)) for _ in masks]

    def prepare(of: list[bytes | None]) -> None:
        for sampler, row, mask in zip(samplers, logits, of, strict=True):
            sampler.prepare(row, 100, mask)

    with torch.inference_mode():
        without = _ms(lambda: prepare([None] * len(masks)))
        return _ms(lambda: prepare(masks)) - without


def _ms(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - started)


if __name__ == "__main__":
    main()
