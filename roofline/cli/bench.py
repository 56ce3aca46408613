"""`roofline bench`: timed runs on random tokens. The last line is always one JSON document."""

import os
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from cyclopts import Parameter

import roofline  # the public door: what it names loads on use, torch with it
from roofline.cli import figures, options, output
from roofline.config import EngineConfig
from roofline.errors import UsageError
from roofline.request import SamplingParams


@options.accepts(
    options.engine_options(
        {"max_num_seqs": "batch size"}, without=("chat_template", "generation_config")
    )
)
def latency(
    model: options.Model,
    /,
    *,
    input_len: Annotated[int, Parameter(help="tokens of each prompt, at random")] = 32,
    output_len: Annotated[int, Parameter(help="tokens of each answer")] = 128,
    batch_size: Annotated[int, Parameter(help="prompts at once")] = 1,
    num_iters: Annotated[int, Parameter(help="batches timed")] = 5,
    num_iters_warmup: Annotated[int, Parameter(help="batches before them")] = 1,
    json: options.Json = False,
    **given: Any,
) -> None:
    """Time batches of one size, start to end; the last line is one JSON document of medians."""
    sizes = {"input_len": input_len, "output_len": output_len, "batch_size": batch_size}
    counts = {"num_iters": num_iters, "num_iters_warmup": num_iters_warmup}
    _check(sizes | counts)
    config = EngineConfig.from_options(given, os.environ, _defaults(batch_size))
    if config.max_num_seqs < batch_size:
        raise UsageError(f"batch_size {batch_size} is more than max_num_seqs {config.max_num_seqs}")
    started = time.monotonic()
    with roofline.LLM.from_config(model, config) as llm:
        load_s = time.monotonic() - started
        if input_len + output_len > llm.max_model_len:
            raise UsageError(
                f"input_len {input_len} and output_len {output_len} are more than the context of "
                f"{llm.max_model_len} tokens"
            )
        with output.progress() as bar:
            batches = bar.track(range(num_iters_warmup + num_iters), description="Timing")
            runs = [_Run.of(llm, **sizes, seed=batch) for batch in batches][num_iters_warmup:]
    report = {
        "model": model,
        **sizes,
        **counts,
        "load_s": load_s,
        **_medians(runs, batch_size * output_len),
        **_typical(runs).report(figures.bandwidth_gb_s(), batch_size),
    }
    if not json:
        for name, value in report.items():
            print(f"{name:20}  {value:.4g}" if isinstance(value, float) else f"{name:20}  {value}")
    output.print_json(report)


@dataclass(frozen=True)
class _Run:
    """One batch, timed."""

    latency_s: float  # until the last token of all
    ttft_s: float  # the median sequence's
    decoding: figures.Decoding

    @classmethod
    def of(
        cls, llm: "roofline.LLM", input_len: int, output_len: int, batch_size: int, seed: int
    ) -> "_Run":
        """Answer random prompts, each batch its own: nothing is found in the prefix cache."""
        params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
        choose = random.Random(seed).choices
        tokens = range(llm.model_config.vocab_size)
        prompts = [choose(tokens, k=input_len) for _ in range(batch_size)]
        submitted = time.monotonic()
        outputs = llm.generate(prompts, params)
        latency_s = time.monotonic() - submitted
        firsts = [(o.metrics.first_token_time or submitted) - submitted for o in outputs]
        return cls(latency_s, statistics.median(firsts), figures.Decoding.of(llm, outputs))


def _defaults(batch_size: int) -> dict[str, int]:
    """A row for every prompt, and in a step a token for every row."""
    tokens = max(batch_size, EngineConfig.max_num_batched_tokens)
    return {"max_num_seqs": batch_size, "max_num_batched_tokens": tokens}


def _check(counts: dict[str, int]) -> None:
    for name, value in counts.items():
        least = 0 if name == "num_iters_warmup" else 1
        if value < least:
            raise UsageError(f"{name} is {value}; it must be at least {least}")


def _medians(runs: Sequence[_Run], tokens: int) -> dict[str, float]:
    latency_s = statistics.median(run.latency_s for run in runs)
    return {
        "latency_s": latency_s,
        "ttft_s": statistics.median(run.ttft_s for run in runs),
        "total_tokens_per_s": tokens / latency_s,  # of all sequences together, prompts' time in it
    }


def _typical(runs: Sequence[_Run]) -> figures.Decoding:
    """The median speed; the bytes are the same in every run."""
    rates = [r.decoding.tokens_per_s for r in runs if r.decoding.tokens_per_s is not None]
    rate = statistics.median(rates) if rates else None
    return figures.Decoding(rate, runs[0].decoding.bytes_per_token)
