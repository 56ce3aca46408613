"""Hugging Face's config.json to ModelConfig, and back. No weights are read and no torch imported."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from roofline.config import (
    ARCHITECTURES,
    CHANNEL,
    GROUP_SIZES,
    ModelConfig,
    RopeScaling,
    WeightFormat,
)
from roofline.errors import CheckpointError, UnsupportedError
from roofline.models.checkpoints.tensors import matrix_shapes

MAX_JSON_BYTES = 64 << 20


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of sane size; CheckpointError names the file otherwise."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; a safetensors folder needs one")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: {path.stat().st_size:,} bytes is too large for a JSON file")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(found).__name__}, not an object")
    return found


def read_config(folder: Path) -> tuple[ModelConfig, dict[str, int]]:
    """The model's shape, and the group size of each tensor that is INT8 on disk."""
    path = folder / "config.json"
    fields = Fields(read_json(path), str(path))
    _refuse_what_we_lack(fields)
    heads, hidden = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    if heads < 1:
        raise CheckpointError(f"{path}: num_attention_heads is {heads}; it must be at least 1")
    theta, scaling, factors = _rope(fields)
    config = ModelConfig(
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", heads),
        head_dim=fields.integer("head_dim", hidden // heads),
        vocab_size=fields.integer("vocab_size"),
        max_position=fields.integer("max_position_embeddings", 2048),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        rope_factors=factors,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        bos_token_id=fields.optional_integer("bos_token_id"),
        eos_token_ids=_token_ids(fields, "eos_token_id"),
    )
    return config, _native_groups(fields, config)


def write_config(config: ModelConfig, weights: WeightFormat, groups: Mapping[str, int]) -> str:
    """config.json of a checkpoint quantised by us; `groups` are the tensors' actual groups."""
    size = CHANNEL if weights.group_size == CHANNEL else weights.group(0, None)
    columns = {name: shape[1] for name, shape in matrix_shapes(config).items()}
    own = {n: g for n, g in groups.items() if g != (columns[n] if size == CHANNEL else size)}
    quantization: dict[str, Any] = {
        "quant_method": "roofline",
        "bits": 8,
        "group_size": size,
        "symmetric": True,
    }
    if own:
        quantization["group_sizes"] = own
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_factors is not None:
        rope |= {"rope_type": "factors", "factors": list(config.rope_factors)}
    elif config.rope_scaling is not None:
        scaling = config.rope_scaling
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            rope |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_position,
            }
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": config.architecture,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
        "quantization_config": quantization,
    }
    return json.dumps(fields, indent=2) + os.linesep


class Fields:
    """Typed access to a JSON object; a wrong type or a missing field names file and field."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def get(self, name: str) -> Any:
        """The raw value, None where absent."""
        return self.values.get(name)

    def integer(self, name: str, default: int | None = None) -> int:
        """An integer; null counts as absent."""
        return self._typed(name, default, (int,), "an integer")

    def optional_integer(self, name: str) -> int | None:
        """An integer, or None where absent."""
        return None if self.values.get(name) is None else self.integer(name)

    def number(self, name: str, default: float | None = None) -> float:
        """A number, as float; null counts as absent."""
        return float(self._typed(name, default, (int, float), "a number"))

    def boolean(self, name: str, default: bool) -> bool:
        """true or false; null counts as absent."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.where}: {name} is {_short(value)}; it must be true or false")
        return value

    def _typed(self, name: str, default: Any, kinds: tuple[type, ...], wanted: str) -> Any:
        value = self.values.get(name)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self.where}: no field '{name}'")
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise CheckpointError(f"{self.where}: {name} is {_short(value)}; it must be {wanted}")
        return value


def _refuse_what_we_lack(fields: Fields) -> None:
    """Name whatever would change the model's arithmetic and is not implemented."""
    kind = fields.get("model_type")
    if kind not in ARCHITECTURES:
        raise UnsupportedError(
            f"{fields.where}: architecture {_short(kind)} is not supported; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    for name in ("attention_bias", "mlp_bias"):
        if fields.boolean(name, False):
            raise UnsupportedError(f"{fields.where}: {name} is not supported; only false is")
    if fields.get("hidden_act") not in (None, "silu"):
        raise UnsupportedError(
            f"{fields.where}: hidden_act {_short(fields.get('hidden_act'))} is not supported; silu is"
        )


def _rope(fields: Fields) -> tuple[float, RopeScaling | None, tuple[float, ...] | None]:
    """Base, scaling and factors, from `rope_parameters` or from `rope_theta` and `rope_scaling`.

    The type `factors` is ours: the divisors a GGUF file stores in place of a scaling rule.
    """
    merged = dict(fields.values)
    for name in ("rope_scaling", "rope_parameters"):
        part = fields.get(name)
        if part is not None and not isinstance(part, dict):
            raise CheckpointError(f"{fields.where}: {name} is {_short(part)}; it must be an object")
        merged |= part or {}
    rope = Fields(merged, fields.where)
    theta = rope.number("rope_theta", 10000.0)
    kind = merged.get("rope_type", merged.get("type", "default"))
    if kind in (None, "default"):
        return theta, None, None
    if kind == "linear":
        return theta, RopeScaling("linear", rope.number("factor")), None
    if kind == "factors":
        return theta, None, _factors(fields.where, merged.get("factors"))
    if kind == "llama3":
        scaling = RopeScaling(
            "llama3",
            rope.number("factor"),
            rope.number("low_freq_factor"),
            rope.number("high_freq_factor"),
            rope.integer("original_max_position_embeddings"),
        )
        return theta, scaling, None
    raise UnsupportedError(
        f"{fields.where}: rope_type {_short(kind)} is not supported; supported: default, linear, llama3"
    )


def _factors(where: str, value: Any) -> tuple[float, ...]:
    if not isinstance(value, list) or not all(type(f) in (int, float) for f in value):
        raise CheckpointError(f"{where}: rope factors are {_short(value)}; they must be numbers")
    return tuple(float(f) for f in value)


def _token_ids(fields: Fields, name: str) -> tuple[int, ...]:
    value = fields.get(name)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(type(i) is not int for i in ids) or len(ids) > 1024:
        raise CheckpointError(f"{fields.where}: {name} is {_short(value)}; it must be token ids")
    return tuple(ids)


def _native_groups(fields: Fields, config: ModelConfig) -> dict[str, int]:
    """Group sizes from `quantization_config`; other quantisers are refused by name."""
    found = fields.get("quantization_config")
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise CheckpointError(f"{fields.where}: quantization_config is not an object")
    method = found.get("quant_method")
    if method != "roofline" or found.get("bits") != 8 or found.get("symmetric") is not True:
        raise UnsupportedError(
            f"{fields.where}: weights quantised by {_short(method)} are not supported; supported: "
            "floats (F32, F16, BF16), GGUF, and what `roofline quantize` writes"
        )
    own = found.get("group_sizes", {})
    if not isinstance(own, dict):
        raise CheckpointError(f"{fields.where}: group_sizes is not an object")
    groups = {}
    for name, (_, columns) in matrix_shapes(config).items():
        size = own.get(name, found.get("group_size"))
        if size != CHANNEL and size not in GROUP_SIZES and size != columns:
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise UnsupportedError(
                f"{fields.where}: group_size {_short(size)} is not supported; supported: {sizes}, channel"
            )
        groups[name] = columns if size == CHANNEL else size
    return groups


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
