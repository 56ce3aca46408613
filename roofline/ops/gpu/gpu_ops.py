"""The ops of the contract on Triton kernels: nothing is allocated, nothing waits for the device.

A layer of one decoding token is seven launches: norm, QKV with RoPE and the write to the cache,
attention, output projection, norm, gate and up with SwiGLU, down projection. Where heads are normed
or the cache is quantised, RoPE and the write are an eighth. Up to 16 tokens round the inputs of two
projections in two more, or lay them out; where Triton multiplies, two more sum splits.
"""

import torch
from torch import Tensor

from roofline.ops import KvCache, Ops, PackedWeight, StepInputs, Weight
from roofline.ops.gpu import attention, lookup, norms, rope, sampling
from roofline.ops.gpu.layout import STREAM_GROUP, layout_of
from roofline.ops.gpu.linear import Linears
from roofline.ops.gpu.room import Room
from roofline.ops.gpu.stream import ModelShapes, Planes
from roofline.ops.gpu.triton_support import (
    TRITON_DTYPES,
    launch,
    parts,
    power_of_two,
    supports_pdl,
)
from roofline.ops.gpu.wide import Laid


class GpuOps(Ops):
    """Kernels on the device that `scratch` lies on; matrices are packed by `layout.pack`."""

    def __init__(
        self, dtype: torch.dtype, scratch: Tensor, tasks: attention.Tasks, window: int | None
    ) -> None:
        super().__init__(dtype, scratch)
        self._tasks = tasks  # room for what a step's attention is cut into
        self._window = window  # the widest of the model's layers; None: some layer has none
        self._longest: int | None = None  # new tokens of a row of this step, at most
        self._pdl = supports_pdl(scratch.device)
        self._linears = Linears(scratch.device)
        # [1] int32: whether logits were NaN or infinite
        self._infinite = torch.zeros(1, dtype=torch.int32, device=scratch.device)

    def compile_ahead(self, planes: int, shapes: ModelShapes, kept: torch.dtype | None) -> None:
        """Have the kernels in CUDA C++ compiled, for a cache of dtype `kept`, None: in integers."""
        if self._linears.streams is not None:
            self._linears.streams.prepare(self.dtype, planes, shapes, kept)
        if self._linears.wides is not None and planes == 2:
            self._linears.wides.prepare(self.dtype, shapes)

    def prepare_step(self, inputs: StepInputs) -> None:
        """See `Ops.prepare_step`: cut the step's attention into tasks, on the device."""
        self._longest = inputs.longest
        attention.plan(
            self._tasks, inputs.query_start, inputs.context_len, self._window, pdl=self._pdl
        )

    def embed(self, token_ids: Tensor, table: Weight, first_id: int, out: Tensor) -> None:
        """See `Ops.embed`."""
        table, layout = _packed(table), layout_of(table)
        if not len(token_ids):
            return
        chunks = max(1, 1024 // layout.chunk)
        launch(
            lookup.embed, (len(token_ids), parts(layout.chunks, chunks)), self._pdl,
            token_ids, table.values, table.scales, out, first_id, table.rows,
            layout.columns, layout.groups, CHUNKS=chunks, CHUNK=layout.chunk, GROUP=layout.group,
        )  # fmt: skip

    def norm_qkv_rope_store(
        self,
        residual: Tensor,
        delta: Tensor | None,
        norm: Tensor,
        eps: float,
        qkv: Weight,
        bias: Tensor | None,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        rope: Tensor,
        inputs: StepInputs,
        kv_cache: KvCache,
        layer: int,
        out: Tensor,
    ) -> None:
        """See `Ops.norm_qkv_rope_store`."""
        if not len(residual):
            return
        room = Room(self.scratch)
        cache, weight = _layer_of(kv_cache, layer), _packed(qkv)
        x = self._normed(residual, delta, norm, eps, weight, room, update=delta is not None)
        plain = cache.scales is None and q_norm is None and k_norm is None
        fuses = plain and self._linears.fuses_rope(weight, len(out), out.shape[2])
        if fuses and not isinstance(x, Laid):
            self._linears.multiply_rope_store(x, weight, bias, rope, inputs, cache, out, room)
            return
        mixed = self._linears.multiply_in_parts(x, len(out), weight, room)
        self._rope_store(mixed, bias, q_norm, k_norm, eps, rope, inputs, cache, out)

    def attention(
        self,
        query: Tensor,
        kv_cache: KvCache,
        layer: int,
        block_table: Tensor,
        query_start: Tensor,
        context_len: Tensor,
        scale: float,
        window: int | None,
        out: Tensor,
    ) -> None:
        """See `Ops.attention`; of the step that was prepared."""
        longest = len(query) if self._longest is None else self._longest
        attention.attention(
            query, kv_cache, layer, block_table, query_start, context_len, self._tasks,
            scale, window, out, self.scratch, longest=longest, pdl=self._pdl,
        )  # fmt: skip

    def linear(self, x: Tensor, weight: Weight, out: Tensor) -> None:
        """See `Ops.linear`."""
        if len(x):
            self._linears.multiply(x, _packed(weight), out, Room(self.scratch))

    def norm_gate_up_swiglu(
        self,
        residual: Tensor,
        delta: Tensor,
        norm: Tensor,
        eps: float,
        gate_up: Weight,
        out: Tensor,
    ) -> None:
        """See `Ops.norm_gate_up_swiglu`."""
        if not len(residual):
            return
        room = Room(self.scratch)
        weight = _packed(gate_up)
        x = self._normed(residual, delta, norm, eps, weight, room, update=True)
        self._linears.multiply(x, weight, out, room)

    def norm_head(
        self,
        residual: Tensor,
        delta: Tensor,
        sampled: Tensor,
        norm: Tensor,
        eps: float,
        head: Weight,
        out: Tensor,
    ) -> None:
        """See `Ops.norm_head`."""
        if not len(sampled):
            return
        room = Room(self.scratch)
        weight = _packed(head)
        x = self._normed(residual, delta, norm, eps, weight, room, update=False, sampled=sampled)
        self._linears.multiply(x, weight, out, room, self._infinite)

    def all_finite(self, logits: Tensor) -> bool:
        """See `Ops.all_finite`: the kernel has looked while it wrote them."""
        return not self._infinite.item()

    def flag_finite(self, logits: Tensor, out: Tensor) -> None:
        """See `Ops.flag_finite`."""
        torch.eq(self._infinite, 0, out=out)

    def truncate(self, logits: Tensor, min_p: Tensor, top_k: Tensor, top_p: Tensor) -> None:
        """See `Ops.truncate`."""
        sampling.truncate(logits, min_p, top_k, top_p, pdl=self._pdl)

    def choose(
        self, logits: Tensor, temperature: Tensor, seed: Tensor, position: Tensor, out: Tensor
    ) -> None:
        """See `Ops.choose`."""
        sampling.choose(logits, temperature, seed, position, out, self.scratch, pdl=self._pdl)

    def _normed(
        self,
        residual: Tensor,  # [T, H] float32
        delta: Tensor | None,
        norm: Tensor,
        eps: float,
        weight: PackedWeight,  # that multiplies it
        room: Room,
        *,
        update: bool,
        sampled: Tensor | None = None,
    ) -> Tensor | Planes | Laid:
        """RMSNorm of residual + delta, [n, H]: of all or the sampled tokens, as it is multiplied.

        Planes where `weight` takes them in groups of 128; else floats, laid out for `wide` or not.
        """
        hidden = residual.shape[1]
        tokens, layout = len(residual if sampled is None else sampled), layout_of(weight)
        planes = 0
        if layout.group == STREAM_GROUP and layout.offset % STREAM_GROUP == 0:
            planes = self._linears.planes(layout, tokens)
        block = max(STREAM_GROUP, power_of_two(hidden))
        x: Tensor | Planes | Laid
        steps, stride, is_wide = None, 0, self._linears.is_wide(layout, tokens)
        if planes:
            x = self._linears.room_for_planes(planes, tokens, hidden, layout.groups, room)
            out, steps, stride = x.values, x.steps, x.steps.stride(0)
        elif is_wide:
            x = self._linears.room_for_laid(tokens, hidden, self.dtype, room)
            out, stride = x.values, x.values.shape[1]
        else:
            x = out = room.take((tokens, hidden), self.dtype)
        launch(
            norms.add_norm, (tokens,), self._pdl,
            residual, delta, sampled, norm, out, steps,
            None if sampled is None else self._infinite,
            hidden, eps, stride, LAID=is_wide, UPDATE=update, PLANES=planes,
            FLOAT=TRITON_DTYPES[self.dtype], BLOCK=block, num_warps=min(16, max(4, block // 512)),
        )  # fmt: skip
        return x

    def _rope_store(
        self,
        mixed: Tensor,  # [splits, T, (Hq + 2 Hkv) D] float32
        bias: Tensor | None,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        table: Tensor,  # [2, max_model_len, D / 2] float32
        inputs: StepInputs,
        cache: KvCache,  # of a layer: [2, blocks, Hkv, block_tokens, D]
        out: Tensor,
    ) -> None:
        tokens, heads, dim = out.shape
        _, blocks, kv_heads, block_tokens, _ = cache.values.shape
        launch(
            rope.rope_store, (tokens, heads + 2 * kv_heads), self._pdl,
            mixed, bias, q_norm, k_norm, eps, table[0], table[1], inputs.positions, inputs.slots,
            cache.values, cache.scales, out, tokens, heads, kv_heads, blocks, block_tokens,
            HALF=dim // 2, BLOCK=power_of_two(dim // 2), SPLITS=len(mixed),
            FLOAT8=cache.values.dtype == torch.float8_e4m3fn, num_warps=1,
        )  # fmt: skip


def _packed(weight: Weight) -> PackedWeight:
    assert isinstance(weight, PackedWeight), "not packed for the GPU"
    return weight


def _layer_of(cache: KvCache, layer: int) -> KvCache:
    return KvCache(cache.values[layer], None if cache.scales is None else cache.scales[layer])
