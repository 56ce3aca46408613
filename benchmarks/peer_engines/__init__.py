"""The engines that `peers.py` measures, a module each: `load` them, then `generate`.

A module is imported in its own peer's environment: nothing but the standard library is shared.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONTEXT, SEQUENCES = 1024, 32  # the longest context and the most sequences that are asked for


@dataclass(frozen=True)
class Weights:
    """The same weights in every format that a peer reads."""

    gguf: Path  # as fetched: Q4_1, its embedding Q8_0
    folder: Path  # what was made of it

    @property
    def q8_0(self) -> Path:
        """A GGUF file of the same weights, all matrices Q8_0."""
        return self.folder / "Q8_0.gguf"

    @property
    def safetensors(self) -> Path:
        """A Hugging Face folder of the same weights in bfloat16."""
        return self.folder / "safetensors"


@dataclass(frozen=True)
class Loaded:
    """An engine with its model in memory.

    `generate(prompts, tokens)` answers prompts of token ids given at once, greedily, each with
    exactly so many tokens; it returns the seconds until every prompt has its first token, and
    until all have their last.
    """

    generate: Callable[[Sequence[Sequence[int]], int], tuple[float, float]]
    facts: dict[str, Any]  # version; weight_bytes that a step reads; what else a reader should know
