"""GGUF's block formats: how many weights a block holds, how its bytes lie, how they become float32.

Layouts are ggml's (`ggml-common.h`), little-endian; arithmetic is float32 in ggml's order, so
results equal `gguf.quants.dequantize` bit for bit. No files and no tensor names here.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from roofline.errors import CheckpointError, UnsupportedError

Q8_0_GROUP_SIZE = 32
_SLAB_BYTES = 1 << 20  # of float32 result decoded at a time: temporaries stay in the cache

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Blocks = np.ndarray  # [blocks] of a type's structured dtype


@dataclass(frozen=True)
class BlockFormat:
    """A tensor type: a row is a whole number of blocks of `elements` weights in `nbytes` bytes."""

    elements: int
    layout: np.dtype
    decode: Callable[[Blocks, Floats], None]  # (blocks [B], out [B, elements])

    @property
    def nbytes(self) -> int:
        """Bytes of one block."""
        return self.layout.itemsize


def block_format(type_name: str) -> BlockFormat:
    """Return the format of a tensor type by its ggml name, such as 'Q4_1'."""
    if type_name not in FORMATS:
        raise UnsupportedError(
            f"tensor type {type_name} is not supported; supported: {', '.join(FORMATS)}"
        )
    return FORMATS[type_name]


def dequantize(raw: Bytes, type_name: str, n_elements: int) -> Floats:
    """Return the float32 values of a tensor's bytes, [n_elements], in memory of their own."""
    blocks = _blocks(raw, type_name, n_elements)
    block = block_format(type_name)
    values = np.empty((len(blocks), block.elements), np.float32)
    step = max(1, _SLAB_BYTES // (4 * block.elements))
    with np.errstate(
        invalid="ignore", over="ignore", under="ignore"
    ):  # a NaN scale gives NaN weights
        for start in range(0, len(blocks), step):
            block.decode(blocks[start : start + step], values[start : start + step])
    return values.reshape(n_elements)


def q8_0_groups(raw: Bytes, rows: int, columns: int) -> tuple[NDArray[np.int8], Floats]:
    """Return a Q8_0 matrix: int8 [rows, columns] and float32 scales [rows, columns / 32].

    Exact: a scale is the float32 of the file's fp16, and -128 stays. A scale of 0 makes every
    weight 0, so it becomes 1.0 over zeros. Raises CheckpointError for a NaN or infinite scale.
    """
    blocks = _blocks(raw, "Q8_0", rows * columns).reshape(rows, columns // Q8_0_GROUP_SIZE)
    with np.errstate(invalid="ignore"):  # a signalling NaN, which is refused below
        scales = blocks["scale"].astype(np.float32)
    finite = np.isfinite(scales)
    if not finite.all():
        row, group = np.argwhere(~finite)[0]
        raise CheckpointError(f"the scale of row {row}, group {group} is {scales[row, group]}")
    quants = blocks["quants"].copy()  # [rows, groups, 32]
    zero = scales == 0
    quants[zero] = 0
    scales[zero] = 1.0
    return quants.reshape(rows, columns), scales


def _blocks(raw: Bytes, type_name: str, n_elements: int) -> Blocks:
    block = block_format(type_name)
    count, rest = divmod(n_elements, block.elements)
    if rest or raw.nbytes != count * block.nbytes:
        raise CheckpointError(
            f"{raw.nbytes} bytes cannot hold {n_elements} weights in {type_name} blocks "
            f"of {block.elements} weights in {block.nbytes} bytes"
        )
    return raw.view(block.layout)


def _decode_plain(blocks: Blocks, out: Floats) -> None:
    out[:, 0] = blocks["value"]


def _decode_bf16(blocks: Blocks, out: Floats) -> None:
    np.left_shift(blocks["value"], np.uint32(16), out=out[:, 0].view(np.uint32))


def _decode_q8_0(blocks: Blocks, out: Floats) -> None:
    out[:] = blocks["quants"]
    out *= _column(blocks["scale"])


def _decode_q4_0(blocks: Blocks, out: Floats) -> None:
    _nibbles(blocks["low"], out)
    out -= 8
    out *= _column(blocks["scale"])


def _decode_q4_1(blocks: Blocks, out: Floats) -> None:
    _nibbles(blocks["low"], out)
    out *= _column(blocks["scale"])
    out += _column(blocks["minimum"])


def _decode_q5_0(blocks: Blocks, out: Floats) -> None:
    _five_bits(blocks, out)
    out -= 16
    out *= _column(blocks["scale"])


def _decode_q5_1(blocks: Blocks, out: Floats) -> None:
    _five_bits(blocks, out)
    out *= _column(blocks["scale"])
    out += _column(blocks["minimum"])


def _nibbles(low: Bytes, out: Floats) -> None:
    """Low nibbles [..., n] are the first half of a block's weights, high nibbles the second."""
    half = low.shape[-1]
    out[..., :half] = low & 0x0F
    out[..., half:] = low >> 4


def _five_bits(blocks: Blocks, out: Floats) -> None:
    """Bit i of the 32-bit field `high` is the fifth bit of weight i."""
    low = blocks["low"]
    fifth = np.unpackbits(blocks["high"], axis=-1, bitorder="little") << 4  # [B, 32]
    out[:, :16] = (low & 0x0F) | fifth[:, :16]
    out[:, 16:] = (low >> 4) | fifth[:, 16:]


def _decode_q4_k(blocks: Blocks, out: Floats) -> None:
    _nibbles(blocks["low"], out.reshape(-1, 4, 64))
    _scale_and_shift(blocks, out)


def _decode_q5_k(blocks: Blocks, out: Floats) -> None:
    low, high = blocks["low"], blocks["high"][:, None, :]  # [B, 4, 32], [B, 1, 32]
    weights = out.reshape(-1, 4, 2, 32)
    pair = np.arange(0, 8, 2, dtype=np.uint8)[
        :, None
    ]  # bits 2i and 2i + 1 of `high` belong to low[i]
    weights[:, :, 0] = (low & 0x0F) | ((high >> pair) & 1) << 4
    weights[:, :, 1] = (low >> 4) | ((high >> (pair + np.uint8(1))) & 1) << 4
    _scale_and_shift(blocks, out)


def _scale_and_shift(blocks: Blocks, out: Floats) -> None:
    """Apply the scale and minimum of each group of 32: six bits a group times an fp16 a block.

    The low six bits of bytes 0-3 and 4-7 of `groups` are the scales and minima of groups 0-3; the
    nibbles of bytes 8-11, under the high two bits of bytes 0-7, are those of groups 4-7.
    """
    packed = blocks["groups"]  # [B, 3, 4]
    first, second, nibbles = packed[:, 0], packed[:, 1], packed[:, 2]
    scales = np.concatenate([first & 0x3F, (nibbles & 0x0F) | ((first >> 2) & 0x30)], axis=1)
    minima = np.concatenate([second & 0x3F, (nibbles >> 4) | ((second >> 2) & 0x30)], axis=1)
    weights = out.reshape(-1, 8, 32)
    weights *= (_column(blocks["scale"]) * scales)[:, :, None]
    weights -= (_column(blocks["minimum"]) * minima)[:, :, None]


def _decode_q6_k(blocks: Blocks, out: Floats) -> None:
    low, high = blocks["low"], blocks["high"]  # [B, 2, 2, 32], [B, 2, 32]
    weights = out.reshape(-1, 2, 4, 32)
    for quarter in range(4):
        nibble = low[:, :, quarter % 2] >> (4 * (quarter // 2)) & 0x0F
        weights[:, :, quarter] = nibble | (high >> (2 * quarter) & 3) << 4
    weights -= 32
    groups = out.reshape(-1, 16, 16)
    groups *= (_column(blocks["scale"]) * blocks["groups"])[:, :, None]


def _column(halves: NDArray[np.float16]) -> Floats:
    return halves.astype(np.float32)[:, None]


_SCALE, _MINIMUM = ("scale", "<f2"), ("minimum", "<f2")
_GROUPS = ("groups", "u1", (3, 4))  # 16 six-bit numbers

FORMATS = {
    "F32": BlockFormat(1, np.dtype([("value", "<f4")]), _decode_plain),
    "F16": BlockFormat(1, np.dtype([("value", "<f2")]), _decode_plain),
    "BF16": BlockFormat(1, np.dtype([("value", "<u2")]), _decode_bf16),
    "Q8_0": BlockFormat(32, np.dtype([_SCALE, ("quants", "i1", 32)]), _decode_q8_0),
    "Q4_0": BlockFormat(32, np.dtype([_SCALE, ("low", "u1", 16)]), _decode_q4_0),
    "Q4_1": BlockFormat(32, np.dtype([_SCALE, _MINIMUM, ("low", "u1", 16)]), _decode_q4_1),
    "Q5_0": BlockFormat(32, np.dtype([_SCALE, ("high", "u1", 4), ("low", "u1", 16)]), _decode_q5_0),
    "Q5_1": BlockFormat(
        32, np.dtype([_SCALE, _MINIMUM, ("high", "u1", 4), ("low", "u1", 16)]), _decode_q5_1
    ),
    "Q4_K": BlockFormat(
        256, np.dtype([_SCALE, _MINIMUM, _GROUPS, ("low", "u1", (4, 32))]), _decode_q4_k
    ),
    "Q5_K": BlockFormat(
        256,
        np.dtype([_SCALE, _MINIMUM, _GROUPS, ("high", "u1", 32), ("low", "u1", (4, 32))]),
        _decode_q5_k,
    ),
    "Q6_K": BlockFormat(
        256,
        np.dtype(
            [("low", "u1", (2, 2, 32)), ("high", "u1", (2, 32)), ("groups", "i1", 16), _SCALE]
        ),
        _decode_q6_k,
    ),
}
