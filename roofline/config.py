"""What a model is and how an engine runs it: frozen, checked when built, composed. No torch here.

Derived sizes are returned by functions, never written back; the environment is read by
`environment_options` alone.
"""

import contextlib
import dataclasses
import difflib
import math
import types
from collections.abc import Mapping
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from roofline.errors import CheckpointError, UnsupportedError, UsageError, shown

CHANNEL = "channel"  # one scale for a whole output channel
GROUP_SIZES = (32, 64, 128, 256)
DEFAULT_GROUP_SIZE = 128
UNIT = 64  # FFN channels and vocabulary are dealt to ranks in units of this many


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
    qkv_bias: bool = False  # of the Q, K and V projections
    qk_norm: bool = False  # RMSNorm of every query and key head before RoPE
    sliding_window: int | None = None  # tokens a query sees in every layer, itself included
    architecture: str = "llama"  # the family, by its model_type in `models.families`
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, limit in _SIZE_LIMITS.items():
            value = getattr(self, name)
            if name == "sliding_window" and value is None:
                continue
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
        for name in ("tie_word_embeddings", "qkv_bias", "qk_norm"):
            if type(getattr(self, name)) is not bool:
                value = shown(getattr(self, name))
                raise CheckpointError(f"model config: {name} is {value}; it must be true or false")
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
    "sliding_window": 1 << 27,
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


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How many ranks share a model, and what each of them holds.

    Tensor parallel: KV heads are dealt first; with more ranks than KV heads the ranks are dealt
    over the heads, and those sharing one split its query heads. FFN channels and vocabulary are
    dealt in units of 64. Pipeline parallel: stages are runs of layers. Any counts work.
    """

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1

    def __post_init__(self) -> None:
        for name in ("tensor_parallel_size", "pipeline_parallel_size"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= 1024:
                raise UsageError(f"{name} is {shown(value)}; it must be an integer from 1 to 1024")

    def check(self, model: ModelConfig) -> None:
        """Refuse a split that would leave a rank without work."""
        tp, most = self.tensor_parallel_size, self.most_tensor_ranks(model)
        if tp > most:
            raise UsageError(
                f"tensor_parallel_size {tp} is too many for this model; the most is {most}"
            )
        if self.pipeline_parallel_size > model.num_layers:
            raise UsageError(
                f"pipeline_parallel_size {self.pipeline_parallel_size} is more than the model's "
                f"{model.num_layers} layers"
            )

    @staticmethod
    def most_tensor_ranks(model: ModelConfig) -> int:
        """The largest tensor parallel size that leaves no rank without work."""
        units = min(-(-model.intermediate_size // UNIT), -(-model.vocab_size // UNIT))
        return min(model.num_heads, units)

    def kv_heads(self, model: ModelConfig, tp_rank: int) -> range:
        """The KV heads a rank stores."""
        ranks, heads = self.tensor_parallel_size, model.num_kv_heads
        if ranks <= heads:
            return deal(heads, ranks, tp_rank)
        head, _, _ = self._sharers(model, tp_rank)
        return range(head, head + 1)

    def query_heads(self, model: ModelConfig, tp_rank: int) -> range:
        """The query heads a rank computes; all of them belong to its `kv_heads`."""
        if self.tensor_parallel_size <= model.num_kv_heads:
            kv = self.kv_heads(model, tp_rank)
            return range(kv.start * model.group_query, kv.stop * model.group_query)
        head, sharers, place = self._sharers(model, tp_rank)
        mine = deal(model.group_query, sharers, place)
        first = head * model.group_query
        return range(first + mine.start, first + mine.stop)

    def ffn_channels(self, model: ModelConfig, tp_rank: int) -> range:
        """The FFN channels a rank computes."""
        return deal_units(model.intermediate_size, self.tensor_parallel_size, tp_rank)

    def vocabulary(self, model: ModelConfig, tp_rank: int) -> range:
        """The token ids whose embedding and head rows a rank holds."""
        return deal_units(model.vocab_size, self.tensor_parallel_size, tp_rank)

    def layers(self, model: ModelConfig, stage: int) -> range:
        """The layers of a pipeline stage."""
        return deal(model.num_layers, self.pipeline_parallel_size, stage)

    def _sharers(self, model: ModelConfig, tp_rank: int) -> tuple[int, int, int]:
        """(KV head, ranks sharing it, this rank's place among them), for more ranks than heads."""
        for head in range(model.num_kv_heads):
            ranks = deal(self.tensor_parallel_size, model.num_kv_heads, head)
            if tp_rank in ranks:
                return head, len(ranks), tp_rank - ranks.start
        raise UsageError(f"tensor parallel rank {tp_rank} is not below {self.tensor_parallel_size}")


def deal(items: int, hands: int, hand: int) -> range:
    """The contiguous share of one hand of items dealt evenly; the first hands get the rest."""
    each, rest = divmod(items, hands)
    start = hand * each + min(hand, rest)
    return range(start, start + each + (hand < rest))


def deal_units(channels: int, hands: int, hand: int) -> range:
    """Like `deal`, in units of 64 channels; the last unit may be short."""
    units = deal(-(-channels // UNIT), hands, hand)
    return range(units.start * UNIT, min(units.stop * UNIT, channels))


@dataclasses.dataclass(frozen=True)
class WeightFormat:
    """What a weight matrix becomes in memory: INT8 groups, or floats of the activations' dtype."""

    quantization: Literal["int8", "none"] = "int8"
    group_size: int | Literal["auto", "channel"] = "auto"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def group(self, columns: int, native: int | None) -> int:
        """Columns of a matrix that share a scale; 0 for floats.

        `native` is their number in the model's file, None where it has no groups.
        """
        if self.quantization == "none":
            return 0
        if self.group_size == CHANNEL:
            return columns
        if self.group_size == "auto":
            return native or DEFAULT_GROUP_SIZE
        return int(self.group_size)


def _option(default: Any, text: str, low: float | None = None, high: float | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, "low": low, "high": high})


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How to load and run a model: one schema for Python, command line and ROOFLINE_* options."""

    load_format: Literal["auto", "dummy"] = _option(
        "auto", "'dummy' makes seeded random weights of the model's shape, for any config or preset"
    )
    quantization: Literal["int8", "none"] = _option(
        "int8", "'none' keeps weights as floats of --dtype"
    )
    group_size: Literal["auto", "channel"] | int = _option(
        "auto",
        "weights that share a scale: 32, 64, 128, 256 or channel; "
        "auto keeps the groups of a file that is already INT8, else 128",
    )
    dtype: Literal["bfloat16", "float32"] = _option("bfloat16", "of activations and KV cache")
    max_model_len: Literal["auto"] | int = _option(
        "auto", "context in tokens; auto is the model's own, or the largest that fits", 1, 1 << 27
    )
    max_num_seqs: int = _option(32, "requests that run at once", 1, 4096)
    max_num_batched_tokens: int = _option(512, "tokens computed in one step", 1, 1 << 20)
    max_prefill_chunk: int | None = _option(
        None, "most tokens of one request in one step; default: max_num_batched_tokens", 1, 1 << 20
    )
    enable_prefix_caching: bool = _option(True, "reuse the KV cache of shared prompt prefixes")
    kv_cache_memory_bytes: int | None = _option(
        None,
        "size of the KV pool; default: what max_num_seqs contexts need, within the budget",
        1,
        1 << 50,
    )
    gpu_memory_utilization: float = _option(
        0.5,
        "share of the device's free memory (here: the host's) for weights, KV and activations",
        0.01,
        1.0,
    )
    block_size: int = _option(16, "tokens of a KV block", 1, 1024)
    tensor_parallel_size: int = _option(1, "ranks that share each layer", 1, 1024)
    pipeline_parallel_size: int = _option(1, "ranks that share the stack of layers", 1, 1024)
    threads: int | None = _option(None, "CPU threads; default: as torch finds them", 1, 4096)
    seed: int = _option(0, "of dummy weights and of requests that bring no seed", 0, (1 << 64) - 1)

    def __post_init__(self) -> None:
        hints = get_type_hints(EngineConfig)
        for field in dataclasses.fields(self):
            _check_option(field.name, field, hints[field.name], getattr(self, field.name))
        group = self.group_size
        if type(group) is int and group not in GROUP_SIZES:
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise UnsupportedError(
                f"group_size {shown(group)} is not supported; supported: {sizes}, channel"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise UsageError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}; it must be at least "
                f"max_num_seqs, {self.max_num_seqs}, or some requests would never decode"
            )
        for name in ("tensor_parallel_size", "pipeline_parallel_size"):
            if getattr(self, name) != 1:
                raise UnsupportedError(
                    f"{name} {getattr(self, name)}: this version runs one rank; "
                    "`roofline fit` plans for more"
                )

    @classmethod
    def from_options(
        cls,
        options: Mapping[str, Any],
        environ: Mapping[str, str],
        defaults: Mapping[str, Any] | None = None,
    ) -> Self:
        """Options given by name over ROOFLINE_* variables over defaults; unknown names are refused.

        `defaults` are a caller's own, where they differ from those of the class.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"; did you mean '{near[0]}'?" if near else f"; options: {', '.join(known)}"
                raise UsageError(f"unknown option '{name}'{hint}")
        return cls(**{**(defaults or {}), **environment_options(environ), **options})

    @property
    def weights(self) -> WeightFormat:
        """The format weights take in memory."""
        return WeightFormat(self.quantization, self.group_size, self.dtype)

    @property
    def parallel(self) -> ParallelConfig:
        """The ranks asked for."""
        return ParallelConfig(self.tensor_parallel_size, self.pipeline_parallel_size)


def environment_options(environ: Mapping[str, str]) -> dict[str, Any]:
    """The engine options found in ROOFLINE_<NAME> variables, as values of their types."""
    hints = get_type_hints(EngineConfig)
    found: dict[str, Any] = {}
    for field in dataclasses.fields(EngineConfig):
        variable = f"ROOFLINE_{field.name.upper()}"
        if variable in environ:
            value = parse_option(hints[field.name], environ[variable])
            _check_option(variable, field, hints[field.name], value)
            found[field.name] = value
    return found


def parse_option(hint: Any, text: str) -> Any:
    """What an option's text means for its type; text that means nothing is left for the check."""
    kinds = _members(hint)
    if text in _choices(hint):
        return text
    if bool in kinds and text.lower() in _BOOLEANS:
        return _BOOLEANS[text.lower()]
    for kind in (int, float):
        if kind in kinds:
            with contextlib.suppress(ValueError):
                return kind(text)
    return text


_BOOLEANS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def _members(hint: Any) -> tuple[Any, ...]:
    return (
        get_args(hint) if isinstance(hint, types.UnionType) or _is_typing_union(hint) else (hint,)
    )


def _is_typing_union(hint: Any) -> bool:
    return get_origin(hint) is not None and get_origin(hint) is not Literal


def _choices(hint: Any) -> tuple[Any, ...]:
    return tuple(c for m in _members(hint) if get_origin(m) is Literal for c in get_args(m))


def _check_option(name: str, field: "dataclasses.Field[Any]", hint: Any, value: Any) -> None:
    """Refuse a value that is neither one of the choices nor a number within the bounds."""
    choices, kinds = _choices(hint), [m for m in _members(hint) if isinstance(m, type)]
    if value in choices or (value is None and type(None) in kinds):
        return
    if bool in kinds and type(value) is bool:
        return
    numeric = (int in kinds and type(value) is int) or (
        float in kinds and type(value) in (int, float)
    )
    low, high = field.metadata["low"], field.metadata["high"]
    if numeric and (low is None or low <= value <= high):  # NaN compares false
        return
    wanted = [repr(c) for c in choices]
    if int in kinds or float in kinds:
        kind = "an integer" if int in kinds else "a number"
        wanted.append(kind if low is None else f"{kind} from {low} to {high}")
    if bool in kinds:
        wanted.append("true or false")
    raise UsageError(f"{name} is {shown(value)}; it must be {' or '.join(wanted)}")


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
