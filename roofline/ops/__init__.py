"""The contract of every op: signature, shapes, dtypes. A backend is one subclass of `Ops`.

Every op writes into a required `out` (`truncate` in place); none allocates what outlives the call.
A layer is six calls. T tokens of a step are ordered by row; R is the number of rows of the
device-side tables, most of which may have no token in a step. `residual` and `delta` are float32 at
every activation dtype.
"""

import abc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Int8Weight:
    """A weight matrix [N, K] in INT8 groups along K: w[n, k] = values[n, k] * scales[n, g(k)]."""

    values: Tensor  # [N, K] int8
    scales: Tensor  # [N, groups] float32
    group: int  # columns that share a scale
    offset: int  # columns of the first group that lie on another rank: g(k) = (k + offset) // group
    copy: Tensor | None = None  # [N, K] bfloat16, the same matrix for prompts, where one is kept

    @property
    def rows(self) -> int:
        """Output channels, N."""
        return self.values.shape[0]


@dataclass(frozen=True)
class FloatWeight:
    """A weight matrix [N, K] of floats."""

    values: Tensor  # [N, K] bfloat16 or float32

    @property
    def rows(self) -> int:
        """Output channels, N."""
        return self.values.shape[0]


@dataclass(frozen=True)
class PackedWeight:
    """A weight matrix [N, K] in the order its backend reads it, which no other backend knows."""

    values: Tensor  # [N * K] int8, bfloat16 or float32
    scales: Tensor | None  # [N * groups] float32, of int8
    rows: int  # output channels, N
    layout: object
    copy: Tensor | None = None  # [N, K] bfloat16, as of `Int8Weight`


Weight = Int8Weight | FloatWeight | PackedWeight

# Puts a loaded matrix into its backend's order; True: the two halves of its rows in turn.
Pack = Callable[[Int8Weight | FloatWeight, bool], Weight]


def keep(weight: Int8Weight | FloatWeight, paired: bool) -> Weight:
    """The `Pack` of a backend that reads matrices as they are."""
    return weight


# Quantises weights [N, K] in groups to values [N, K] int8 and scales [N, ceil(K / group)], as
# quantization/int8_groups.py defines; False where one is NaN or infinite.
Quantize = Callable[[Tensor, int, Tensor, Tensor], bool]


@dataclass(frozen=True)
class KvCache:
    """Keys and values of every token in blocks; in INT8 or FP8 with a scale a token and head."""

    values: (
        Tensor  # [layers, 2, blocks, Hkv, block_tokens, D] activation dtype, int8, float8_e4m3fn
    )
    scales: Tensor | None  # [layers, 2, blocks, Hkv, block_tokens] float32, of int8 and float8

    @property
    def kv_heads(self) -> int:
        """Hkv."""
        return self.values.shape[3]

    @property
    def block_tokens(self) -> int:
        """Tokens of a block."""
        return self.values.shape[4]


@dataclass(frozen=True)
class StepInputs:
    """What a step computes, as views of the arena; filled by `execution.inputs`.

    A captured step is padded: its last tokens are of no row, with slot -1, and their values in
    `residual`, `query` and so on are never read.
    """

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64, place of each token in its request
    # [T] int64, block * block_tokens + place in the block, where its KV goes; -1: nowhere
    slots: Tensor
    query_start: Tensor  # [R + 1] int32, first token of each row
    context_len: Tensor  # [R] int32, tokens of the row's request after this step
    block_table: Tensor  # [R, B] int32
    longest: int | None = None  # new tokens of a row at most, where the host must know: grids


class Ops(abc.ABC):
    """What a backend computes at one activation dtype. `ops.reference` is the definition."""

    def __init__(self, dtype: torch.dtype, scratch: Tensor) -> None:
        self.dtype = dtype  # of activations and KV; fixed here, never by the tokens of a step
        self.scratch = scratch  # [n] float32, room for what an op needs on its way

    def prepare_step(self, inputs: StepInputs) -> None:  # noqa: B027 - most plan nothing
        """Plan what is the same in all layers of a step; called once, before `embed`.

        It is captured with the step, so it reads the tensors where they lie.
        """

    @abc.abstractmethod
    def embed(self, token_ids: Tensor, table: Weight, first_id: int, out: Tensor) -> None:
        """Write rows `token_ids - first_id` of table [V, H] to out [T, H] float32; others zero."""

    @abc.abstractmethod
    def norm_qkv_rope_store(
        self,
        residual: Tensor,  # [T, H] float32, += delta
        delta: Tensor | None,  # [T, H] float32
        norm: Tensor,  # [H] float32
        eps: float,
        qkv: Weight,  # [(Hq + 2 Hkv) D, H]
        bias: Tensor | None,  # [(Hq + 2 Hkv) D] float32, of queries, keys and values
        q_norm: Tensor | None,  # [D] float32, of every query head
        k_norm: Tensor | None,  # [D] float32, of every key head
        rope: Tensor,  # [2, max_model_len, D / 2] float32: cosines, sines
        inputs: StepInputs,
        kv_cache: KvCache,
        layer: int,
        out: Tensor,  # [T, Hq, D] activation dtype: rotated queries
    ) -> None:
        """RMSNorm, QKV projection, half-split RoPE, and the write of K and V to their slots.

        The bias, then RMSNorm of each head with the same eps, come before RoPE where a model has
        them. All is float32 from the projection's sums to the writes. In an INT8 cache the scale of
        a token and head is max |x| / 127, of an FP8 one max |x| / 448, 1.0 where that is zero or
        subnormal; what is stored is x / scale, rounded half to even. A slot of -1 is not written.
        """

    @abc.abstractmethod
    def attention(
        self,
        query: Tensor,  # [T, Hq, D] activation dtype
        kv_cache: KvCache,
        layer: int,
        block_table: Tensor,  # [R, B] int32
        query_start: Tensor,  # [R + 1] int32
        context_len: Tensor,  # [R] int32
        scale: float,
        window: int | None,  # tokens a query sees, itself included; None: all before it
        out: Tensor,  # [T, Hq, D]
    ) -> None:
        """Causal attention of each row's last tokens over its paged context, KV blocks in order."""

    @abc.abstractmethod
    def linear(self, x: Tensor, weight: Weight, out: Tensor) -> None:
        """Write x [T, K] times the transpose of weight [N, K] to out [T, N], summed in float32."""

    @abc.abstractmethod
    def norm_gate_up_swiglu(
        self,
        residual: Tensor,  # [T, H] float32, += delta
        delta: Tensor,  # [T, H] float32
        norm: Tensor,  # [H] float32
        eps: float,
        gate_up: Weight,  # [2 F, H]
        out: Tensor,  # [T, F] activation dtype
    ) -> None:
        """RMSNorm, gate and up projections, silu(gate) * up."""

    @abc.abstractmethod
    def norm_head(
        self,
        residual: Tensor,  # [T, H] float32
        delta: Tensor,  # [T, H] float32
        sampled: Tensor,  # [S] int64, the tokens whose logits are wanted
        norm: Tensor,  # [H] float32
        eps: float,
        head: Weight,  # [V, H]
        out: Tensor,  # [S, V] float32: logits
    ) -> None:
        """RMSNorm of residual + delta at the sampled tokens, projected to the vocabulary."""

    def all_finite(self, logits: Tensor) -> bool:
        """Whether what the last `norm_head` wrote is free of NaN and infinities."""
        return bool(torch.isfinite(logits).all())

    def flag_finite(self, logits: Tensor, out: Tensor) -> None:
        """Write to out [1] int64 whether `all_finite`, 1 or 0, without waiting for the device."""
        out.copy_(torch.isfinite(logits).all())

    @abc.abstractmethod
    def truncate(
        self,
        logits: Tensor,  # [S, V] float32, divided by temperature; changed in place
        min_p: Tensor,  # [S] float32; 0 = off
        top_k: Tensor,  # [S] int64; 0 = off
        top_p: Tensor,  # [S] float64; 1 = off
    ) -> None:
        """Set to -inf what min_p, top_k and top_p leave out, in this order (`ops.truncation`)."""

    @abc.abstractmethod
    def choose(
        self,
        logits: Tensor,  # [S, V] float32; -inf is never chosen
        temperature: Tensor,  # [S] float64; 0 = the likeliest
        seed: Tensor,  # [S] int64, the bits of an unsigned number
        position: Tensor,  # [S] int64
        out: Tensor,  # [S] int64: token ids
    ) -> None:
        """Argmax of logits / temperature + noise (`ops.noise`), the lowest id winning ties."""
