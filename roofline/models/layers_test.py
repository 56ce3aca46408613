import dataclasses
import weakref
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from roofline.budget import GATE_UP, QKV, ModelPlan, Rank, layer_tensor, plan_model
from roofline.config import ModelConfig, ParallelConfig, WeightFormat
from roofline.errors import CheckpointError
from roofline.models.checkpoints import Checkpoint
from roofline.models.checkpoints.dummy import DummyCheckpoint
from roofline.models.checkpoints.tensors import EMBEDDING, HEAD, tensor_shapes
from roofline.models.layers import LayerWeights, Source, allocate, load_layer, load_table
from roofline.ops import FloatWeight, Int8Weight, Weight

RANKS = [1, 2, 3, 4]
# 3 KV heads of 20 and FFN units of 64 over 2 and 4 ranks: every group size is cut inside a group.
CONFIG = ModelConfig(
    hidden_size=100,
    intermediate_size=300,
    num_layers=2,
    num_heads=9,
    num_kv_heads=3,
    head_dim=20,
    vocab_size=270,
    max_position=64,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    tie_word_embeddings=False,
)


class Watched:
    """`Checkpoint` of bfloat16 numbers by name, counting those that are alive at once."""

    config = CONFIG
    native_groups: Mapping[str, int] = MappingProxyType({})

    def __init__(self) -> None:
        self._given: list[weakref.ref[Tensor]] = []
        self.most_alive = 0

    def read(self, name: str) -> Tensor:
        generator = torch.Generator().manual_seed(sum(name.encode()))
        tensor = torch.randn(tensor_shapes(CONFIG)[name], generator=generator).bfloat16()
        self._given.append(weakref.ref(tensor))
        self.most_alive = max(self.most_alive, sum(given() is not None for given in self._given))
        return tensor

    def read_int8(self, name: str) -> tuple[Any, Any]:
        raise AssertionError("nothing is INT8 here")

    def close(self) -> None:
        """Nothing is open."""


FORMATS = [
    WeightFormat("none", dtype="float32"),
    WeightFormat("none", dtype="bfloat16"),
    *(WeightFormat(group_size=size) for size in (32, 64, 128, 256)),
    WeightFormat(group_size="channel"),
]


def silent(_: str) -> None:
    """Progress that nobody watches."""


def ranks_of(count: int) -> list[Rank]:
    return [Rank(ParallelConfig(tensor_parallel_size=count), rank, 0) for rank in range(count)]


def plan_of(weights: WeightFormat, rank: Rank, checkpoint: Checkpoint) -> ModelPlan:
    return plan_model(CONFIG, weights, rank, checkpoint.native_groups)


def layer_of(weights: WeightFormat, rank: Rank, checkpoint: Checkpoint) -> LayerWeights:
    plan = plan_of(weights, rank, checkpoint)
    return load_layer(Source(checkpoint, silent), CONFIG, rank, plan.layers[1], 1)


def table_of(weights: WeightFormat, rank: Rank, checkpoint: Checkpoint) -> Weight:
    head = plan_of(weights, rank, checkpoint).head
    assert head is not None
    return load_table(Source(checkpoint, silent), CONFIG, rank, head)


def floats(weight: Weight) -> Tensor:
    values = weight.values.float()
    return values * scales_of_columns(weight) if isinstance(weight, Int8Weight) else values


def scales_of_columns(weight: Weight) -> Tensor:
    """The scale of every weight, [N, K]."""
    assert isinstance(weight, Int8Weight)
    columns = torch.arange(weight.values.shape[1])
    return weight.scales[:, (columns + weight.offset) // weight.group]


@pytest.fixture(params=FORMATS, ids=lambda f: f"{f.quantization}-{f.group_size}-{f.dtype}")
def weights(request: pytest.FixtureRequest) -> WeightFormat:
    return request.param


@pytest.fixture(params=["float", "int8"])
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    return Watched() if request.param == "float" else DummyCheckpoint(CONFIG, 1)


def test_one_rank_holds_the_tensors_of_the_checkpoint(
    weights: WeightFormat, checkpoint: Checkpoint
) -> None:
    layer = layer_of(weights, Rank(), checkpoint)
    fused = {"qkv": QKV, "output": ("self_attn.o_proj",), "gate_up": GATE_UP}
    for name, pieces in (fused | {"down": ("mlp.down_proj",)}).items():
        originals = [checkpoint.read(layer_tensor(1, piece)) for piece in pieces]
        whole = torch.cat([torch.as_tensor(original).float() for original in originals])
        weight: Weight = getattr(layer, name)
        if isinstance(weight, FloatWeight):
            assert torch.equal(weight.values, whole.to(weight.values.dtype))
        else:
            error = (floats(weight).double() - whole.double()).abs()
            assert (error <= scales_of_columns(weight).double() * 0.5001).all()


@pytest.mark.parametrize("count", RANKS)
def test_row_parallel_shards_side_by_side_are_the_whole(
    weights: WeightFormat, checkpoint: Checkpoint, count: int
) -> None:
    whole = layer_of(weights, Rank(), checkpoint)
    shards = [layer_of(weights, rank, checkpoint) for rank in ranks_of(count)]
    for name in ("output", "down"):
        parts: list[Weight] = [getattr(shard, name) for shard in shards]
        one: Weight = getattr(whole, name)
        assert torch.equal(torch.cat([part.values for part in parts], 1), one.values)
        assert torch.equal(torch.cat([floats(part) for part in parts], 1), floats(one))
        if isinstance(one, Int8Weight):
            assert torch.equal(
                torch.cat([scales_of_columns(p) for p in parts], 1), scales_of_columns(one)
            )


def test_some_of_these_shards_begin_inside_a_group() -> None:
    for size in (32, 64, 128, 256):
        weights = WeightFormat(group_size=size)
        ranks = [rank for count in RANKS for rank in ranks_of(count)]
        plans = [plan_model(CONFIG, weights, rank, {}).layers[0] for rank in ranks]
        assert any(plan.output.offset for plan in plans)
    assert any(plan.down.offset for plan in plans)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_column_parallel_shards_one_above_the_other_are_the_whole(
    weights: WeightFormat, checkpoint: Checkpoint, count: int
) -> None:
    whole = layer_of(weights, Rank(), checkpoint)
    ranks = ranks_of(count)
    shards = [layer_of(weights, rank, checkpoint) for rank in ranks]
    for name, heights in (("qkv", (180, 60, 60)), ("gate_up", (300, 300))):
        pieces: list[list[Tensor]] = []
        for rank, shard in zip(ranks, shards, strict=True):
            own = [share_of(rank, name, piece) for piece in range(len(heights))]
            pieces.append(list(floats(getattr(shard, name)).split(own)))
        stacked = [torch.cat(piece) for piece in zip(*pieces, strict=True)]
        assert tuple(len(piece) for piece in stacked) == heights
        assert torch.equal(torch.cat(stacked), floats(getattr(whole, name)))


def share_of(rank: Rank, name: str, piece: int) -> int:
    """Rows of one piece of a fused matrix on a rank."""
    if name == "gate_up":
        return len(rank.parallel.ffn_channels(CONFIG, rank.tp_rank))
    heads = (rank.parallel.query_heads, rank.parallel.kv_heads, rank.parallel.kv_heads)[piece]
    return len(heads(CONFIG, rank.tp_rank)) * CONFIG.head_dim


def test_ranks_that_share_a_kv_head_hold_the_same_keys_and_values() -> None:
    checkpoint, ranks = Watched(), ranks_of(4)
    weights = WeightFormat(group_size=32)
    layers = [layer_of(weights, rank, checkpoint) for rank in ranks]
    heads = [rank.parallel.kv_heads(CONFIG, rank.tp_rank) for rank in ranks]
    assert heads[0] == heads[1]
    keys_and_values = [floats(layer.qkv)[-2 * CONFIG.head_dim :] for layer in layers]
    assert torch.equal(keys_and_values[0], keys_and_values[1])
    queries = [floats(layer.qkv)[: -2 * CONFIG.head_dim] for layer in layers]
    whole = layer_of(weights, Rank(), checkpoint)
    assert torch.equal(torch.cat(queries), floats(whole.qkv)[: CONFIG.query_size])


@pytest.mark.parametrize("count", [2, 3])
def test_biases_are_cut_like_the_rows_they_are_added_to(count: int) -> None:
    model = dataclasses.replace(CONFIG, qkv_bias=True, qk_norm=True)
    source, floats32 = Source(DummyCheckpoint(model, 1), silent), WeightFormat("none", "auto")
    shards: list[list[Tensor]] = []
    for rank in ranks_of(count):
        plan = plan_model(model, floats32, rank, {})
        layer = load_layer(source, model, rank, plan.layers[1], 1)
        assert layer.qkv_bias is not None and layer.q_norm is not None
        assert len(layer.qkv_bias) == layer.qkv.rows and layer.q_norm.shape == (20,)
        own = [share_of(rank, "qkv", piece) for piece in range(3)]
        shards.append(list(layer.qkv_bias.split(own)))
    whole = [torch.from_numpy(source.checkpoint.read(layer_tensor(1, p, "bias"))) for p in QKV]
    for pieces, bias in zip(zip(*shards, strict=True), whole, strict=True):
        assert torch.equal(torch.cat(pieces), bias)


@pytest.mark.parametrize("count", RANKS)
def test_tables_one_above_the_other_are_the_whole(
    weights: WeightFormat, checkpoint: Checkpoint, count: int
) -> None:
    whole = table_of(weights, Rank(), checkpoint)
    shards = [table_of(weights, rank, checkpoint) for rank in ranks_of(count)]
    assert torch.equal(torch.cat([shard.values for shard in shards]), whole.values)
    assert torch.equal(torch.cat([floats(shard) for shard in shards]), floats(whole))


@pytest.mark.parametrize("count", RANKS)
def test_bytes_loaded_are_the_bytes_planned(
    weights: WeightFormat, checkpoint: Checkpoint, count: int
) -> None:
    for rank in ranks_of(count):
        planned = plan_of(weights, rank, checkpoint).layers[1]
        layer = layer_of(weights, rank, checkpoint)
        for plan, name in zip(
            planned.matrices(), ("qkv", "output", "gate_up", "down"), strict=True
        ):
            weight: Weight = getattr(layer, name)
            assert weight.values.untyped_storage().nbytes() == plan.weight_bytes
            if isinstance(weight, Int8Weight):
                assert weight.scales.untyped_storage().nbytes() == plan.scale_bytes
                assert (weight.group, weight.offset) == (plan.group, plan.offset)


def test_one_float_tensor_is_in_memory_at_a_time(weights: WeightFormat) -> None:
    checkpoint = Watched()
    layer_of(weights, Rank(), checkpoint)
    table_of(weights, Rank(), checkpoint)
    assert checkpoint.most_alive == 1


def test_progress_hears_of_every_tensor_once() -> None:
    heard: list[str] = []
    source, plan = Source(Watched(), heard.append), plan_model(CONFIG, WeightFormat(), Rank(), {})
    for layer, layer_plan in plan.layers.items():
        load_layer(source, CONFIG, Rank(), layer_plan, layer)
    for table in (plan.embedding, plan.head):
        assert table is not None
        load_table(source, CONFIG, Rank(), table)
    source.vector("model.norm.weight")
    assert sorted(heard) == sorted(tensor_shapes(CONFIG))
    assert {EMBEDDING, HEAD} < set(heard)


def test_loaded_weights_are_no_views_of_the_file() -> None:
    class Mapped(Watched):
        """Gives every reader the same memory, as a mapped file does."""

        kept: dict[str, Tensor] = {}  # noqa: RUF012

        def read(self, name: str) -> Tensor:
            return self.kept.setdefault(name, super().read(name).float())

    checkpoint = Mapped()
    layer = layer_of(WeightFormat("none", dtype="float32"), Rank(), checkpoint)
    for tensor in checkpoint.kept.values():
        tensor.zero_()
    assert layer.down.values.any() and layer.attention_norm.any()


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_weight_that_is_no_number_is_named(name: str) -> None:
    class Spoilt(Watched):
        """Has one NaN."""

        def read(self, name: str) -> Tensor:
            tensor = super().read(name)
            tensor[-1] = float("nan")
            return tensor

    source = Source(Spoilt(), silent)
    with pytest.raises(CheckpointError, match=f"tensor '{name}' holds NaN"):
        if name.endswith("norm.weight"):
            source.vector(name)
        else:
            rows, columns = tensor_shapes(CONFIG)[name]
            plan = plan_model(CONFIG, WeightFormat(), Rank(), {}).layers[1].down
            source.fill(name, range(rows), range(columns), allocate(plan, None))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_files_are_dequantised_where_floats_are_wanted(
    dtype: Literal["float32", "bfloat16"],
) -> None:
    checkpoint = DummyCheckpoint(CONFIG, 2)
    layer = layer_of(WeightFormat("none", dtype=dtype), Rank(), checkpoint)
    wanted = torch.as_tensor(checkpoint.read(layer_tensor(1, "mlp.down_proj")))
    assert torch.equal(layer.down.values, wanted.to(getattr(torch, dtype)))


def test_numpy_and_torch_checkpoints_load_alike() -> None:
    class AsNumpy(Watched):
        """Gives numpy arrays, as a GGUF file does."""

        def read(self, name: str) -> Any:
            return super().read(name).float().numpy()

    for weights in (WeightFormat(), WeightFormat("none", dtype="float32")):
        one, other = (layer_of(weights, Rank(), c) for c in (Watched(), AsNumpy()))
        assert torch.equal(floats(one.qkv), floats(other.qkv))
        assert torch.equal(one.ffn_norm, other.ffn_norm)
