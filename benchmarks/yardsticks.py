"""What this machine can do, measured by `kernels.py`, and how much work a model is."""

from typing import Any

from kernels import Bench

from roofline import budget
from roofline.config import ModelConfig, WeightFormat
from roofline.execution.host import cpu_model
from roofline.ops.cpu.library import Library, open_library


def yardsticks(threads: int, rounds: int = 7) -> dict[str, Any]:
    """The CPU, the ISA our kernels use, GB/s of memory read and GMAC/s of each kind of dot."""
    library = open_library(None)
    if not isinstance(library, Library):
        raise SystemExit(f"the native kernels cannot be measured here: {library}")
    peaks = Bench(library, threads, rounds).peaks()
    return {"cpu": cpu_model(), "isa": library.isa_name, **peaks}


def products(model: ModelConfig, tokens: int, sampled: int, seen: int) -> int:
    """Multiplications of a step: layers' tokens, rows of logits, positions seen by all tokens."""
    plan = budget.plan_model(model, WeightFormat(), budget.Rank(), {})
    layers = sum(m.rows * m.columns for layer in plan.layers.values() for m in layer.matrices())
    attention = 2 * model.num_heads * model.head_dim * model.num_layers
    return tokens * layers + sampled * model.vocab_size * model.hidden_size + seen * attention


def prompt_products(model: ModelConfig, tokens: int) -> int:
    """Multiplications of a prompt, up to its first token."""
    return products(model, tokens, 1, tokens * (tokens + 1) // 2)
