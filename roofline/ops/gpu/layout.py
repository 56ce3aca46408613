"""How each matrix is multiplied: kernels and tile sizes, fixed by its shape when it is loaded.

Nothing is tried out while requests wait: `benchmarks/gpu_tune.py` measures the candidates, and what
won stands here as a rule.
"""

from dataclasses import dataclass

import torch

from roofline.budget import DEQUANTIZED_ROWS, PARTIAL_ROWS, SPLIT_TOKENS
from roofline.ops import FloatWeight, Int8Weight, PackedWeight, Weight
from roofline.ops.gpu.triton_support import power_of_two

CHUNK = 128  # columns of INT8 that a product takes at once, at most; all of one group
FLOAT_CHUNK = 64
STREAM_GROUP = 128  # columns that share a scale in what `stream` multiplies
STREAM_ROWS, STREAM_COLUMNS = 16, 64  # that its matrices are multiples of
STREAM_TOKENS = 16  # at most
STREAM_BYTES = 8 << 20  # of a matrix; with a smaller one `gemv` is done sooner with one token
WIDE_TOKENS = 256  # that `wide` takes at most, of matrices of as many bytes
WIDE_FEW_ROWS, WIDE_FEW_TOKENS = 8192, 128  # where rows are few
PROGRAMS = 256  # about two for each multiprocessor of an H100: fewer leave memory idle


@dataclass(frozen=True)
class GemvPlan:
    """One token: what a program takes at once."""

    rows: int
    chunks: int
    warps: int


@dataclass(frozen=True)
class TilesPlan:
    """Several tokens: the tile of a program, and into how many parts K is cut."""

    rows: int
    tokens: int
    splits: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Layout:
    """What kernels are told of a matrix."""

    columns: int
    groups: int  # scales of a row; 0: floats
    group: int  # columns that share a scale; 0: all of a row do, or it has none
    offset: int  # columns of the first group that lie on another rank
    chunk: int
    paired: bool  # the two halves of the rows are gate and up
    rounds_activations: bool  # to INT8, before they are multiplied
    streamed: range  # tokens that are for `stream`, where that can be compiled
    wide: range  # and for `wide`
    gemv: GemvPlan | None
    tiles: tuple[TilesPlan, ...]  # by the tokens of their tile; the last serves any number
    library_tokens: int | None  # from so many tokens on the library multiplies; None: never

    @property
    def shift(self) -> int:
        """Columns of the first chunk that lie before the matrix."""
        return self.offset % self.chunk if self.group else 0

    @property
    def chunks(self) -> int:
        """Chunks of a row."""
        return -(-(self.columns + self.shift) // self.chunk)

    def is_even(self, chunks: int) -> bool:
        """Whether so many chunks are the matrix exactly: nothing needs a mask."""
        return self.shift == 0 and chunks * self.chunk == self.columns

    def tiles_of(self, tokens: int) -> TilesPlan:
        """The tiles of a number of tokens."""
        fitting = (plan for plan in self.tiles if tokens <= plan.tokens)
        return next(fitting, self.tiles[-1])


def layout_of(weight: Weight) -> Layout:
    """The layout of a packed matrix."""
    assert isinstance(weight, PackedWeight) and isinstance(weight.layout, Layout)
    return weight.layout


def pack(
    weight: Int8Weight | FloatWeight,
    paired: bool,
    *,
    dtype: torch.dtype,  # of activations
    int8_activations: bool = False,
    deterministic: bool = False,
) -> PackedWeight:
    """A matrix on its device, as it lies, with the plans of its products."""
    rows, columns = weight.values.shape
    groups = group = offset = 0
    scales = copy = None
    if isinstance(weight, Int8Weight):
        scales, copy, groups = weight.scales, weight.copy, weight.scales.shape[1]
        group, offset = (weight.group, weight.offset) if groups > 1 else (0, 0)
    chunk = FLOAT_CHUNK if scales is None else min(group or CHUNK, CHUNK)
    rounds = int8_activations and scales is not None
    has_floats = scales is None or copy is not None
    streamed = range(0) if deterministic else _streamed(rows, columns, group, offset, dtype)
    layout = Layout(
        columns, groups, group, offset, chunk, paired, rounds, streamed,
        _wide(rows, columns, has_floats) if streamed and not rounds else range(0),
        None if deterministic else plan_gemv(rows, columns, chunk, weight.values.element_size()),
        plan_tiles(
            rows, columns, chunk, paired, dtype, rounds=rounds, deterministic=deterministic
        ),
        _library_tokens(rows, has_floats, rounds or deterministic),
    )  # fmt: skip
    return PackedWeight(weight.values, scales, rows, layout, copy)


def _streamed(rows: int, columns: int, group: int, offset: int, dtype: torch.dtype) -> range:
    whole = group == STREAM_GROUP and offset % STREAM_GROUP == 0
    whole = whole and rows % STREAM_ROWS == 0 and columns % STREAM_COLUMNS == 0
    if not whole or dtype == torch.float32:  # which has more than 16 bits of fixed point
        return range(0)
    return range(1 if rows * columns >= STREAM_BYTES else 2, STREAM_TOKENS + 1)


def _wide(rows: int, columns: int, has_floats: bool) -> range:
    if rows * columns < STREAM_BYTES:
        return range(0)
    most = WIDE_FEW_TOKENS if rows <= WIDE_FEW_ROWS else WIDE_TOKENS
    return range(STREAM_TOKENS + 1, (SPLIT_TOKENS if has_floats else most) + 1)


def plan_gemv(rows: int, columns: int, chunk: int, item_bytes: int) -> GemvPlan:
    """Whole rows, or spans of 2 KB of long ones; together 8 KB a program are on their way."""
    whole = power_of_two(-(-columns // chunk))
    largest = 4096 // (chunk * item_bytes)
    if whole > largest:
        return GemvPlan(2, largest // 2 if item_bytes == 1 else largest, 4)
    if rows > DEQUANTIZED_ROWS and whole == largest:
        return GemvPlan(4, whole, 8)
    taken = 2
    while taken < 16 and 2 * taken * whole * chunk * item_bytes <= 8192:
        taken *= 2
    while taken > 2 and rows < PROGRAMS * taken:
        taken //= 2
    return GemvPlan(taken, whole, 4)


def plan_tiles(
    rows: int,
    columns: int,
    chunk: int,
    paired: bool,
    dtype: torch.dtype,
    *,
    rounds: bool,  # activations are rounded to INT8
    deterministic: bool,
) -> tuple[TilesPlan, ...]:
    """Tiles for up to 16, 32 and 64 tokens, and for prompts; one for all where deterministic."""
    if dtype == torch.float32:  # no tensor core multiplies these
        return (TilesPlan(32, 16, 1, 4, 2),)
    if deterministic:
        return (TilesPlan(64, 64, 1, 4, 4),)
    sixteen = (64, 16, 4, 4) if rounds else (32, 16, 2, 6)  # docs/gpu_performance.md: measured
    few = [sixteen, (64, 32, 4, 4), (64, 64, 4, 3)]
    chunks = -(-columns // chunk)
    plans = [
        TilesPlan(r, tokens, 1 if paired else _splits(rows, r, chunks), warps, stages)
        for r, tokens, warps, stages in few
    ]
    return *plans, TilesPlan(64, 128, 1, 4, 3)


def _splits(rows: int, tile_rows: int, chunks: int) -> int:
    splits = 1
    while (
        -(-rows // tile_rows) * splits < PROGRAMS
        and chunks >= 16 * splits  # at least eight a split
        and 2 * splits * rows <= PARTIAL_ROWS
    ):
        splits *= 2
    return splits


def _library_tokens(rows: int, has_floats: bool, never: bool) -> int | None:
    """For few tokens, reading the weights as INT8 costs less than writing them as floats."""
    if never or (not has_floats and rows > DEQUANTIZED_ROWS):
        return None
    return SPLIT_TOKENS + 1 if has_floats else 97 if rows <= 8192 else 257
