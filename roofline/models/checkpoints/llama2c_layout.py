"""What lies where in a .bin file of llama2.c or KuiperLLama, worked out from its header.

A file names nothing: its size must be, to the byte, what a header's integers imply. Source: the
exporters, `export.py` of karpathy/llama2.c and of zjhellofss/KuiperLLama. No tensor is read here.
"""

import contextlib
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from roofline.budget import layer_tensor
from roofline.config import ModelConfig
from roofline.errors import CheckpointError, UnsupportedError
from roofline.models.checkpoints.rotary_order import RotaryOrder
from roofline.models.checkpoints.tensors import EMBEDDING, HEAD, NORM, tensor_shapes

LONGEST_HEADER_BYTES = 256


@dataclass(frozen=True)
class Layout:
    """One exporter's order; a part of a layer stands for that of all layers, one after another."""

    title: str
    header_bytes: int
    order: tuple[str, ...]
    floats: frozenset[str]  # of the order; the others are INT8
    rotary_order: RotaryOrder  # of the rows of Q and K


@dataclass(frozen=True)
class Place:
    """Where one tensor lies: its values, and behind INT8 ones their groups' float32 scales."""

    offset: int  # bytes from the start of the file
    shape: tuple[int, ...]
    is_int8: bool

    @property
    def items(self) -> int:
        """Values, scales not counted."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Contents:
    """What a header says of its file."""

    layout: Layout
    config: ModelConfig
    group: int  # values that share a scale, counted over the flattened tensor; 0: no INT8
    places: Mapping[str, Place]  # by canonical name
    size_bytes: int


def identify(header: bytes, size_bytes: int) -> Contents:
    """Say what a file of so many bytes is that starts with `header`.

    v0 and KuiperLLama's INT8 have no magic number: only the size tells them apart.
    """
    versioned = header.startswith(_MAGIC)
    candidates = [_versioned(header)] if versioned else _unversioned(header)
    found = [contents for contents in candidates if contents.size_bytes == size_bytes]
    if len(found) == 1:
        return found[0]
    expected = " or ".join(f"{c.size_bytes:,} as {c.layout.title}" for c in candidates)
    verdict = "which does not tell them apart" if found else "it is cut short or something else"
    raise CheckpointError(f"has {size_bytes:,} bytes; its header makes that {expected}; {verdict}")


def _versioned(header: bytes) -> Contents:
    """What a header with the magic number says."""
    if len(header) < FLOAT.header_bytes:
        raise CheckpointError(f"ends in its header, which takes {FLOAT.header_bytes} bytes")
    version, *fields, shared, group = _VERSIONED.unpack_from(header, len(_MAGIC))
    layout = _LAYOUTS.get(version)
    if layout is None:
        raise UnsupportedError(
            f"llama2.c version {version} is not supported; supported: 0 (which has no version "
            f"number), {', '.join(map(str, _LAYOUTS))}, and KuiperLLama's INT8"
        )
    if shared not in (0, 1):
        raise CheckpointError(f"header: shared_classifier is {shared}; it must be 0 or 1")
    used = len(_MAGIC) + _VERSIONED.size - (0 if layout is INT8 else _GROUP.size)
    if any(header[used : layout.header_bytes]):
        raise UnsupportedError(
            f"header: after byte {used} is more than version {version} has; supported: zeros"
        )
    config = _config(fields, tied=bool(shared))
    return _contents(layout, config, group if layout is INT8 else 0)


def _unversioned(header: bytes) -> list[Contents]:
    """What a header without the magic number may say; a negative vocab_size: not tied."""
    if len(header) < LEGACY.header_bytes:
        raise CheckpointError(f"ends in its header, which takes {LEGACY.header_bytes} bytes")
    *fields, vocab_size, max_seq_len = _FIELDS.unpack_from(header)
    config = _config([*fields, abs(vocab_size), max_seq_len], tied=vocab_size > 0)
    candidates = [_contents(LEGACY, config, 0)]
    if len(header) >= KUIPER.header_bytes:
        (group,) = _GROUP.unpack_from(header, _FIELDS.size)  # or the first weight of v0
        with contextlib.suppress(CheckpointError):  # it is no group size
            candidates.append(_contents(KUIPER, config, group))
    return candidates


def _config(fields: Sequence[int], tied: bool) -> ModelConfig:
    """The model's shape; for what a header does not say, the constants of llama2.c."""
    for (name, limit), value in zip(_LIMITS.items(), fields, strict=True):
        if not 1 <= value <= limit:
            raise CheckpointError(f"header: {name} is {value}; a model has 1 to {limit}")
    dim, hidden_dim, layers, heads, kv_heads, vocab_size, max_seq_len = fields
    if dim % heads:
        raise CheckpointError(f"header: dim {dim} is not a multiple of n_heads {heads}")
    return ModelConfig(
        hidden_size=dim,
        intermediate_size=hidden_dim,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim // heads,
        vocab_size=vocab_size,
        max_position=max_seq_len,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=tied,
    )


def _contents(layout: Layout, config: ModelConfig, group: int) -> Contents:
    """Lay the tensors out one behind the other."""
    shapes, places, end = tensor_shapes(config), dict[str, Place](), layout.header_bytes
    for part in layout.order:
        if part == _ROTARY_TABLES:
            end += _FLOAT_BYTES * config.max_position * config.head_dim
            continue
        for name in _tensors(part, config):
            place = Place(end, shapes[name], is_int8=part not in layout.floats)
            places[name] = place
            items = place.items
            end += _int8_bytes(name, items, group) if place.is_int8 else _FLOAT_BYTES * items
    return Contents(layout, config, group, places, end)


def _tensors(part: str, config: ModelConfig) -> list[str]:
    """The names that a part of an order stands for."""
    if part == HEAD:
        return [] if config.tie_word_embeddings else [HEAD]
    if part in (EMBEDDING, NORM):
        return [part]
    return [layer_tensor(layer, part) for layer in range(config.num_layers)]


def _int8_bytes(name: str, items: int, group: int) -> int:
    """Bytes of an INT8 tensor's values and scales."""
    if group < 1 or items % group:
        raise CheckpointError(
            f"header: group_size is {group}; it must be above 0 and divide the "
            f"{items} weights of {name}"
        )
    return items + _FLOAT_BYTES * (items // group)


_MAGIC = struct.pack("<I", 0x616B3432)  # "ak42"
_FIELDS = struct.Struct("<7i")
_GROUP = struct.Struct("<i")
_VERSIONED = struct.Struct("<i 7i B i")  # version, fields, shared_classifier, group_size; unaligned
_FLOAT_BYTES = 4
_LIMITS = {  # of _FIELDS, in their order: those of ModelConfig
    "dim": 1 << 20,
    "hidden_dim": 1 << 22,
    "n_layers": 1 << 12,
    "n_heads": 1 << 12,
    "n_kv_heads": 1 << 12,
    "vocab_size": 1 << 24,
    "max_seq_len": 1 << 27,
}

_ROTARY_TABLES = "rotary tables"  # cosines and sines, which llama2.c too computes anew
_BEFORE, _AFTER = "input_layernorm", "post_attention_layernorm"  # of attention
_ATTENTION = tuple(f"self_attn.{x}_proj" for x in "qkvo")
_FFN = ("mlp.gate_proj", "mlp.down_proj", "mlp.up_proj")  # w1, w2, w3
_NORMS = frozenset({_BEFORE, _AFTER, NORM})
_ALL = _NORMS.union(_ATTENTION, _FFN, (EMBEDDING, HEAD))
_LEGACY_ORDER = (EMBEDDING, _BEFORE, *_ATTENTION, _AFTER, *_FFN, NORM, _ROTARY_TABLES, HEAD)
_ORDER = (_BEFORE, _AFTER, NORM, EMBEDDING, *_ATTENTION, *_FFN, HEAD)
_KUIPER_ORDER = (*_ATTENTION, *_FFN, HEAD, EMBEDDING, _BEFORE, _AFTER, NORM)

LEGACY = Layout("llama2.c float32 (v0)", 28, _LEGACY_ORDER, _ALL, "interleaved")
FLOAT = Layout("llama2.c float32 (v1)", 256, _ORDER, _ALL, "interleaved")
INT8 = Layout("llama2.c INT8 (v2)", 256, _ORDER, _NORMS, "interleaved")
KUIPER = Layout("KuiperLLama INT8", 32, _KUIPER_ORDER, _NORMS | {EMBEDDING}, "half-split")
_LAYOUTS = {1: FLOAT, 2: INT8}
