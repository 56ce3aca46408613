"""How fast decoding went, and how close that is to what memory allows: the roofline.

A decoding step reads every weight and scale once and the KV cache of each sequence, so
`steps/s <= bandwidth / bytes read`.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Self

import roofline  # the public door: what it names loads on use, torch with it
from roofline import budget, execution, models
from roofline.budget import usable_cores


@dataclasses.dataclass(frozen=True)
class Decoding:
    """What sequences decoded side by side read from memory, and how fast."""

    tokens_per_s: (
        float | None
    )  # of each sequence: (n - 1) / (t_last - t_first); None below 2 tokens
    bytes_per_token: float  # (weights + scales) / sequences + mean KV read

    @classmethod
    def of(cls, llm: "roofline.LLM", outputs: Sequence["roofline.RequestOutput"]) -> Self:
        """The median sequence of a batch; its context grew from its prompt by its answer."""
        rates = [rate for rate in map(_tokens_per_s, outputs) if rate is not None]
        contexts = [len(o.prompt_token_ids) + len(o.outputs[0].token_ids) / 2 for o in outputs]
        weights = budget.step_read_bytes(llm.budget.model, budget.Rank()) / len(outputs)
        kv = statistics.fmean(contexts) * budget.kv_token_bytes(
            llm.model_config, llm.config.kv_dtype
        )
        return cls(statistics.median(rates) if rates else None, weights + kv)

    def read_gb_s(self, sequences: int = 1) -> float | None:
        """What was read from memory, 1e9 bytes/s."""
        if self.tokens_per_s is None:
            return None
        return self.tokens_per_s * sequences * self.bytes_per_token / 1e9

    def report(self, bandwidth_gb_s: float, sequences: int = 1) -> dict[str, float | None]:
        """The figures of a JSON report."""
        read = self.read_gb_s(sequences)
        fraction = None if read is None else read / bandwidth_gb_s
        return {
            "decode_tokens_per_s": self.tokens_per_s,
            "bytes_per_token": self.bytes_per_token,
            "bandwidth_gb_s": bandwidth_gb_s,
            "roofline_fraction": fraction,
        }


def bandwidth_gb_s(
    threads: int | None,
    *,
    device: str = "cpu",
    anew: bool = False,
    reached: float | None = None,
) -> float:
    """Read bandwidth of a device, 1e9 bytes/s; of this host on an engine's threads. Measured once.

    A run that has `reached` more shows that the device was busy then: it is measured again.
    """
    cache, threads = models.builtin.cache_folder() / "bandwidth.json", threads or usable_cores()
    found = execution.bandwidth.read(cache, threads, device, anew=anew)
    if reached is not None and reached > found and not anew:
        return execution.bandwidth.read(cache, threads, device, anew=True)
    return found


def bytes_read(
    llm: "roofline.LLM", outputs: Sequence["roofline.RequestOutput"], num_steps: int
) -> float:
    """What answering had to read at least: all weights each step, for each token its context."""
    kv_tokens = sum(
        len(o.outputs[0].token_ids) * (len(o.prompt_token_ids) + len(o.outputs[0].token_ids) / 2)
        for o in outputs
    )
    weights = num_steps * budget.step_read_bytes(llm.budget.model, budget.Rank())
    return weights + kv_tokens * budget.kv_token_bytes(llm.model_config, llm.config.kv_dtype)


def one_line(report: Mapping[str, Any]) -> str:
    """A run's report for a person."""
    line = f"{report['prompt_tokens']} prompt tokens, first token after {report['ttft_s']:.2f} s"
    if report["decode_tokens_per_s"] is None:
        return line
    rate, bandwidth = report["decode_tokens_per_s"], report["bandwidth_gb_s"]
    read = rate * report["bytes_per_token"] / 1e9
    return (
        f"{line}, then {rate:.1f} tokens/s: {read:.2f} of {bandwidth:.1f} GB/s, "
        f"{report['roofline_fraction']:.1%} of the roofline"
    )


def ttft_s(output: "roofline.RequestOutput") -> float | None:
    """From a request's arrival to its first token."""
    first = output.metrics.first_token_time
    return None if first is None else first - output.metrics.arrival_time


def tpot_s(output: "roofline.RequestOutput") -> float | None:
    """From token to token after the first; None below 2 tokens."""
    first, last = output.metrics.first_token_time, output.metrics.last_token_time
    steps = len(output.outputs[0].token_ids) - 1
    if steps < 1 or first is None or last is None:
        return None
    return (last - first) / steps


def latency_s(output: "roofline.RequestOutput") -> float | None:
    """From a request's arrival to its last token."""
    last = output.metrics.last_token_time
    return None if last is None else last - output.metrics.arrival_time


def _tokens_per_s(output: "roofline.RequestOutput") -> float | None:
    seconds = tpot_s(output)
    return 1 / seconds if seconds else None
