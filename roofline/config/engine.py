"""Options of an engine: one schema for Python, the command line and the environment."""

import contextlib
import dataclasses
import difflib
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from roofline.config.parallel import ParallelConfig
from roofline.errors import UnsupportedError, UsageError, shown

CHANNEL = "channel"  # one scale for a whole output channel
GROUP_SIZES = (32, 64, 128, 256)
DEFAULT_GROUP_SIZE = 128


@dataclasses.dataclass(frozen=True)
class WeightFormat:
    """What a weight matrix becomes in memory: INT8 groups, or floats of the activations' dtype."""

    quantization: Literal["int8", "none"] = "int8"
    group_size: int | Literal["auto", "channel"] = "auto"
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    keeps_bfloat16: bool = False  # whether the layers' INT8 matrices have a copy in bfloat16

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


@dataclasses.dataclass(frozen=True)
class StepLimits:
    """How large steps and blocks are, and how much memory is taken: what differs by device."""

    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int  # tokens
    memory_share: float  # of what is free


_CPU_LIMITS = StepLimits(32, 512, 16, 0.5)
_GPU_LIMITS = StepLimits(256, 8192, 64, 0.9)


def _option(default: Any, text: str, low: float | None = None, high: float | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, "low": low, "high": high})


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How to load and run a model: one schema for Python, command line and ROOFLINE_* options."""

    revision: str | None = _option(
        None, "branch, tag or commit of a Hugging Face repository; default: main"
    )
    load_format: Literal["auto", "dummy"] = _option(
        "auto", "'dummy' makes seeded random weights of the model's shape, for any config or preset"
    )
    tokenizer: str | None = _option(
        None, "a folder, tokenizer.json, tokenizer.bin or .gguf, in place of the model's own"
    )
    chat_template: str | None = _option(
        None,
        "a Jinja file, a JSON file with one, or its own text, in place of the model's own",
    )
    generation_config: str = _option(
        "auto",
        "a file or folder of EOS ids and sampling defaults; auto is the model's own; or none",
    )
    rotary_order: Literal["auto", "interleaved", "half-split"] = _option(
        "auto", "of the rows of Q and K in a .bin file, which does not say"
    )
    quantization: Literal["int8", "none"] = _option(
        "int8", "'none' keeps weights as floats of --dtype"
    )
    group_size: Literal["auto", "channel"] | int = _option(
        "auto",
        "weights that share a scale: 32, 64, 128, 256 or channel; "
        "auto keeps the groups of a file that is already INT8, else 128",
    )
    device: str = _option(
        "auto", "cpu, cuda or cuda:N; auto is a GPU of compute capability 8.0 or later, else cpu"
    )
    dtype: Literal["bfloat16", "float16", "float32"] = _option(
        "bfloat16", "of activations, and of the KV cache unless that has its own"
    )
    kv_cache_dtype: Literal["auto", "int8", "fp8"] = _option(
        "auto", "of the KV cache; int8 and fp8 have a scale a token and head; auto is --dtype"
    )
    activations: Literal["float", "int8"] = _option(
        "float", "int8 rounds what INT8 weights are multiplied by, too: faster, less exact"
    )
    max_model_len: Literal["auto"] | int = _option(
        "auto", "context in tokens; auto is the model's own, or the largest that fits", 1, 1 << 27
    )
    prefill_weights: Literal["auto", "int8", "bfloat16"] = _option(
        "auto",
        "of prompts on a GPU: bfloat16 keeps a copy of the layers beside int8; auto is int8",
    )
    deterministic: bool = _option(
        False, "on a GPU: tokens do not depend on what else runs; on a CPU they never do"
    )
    max_num_seqs: int | None = _option(
        None, "requests that run at once; default: 32, on a GPU 256", 1, 4096
    )
    max_num_batched_tokens: int | None = _option(
        None, "tokens computed in one step; default: 512, on a GPU 8192", 1, 1 << 20
    )
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
    gpu_memory_utilization: float | None = _option(
        None,
        "share of the device's free memory for weights, KV and activations; "
        "default: 0.5 of the host's, 0.9 of a GPU's",
        0.01,
        1.0,
    )
    block_size: int | None = _option(
        None, "tokens of a KV block; default: 16, on a GPU 64", 1, 1024
    )
    tensor_parallel_size: int = _option(1, "ranks that share each layer", 1, 1024)
    pipeline_parallel_size: int = _option(1, "ranks that share the stack of layers", 1, 1024)
    threads: int | None = _option(
        None, "CPU threads; default: the cores this process may use", 1, 1024
    )
    cpu_isa: Literal["auto", "amx", "avx512_bf16", "avx512", "avx2", "portable", "reference"] = (
        _option("auto", "kernels to use; reference is plain PyTorch, slow and always right")
    )
    enforce_eager: bool = _option(False, "run a step op by op, never as a tape or CUDA graph")
    seed: int = _option(0, "of dummy weights and of requests that bring no seed", 0, (1 << 64) - 1)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_option(field.name, getattr(self, field.name))
        group = self.group_size
        if type(group) is int and group not in GROUP_SIZES:
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise UnsupportedError(
                f"group_size {shown(group)} is not supported; supported: {sizes}, channel"
            )
        limits = self.limits
        if limits.max_num_batched_tokens < limits.max_num_seqs:
            raise UsageError(
                f"max_num_batched_tokens is {limits.max_num_batched_tokens}; it must be at least "
                f"max_num_seqs, {limits.max_num_seqs}, or some requests would never decode"
            )
        self._check_device()
        if self.quantization == "none" and group != "auto":
            raise UsageError(f"group_size {group} does nothing with quantization 'none'; drop one")
        if self.quantization == "none" and self.activations == "int8":
            raise UsageError("activations 'int8' does nothing with quantization 'none'; drop one")
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

    def _check_device(self) -> None:
        """Refuse a device that is none, and options that would do nothing there."""
        if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", self.device):
            raise UsageError(
                f"device is {shown(self.device)}; it must be 'auto', 'cpu', 'cuda' or 'cuda:N'"
            )
        if self.is_on_gpu and self.cpu_isa != "auto":
            raise UsageError(f"cpu_isa '{self.cpu_isa}' does nothing on device {self.device}")
        if self.prefill_weights == "bfloat16":
            if self.device == "cpu":
                raise UsageError("prefill_weights 'bfloat16' does nothing on device cpu; drop one")
            for name, other in (("quantization", "none"), ("activations", "int8")):
                if getattr(self, name) == other:
                    raise UsageError(
                        f"prefill_weights 'bfloat16' does nothing with {name} '{other}'; drop one"
                    )
            if self.dtype != "bfloat16" or self.deterministic:
                other = "deterministic" if self.deterministic else f"dtype {self.dtype}"
                raise UsageError(f"prefill_weights 'bfloat16' does not go with {other}; drop one")

    @property
    def is_on_gpu(self) -> bool:
        """Whether the device is a GPU; 'auto' is not known yet (`execution.devices`)."""
        return self.device.startswith("cuda")

    @property
    def limits(self) -> StepLimits:
        """Sizes given, or else the device's own; those not given make room for those that are."""
        usual = _GPU_LIMITS if self.is_on_gpu else _CPU_LIMITS
        rows, tokens = self.max_num_seqs, self.max_num_batched_tokens
        return StepLimits(
            usual.max_num_seqs if rows is None else rows,
            max(usual.max_num_batched_tokens, rows or 1) if tokens is None else tokens,
            usual.block_size if self.block_size is None else self.block_size,
            self.gpu_memory_utilization or usual.memory_share,
        )

    @property
    def kv_dtype(self) -> str:
        """The dtype of the KV cache's values, as torch calls it."""
        stored = {"auto": self.dtype, "int8": "int8", "fp8": "float8_e4m3fn"}
        return stored[self.kv_cache_dtype]

    @property
    def weights(self) -> WeightFormat:
        """The format weights take in memory."""
        copied = self.prefill_weights == "bfloat16"
        return WeightFormat(self.quantization, self.group_size, self.dtype, copied)

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
            check_option(field.name, value, variable)
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


def check_option(name: str, value: Any, source: str | None = None) -> None:
    """Refuse a value that an option cannot have; `source` is what a message calls it."""
    hint = get_type_hints(EngineConfig)[name]
    choices, kinds = _choices(hint), [m for m in _members(hint) if isinstance(m, type)]
    if value in choices or (value is None and type(None) in kinds):
        return
    if (bool in kinds and type(value) is bool) or (str in kinds and type(value) is str and value):
        return
    numeric = (int in kinds and type(value) is int) or (
        float in kinds and type(value) in (int, float)
    )
    metadata = EngineConfig.__dataclass_fields__[name].metadata
    low, high = metadata["low"], metadata["high"]
    if numeric and (low is None or low <= value <= high):  # NaN compares false
        return
    wanted = [repr(c) for c in choices]
    if int in kinds or float in kinds:
        kind = "an integer" if int in kinds else "a number"
        wanted.append(kind if low is None else f"{kind} from {low} to {high}")
    if bool in kinds:
        wanted.append("true or false")
    if str in kinds:
        wanted.append("a text of at least one character")
    raise UsageError(f"{source or name} is {shown(value)}; it must be {' or '.join(wanted)}")


def option_path(option: str, value: str, wanted: str) -> Path:
    """The path that an option names, of something that exists; else a UsageError says `wanted`."""
    path = Path(value)
    try:
        if path.exists():
            return path
        fault = "no such file or folder"
    except OSError as error:  # a name too long, a folder that may not be entered
        fault = f"cannot be read: {error.strerror}"
    raise UsageError(f"{option} {shown(value)}: {fault}; give {wanted}")


_BOOLEANS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def _members(hint: Any) -> tuple[Any, ...]:
    return (
        get_args(hint) if isinstance(hint, types.UnionType) or _is_typing_union(hint) else (hint,)
    )


def _is_typing_union(hint: Any) -> bool:
    return get_origin(hint) is not None and get_origin(hint) is not Literal


def _choices(hint: Any) -> tuple[Any, ...]:
    return tuple(c for m in _members(hint) if get_origin(m) is Literal for c in get_args(m))
