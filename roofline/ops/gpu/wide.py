"""Linears of more tokens than `stream` takes by `wide.cu`, on Hopper: which tiles multiply what.

`benchmarks/gpu_tune.py` measures the candidates; what won stands here as a rule.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from roofline.ops import PackedWeight
from roofline.ops.gpu import nvrtc
from roofline.ops.gpu.layout import STREAM_GROUP, layout_of
from roofline.ops.gpu.stream import ModelShapes
from roofline.ops.gpu.triton_support import parts, supports_pdl

TILES = (32, 64, 96, 128)  # tokens of a tile
SLAB_ROWS = 16  # that a warp multiplies
BLOCK_SLABS = 16  # at most
CLUSTER = 5  # blocks that share K, at most
MOST_SHARED = 231_424  # of a block of Hopper's, beside what the kernel has of its own
_ALONE_SHARED = 200_000  # with which a block has a multiprocessor for itself
_STEP_BYTES = 16 * (STREAM_GROUP + 4)  # of a warp: weights and their scales
_STEP_COST, _SLAB_COST = 16, 3  # one to the other, fitted to few plans: docs/gpu_performance.md
_SOURCE = Path(__file__).with_suffix(".cu")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True)
class Laid:
    """Activations as `norms.lay` lays them out."""

    values: Tensor  # [2 ceil(K / 128), tokens, 64]; tokens up to a multiple of 8


@dataclass(frozen=True)
class WidePlan:
    """The tile of a block, and how many blocks share K."""

    tokens: int
    slabs: int  # of 16 rows
    splits: int
    depth: int  # steps that are on their way: of weights
    held: int  # and of activations

    @property
    def warps(self) -> int:
        """Of a block: whole groups of four, which multiply together."""
        return parts(self.slabs, 4) * 4

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block, for what is on its way or for its sums."""
        rings = self.held * self.tokens * 2 * STREAM_GROUP + self.warps * self.depth * _STEP_BYTES
        sums = 4 * self.tokens * (SLAB_ROWS * self.warps + 4) if self.splits > 1 else 0
        return max(rings, sums)


@functools.cache
def plan_wide(tokens: int, rows: int, columns: int, clusters: tuple[int, ...]) -> WidePlan:
    """The plan for so many tokens; `clusters` of 1, 2, 3... blocks are on the device at once."""
    tile = tile_of(tokens)
    slabs = parts(rows, SLAB_ROWS) * parts(tokens, tile)  # of all tiles of tokens
    steps = parts(columns, STREAM_GROUP)
    best, least = (1, 1), 0
    for splits, count in enumerate(clusters, 1):
        if splits > steps or not count:
            continue
        rounds = parts(slabs, BLOCK_SLABS * count)
        mine = parts(slabs, rounds * count)
        cost = rounds * parts(steps, splits) * (_STEP_COST + _SLAB_COST * mine)
        if not least or cost < least:
            best, least = (mine, splits), cost
    return WidePlan(tile, *best, *_rings_of(tile))


def tile_of(tokens: int) -> int:
    """Tokens of a tile: as few tiles as there can be, and those as small as they can be."""
    each = parts(tokens, parts(tokens, TILES[-1]))
    return next(tile for tile in TILES if each <= tile)


def _rings_of(tile: int) -> tuple[int, int]:
    """Steps on their way, of weights and of activations."""
    return {32: (4, 4), 64: (4, 4), 96: (3, 4), 128: (3, 3)}[tile]


class Wides:
    """The variants on one device, compiled when first needed or ahead."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.pdl = device, supports_pdl(device)
        self._variants = nvrtc.Variants(_SOURCE, device, own=True)
        self._clusters: tuple[int, ...] = ()  # of 1, 2, 3... blocks, at once; () as yet

    def prepare(self, dtype: torch.dtype, shapes: ModelShapes) -> None:
        """Compile ahead what a model will need."""
        wanted: set[nvrtc.Macros] = set()
        for tile in TILES:
            plan = WidePlan(tile, 1, 1, *_rings_of(tile))
            wanted.add(self._macros(plan, True, dtype, dtype, shapes.hidden))
            for columns in (shapes.hidden, shapes.attended, shapes.activated):
                wanted.add(self._macros(plan, False, dtype, torch.float32, columns))
        self._variants.compile_ahead(wanted)

    def multiply(
        self,
        x: Laid,
        weight: PackedWeight,
        out: Tensor,  # [T, N], or [T, N / 2] of a pair
        infinite: Tensor | None,  # [1] int32, set where a product is NaN or infinite
        plan: WidePlan | None = None,  # another than the rule's
    ) -> None:
        """Write the product, in the dtype of `out`."""
        layout, tokens = layout_of(weight), len(out)
        assert out.stride(1) == 1
        plan = plan or plan_wide(tokens, weight.rows, layout.columns, self.clusters)
        row_tiles = parts(weight.rows, SLAB_ROWS * plan.slabs)
        token_tiles = parts(tokens, plan.tokens)
        clusters = row_tiles * token_tiles
        if plan.splits == 1:  # a block has as many tiles as any other, or one fewer
            clusters = parts(clusters, parts(clusters, self.clusters[0]))
        macros = self._macros(plan, layout.paired, x.values.dtype, out.dtype, layout.columns)
        self._variants.kernel(macros).launch(
            clusters * plan.splits, 32 * plan.warps, plan.shared_bytes, self.pdl,
            x.values, weight.values, weight.scales, out, infinite,
            tokens, weight.rows, layout.columns, x.values.shape[1], plan.slabs,
            row_tiles, token_tiles, out.stride(0), cluster=plan.splits,
        )  # fmt: skip

    @property
    def clusters(self) -> tuple[int, ...]:
        """How many clusters of 1, 2, 3... blocks are on the device at once, a block a processor."""
        if not self._clusters:
            plan = WidePlan(TILES[0], BLOCK_SLABS, 1, *_rings_of(TILES[0]))
            macros = self._macros(plan, False, torch.bfloat16, torch.float32, STREAM_GROUP)
            kernel = self._variants.kernel(macros)
            self._clusters = tuple(
                kernel.clusters(size, 32 * BLOCK_SLABS, _ALONE_SHARED)
                for size in range(1, CLUSTER + 1)
            )
        return self._clusters

    def _macros(
        self, plan: WidePlan, paired: bool, given: torch.dtype, result: torch.dtype, columns: int
    ) -> nvrtc.Macros:
        macros = {"TOKENS": plan.tokens, "DEPTH": plan.depth, "HELD": plan.held}
        macros |= {"KIND": int(paired), "GIVEN": _DTYPES[given], "RESULT": _DTYPES[result]}
        macros |= {"EVEN": int(columns % STREAM_GROUP == 0), "PDL": int(self.pdl)}
        return tuple(sorted(macros.items()))


def wides_on(device: torch.device) -> Wides | None:
    """The variants on a device; None where it is no Hopper or has no compiler for them."""
    if device.type != "cuda" or nvrtc.missing() is not None:
        return None
    return Wides(device) if torch.cuda.get_device_capability(device) == (9, 0) else None
