"""`roofline fit`: what a model takes on every rank, what fits, and how fast it could be.

From the model's config alone, through the functions of `budget` that the engine allocates by: no
weights are read and torch is not imported.
"""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from cyclopts import Parameter
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from roofline import models
from roofline.budget import (
    NativeGroups,
    Rank,
    RankBudget,
    StepShape,
    buffer_bytes,
    kv_block_bytes,
    plan_buffers,
    plan_rank,
    step_read_bytes,
)
from roofline.cli import options, output
from roofline.config import EngineConfig, ModelConfig, ParallelConfig, environment_options
from roofline.errors import UsageError

_DEFAULTS = {"max_num_seqs": 1, "device": "cpu"}
_SIZING = (  # options that change a size
    "revision",
    "quantization",
    "group_size",
    "device",
    "dtype",
    "kv_cache_dtype",
    "prefill_weights",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "kv_cache_memory_bytes",
    "block_size",
    "tensor_parallel_size",
    "pipeline_parallel_size",
)
_UNLIMITED = 1 << 62  # bytes
_MOST_SEQUENCES = 4096
_UNITS = {
    "": 1 << 30,
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)},
    **{f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", 1)},
}


@options.accepts(options.engine_options(_DEFAULTS, only=_SIZING))
def fit(
    model: Annotated[
        str,
        Parameter(
            help="a .gguf file, a safetensors folder, a built-in name, org/repo[:QUANT] on "
            "Hugging Face, or a shape like llama-3.1-8b"
        ),
    ],
    /,
    *,
    memory: Annotated[
        str | None, Parameter(help="of a rank, say what fits: 24 (GiB), 24GB, 500MiB")
    ] = None,
    bandwidth: Annotated[
        str | None, Parameter(help="of a rank in GB/s: say how many tokens/s that allows")
    ] = None,
    json: options.Json = False,
    **given: Any,
) -> None:
    """Say what a model takes on every rank, what fits and how fast it could be."""
    memory_bytes = None if memory is None else _read_memory(memory)
    gb_s = None if bandwidth is None else _read_number("--bandwidth", bandwidth, "GB/s")
    chosen: dict[str, Any] = {**_DEFAULTS, **environment_options(os.environ), **given}
    names = ("tensor_parallel_size", "pipeline_parallel_size")
    parallel = ParallelConfig(**{name: chosen.pop(name) for name in names if name in chosen})
    if memory is not None and chosen.get("kv_cache_memory_bytes") is not None:
        raise UsageError("--memory says what KV pool fits; drop --kv-cache-memory-bytes")
    config = EngineConfig.from_options(chosen, {})
    plan = Plan.of(*models.opening.describe(model, config.revision), config, parallel)
    report = {
        "model": model,
        **plan.report(),
        "memory": None if memory_bytes is None else plan.fitting(memory_bytes),
        "speed": None if gb_s is None else plan.speed(gb_s),
    }
    if json:
        output.print_json(report)
    else:
        _show(report)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A model laid out over ranks, its KV pool sized for all sequences at full length."""

    model: ModelConfig
    config: EngineConfig
    ranks: Sequence[tuple[Rank, RankBudget]]
    parameters: int  # of the whole model, each counted once

    @classmethod
    def of(
        cls,
        model: ModelConfig,
        native: NativeGroups,
        config: EngineConfig,
        parallel: ParallelConfig,
    ) -> "Plan":
        """Every rank's budget; UsageError for more ranks than the model has work for."""
        parallel.check(model)
        ranks = [
            Rank(parallel, tp_rank, stage)
            for stage in range(parallel.pipeline_parallel_size)
            for tp_rank in range(parallel.tensor_parallel_size)
        ]
        budgets = [plan_rank(model, config, rank, native, _UNLIMITED) for rank in ranks]
        whole = plan_rank(model, config, Rank(), native, _UNLIMITED)
        return cls(model, config, list(zip(ranks, budgets, strict=True)), whole.model.parameters)

    @property
    def max_model_len(self) -> int:
        """Tokens of context planned for."""
        return self.ranks[0][1].step.max_model_len

    def report(self) -> dict[str, Any]:
        """Bytes of every rank, under the names of `LLM.storage_bytes`."""
        return {
            "parameters": self.parameters,
            "max_model_len": self.max_model_len,
            "device": self.config.device,
            "max_num_seqs": self.config.limits.max_num_seqs,
            "ranks": [
                {
                    "tensor_parallel_rank": rank.tp_rank,
                    "pipeline_stage": rank.stage,
                    "parameters": budget.model.parameters,
                    "weights": budget.model.weight_bytes,
                    "scales": budget.model.scale_bytes,
                    "kv": budget.kv_bytes,
                    "activations": budget.activation_bytes,
                    "total": budget.total_bytes,
                }
                for rank, budget in self.ranks
            ],
        }

    def fitting(self, memory_bytes: int) -> dict[str, Any]:
        """Whether every rank fits into so many bytes, and the longest and widest that would.

        `max_model_len` is the largest for the planned number of sequences, and `max_num_seqs` the
        largest at the planned length; 0 where not even one fits.
        """
        sequences, length = self.config.limits.max_num_seqs, self.max_model_len

        def fits(length: int, sequences: int) -> bool:
            return all(
                self._rank_bytes(rank, budget, length, sequences) <= memory_bytes
                for rank, budget in self.ranks
            )

        return {
            "bytes": memory_bytes,
            "fits": all(budget.total_bytes <= memory_bytes for _, budget in self.ranks),
            "max_model_len": _largest(self.model.max_position, lambda n: fits(n, sequences)),
            "max_num_seqs": _largest(_MOST_SEQUENCES, lambda n: fits(length, n)),
        }

    def speed(self, bandwidth_gb_s: float) -> dict[str, float]:
        """Tokens/s of all sequences together, were reading memory all that takes time.

        A step reads weights and scales once and the KV of every sequence at half its length, the
        mean while it grows. Tensor parallel ranks read at the same time, stages one after another.
        """
        slowest = [0.0] * self.ranks[-1][0].parallel.pipeline_parallel_size
        tokens = self.config.limits.max_num_seqs * self.max_model_len / 2
        for rank, budget in self.ranks:
            read = step_read_bytes(budget.model, rank) + tokens * self._kv_token_bytes(rank)
            slowest[rank.stage] = max(slowest[rank.stage], read)
        rate = self.config.limits.max_num_seqs * bandwidth_gb_s * 1e9 / sum(slowest)
        return {
            "bandwidth_gb_s": bandwidth_gb_s,
            "bytes_per_step": sum(slowest),
            "tokens_per_s": rate,
        }

    def _kv_token_bytes(self, rank: Rank) -> int:
        return kv_block_bytes(self.model, self.config.kv_dtype, rank, 1)

    def _rank_bytes(self, rank: Rank, budget: RankBudget, length: int, sequences: int) -> int:
        """What `plan_rank` would come to, weights not counted anew."""
        config, limits = self.config, self.config.limits
        tokens = max(limits.max_num_batched_tokens, sequences)  # a step has one for each sequence
        step = StepShape(tokens, sequences, length, limits.block_size)
        blocks = sequences * step.blocks_per_row
        return (
            budget.model.weight_bytes
            + budget.model.scale_bytes
            + blocks * kv_block_bytes(self.model, config.kv_dtype, rank, limits.block_size)
            + buffer_bytes(plan_buffers(self.model, config, rank, step, budget.model))
        )


def _largest(limit: int, holds: Callable[[int], bool]) -> int:
    """The largest n up to `limit` for which a falling condition holds; 0 if none."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _read_memory(text: str) -> int:
    match = re.fullmatch(r"([\d.]+) *(|B|[KMGT]I?B)", text.strip().upper())
    if match is None:
        raise UsageError(f"--memory is {text!r}; it must be like 24 (GiB), 24GB or 500MiB")
    return int(_read_number("--memory", match[1], "GiB or its own unit") * _UNITS[match[2]])


def _read_number(option: str, text: str, unit: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1e15:
        raise UsageError(f"{option} is {text!r}; it must be a number above 0, in {unit}")
    return value


def _show(report: dict[str, Any]) -> None:
    """The report as a table and a few sentences."""
    console = Console(highlight=False, soft_wrap=True)
    sizes = ("weights", "scales", "kv", "activations", "total")
    table = Table("stage/TP", "parameters", *sizes, box=SIMPLE_HEAD, pad_edge=False)
    for column in table.columns:
        column.justify, column.no_wrap = "right", True
    for rank in report["ranks"]:
        place = f"{rank['pipeline_stage']}/{rank['tensor_parallel_rank']}"
        count = f"{rank['parameters'] / 1e6:,.1f} M"
        table.add_row(place, count, *(_size(rank[name]) for name in sizes))
    planned = f"{report['max_num_seqs']} x {report['max_model_len']:,} tokens of context"
    console.print(f"{report['model']}: {report['parameters']:,} parameters, {planned}")
    console.print(table)
    if memory := report["memory"]:
        verdict = "fits" if memory["fits"] else "does not fit"
        console.print(
            f"{_size(memory['bytes'])} a rank: {verdict}; the most is {memory['max_model_len']:,} "
            f"tokens for {report['max_num_seqs']}, or {memory['max_num_seqs']:,} sequences of "
            f"{report['max_model_len']:,}"
        )
    if speed := report["speed"]:
        console.print(
            f"{speed['bandwidth_gb_s']:g} GB/s a rank: up to {speed['tokens_per_s']:.1f} tokens/s "
            f"reading {_size(speed['bytes_per_step'])} a step at half the context"
        )


def _size(size_bytes: float) -> str:
    """Bytes in the largest unit that leaves a whole number."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.1f} {unit}"
    return f"{size_bytes:.0f} B"
