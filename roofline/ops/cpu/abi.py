"""The structs of csrc/abi.h, field by field. Pointers and 64-bit numbers only."""

import ctypes
from ctypes import Structure, c_double, c_int64, c_void_p
from typing import Any, ClassVar

VERSION = 8

EMBED, NORM_QKV_ROPE_STORE, ATTENTION, LINEAR, NORM_GATE_UP_SWIGLU, NORM_HEAD = range(6)
TRUNCATE, CHOOSE = range(6, 8)
READ_MEMORY, DOT_ACTIVATIONS, DOT_INT8 = range(8, 11)  # for benchmarks
QUANTIZE = 11  # at load
INT8, BFLOAT16, FLOAT32, OFFSET_INT8 = range(4)

_Field = tuple[str, Any]


def _fields(pointers: str = "", **others: Any) -> list[_Field]:
    """Fields in order: pointers by name, then the others."""
    return [*((name, c_void_p) for name in pointers.split()), *others.items()]


def _numbers(names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), c_int64)


class Weight(Structure):
    """A packed matrix."""

    _fields_: ClassVar[list[_Field]] = _fields(
        "values scales", **_numbers("rows columns group offset kind chunks extremes")
    )


class Embed(Structure):
    """`Ops.embed`."""

    _fields_: ClassVar[list[_Field]] = [
        *_fields("step token_ids", table=Weight, first_id=c_int64),
        *_fields("out"),
    ]


class NormQkvRopeStore(Structure):
    """`Ops.norm_qkv_rope_store`."""

    _fields_: ClassVar[list[_Field]] = [
        *_fields("step residual delta norm", eps=c_double, qkv=Weight),
        *_fields("bias q_norm k_norm rope", rope_length=c_int64),
        *_fields("positions slots keys values", **_numbers("heads kv_heads head_dim block_tokens")),
        *_fields("normed quantized mixed out"),
    ]


class Attention(Structure):
    """`Ops.attention`."""

    _fields_: ClassVar[list[_Field]] = [
        *_fields("step query keys values block_table", table_width=c_int64),
        *_fields("query_start context_len", **_numbers("heads kv_heads head_dim block_tokens")),
        *_fields(scale=c_double, window=c_int64),
        *_fields("partial", partial_values=c_int64),
        *_fields("out"),
    ]


class Linear(Structure):
    """`Ops.linear`."""

    _fields_: ClassVar[list[_Field]] = [
        *_fields("step x", weight=Weight),
        *_fields("quantized out"),
    ]


class NormGateUpSwiglu(Structure):
    """`Ops.norm_gate_up_swiglu`."""

    _fields_: ClassVar[list[_Field]] = [
        *_fields("step residual delta norm", eps=c_double, gate_up=Weight),
        *_fields("normed quantized out"),
    ]


class NormHead(Structure):
    """`Ops.norm_head`."""

    _fields_: ClassVar[list[_Field]] = [
        *_fields("step residual delta sampled norm", eps=c_double, head=Weight),
        *_fields("normed quantized out", out_stride=c_int64),
    ]


class Truncate(Structure):
    """`Ops.truncate`."""

    _fields_: ClassVar[list[_Field]] = [
        *_fields("step logits", stride=c_int64, vocab=c_int64),
        *_fields("min_p top_k top_p"),
    ]


class Choose(Structure):
    """`Ops.choose`."""

    _fields_: ClassVar[list[_Field]] = [
        *_fields("step logits", stride=c_int64, vocab=c_int64),
        *_fields("temperature seed position out"),
    ]


class Measure(Structure):
    """What a benchmark repeats."""

    _fields_: ClassVar[list[_Field]] = [
        *_fields("buffer", count=c_int64),
        *_fields("sink"),
    ]


class Quantize(Structure):
    """Weights to INT8 groups."""

    _fields_: ClassVar[list[_Field]] = _fields(
        "weights values scales broken", **_numbers("rows columns stride group")
    )


SIGNATURES: dict[str, tuple[Any, list[Any]]] = {  # name -> what it returns, what it takes
    "roofline_abi_version": (ctypes.c_int, []),
    "roofline_isa": (ctypes.c_char_p, [ctypes.c_int]),
    "roofline_pool_new": (c_void_p, [ctypes.c_int]),
    "roofline_pool_free": (None, [c_void_p]),
    "roofline_run": (None, [c_void_p, ctypes.c_int, ctypes.c_int, c_int64, c_void_p]),
    "roofline_tape_new": (c_void_p, []),
    "roofline_tape_free": (None, [c_void_p]),
    "roofline_tape_add": (
        None,
        [c_void_p, ctypes.c_int, ctypes.c_int, c_int64, c_void_p, c_int64],
    ),
    "roofline_tape_play": (None, [c_void_p, c_void_p]),
    "roofline_pack": (
        ctypes.c_int,
        [c_void_p, c_void_p, *[c_int64] * 5, ctypes.c_int, ctypes.c_int, c_void_p, c_void_p],
    ),
}
