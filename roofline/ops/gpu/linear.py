"""The launchers of linears: which kernel multiplies how many tokens, and what it is given.

Up to 16 tokens: `stream`, and up to 256: `wide`, in CUDA C++. What these do not take, `gemv` for
one token and `tiles` for several, with `sum_splits` where K was cut. Long prompts: the library,
by a matrix that is kept as floats or dequantised into a buffer; in INT8 activations, and where a
token's bits may not depend on the others, `tiles` at every size.
"""

import torch
from torch import Tensor

from roofline.budget import LIBRARY_TOKENS
from roofline.ops import KvCache, PackedWeight, StepInputs
from roofline.ops.gpu import lookup, norms, tiles
from roofline.ops.gpu.gemv import gemv
from roofline.ops.gpu.gemv_rope import gemv_rope_store
from roofline.ops.gpu.layout import GemvPlan, Layout, TilesPlan, layout_of
from roofline.ops.gpu.room import Room
from roofline.ops.gpu.stream import Planes, streams_on
from roofline.ops.gpu.triton_support import launch, parts, power_of_two, supports_pdl
from roofline.ops.gpu.wide import Laid, wides_on

SUM_BLOCK = 1024
QUANTIZED_COLUMNS = 1024  # that a program rounds, at least
LAID_COLUMNS = 2048  # that a program lays out


class Linears:
    """Products of tokens with packed matrices, on one device."""

    def __init__(self, device: torch.device) -> None:
        self.pdl = supports_pdl(device)  # kernels start before the one before them has ended
        self.streams = streams_on(device)
        self.wides = wides_on(device)

    def planes(self, layout: Layout, tokens: int) -> int:
        """Planes that so many tokens are multiplied in, if they are not floats: 0."""
        if layout.rounds_activations:
            return 1
        return 2 if self.is_streamed(layout, tokens) else 0

    def is_streamed(self, layout: Layout, tokens: int) -> bool:
        """Whether so many tokens are for `stream`."""
        return self.streams is not None and tokens in layout.streamed

    def is_wide(self, layout: Layout, tokens: int) -> bool:
        """Whether so many tokens are for `wide`, laid out as `lay` does."""
        return self.wides is not None and tokens in layout.wide

    def multiply(
        self,
        x: Tensor | Planes | Laid,  # [T, K] activation dtype; or as `planes` and `is_wide` say
        weight: PackedWeight,
        out: Tensor,  # [T, N], or [T, N / 2] of a pair: silu(gate) * up
        room: Room,
        infinite: Tensor | None = None,  # [1] int32, set where a product is NaN or infinite
    ) -> None:
        """Write the product, in the dtype of `out`."""
        layout, tokens = layout_of(weight), len(out)
        if self.wides is not None and self.is_wide(layout, tokens):
            assert not isinstance(x, Planes)
            self.wides.multiply(self.laid(x, room), weight, out, infinite)
            return
        assert not isinstance(x, Laid)
        if self.streams is not None and self.is_streamed(layout, tokens):
            if tokens > 1 or layout.rounds_activations:  # one token's planes are made on the way
                x = self.rounded(x, layout, room)
            self.streams.multiply(x, weight, out, infinite)
            return
        if layout.library_tokens is not None and tokens >= layout.library_tokens:
            assert isinstance(x, Tensor)
            self.library(x, weight, out, room)
            if infinite is not None:
                assert out.is_contiguous()
                launch(
                    norms.find_infinite, (parts(out.numel(), 4 * SUM_BLOCK),), self.pdl,
                    out, infinite, out.numel(), BLOCK=4 * SUM_BLOCK,
                )  # fmt: skip
            return
        x, steps = self._operands(x, layout, room)
        if tokens == 1 and layout.gemv is not None:
            self.gemv(x, steps, weight, out, infinite, layout.gemv)
            return
        plan = layout.tiles_of(tokens)
        if plan.splits == 1:
            self.tiles(x, steps, weight, out, infinite, plan)
            return
        partial = room.take((plan.splits, tokens, weight.rows), torch.float32)
        self.tiles(x, steps, weight, partial, infinite, plan)
        self.sum_splits(partial, out)

    def multiply_in_parts(
        self, x: Tensor | Planes | Laid, tokens: int, weight: PackedWeight, room: Room
    ) -> Tensor:
        """The product [splits, T, N] float32 that is yet to be added up, as the next kernel may."""
        layout = layout_of(weight)
        splits = 1
        own = self.is_streamed(layout, tokens) or self.is_wide(layout, tokens)
        if not own and (tokens > 1 or layout.gemv is None):
            splits = layout.tiles_of(tokens).splits
        if splits == 1:
            out = room.take((1, tokens, weight.rows), torch.float32)
            self.multiply(x, weight, out[0], room)
            return out
        assert not isinstance(x, Laid)
        x, steps = self._operands(x, layout, room)
        out = room.take((splits, tokens, weight.rows), torch.float32)
        self.tiles(x, steps, weight, out, None, layout.tiles_of(tokens))
        return out

    def gemv(
        self,
        x: Tensor,  # [1, K] activation dtype, or int8
        steps: Tensor | None,
        weight: PackedWeight,
        out: Tensor,
        infinite: Tensor | None,
        plan: GemvPlan,
    ) -> None:
        """One token."""
        layout = layout_of(weight)
        count = parts(layout.chunks, plan.chunks)
        launch(
            gemv, (parts(weight.rows, plan.rows),), self.pdl,
            x, steps, weight.values, weight.scales, out, infinite,
            weight.rows, layout.columns, layout.groups, 0 if steps is None else steps.stride(0),
            ROWS=plan.rows, CHUNKS=plan.chunks, CHUNK=layout.chunk, STEPS=count,
            SHIFT=layout.shift, OFFSET=layout.offset, GROUP=layout.group,
            EVEN=layout.is_even(count * plan.chunks), PAIRED=layout.paired, num_warps=plan.warps,
        )  # fmt: skip

    def fuses_rope(self, weight: PackedWeight, tokens: int, dim: int) -> bool:
        """Whether `multiply_rope_store` takes so many tokens and heads of `dim` channels."""
        layout = layout_of(weight)
        if self.is_streamed(layout, tokens):
            return dim % 16 == 0
        return tokens == 1 and layout.gemv is not None

    def multiply_rope_store(
        self,
        x: Tensor | Planes,  # [T, K] activation dtype; or as many planes as `planes` says
        weight: PackedWeight,  # queries, keys, values
        bias: Tensor | None,  # [N] float32
        table: Tensor,  # [2, max_model_len, D / 2] float32
        inputs: StepInputs,
        cache: KvCache,  # of a layer, floats
        out: Tensor,  # [T, Hq, D]
        room: Room,
    ) -> None:
        """Queries, keys and values of some tokens, see `fuses_rope`, rotated, where they belong."""
        layout = layout_of(weight)
        if self.streams is not None and self.is_streamed(layout, len(out)):
            x = self.rounded(x, layout, room)
            self.streams.rope_store(x, weight, bias, table, inputs, cache, out)
            return
        plan = layout.gemv
        assert plan is not None and len(out) == 1
        x, steps = self._operands(x, layout, room)
        count = parts(layout.chunks, plan.chunks)
        _, blocks, kv_heads, block_tokens, dim = cache.values.shape
        launch(
            gemv_rope_store, (parts(weight.rows, plan.rows),), self.pdl,
            x, steps, weight.values, weight.scales, bias, table[0], table[1], inputs.positions,
            inputs.slots, cache.values, out, layout.columns, layout.groups,
            0 if steps is None else steps.stride(0), out.shape[1], kv_heads, blocks, block_tokens,
            HALF=dim // 2, ROWS=plan.rows, CHUNKS=plan.chunks, CHUNK=layout.chunk, STEPS=count,
            SHIFT=layout.shift, OFFSET=layout.offset, GROUP=layout.group,
            EVEN=layout.is_even(count * plan.chunks), num_warps=plan.warps,
        )  # fmt: skip

    def tiles(
        self,
        x: Tensor,  # [T, K] activation dtype, or int8
        steps: Tensor | None,
        weight: PackedWeight,
        out: Tensor,  # [T, N], or [splits, T, N] float32
        infinite: Tensor | None,
        plan: TilesPlan,
    ) -> None:
        """Any number of tokens."""
        layout, tokens = layout_of(weight), len(x)
        count = parts(layout.chunks, plan.splits)
        grid = (parts(tokens, plan.tokens), parts(weight.rows, plan.rows), plan.splits)
        launch(
            tiles.tiles, grid, self.pdl,
            x, steps, weight.values, weight.scales, out, infinite,
            tokens, weight.rows, layout.columns, layout.groups,
            0 if steps is None else steps.stride(0), out.stride(-2), count,
            ROWS=plan.rows, TOKENS=plan.tokens, CHUNK=layout.chunk,
            SHIFT=layout.shift, OFFSET=layout.offset, GROUP=layout.group,
            EVEN=layout.is_even(count * plan.splits), PAIRED=layout.paired, PREFETCHED_LINES=4,
            num_warps=plan.warps, num_stages=plan.stages,
        )  # fmt: skip

    def sum_splits(self, partial: Tensor, out: Tensor) -> None:
        """Add partial sums [splits, T, N] to out [T, N]."""
        assert out.is_contiguous()
        grid = (parts(out.numel(), SUM_BLOCK),)
        launch(
            tiles.sum_splits, grid, self.pdl,
            partial, out, out.numel(), SPLITS=len(partial), BLOCK=SUM_BLOCK,
        )  # fmt: skip

    def dequantize(self, weight: PackedWeight, out: Tensor) -> None:
        """Write the matrix [N, K] as floats."""
        layout = layout_of(weight)
        chunks = max(1, 1024 // layout.chunk)
        grid = (parts(weight.rows, 4), parts(layout.chunks, chunks))
        launch(
            lookup.dequantize, grid, self.pdl,
            weight.values, weight.scales, out, weight.rows, layout.columns, layout.groups,
            ROWS=4, CHUNKS=chunks, CHUNK=layout.chunk, SHIFT=layout.shift, OFFSET=layout.offset,
            GROUP=layout.group,
        )  # fmt: skip

    def rounded(self, x: Tensor | Planes, layout: Layout, room: Room) -> Planes:
        """The input [T, K] as planes, as many as `planes` says."""
        if isinstance(x, Planes):
            return x
        assert x.is_contiguous()
        tokens, columns = x.shape
        planes = self.planes(layout, tokens)
        found = self.room_for_planes(planes, tokens, columns, layout.groups, room)
        wide = power_of_two(layout.group or columns)
        groups = max(1, QUANTIZED_COLUMNS // wide)
        launch(
            norms.quantize, (tokens, parts(layout.groups, groups)), self.pdl,
            x, found.values, found.steps, columns, layout.groups, found.steps.stride(0),
            PLANES=planes, OFFSET=layout.offset, GROUP=layout.group, COLUMNS=wide, GROUPS=groups,
            num_warps=4 if wide <= 4096 else 8,
        )  # fmt: skip
        return found

    def room_for_planes(
        self, planes: int, tokens: int, columns: int, groups: int, room: Room
    ) -> Planes:
        """Planes that are yet to be written."""
        values = room.take((planes, tokens, columns), torch.int8)
        return Planes(values, room.take((groups, -(-tokens // 16) * 16), torch.float32))

    def laid(self, x: Tensor | Laid, room: Room) -> Laid:
        """The input [T, K] as `wide` reads it."""
        if isinstance(x, Laid):
            return x
        assert x.is_contiguous()
        tokens, columns = x.shape
        found = self.room_for_laid(tokens, columns, x.dtype, room)
        launch(
            norms.lay, (tokens, parts(columns, LAID_COLUMNS)), self.pdl,
            x, found.values, columns, found.values.shape[1], COLUMNS=LAID_COLUMNS,
        )  # fmt: skip
        return found

    def room_for_laid(self, tokens: int, columns: int, dtype: torch.dtype, room: Room) -> Laid:
        """Activations that are yet to be laid out."""
        return Laid(room.take((2 * parts(columns, 128), parts(tokens, 8) * 8, 64), dtype))

    def _operands(
        self, x: Tensor | Planes, layout: Layout, room: Room
    ) -> tuple[Tensor, Tensor | None]:
        """The input of `gemv` and `tiles`: as it is, or INT8 with steps [G, T and more] float32."""
        if not layout.rounds_activations:
            assert isinstance(x, Tensor) and x.is_contiguous()
            return x, None
        planes = self.rounded(x, layout, room)
        return planes.values[0], planes.steps

    def library(self, x: Tensor, weight: PackedWeight, out: Tensor, room: Room) -> None:
        """By cuBLAS; the product of a pair in slices, as it is twice as wide as what it becomes."""
        layout = layout_of(weight)
        floats = weight.values if weight.scales is None else weight.copy
        if floats is None:
            floats = room.take((weight.rows, layout.columns), x.dtype)
            self.dequantize(weight, floats)
        if not layout.paired:
            _matrix_product(x, floats, out)
            return
        both = room.take((min(len(x), LIBRARY_TOKENS), weight.rows), x.dtype)
        for start in range(0, len(x), LIBRARY_TOKENS):
            part, done = x[start : start + LIBRARY_TOKENS], out[start : start + LIBRARY_TOKENS]
            _matrix_product(part, floats, both[: len(part)])
            channels = weight.rows // 2
            launch(
                norms.swiglu,
                (len(part), parts(channels, SUM_BLOCK)),
                self.pdl,
                both,
                done,
                channels,
                BLOCK=SUM_BLOCK,
            )


def _matrix_product(x: Tensor, matrix: Tensor, out: Tensor) -> None:
    """x [T, K] times the transpose of matrix [N, K], in the dtype of out [T, N]."""
    if out.dtype == x.dtype:
        torch.mm(x, matrix.t(), out=out)
    elif x.is_cuda:
        torch.ops.aten.mm.dtype_out(x, matrix.t(), out.dtype, out=out)
    else:  # torch has no such product on the CPU, where the interpreter runs
        out.copy_(x.to(out.dtype) @ matrix.t().to(out.dtype))
