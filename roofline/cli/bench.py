"""`roofline bench`: timed runs, on random tokens or on a file of prompts.

The last line is always one JSON document.
"""

import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from cyclopts import Parameter

import roofline  # the public door: what it names loads on use, torch with it
from roofline.cli import dataset, figures, options, output
from roofline.config import EngineConfig
from roofline.errors import UsageError
from roofline.request import SamplingParams

_Measured = TypeVar("_Measured")
_NO_CACHE = {"enable_prefix_caching": False}  # every round of a dataset asks the same

Iterations = Annotated[int, Parameter(help="rounds timed")]
WarmUps = Annotated[int, Parameter(help="rounds before them")]


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
    num_iters: Iterations = 5,
    num_iters_warmup: WarmUps = 1,
    json: options.Json = False,
    **given: Any,
) -> None:
    """Time batches of one size, start to end; the last line is one JSON document of medians."""
    sizes = {"input_len": input_len, "output_len": output_len, "batch_size": batch_size}
    counts = {"num_iters": num_iters, "num_iters_warmup": num_iters_warmup}
    _check(sizes | counts)
    config = EngineConfig.from_options(given, os.environ, _defaults(batch_size))
    rows = config.limits.max_num_seqs
    if rows < batch_size:
        raise UsageError(f"batch_size {batch_size} is more than max_num_seqs {rows}")
    started = time.monotonic()
    with roofline.LLM.from_config(model, config) as llm:
        load_s = time.monotonic() - started
        _check_context(llm, "input_len", input_len, output_len)
        runs = _timed(lambda seed: _Run.of(llm, **sizes, seed=seed), **counts)
        loaded = llm.config
    typical = _typical(runs)
    reached = typical.read_gb_s(batch_size)
    bandwidth = figures.bandwidth_gb_s(loaded.threads, device=loaded.device, reached=reached)
    report = {
        "model": model,
        **sizes,
        **counts,
        "load_s": load_s,
        **_medians(runs, batch_size * output_len),
        **typical.report(bandwidth, batch_size),
    }
    _print(report, json)


@options.accepts(options.engine_options(_NO_CACHE))
def throughput(
    model: options.Model,
    /,
    *,
    dataset_path: Annotated[
        str | None, Parameter(name="--dataset", help="a .jsonl file of prompts, messages or turns")
    ] = None,
    input_len: Annotated[
        int | None, Parameter(help="tokens of each prompt, at random; default without dataset: 32")
    ] = None,
    output_len: Annotated[int, Parameter(help="tokens of each answer")] = 128,
    num_prompts: Annotated[int, Parameter(help="prompts of a round; of a dataset its first")] = 32,
    num_iters: Iterations = 3,
    num_iters_warmup: WarmUps = 1,
    json: options.Json = False,
    **given: Any,
) -> None:
    """Time many prompts given at once; the last line is one JSON document of all rounds together.

    Its names are those of `vllm bench`.
    """
    sizes = {"output_len": output_len, "num_prompts": num_prompts}
    counts = {"num_iters": num_iters, "num_iters_warmup": num_iters_warmup}
    if dataset_path is not None and input_len is not None:
        raise UsageError("input_len does nothing with a dataset; drop one")
    length = 32 if input_len is None else input_len
    _check(sizes | counts | {"input_len": length})
    asked = None if dataset_path is None else dataset.read(dataset_path, num_prompts)
    config = EngineConfig.from_options(given, os.environ, _NO_CACHE)
    started = time.monotonic()
    with roofline.LLM.from_config(model, config) as llm:
        load_s = time.monotonic() - started
        prompts = None if asked is None else dataset.encode(asked, llm)
        longest = length if prompts is None else max(map(len, prompts))
        _check_context(
            llm, "input_len" if prompts is None else "the longest prompt", longest, output_len
        )
        rounds = _timed(
            lambda seed: _Round.of(
                llm, prompts or _random_prompts(llm, num_prompts, length, seed), output_len
            ),
            **counts,
        )
        loaded = llm.config
    source = {"model": model, "dataset": dataset_path, "input_len": None if asked else length}
    _print(source | sizes | counts | {"load_s": load_s} | _summary(rounds, loaded), json)


@dataclass(frozen=True)
class _Run:
    """One batch, timed."""

    latency_s: float  # until the last token of all
    ttft_s: float  # the median sequence's
    host_share: float | None  # of the latency, what was not spent in native code; None: op by op
    decoding: figures.Decoding

    @classmethod
    def of(
        cls, llm: "roofline.LLM", input_len: int, output_len: int, batch_size: int, seed: int
    ) -> "_Run":
        """Answer random prompts, each batch its own: nothing is found in the prefix cache."""
        prompts = _random_prompts(llm, batch_size, input_len, seed)
        before, submitted = llm.replay_s(), time.monotonic()
        outputs = llm.generate(prompts, _exactly(output_len))
        latency_s, after = time.monotonic() - submitted, llm.replay_s()
        share = None if after is None else 1 - (after - (before or 0)) / latency_s
        firsts = [(o.metrics.first_token_time or submitted) - submitted for o in outputs]
        return cls(latency_s, statistics.median(firsts), share, figures.Decoding.of(llm, outputs))


@dataclass(frozen=True)
class _Round:
    """Many prompts given at once, timed."""

    duration_s: float
    num_steps: int
    bytes_read: float
    outputs: "list[roofline.RequestOutput]"

    @classmethod
    def of(cls, llm: "roofline.LLM", prompts: Sequence[Sequence[int]], output_len: int) -> "_Round":
        """Answer prompts."""
        steps = llm.stats()["num_steps"]
        submitted = time.monotonic()
        outputs = llm.generate(prompts, _exactly(output_len))
        duration_s = time.monotonic() - submitted
        steps = llm.stats()["num_steps"] - steps
        return cls(duration_s, steps, figures.bytes_read(llm, outputs, steps), outputs)


def _exactly(output_len: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)


def _random_prompts(llm: "roofline.LLM", count: int, length: int, seed: int) -> list[list[int]]:
    choose, tokens = random.Random(seed).choices, range(llm.model_config.vocab_size)
    return [choose(tokens, k=length) for _ in range(count)]


def _timed(
    measure: Callable[[int], _Measured], num_iters: int, num_iters_warmup: int
) -> list[_Measured]:
    """Measure round by round, each with a seed of its own; the first do not count."""
    with output.progress() as bar:
        rounds = bar.track(range(num_iters_warmup + num_iters), description="Timing")
        return [measure(seed) for seed in rounds][num_iters_warmup:]


def _defaults(batch_size: int) -> dict[str, int]:
    """A row for every prompt."""
    return {"max_num_seqs": batch_size}


def _check(counts: dict[str, int]) -> None:
    for name, value in counts.items():
        least = 0 if name == "num_iters_warmup" else 1
        if value < least:
            raise UsageError(f"{name} is {value}; it must be at least {least}")


def _check_context(llm: "roofline.LLM", name: str, input_len: int, output_len: int) -> None:
    if input_len + output_len > llm.max_model_len:
        raise UsageError(
            f"{name} {input_len} and output_len {output_len} are more than the context of "
            f"{llm.max_model_len} tokens"
        )


def _print(report: Mapping[str, Any], json: bool) -> None:
    if not json:
        for name, value in report.items():
            print(f"{name:22}  {value:.4g}" if isinstance(value, float) else f"{name:22}  {value}")
    output.print_json(report)


def _medians(runs: Sequence[_Run], tokens: int) -> dict[str, float | None]:
    latency_s = statistics.median(run.latency_s for run in runs)
    shares = [run.host_share for run in runs if run.host_share is not None]
    return {
        "latency_s": latency_s,
        "ttft_s": statistics.median(run.ttft_s for run in runs),
        "host_share": statistics.median(shares) if shares else None,
        "total_tokens_per_s": tokens / latency_s,  # of all sequences together, prompts' time in it
    }


def _typical(runs: Sequence[_Run]) -> figures.Decoding:
    """The median speed; the bytes are the same in every run."""
    rates = [r.decoding.tokens_per_s for r in runs if r.decoding.tokens_per_s is not None]
    rate = statistics.median(rates) if rates else None
    return figures.Decoding(rate, runs[0].decoding.bytes_per_token)


def _summary(rounds: Sequence[_Round], config: EngineConfig) -> dict[str, Any]:
    """All rounds as if they were one."""
    outputs = [output for each in rounds for output in each.outputs]
    duration_s = sum(each.duration_s for each in rounds)
    read = sum(len(output.prompt_token_ids) for output in outputs)
    written = sum(len(output.outputs[0].token_ids) for output in outputs)
    bytes_read = sum(each.bytes_read for each in rounds)
    read_gb_s = bytes_read / duration_s / 1e9
    bandwidth = figures.bandwidth_gb_s(config.threads, device=config.device, reached=read_gb_s)
    return {
        "duration": duration_s,
        "completed": len(outputs),
        "total_input_tokens": read,
        "total_output_tokens": written,
        "request_throughput": len(outputs) / duration_s,
        "output_throughput": written / duration_s,
        "total_token_throughput": (read + written) / duration_s,
        **_percentiles("ttft", [figures.ttft_s(output) for output in outputs]),
        **_percentiles("tpot", [figures.tpot_s(output) for output in outputs]),
        **_percentiles("e2el", [figures.latency_s(output) for output in outputs]),
        "num_steps": sum(each.num_steps for each in rounds),
        "bytes_read": bytes_read,
        "bandwidth_gb_s": bandwidth,
        "roofline_fraction": read_gb_s / bandwidth,
    }


def _percentiles(name: str, seconds: Sequence[float | None]) -> dict[str, float | None]:
    """Of those requests that have the figure; None if none has."""
    known = [value * 1e3 for value in seconds if value is not None]
    kinds = ("mean", "median", "std", "p90", "p99")
    if not known:
        return {f"{kind}_{name}_ms": None for kind in kinds}
    # Twice the same where there is one: a quantile lies between two.
    cuts = statistics.quantiles(known if len(known) > 1 else known * 2, n=100, method="inclusive")
    mean, std = statistics.fmean(known), statistics.pstdev(known)
    values = (mean, statistics.median(known), std, cuts[89], cuts[98])
    return {f"{kind}_{name}_ms": value for kind, value in zip(kinds, values, strict=True)}
