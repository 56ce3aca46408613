"""Layers that cut their own shard from a checkpoint: matrices, norms, biases, the token table.

Each loads what its rank holds, quantising tensor by tensor; at any time the result and at most
two float tensors are in memory. No forward pass lives here: the decoder calls the ops.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from roofline.budget import (
    GATE_UP,
    QKV,
    LayerPlan,
    MatrixPlan,
    Rank,
    layer_tensor,
    padded_rows,
)
from roofline.config import ModelConfig
from roofline.models.checkpoints import Checkpoint
from roofline.models.checkpoints.reading import Upload, as_it_is, float_vector, int8_rows
from roofline.ops import FloatWeight, Int8Weight, Pack, Quantize, Weight, keep
from roofline.ops.reference import dequantize
from roofline.quantization.int8_groups import cut_columns, quantize_groups

Progress = Callable[[str], None]  # told the name of each tensor loaded


@dataclass(frozen=True)
class Source:
    """Where tensors come from, and who wants to know of each."""

    checkpoint: Checkpoint
    progress: Progress
    pack: Pack = keep
    device: torch.device | None = None  # where weights go; None: they stay on the host
    upload: Upload = as_it_is  # to that device
    quantize: Quantize = quantize_groups

    def vector(self, name: str, rows: range | None = None) -> Tensor:
        """An RMSNorm weight or some rows of a bias, [n] float32."""
        self.progress(name)
        picked = slice(None) if rows is None else slice(rows.start, rows.stop)
        return self.upload(float_vector(self.checkpoint, name, picked))

    def fill(self, name: str, rows: range, columns: range, out: Int8Weight | FloatWeight) -> None:
        """Load the rank's rows and columns of a matrix into `out`, in the format of that."""
        self.progress(name)
        picked = slice(rows.start, rows.stop)
        if isinstance(out, FloatWeight):
            values = torch.as_tensor(self.checkpoint.read(name))
            out.values.copy_(self.upload(values[picked, columns.start : columns.stop]))
            return
        whole = int8_rows(self.checkpoint, name, out.group, picked, self.upload, self.quantize)
        weight = cut_columns(whole, columns)
        out.values.copy_(weight.values)
        out.scales.copy_(weight.scales)


def allocate(plan: MatrixPlan, device: torch.device | None) -> Int8Weight | FloatWeight:
    """An unfilled matrix as planned: its rows in memory that has room for the padded ones."""
    rows = padded_rows(plan.rows)
    if not plan.group:
        values = torch.empty(rows, plan.columns, dtype=getattr(torch, plan.dtype), device=device)
        return FloatWeight(values[: plan.rows])
    values = torch.empty(rows, plan.columns, dtype=torch.int8, device=device)
    scales = torch.empty(rows, plan.groups, device=device)
    return Int8Weight(values[: plan.rows], scales[: plan.rows], plan.group, plan.offset)


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer on one rank."""

    attention_norm: Tensor  # [H] float32
    qkv: Weight  # [(Hq + 2 Hkv) D, H], column parallel: heads
    output: Weight  # [H, Hq D], row parallel
    ffn_norm: Tensor  # [H] float32
    gate_up: Weight  # [2 F, H], column parallel: channels
    down: Weight  # [H, F], row parallel
    qkv_bias: Tensor | None  # [(Hq + 2 Hkv) D] float32, cut like qkv
    q_norm: Tensor | None  # [D] float32, the same for every head
    k_norm: Tensor | None  # [D] float32


VECTORS = ("attention_norm", "ffn_norm", "qkv_bias", "q_norm", "k_norm")  # of LayerWeights


def load_layer(
    source: Source, model: ModelConfig, rank: Rank, plan: LayerPlan, layer: int
) -> LayerWeights:
    """Load and cut one layer."""
    parallel, tp, dim = rank.parallel, rank.tp_rank, model.head_dim
    query, kv = parallel.query_heads(model, tp), parallel.kv_heads(model, tp)
    queries = range(query.start * dim, query.stop * dim)
    keys = range(kv.start * dim, kv.stop * dim)
    channels = parallel.ffn_channels(model, tp)
    qkv = list(zip(QKV, (queries, keys, keys), strict=True))

    def column_parallel(
        matrix: MatrixPlan, pieces: Sequence[tuple[str, range]], paired: bool = False
    ) -> Weight:
        """Matrices one above the other, each cut by rows."""
        fused, top = allocate(matrix, source.device), 0
        for piece, rows in pieces:
            part = _rows(fused, top, top + len(rows))
            source.fill(layer_tensor(layer, piece), rows, range(matrix.columns), part)
            top += len(rows)
        return source.pack(_with_copy(fused, matrix), paired)

    def row_parallel(matrix: MatrixPlan, piece: str, columns: range) -> Weight:
        """A matrix cut by columns."""
        weight = allocate(matrix, source.device)
        source.fill(layer_tensor(layer, piece), range(matrix.rows), columns, weight)
        return source.pack(_with_copy(weight, matrix), False)

    def bias(pieces: Sequence[tuple[str, range]]) -> Tensor:
        """The biases of a column-parallel matrix, cut like it."""
        parts = [source.vector(layer_tensor(layer, name, "bias"), rows) for name, rows in pieces]
        return torch.cat(parts)

    def vector(name: str) -> Tensor:
        """A norm's weight, whole on every rank."""
        return source.vector(layer_tensor(layer, name))

    return LayerWeights(
        attention_norm=vector("input_layernorm"),
        qkv=column_parallel(plan.qkv, qkv),
        output=row_parallel(plan.output, "self_attn.o_proj", queries),
        ffn_norm=vector("post_attention_layernorm"),
        gate_up=column_parallel(plan.gate_up, [(piece, channels) for piece in GATE_UP], True),
        down=row_parallel(plan.down, "mlp.down_proj", channels),
        qkv_bias=bias(qkv) if model.qkv_bias else None,
        q_norm=vector("self_attn.q_norm") if model.qk_norm else None,
        k_norm=vector("self_attn.k_norm") if model.qk_norm else None,
    )


def load_table(source: Source, model: ModelConfig, rank: Rank, plan: MatrixPlan) -> Weight:
    """A table over the vocabulary (embedding or head), cut by token ids."""
    table = allocate(plan, source.device)
    rows = rank.parallel.vocabulary(model, rank.tp_rank)
    source.fill(plan.name, rows, range(plan.columns), table)
    return source.pack(table, False)


def _with_copy(weight: Int8Weight | FloatWeight, plan: MatrixPlan) -> Int8Weight | FloatWeight:
    """The matrix with its copy in bfloat16, if one is planned."""
    if not plan.copy_bytes or isinstance(weight, FloatWeight):
        return weight
    copy = torch.empty_like(weight.values, dtype=torch.bfloat16)
    for start in range(0, plan.rows, _SLAB_ROWS):
        part = _rows(weight, start, min(start + _SLAB_ROWS, plan.rows))
        assert isinstance(part, Int8Weight)
        floats = dequantize(part, torch.empty_like(part.values, dtype=torch.float32))
        copy[start : start + len(floats)] = floats
    return dataclasses.replace(weight, copy=copy)


_SLAB_ROWS = 4096  # dequantised at a time


def _rows(weight: Int8Weight | FloatWeight, start: int, stop: int) -> Int8Weight | FloatWeight:
    """A view of some rows."""
    if isinstance(weight, FloatWeight):
        return FloatWeight(weight.values[start:stop])
    rows = slice(start, stop)
    return Int8Weight(weight.values[rows], weight.scales[rows], weight.group, weight.offset)
