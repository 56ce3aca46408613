"""Linears of up to 16 tokens by `stream.cu`: which of its variants multiplies what.

`benchmarks/gpu_tune.py` measures the candidates; what won stands here as a rule.
"""

import functools
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver

from roofline.ops import KvCache, PackedWeight, StepInputs
from roofline.ops.gpu import nvrtc
from roofline.ops.gpu.layout import STREAM_GROUP, STREAM_TOKENS, layout_of
from roofline.ops.gpu.triton_support import parts, supports_pdl

COLUMNS = 8  # of a tensor core's product: a token takes as many as it has planes
IN_MEMORY, IN_SHARED, IN_REGISTERS = range(3)  # where activations wait, HELD
_SOURCE = Path(__file__).with_suffix(".cu")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_PLAIN, _PAIRED, _ROPE = range(3)


@dataclass(frozen=True)
class Planes:
    """Activations as integers: steps * values, or steps * (256 * values[0] + values[1])."""

    values: Tensor  # [1 or 2, T, K] int8
    steps: Tensor  # [groups, T and more] float32


@dataclass(frozen=True)
class ModelShapes:
    """Columns of a rank's matrices."""

    hidden: int
    attended: int  # of the output projection
    activated: int  # of the down projection
    head_dim: int


@dataclass(frozen=True)
class StreamPlan:
    """Constants of a variant, as `stream.cu` names them, but for what its epilogue does."""

    columns: int
    warps: int
    depth: int
    row_tiles: int
    token_tiles: int
    planes: int
    blocks: int  # of a multiprocessor, at least: how many registers a thread may have
    held: int
    given: int  # the dtype of one token in floats; 0: planes
    waves: int  # blocks of a multiprocessor that are launched

    def grid(self, tiles: int, multiprocessors: int) -> int:
        """Blocks that have as many row tiles each as any other, or one fewer."""
        return parts(tiles, parts(tiles, multiprocessors * self.waves))

    def shared_bytes(self, tokens: int) -> int:
        """Shared memory of a block: what is asked for at the launch, and its sums."""
        sums = 1024 * self.warps * self.row_tiles * parts(self.token_tiles, self.planes)
        return self.dynamic_bytes(tokens) + sums

    def dynamic_bytes(self, tokens: int) -> int:
        """Shared memory of a block that is asked for at the launch."""
        ring = self.warps * self.depth * self.row_tiles * 16 * (STREAM_GROUP + 4)
        if self.held != IN_SHARED and not self.given:
            return ring
        steps = parts(self.columns, STREAM_GROUP)
        return ring + steps * tokens * (self.planes * STREAM_GROUP + 4)


@functools.cache
def plan_stream(
    tokens: int, planes: int, columns: int, given: int = 0, most_shared: int = 232_448
) -> StreamPlan:
    """The plan for so many tokens, at most 16, of so many columns.

    `most_shared`: shared memory that a block may have; an H100's by default.
    docs/gpu_performance.md has the measurements behind the rules.
    """
    tiles = 1 << (parts(tokens * planes, COLUMNS) - 1).bit_length()
    warps, own, depth = _share_steps(parts(columns, STREAM_GROUP))
    one = StreamPlan(columns, warps, depth, 1, tiles, planes, 1, IN_MEMORY, given, 1)
    two = replace(one, depth=2 - own % 2, row_tiles=2)  # row tiles, to which activations go
    if tiles == 1 and own <= 8:  # two blocks, so that one streams while the other adds up
        depth = max(d for d in range(1, 6) if own % d == 0)
        wishes = [replace(one, depth=depth, blocks=2, held=IN_REGISTERS, waves=2)]
    elif tiles == 1:
        wishes = [replace(one, held=IN_SHARED if given else IN_MEMORY)]
    elif tiles == 2 and own <= 4:
        wishes = [replace(one, held=IN_REGISTERS)]
    else:
        wishes = [replace(one, held=IN_SHARED), two]
    wishes += [replace(wish, depth=1) for wish in wishes] + [replace(one, depth=1)]
    return next(wish for wish in wishes if wish.shared_bytes(tokens) <= most_shared)


def _share_steps(steps: int) -> tuple[int, int, int]:
    """Warps that share so many steps, each warp's own at most, and a depth that divides those."""
    for most in range(8, 0, -1):
        own = parts(steps, most)
        warps = parts(steps, own)  # fewer may do
        depth = max(d for d in range(1, 8) if parts(steps, warps) % d == 0)
        if depth >= min(own, 3):
            return warps, own, depth
    return 1, steps, 1


@functools.cache  # asked for at every launch that is not replayed, as is `plan_stream`
def _macros_of(
    plan: StreamPlan, kind: int, result: torch.dtype, kept: torch.dtype, half: int, pdl: bool
) -> nvrtc.Macros:
    """The macros of a variant, in their order."""
    macros = {name.upper(): value for name, value in asdict(plan).items() if name != "waves"}
    macros |= {"KIND": kind, "RESULT": _DTYPES[result], "KEPT": _DTYPES[kept], "HALF": half}
    return tuple(sorted((macros | {"PDL": int(pdl)}).items()))


class Streams:
    """The variants on one device, compiled when first needed or ahead."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.pdl = device, supports_pdl(device)
        index = torch.cuda.current_device() if device.index is None else device.index
        active: Any = driver.active
        about = active.utils.get_device_properties(index)
        self._multiprocessors: int = about["multiprocessor_count"]
        self._most_shared: int = about["max_shared_mem"]  # of a block
        self._variants = nvrtc.Variants(_SOURCE, device)

    def prepare(
        self, dtype: torch.dtype, planes: int, shapes: ModelShapes, kept: torch.dtype | None
    ) -> None:
        """Compile ahead what a model will need; `kept` is a cache in floats, None another."""
        wanted: set[nvrtc.Macros] = set()
        for tokens in range(1, STREAM_TOKENS + 1):
            normed = self._plan(tokens, planes, shapes.hidden)
            wanted.add(self._macros(normed, _PLAIN, torch.float32))
            wanted.add(self._macros(normed, _PAIRED, dtype))
            if kept is not None:
                wanted.add(self._macros(normed, _ROPE, dtype, kept, shapes.head_dim // 2))
            given = _DTYPES[dtype] if tokens == 1 and planes == 2 else 0
            for columns in (shapes.attended, shapes.activated):
                plan = self._plan(tokens, planes, columns, given)
                wanted.add(self._macros(plan, _PLAIN, torch.float32))
        self._variants.compile_ahead(wanted)

    def multiply(
        self,
        x: Tensor | Planes,  # a tensor: [1, K] in the activation dtype
        weight: PackedWeight,
        out: Tensor,  # [T, N] float32, or [T, N / 2] of a pair in the activation dtype
        infinite: Tensor | None,  # [1] int32, set where a product is NaN or infinite
        plan: StreamPlan | None = None,  # another than the rule's
    ) -> None:
        """Write the product."""
        plan = plan or self._plan_for(x, weight)
        kind = _PAIRED if layout_of(weight).paired else _PLAIN
        macros = self._macros(plan, kind, out.dtype)
        self._launch(macros, plan, x, weight, out, infinite, out.stride(0), *[None] * 6, 0, 0, 0, 0)

    def rope_store(
        self,
        x: Tensor | Planes,
        weight: PackedWeight,  # queries, keys, values
        bias: Tensor | None,  # [N] float32
        table: Tensor,  # [2, max_model_len, D / 2] float32
        inputs: StepInputs,
        cache: KvCache,  # of a layer, floats
        out: Tensor,  # [T, Hq, D]
    ) -> None:
        """Queries, keys and values of some tokens, rotated, where they belong."""
        plan = self._plan_for(x, weight)
        _, blocks, kv_heads, block_tokens, dim = cache.values.shape
        macros = self._macros(plan, _ROPE, out.dtype, cache.values.dtype, dim // 2)
        self._launch(
            macros, plan, x, weight, out, None, out.stride(0), bias, table[0], table[1],
            inputs.positions, inputs.slots, cache.values, out.shape[1], kv_heads, blocks,
            block_tokens,
        )  # fmt: skip

    def _plan_for(self, x: Tensor | Planes, weight: PackedWeight) -> StreamPlan:
        columns = layout_of(weight).columns
        if isinstance(x, Tensor):
            assert len(x) == 1
            return self._plan(1, 2, columns, _DTYPES[x.dtype])
        planes, tokens, _ = x.values.shape
        return self._plan(tokens, planes, columns)

    def _plan(self, tokens: int, planes: int, columns: int, given: int = 0) -> StreamPlan:
        return plan_stream(tokens, planes, columns, given, self._most_shared)

    def _launch(
        self,
        macros: nvrtc.Macros,
        plan: StreamPlan,
        x: Tensor | Planes,
        weight: PackedWeight,
        out: Tensor,
        infinite: Tensor | None,
        out_stride: int,
        *rest: Tensor | int | None,
    ) -> None:
        tiles = parts(weight.rows, 16 * plan.row_tiles)
        values, steps = (x.values, x.steps) if isinstance(x, Planes) else (x, None)
        self._variants.kernel(macros).launch(
            plan.grid(tiles, self._multiprocessors), 32 * plan.warps,
            plan.dynamic_bytes(len(out)), self.pdl,
            values, steps, weight.values, weight.scales, out, infinite,
            len(out), weight.rows, tiles,
            0 if steps is None else steps.stride(0), out_stride, *rest,
        )  # fmt: skip

    def _macros(
        self,
        plan: StreamPlan,
        kind: int,
        result: torch.dtype,
        kept: torch.dtype = torch.float32,
        half: int = 1,
    ) -> nvrtc.Macros:
        return _macros_of(plan, kind, result, kept, half, self.pdl)


def streams_on(device: torch.device) -> Streams | None:
    """The variants on a device; None where there is no compiler for them."""
    if device.type != "cuda" or nvrtc.missing() is not None:
        return None
    return Streams(device)
