"""The shape of a model, whatever file it came from, and the shapes that have names."""

import dataclasses
import math
from typing import Literal

from roofline.errors import CheckpointError, UnsupportedError, shown

ARCHITECTURES = ("llama",)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

    `linear` divides all by `factor`; `llama3` divides the long wavelengths only
    (transformers `modeling_rope_utils._compute_llama3_parameters`).
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a Llama-like decoder, whatever file it came from."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int  # tokens of context the model was made for
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    rope_scaling: RopeScaling | None = None
    rope_factors: tuple[float, ...] | None = (
        None  # [head_dim / 2], divisors of the frequencies (GGUF rope_freqs)
    )
    architecture: str = "llama"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise UnsupportedError(
                f"architecture '{self.architecture}' is not supported; "
                f"supported: {', '.join(ARCHITECTURES)}"
            )
        for name, limit in _SIZE_LIMITS.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= limit:
                raise CheckpointError(
                    f"model config: {name} is {shown(value)}; "
                    f"it must be an integer from 1 to {limit}"
                )
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"model config: num_heads {self.num_heads} is not a multiple of "
                f"num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise CheckpointError(
                f"model config: head_dim {self.head_dim} is odd; rotary embedding needs pairs"
            )
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not (isinstance(value, float) and math.isfinite(value) and value > 0):
                raise CheckpointError(
                    f"model config: {name} is {shown(value)}; it must be a finite number above 0"
                )
        self._check_rope()
        for token in (
            *self.eos_token_ids,
            *([] if self.bos_token_id is None else [self.bos_token_id]),
        ):
            if type(token) is not int or not 0 <= token < self.vocab_size:
                raise CheckpointError(
                    f"model config: special token id {shown(token)} is outside the vocabulary "
                    f"of {self.vocab_size}"
                )

    def _check_rope(self) -> None:
        scaling = self.rope_scaling
        if scaling is not None:
            numbers = (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor)
            if (
                not all(math.isfinite(n) and n > 0 for n in numbers)
                or scaling.original_max_position < 1
            ):
                raise CheckpointError(
                    f"model config: rope scaling {scaling} needs finite factors above 0"
                )
            if scaling.kind == "llama3" and scaling.high_freq_factor <= scaling.low_freq_factor:
                raise CheckpointError(
                    "model config: rope scaling needs high_freq_factor above low_freq_factor"
                )
        if self.rope_factors is not None:
            if len(self.rope_factors) != self.head_dim // 2:
                raise CheckpointError(
                    f"model config: {len(self.rope_factors)} rope factors for head_dim "
                    f"{self.head_dim}; it needs {self.head_dim // 2}"
                )
            if not all(math.isfinite(f) and f > 0 for f in self.rope_factors):
                raise CheckpointError("model config: rope factors must be finite numbers above 0")

    @property
    def query_size(self) -> int:
        """Channels of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Channels of all key (or value) heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def group_query(self) -> int:
        """Query heads to a key-value head."""
        return self.num_heads // self.num_kv_heads

    def rope_frequencies(self) -> list[float]:
        """Angular frequency of each rotary pair, [head_dim / 2], radians a token."""
        frequencies = [
            self.rope_theta ** (-2 * i / self.head_dim) for i in range(self.head_dim // 2)
        ]
        if self.rope_factors is not None:
            frequencies = [f / d for f, d in zip(frequencies, self.rope_factors, strict=True)]
        scaling = self.rope_scaling
        if scaling is None:
            return frequencies
        if scaling.kind == "linear":
            return [f / scaling.factor for f in frequencies]
        return [_llama3_frequency(f, scaling) for f in frequencies]


_SIZE_LIMITS = {
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_layers": 1 << 12,
    "num_heads": 1 << 12,
    "num_kv_heads": 1 << 12,
    "head_dim": 1 << 10,
    "vocab_size": 1 << 24,
    "max_position": 1 << 27,
}


def _llama3_frequency(frequency: float, scaling: RopeScaling) -> float:
    wavelength = 2 * math.pi / frequency
    low = scaling.original_max_position / scaling.low_freq_factor
    high = scaling.original_max_position / scaling.high_freq_factor
    if wavelength < high:
        return frequency
    if wavelength > low:
        return frequency / scaling.factor
    smooth = (scaling.original_max_position / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


PRESETS: dict[str, ModelConfig] = {
    "llama-110m": ModelConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_layers=12,
        num_heads=12,
        num_kv_heads=12,
        head_dim=64,
        vocab_size=32000,
        max_position=1024,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=True,
    ),
    "llama-3.2-1b": ModelConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        vocab_size=128256,
        max_position=131072,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        tie_word_embeddings=True,
        rope_scaling=RopeScaling("llama3", 32.0),
    ),
    "llama-3.1-8b": ModelConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=128256,
        max_position=131072,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        tie_word_embeddings=False,
        rope_scaling=RopeScaling("llama3", 8.0),
    ),
    "llama-3.1-70b": ModelConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=128256,
        max_position=131072,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        tie_word_embeddings=False,
        rope_scaling=RopeScaling("llama3", 8.0),
    ),
}
