"""The ops of the contract on the native kernels: shapes and pointers go in, nothing is allocated.

An op runs at once, or is recorded on a tape that replays it with the sizes of a later step.
"""

import ctypes
import time
import weakref
from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from roofline.budget import quantized_values
from roofline.errors import CapacityError
from roofline.ops import KvCache, Ops, PackedWeight, StepInputs, Weight
from roofline.ops.cpu import abi
from roofline.ops.cpu.library import Library
from roofline.ops.cpu.packing import address

MAX_QUERIES, MAX_HEAD_DIM = 32, 256  # as in csrc/attention.h


class Pool:
    """Threads that run ops together; the caller is one of them."""

    def __init__(self, library: Library, threads: int) -> None:
        self.library, self.threads = library, threads
        self.handle = library.functions.roofline_pool_new(threads)
        if self.handle is None:
            raise CapacityError(f"cannot start {threads} threads; lower --threads")
        self.close = weakref.finalize(self, library.functions.roofline_pool_free, self.handle)
        self.replay_s = 0.0  # spent in replays of tapes since it began


class Tape:
    """Ops recorded once, replayed in one call of native code; it keeps what they point to alive."""

    def __init__(self, pool: Pool, kept: object) -> None:
        functions = pool.library.functions
        self.handle, self._pool, self._kept = functions.roofline_tape_new(), pool, kept
        weakref.finalize(self, functions.roofline_tape_free, self.handle)

    def play(self) -> None:
        """Run everything recorded."""
        started = time.perf_counter()
        self._pool.library.functions.roofline_tape_play(self._pool.handle, self.handle)
        self._pool.replay_s += time.perf_counter() - started


class NativeOps(Ops):
    """The kernels of one ISA; matrices are packed, `step` holds the live sizes of the step."""

    def __init__(self, dtype: torch.dtype, scratch: Tensor, step: Tensor, pool: Pool) -> None:
        super().__init__(dtype, scratch)
        # [4] int64: tokens, sampled tokens, rows, whether logits were NaN or infinite
        self._step, self._sizes, self._pool = step, step.numpy(), pool
        self._bfloat16 = int(dtype == torch.bfloat16)
        self._recording: Tape | None = None

    def set_sizes(self, tokens: int, sampled: int, rows: int) -> None:
        """Say how large the step is that ops run on next."""
        sizes = self._sizes
        sizes[0], sizes[1], sizes[2], sizes[3] = tokens, sampled, rows, 0

    def all_finite(self, logits: Tensor) -> bool:
        """See `Ops.all_finite`: the kernel has looked while it wrote them."""
        return not self._sizes[3]

    @contextmanager
    def record(self, kept: object) -> Generator[Tape]:
        """Record the ops called meanwhile on a tape instead of running them."""
        self._recording = tape = Tape(self._pool, kept)
        try:
            yield tape
        finally:
            self._recording = None

    def embed(self, token_ids: Tensor, table: Weight, first_id: int, out: Tensor) -> None:
        """See `Ops.embed`."""
        arguments = abi.Embed(
            *self._pointers(self._step, token_ids), _layout(table), first_id, *self._pointers(out)
        )
        self._run(abi.EMBED, arguments, tokens=len(out))

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
        tokens, heads, dim = out.shape
        kv_heads, block_tokens = kv_cache.kv_heads, kv_cache.block_tokens
        hidden = residual.shape[1]
        sizes = tokens * hidden, quantized_values(tokens, hidden), tokens * qkv.rows
        normed, quantized, mixed = self._room(*sizes)
        arguments = abi.NormQkvRopeStore(
            *self._pointers(self._step, residual, delta, norm), eps, _layout(qkv),
            *self._pointers(bias, q_norm, k_norm, rope), rope.shape[1],
            *self._pointers(inputs.positions, inputs.slots, *kv_cache.values[layer]),
            heads, kv_heads, dim, block_tokens, *self._pointers(normed, quantized, mixed, out),
        )  # fmt: skip
        self._run(abi.NORM_QKV_ROPE_STORE, arguments, tokens)

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
        """See `Ops.attention`."""
        tokens, heads, dim = query.shape
        kv_heads, block_tokens = kv_cache.kv_heads, kv_cache.block_tokens
        pointers = self._step, query, *kv_cache.values[layer], block_table
        arguments = abi.Attention(
            *self._pointers(*pointers), block_table.shape[1],
            *self._pointers(query_start, context_len), heads, kv_heads, dim, block_tokens,
            scale, window or 0, address(self.scratch), self.scratch.numel(), address(out),
        )  # fmt: skip
        self._run(abi.ATTENTION, arguments, tokens, rows=len(context_len))

    def linear(self, x: Tensor, weight: Weight, out: Tensor) -> None:
        """See `Ops.linear`."""
        arguments = abi.Linear(
            *self._pointers(self._step, x), _layout(weight), *self._pointers(self.scratch, out)
        )
        self._run(abi.LINEAR, arguments, tokens=len(x))

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
        arguments = abi.NormGateUpSwiglu(
            *self._pointers(self._step, residual, delta, norm), eps, _layout(gate_up),
            *self._pointers(*self._normed(residual), out),
        )  # fmt: skip
        self._run(abi.NORM_GATE_UP_SWIGLU, arguments, tokens=len(out))

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
        arguments = abi.NormHead(
            *self._pointers(self._step, residual, delta, sampled, norm), eps, _layout(head),
            *self._pointers(*self._normed(residual, len(sampled)), out), out.stride(0),
        )  # fmt: skip
        self._run(abi.NORM_HEAD, arguments, sampled=len(sampled))

    def truncate(self, logits: Tensor, min_p: Tensor, top_k: Tensor, top_p: Tensor) -> None:
        """See `Ops.truncate`."""
        arguments = abi.Truncate(
            *self._pointers(self._step, logits), logits.stride(0), logits.shape[1],
            *self._pointers(min_p, top_k, top_p),
        )  # fmt: skip
        self._run(abi.TRUNCATE, arguments, sampled=len(logits))

    def choose(
        self, logits: Tensor, temperature: Tensor, seed: Tensor, position: Tensor, out: Tensor
    ) -> None:
        """See `Ops.choose`."""
        arguments = abi.Choose(
            *self._pointers(self._step, logits), logits.stride(0), logits.shape[1],
            *self._pointers(temperature, seed, position, out),
        )  # fmt: skip
        self._run(abi.CHOOSE, arguments, sampled=len(out))

    def _normed(self, residual: Tensor, tokens: int | None = None) -> Sequence[Tensor]:
        """Room for normed activations, and for those as INT8."""
        rows, hidden = residual.shape
        tokens = rows if tokens is None else tokens
        return self._room(tokens * hidden, quantized_values(tokens, hidden))

    def _room(self, *sizes: int) -> Sequence[Tensor]:
        """Parts of the scratch buffer, one after the other, of so many floats."""
        return self.scratch[: sum(sizes)].split(sizes)

    def _pointers(self, *tensors: Tensor | None) -> list[int | None]:
        return [address(tensor) for tensor in tensors]

    def _run(
        self,
        op: int,
        arguments: ctypes.Structure,
        tokens: int = 0,
        sampled: int = 0,
        rows: int = 0,
    ) -> None:
        """Run an op on as many tokens as its tensors have, or record it for those of any step."""
        library, pointer = self._pool.library, ctypes.addressof(arguments)
        place = library.isa, self._bfloat16, op, pointer
        if self._recording is not None:
            size = ctypes.sizeof(arguments)
            library.functions.roofline_tape_add(self._recording.handle, *place, size)
            return
        self.set_sizes(tokens, sampled, rows)
        library.functions.roofline_run(self._pool.handle, *place)


def _layout(weight: Weight) -> abi.Weight:
    assert isinstance(weight, PackedWeight) and isinstance(weight.layout, abi.Weight)
    return weight.layout
