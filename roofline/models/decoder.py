"""One decoder for all families with this data flow: norm, attention, norm, gated FFN, residual.

Reads like the paper: calls ops and collectives only, on buffers it is given. It knows nothing of
requests, of sampling or of where weights come from.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from roofline.budget import MatrixPlan, ModelPlan
from roofline.config import ModelConfig
from roofline.models.checkpoints.tensors import NORM
from roofline.models.layers import VECTORS, LayerWeights, Source, load_layer, load_table
from roofline.ops import FloatWeight, KvCache, Ops, StepInputs, Weight
from roofline.parallel.mesh import Mesh


@dataclass(frozen=True)
class Buffers:
    """Where a step's activations live: views of the arena, T tokens tall."""

    residual: Tensor  # [T, H] float32
    delta: Tensor  # [T, H] float32, what the residual has yet to receive
    query: Tensor  # [T, Hq, D] activation dtype
    attended: Tensor  # [T, Hq, D] activation dtype
    activated: Tensor  # [T, F] activation dtype
    rope: Tensor  # [2, max_model_len, D / 2] float32


class Decoder:
    """The part of a model one rank runs: a run of layers, and the ends its stage has."""

    def __init__(self, config: ModelConfig, plan: ModelPlan, mesh: Mesh, source: Source) -> None:
        self.config, self.mesh = config, mesh
        self.table = _load_table(source, config, mesh, plan.embedding)
        self.layers: list[LayerWeights] = [
            load_layer(source, config, mesh.rank, layer_plan, layer)
            for layer, layer_plan in plan.layers.items()
        ]
        self.head = _load_table(source, config, mesh, plan.head)
        self.norm = source.vector(NORM) if mesh.rank.is_last_stage else None

    def forward(self, ops: Ops, inputs: StepInputs, kv_cache: KvCache, buffers: Buffers) -> None:
        """Run this stage's layers; residual and delta are left for `logits` or the next stage."""
        collectives, delta = self.mesh.collectives, None
        ops.prepare_step(inputs)
        if self.mesh.rank.is_first_stage:
            assert self.table is not None, "the first stage holds the embedding"
            ops.embed(inputs.token_ids, self.table, self._first_id, buffers.residual)
            collectives.all_reduce(buffers.residual)
        else:
            collectives.recv(buffers.residual)
            collectives.recv(buffers.delta)
            delta = buffers.delta
        for layer, weights in enumerate(self.layers):
            self._layer(ops, weights, layer, inputs, kv_cache, buffers, delta)
            delta = buffers.delta
        if not self.mesh.rank.is_last_stage:
            collectives.send(buffers.residual)
            collectives.send(buffers.delta)

    def _layer(
        self,
        ops: Ops,
        weights: LayerWeights,
        layer: int,
        inputs: StepInputs,
        kv_cache: KvCache,
        b: Buffers,
        delta: Tensor | None,
    ) -> None:
        eps, all_reduce = self.config.rms_norm_eps, self.mesh.collectives.all_reduce
        ops.norm_qkv_rope_store(
            b.residual, delta, weights.attention_norm, eps, weights.qkv, weights.qkv_bias,
            weights.q_norm, weights.k_norm, b.rope, inputs, kv_cache, layer, out=b.query,
        )  # fmt: skip
        ops.attention(
            b.query, kv_cache, layer, inputs.block_table, inputs.query_start, inputs.context_len,
            self.config.head_dim**-0.5, self.config.sliding_window, out=b.attended,
        )  # fmt: skip
        ops.linear(b.attended.flatten(1), weights.output, out=b.delta)
        all_reduce(b.delta)
        ops.norm_gate_up_swiglu(
            b.residual, b.delta, weights.ffn_norm, eps, weights.gate_up, out=b.activated
        )
        ops.linear(b.activated, weights.down, out=b.delta)
        all_reduce(b.delta)

    def logits(
        self, ops: Ops, sampled: Tensor, buffers: Buffers, shard: Tensor, out: Tensor
    ) -> None:
        """Logits of the sampled tokens [S] to out [S, V]; this rank's own go to `shard` first."""
        head, eps = self.head or self.table, self.config.rms_norm_eps
        assert head is not None and self.norm is not None, "the last stage holds norm and head"
        ops.norm_head(buffers.residual, buffers.delta, sampled, self.norm, eps, head, out=shard)
        if self.mesh.rank.parallel.tensor_parallel_size > 1:
            self.mesh.collectives.all_gather(shard, self._vocabulary_columns(out))

    def _vocabulary_columns(self, logits: Tensor) -> list[Tensor]:
        parallel = self.mesh.rank.parallel
        shares = [parallel.vocabulary(self.config, r) for r in range(parallel.tensor_parallel_size)]
        return [logits[:, share.start : share.stop] for share in shares]

    @property
    def _first_id(self) -> int:
        return self.mesh.rank.parallel.vocabulary(self.config, self.mesh.rank.tp_rank).start

    def tensors(self) -> Mapping[str, Tensor]:
        """Every weight this rank holds, by name: for counting bytes."""
        found: dict[str, Tensor] = {} if self.norm is None else {"norm": self.norm}
        for name, weight in (("table", self.table), ("head", self.head)):
            found |= _matrix_tensors(name, weight)
        for number, layer in enumerate(self.layers):
            vectors = {name: getattr(layer, name) for name in VECTORS}
            found |= {f"{number}.{name}": v for name, v in vectors.items() if v is not None}
            for name in ("qkv", "output", "gate_up", "down"):
                found |= _matrix_tensors(f"{number}.{name}", getattr(layer, name))
        return found


def _load_table(
    source: Source, config: ModelConfig, mesh: Mesh, plan: MatrixPlan | None
) -> Weight | None:
    return None if plan is None else load_table(source, config, mesh.rank, plan)


def rope_table(config: ModelConfig, length: int, out: Tensor) -> None:
    """Fill out [2, length, D / 2] float32 with the cosines and sines of every position."""
    frequencies = torch.tensor(config.rope_frequencies(), dtype=torch.float64)
    # In slices: in float64 the angles of a long context would dwarf the table.
    for start in range(0, length, 4096):
        stop = min(start + 4096, length)
        angles = torch.outer(torch.arange(start, stop, dtype=torch.float64), frequencies)
        out[0, start:stop], out[1, start:stop] = torch.cos(angles), torch.sin(angles)


def _matrix_tensors(name: str, weight: Weight | None) -> dict[str, Tensor]:
    if weight is None:
        return {}
    found = {f"{name}.values": weight.values}
    if not isinstance(weight, FloatWeight) and weight.scales is not None:
        found[f"{name}.scales"] = weight.scales
    if not isinstance(weight, FloatWeight) and weight.copy is not None:
        found[f"{name}.copy"] = weight.copy
    return found
