"""Hugging Face's config.json to ModelConfig, and back. No weights are read and no torch imported.

The files are untrusted: whatever would change an answer and is not done here is refused by name.
"""

import collections
import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from roofline.config import CHANNEL, GROUP_SIZES, ModelConfig, RopeScaling, WeightFormat
from roofline.errors import CheckpointError, RooflineError, UnsupportedError, shown
from roofline.models.checkpoints.generation_config import listed_eos_ids
from roofline.models.checkpoints.json_fields import Fields, read_json
from roofline.models.checkpoints.tensors import matrix_shapes
from roofline.models.families import FAMILIES, Family


def read_config(folder: Path) -> tuple[ModelConfig, dict[str, int]]:
    """The model's shape, and the group size of each tensor that is INT8 on disk."""
    path = folder / "config.json"
    stated = Fields(read_json(path), str(path))
    family = _family(stated)
    fields = Fields({**family.defaults, **stated.values}, str(path))
    _refuse_what_we_lack(fields, family)
    heads, vocab_size = fields.integer("num_attention_heads"), fields.integer("vocab_size")
    theta, scaling, factors = _rope(fields)
    build = functools.partial(
        ModelConfig,
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", heads),
        head_dim=_head_dim(fields, heads),
        vocab_size=vocab_size,
        max_position=fields.integer("max_position_embeddings", 2048),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        rope_factors=factors,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        sliding_window=_window(fields, family),
        architecture=family.model_type,
        bos_token_id=fields.optional_integer("bos_token_id"),
        eos_token_ids=listed_eos_ids(fields, vocab_size),
    )
    try:
        config = build()
    except RooflineError as error:  # of a config that does not know its file
        raise type(error)(f"{path}: {error.message}") from None
    return config, _native_groups(fields, config)


def write_config(config: ModelConfig, weights: WeightFormat, groups: Mapping[str, int]) -> str:
    """config.json of a checkpoint quantised by us; `groups` are the matrices' actual groups."""
    family = FAMILIES[config.architecture]
    fields = {
        "architectures": [family.transformers_class],
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
        "rope_parameters": _rope_fields(config),
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
        **_window_fields(config, family),
        "quantization_config": _quantization_fields(config, weights, groups),
    }
    return json.dumps(fields, indent=2, allow_nan=False) + "\n"


def _family(fields: Fields) -> Family:
    named = fields.get("model_type")
    if not isinstance(named, str) or named not in FAMILIES:
        raise fields.unsupported("model_type", ", ".join(FAMILIES))
    return FAMILIES[named]


def _refuse_what_we_lack(fields: Fields, family: Family) -> None:
    """Name whatever would change the model's arithmetic and is not implemented."""
    for name, neutral in _NEUTRAL.items():
        if name == "attention_bias" and family.qkv_bias:
            continue  # says what the family has; elsewhere the output projection gets a bias too
        if fields.get(name) is not None and not _same(fields.get(name), neutral):
            raise fields.unsupported(name, f"{json.dumps(neutral)}, or no such field")


def _head_dim(fields: Fields, heads: int) -> int:
    """The stated size of a head, or the hidden size dealt over the heads."""
    stated = fields.optional_integer("head_dim")
    if stated is not None:
        return stated
    hidden = fields.integer("hidden_size")
    if heads < 1 or hidden % heads:
        raise CheckpointError(
            f"{fields.where}: hidden_size {hidden} is not a multiple of "
            f"num_attention_heads {heads}, and there is no head_dim"
        )
    return hidden // heads


def _window(fields: Fields, family: Family) -> int | None:
    """Tokens a query sees in every layer, None for all; a window in some layers only is refused."""
    window = fields.optional_integer("sliding_window")
    if window is not None and family.window == "never":
        raise fields.unsupported("sliding_window", "null, or no such field")
    if family.window == "switched" and not _switched_on(fields):
        window = None
    kind = "full_attention" if window is None else "sliding_attention"
    listed, layers = fields.get("layer_types"), fields.integer("num_hidden_layers")
    if listed is None:
        return window
    if not isinstance(listed, list) or len(listed) != layers or any(k != kind for k in listed):
        raise fields.unsupported("layer_types", f"'{kind}' for each of the {layers} layers")
    return window


def _switched_on(fields: Fields) -> bool:
    """Whether all layers have Qwen's window; the first `max_window_layers` of them have none."""
    if not fields.boolean("use_sliding_window", False):
        return False
    listed = fields.get("layer_types")
    if isinstance(listed, list):  # it alone counts, then
        return "sliding_attention" in listed
    bare, layers = fields.integer("max_window_layers"), fields.integer("num_hidden_layers")
    if 0 < bare < layers:
        raise fields.unsupported("max_window_layers", f"0 (a window in all layers) or {layers}")
    return bare <= 0


def _window_fields(config: ModelConfig, family: Family) -> dict[str, Any]:
    """What `_window` reads."""
    if family.window == "never":
        return {}
    fields: dict[str, Any] = {"sliding_window": config.sliding_window}
    if family.window == "switched":
        used = config.sliding_window is not None
        fields |= {"use_sliding_window": used, "max_window_layers": 0}
    return fields


def _rope(fields: Fields) -> tuple[float, RopeScaling | None, tuple[float, ...] | None]:
    """Base, scaling and factors: of `rope_parameters`, or of `rope_theta` and `rope_scaling`.

    The first is how transformers 5 writes them, the second how it did before. The type `factors`
    is ours: the divisors a GGUF file stores in place of a scaling rule.
    """
    sections = fields.section("rope_scaling") | fields.section("rope_parameters")
    outside = {name: fields.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    rope = Fields(outside | sections, fields.where)
    if rope.number("partial_rotary_factor", 1.0) != 1.0:
        raise rope.unsupported("partial_rotary_factor", "1.0, or no such field")
    theta = rope.number("rope_theta", 10000.0)
    kind = sections.get("rope_type", sections.get("type", "default"))
    if kind == "default":
        return theta, None, None
    if kind == "linear":
        return theta, RopeScaling("linear", rope.number("factor")), None
    if kind == "factors":
        return theta, None, _factors(rope)
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
        f"{fields.where}: rope_type {shown(kind)} is not supported; "
        "supported: default, linear, llama3"
    )


def _factors(rope: Fields) -> tuple[float, ...]:
    listed = rope.get("factors")
    if not isinstance(listed, list):
        raise rope.wrong("factors", "a list of numbers")
    members = Fields({f"factors[{i}]": factor for i, factor in enumerate(listed)}, rope.where)
    return tuple(members.number(name) for name in members.values)


def _rope_fields(config: ModelConfig) -> dict[str, Any]:
    """What `_rope` reads."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    scaling = config.rope_scaling
    if config.rope_factors is not None:
        factors = config.rope_factors
        if scaling is not None:  # a GGUF file may have both: what they come to is written
            plain = dataclasses.replace(config, rope_factors=None, rope_scaling=None)
            pairs = zip(plain.rope_frequencies(), config.rope_frequencies(), strict=True)
            factors = tuple(whole / stretched for whole, stretched in pairs)
        return rope | {"rope_type": "factors", "factors": list(factors)}
    if scaling is None:
        return rope
    rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        rope |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position,
        }
    return rope


def _native_groups(fields: Fields, config: ModelConfig) -> dict[str, int]:
    """Group sizes from `quantization_config`; other quantisers are refused by name."""
    if fields.get("quantization_config") is None:
        return {}
    found = Fields(fields.section("quantization_config"), f"{fields.where}: quantization_config")
    if found.get("quant_method") != "roofline":
        raise found.unsupported(
            "quant_method", "floats (F32, F16, BF16), GGUF, and what `roofline quantize` writes"
        )
    for name, only in (("bits", 8), ("symmetric", True)):
        if not _same(found.get(name), only):
            raise found.unsupported(name, json.dumps(only))
    columns = {name: shape[1] for name, shape in matrix_shapes(config).items()}
    own = Fields(found.section("group_sizes"), f"{found.where}: group_sizes")
    for name in own.values:
        if name not in columns:
            raise CheckpointError(f"{own.where}: the model has no matrix {shown(name)}")
    return {
        name: _group(own, name, width) if name in own.values else _group(found, "group_size", width)
        for name, width in columns.items()
    }


def _group(fields: Fields, name: str, columns: int) -> int:
    """Columns that share a scale, of a matrix of so many."""
    size = fields.get(name)
    if size == CHANNEL:
        return columns
    if type(size) is not int or (size not in GROUP_SIZES and size != columns):
        raise fields.unsupported(name, f"{', '.join(map(str, GROUP_SIZES))}, {CHANNEL}")
    return size


def _quantization_fields(
    config: ModelConfig, weights: WeightFormat, groups: Mapping[str, int]
) -> dict[str, Any]:
    """What `_native_groups` reads: a group size for most, and those of the exceptions."""
    columns = {name: shape[1] for name, shape in matrix_shapes(config).items()}
    size = weights.group_size
    if size == "auto":
        commonest, _ = collections.Counter(groups.values()).most_common(1)[0]
        size = commonest if commonest in GROUP_SIZES else CHANNEL
    own = {n: g for n, g in groups.items() if g != (columns[n] if size == CHANNEL else size)}
    fields = {"quant_method": "roofline", "bits": 8, "group_size": size, "symmetric": True}
    return fields | ({"group_sizes": own} if own else {})


def _same(value: Any, wanted: Any) -> bool:
    """Equal, and of one type: neither 1 for true nor 8.0 for 8."""
    return type(value) is type(wanted) and value == wanted


# Fields of config.json that change the answer when they hold anything else.
_NEUTRAL: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
}
