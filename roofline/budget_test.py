import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roofline.budget import (
    Rank,
    RankBudget,
    StepShape,
    buffer_bytes,
    kv_block_bytes,
    kv_token_bytes,
    plan_model,
    plan_rank,
    plan_step_buffers,
    step_read_bytes,
)
from roofline.config import PRESETS, EngineConfig, ModelConfig, ParallelConfig, WeightFormat
from roofline.errors import CapacityError, UsageError

INT8 = WeightFormat("int8", 128)
FLOATS = WeightFormat("none", dtype="bfloat16")
LLAMA_8B = PRESETS["llama-3.1-8b"]
TINY = ModelConfig(
    hidden_size=100,
    intermediate_size=200,
    num_layers=3,
    num_heads=6,
    num_kv_heads=3,
    head_dim=20,
    vocab_size=300,
    max_position=1000,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    tie_word_embeddings=True,
)


def ranks_of(parallel: ParallelConfig) -> list[Rank]:
    return [
        Rank(parallel, tp_rank, stage)
        for stage in range(parallel.pipeline_parallel_size)
        for tp_rank in range(parallel.tensor_parallel_size)
    ]


@pytest.mark.parametrize(
    ("changes", "parameters"),
    [
        (  # Mistral 7B v0.1
            {"vocab_size": 32000, "sliding_window": 4096},
            7_241_732_096,
        ),
        (  # Qwen2.5 7B
            {
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "num_layers": 28,
                "num_heads": 28,
                "num_kv_heads": 4,
                "vocab_size": 152064,
                "qkv_bias": True,
            },
            7_615_616_512,
        ),
        (  # Qwen3 8B
            {
                "intermediate_size": 12288,
                "num_layers": 36,
                "vocab_size": 151936,
                "qk_norm": True,
            },
            8_190_735_360,
        ),
    ],
    ids=["mistral-7b", "qwen2.5-7b", "qwen3-8b"],
)
def test_parameters_are_those_published(changes: dict[str, Any], parameters: int) -> None:
    model = dataclasses.replace(LLAMA_8B, **changes)
    assert plan_model(model, INT8, Rank(), {}).parameters == parameters


def test_llama_8b_takes_8_gigabytes_in_int8_and_16_in_bfloat16() -> None:
    norms = 65 * 4096
    matrices = 8_030_261_248 - norms  # the published number of parameters
    plan = plan_model(LLAMA_8B, INT8, Rank(), {})
    assert plan.parameters == matrices + norms
    assert plan.weight_bytes == matrices + 4 * norms
    assert plan.scale_bytes == matrices // 128 * 4
    assert plan.weight_bytes + plan.scale_bytes == pytest.approx(8.28e9, rel=1e-3)
    floats = plan_model(LLAMA_8B, FLOATS, Rank(), {})
    assert (floats.weight_bytes, floats.scale_bytes) == (2 * matrices + 4 * norms, 0)
    assert floats.weight_bytes == pytest.approx(16.06e9, rel=1e-3)


def test_groups_that_do_not_divide_a_row_cost_one_more_scale() -> None:
    layer = plan_model(TINY, WeightFormat("int8", 64), Rank(), {}).layers[0]
    assert [m.groups for m in layer.matrices()] == [2, 2, 2, 4]  # of 100, 120, 100, 200 columns
    channel = plan_model(TINY, WeightFormat("int8", "channel"), Rank(), {}).layers[0]
    assert [m.groups for m in channel.matrices()] == [1, 1, 1, 1]


def test_native_groups_are_kept_where_all_fused_matrices_share_them() -> None:
    native = {f"model.layers.0.self_attn.{p}_proj.weight": 32 for p in "qkvo"}
    native |= {"model.layers.0.mlp.gate_proj.weight": 32, "model.embed_tokens.weight": 32}
    plan = plan_model(TINY, WeightFormat(), Rank(), native)
    assert [m.group for m in plan.layers[0].matrices()] == [32, 32, 128, 128]
    assert plan.embedding is not None and plan.embedding.group == 32


models = st.builds(
    lambda kv_heads, group, ffn, vocab, tied, flagged: dataclasses.replace(
        TINY,
        num_kv_heads=kv_heads,
        num_heads=kv_heads * group,
        intermediate_size=ffn,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        qkv_bias=flagged,
        qk_norm=flagged,
    ),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 700),
    st.integers(1, 700),
    st.booleans(),
    st.booleans(),
)


@given(models, st.sampled_from([INT8, FLOATS, WeightFormat("int8", 32)]), st.data())
def test_the_ranks_together_hold_the_whole_model_once(
    model: ModelConfig, weights: WeightFormat, data: st.DataObject
) -> None:
    most = ParallelConfig.most_tensor_ranks(model)
    parallel = ParallelConfig(data.draw(st.integers(1, most)), data.draw(st.integers(1, 3)))
    whole = plan_model(model, weights, Rank(), {})
    plans = [plan_model(model, weights, rank, {}) for rank in ranks_of(parallel)]
    tp, pp = parallel.tensor_parallel_size, parallel.pipeline_parallel_size

    values = sum(m.rows * m.columns for plan in plans for m in plan.matrices())
    once = sum(m.rows * m.columns for m in whole.matrices())
    heads_again = max(0, tp - model.num_kv_heads) * 2 * model.head_dim * model.hidden_size
    table_again = model.vocab_size * model.hidden_size * (model.tie_word_embeddings and pp > 1)
    assert values == once + model.num_layers * heads_again + table_again
    biases = model.num_layers * (model.query_size + 2 * model.kv_size) * model.qkv_bias
    biases_again = model.num_layers * max(0, tp - model.num_kv_heads) * 2 * model.head_dim
    norms = tp * (whole.vector_values - biases)
    vectors = norms + biases + biases_again * model.qkv_bias
    assert sum(plan.vector_values for plan in plans) == vectors


@given(models, st.integers(1, 8))
def test_a_group_cut_in_two_has_its_scale_on_both_ranks(model: ModelConfig, tp: int) -> None:
    parallel = ParallelConfig(min(tp, ParallelConfig.most_tensor_ranks(model)))
    for name in ("output", "down"):
        column = 0
        for rank in ranks_of(parallel):
            matrix = getattr(plan_model(model, INT8, rank, {}).layers[0], name)
            assert matrix.offset == column % 128
            last = column + matrix.columns - 1
            assert matrix.groups == last // 128 - column // 128 + 1
            column = last + 1
        assert column == {"output": model.query_size, "down": model.intermediate_size}[name]


def test_a_decoding_step_reads_all_but_a_lookup_table() -> None:
    tied, untied = TINY, dataclasses.replace(TINY, tie_word_embeddings=False)
    for model in (tied, untied):
        plan = plan_model(model, INT8, Rank(), {})
        table = 304 * 100 + 304 * 4  # rows are padded to 16
        both = plan.weight_bytes + plan.scale_bytes
        assert step_read_bytes(plan, Rank()) == both - (0 if model is tied else table)
    first = Rank(ParallelConfig(pipeline_parallel_size=2), stage=0)
    plan = plan_model(tied, INT8, first, {})
    assert step_read_bytes(plan, first) == plan.weight_bytes + plan.scale_bytes - table


def test_a_context_beyond_the_model_s_own_is_refused_with_both_numbers() -> None:
    longest = TINY.max_position
    assert plan(1 << 40, max_model_len=longest).step.max_model_len == longest
    with pytest.raises(UsageError, match=f"{longest + 1} .* {longest} "):
        plan(1 << 40, max_model_len=longest + 1)


def test_kv_bytes_of_smollm2_are_those_of_the_documentation() -> None:
    smollm2 = dataclasses.replace(
        TINY, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64, hidden_size=576
    )
    assert kv_token_bytes(smollm2, "bfloat16") == 23_040
    assert kv_block_bytes(smollm2, "float32", Rank(), 16) == 16 * 2 * 23_040
    on_four = [kv_block_bytes(smollm2, "bfloat16", r, 1) for r in ranks_of(ParallelConfig(4, 2))]
    assert on_four == [23_040 // 6] * 8  # KV head 0 twice


@given(models, st.integers(1, 40), st.integers(1, 9), st.integers(1, 5000), st.integers(1, 64))
def test_buffers_are_as_large_as_the_step(
    model: ModelConfig, tokens: int, rows: int, length: int, block_size: int
) -> None:
    step = StepShape(tokens, rows, length, block_size)
    buffers = plan_step_buffers(model, "bfloat16", Rank(), step)
    assert buffers["block_table"][0][1] == math.ceil(length / block_size)
    assert "logits_shard" not in buffers
    longest_row = max(model.hidden_size, model.query_size, model.intermediate_size)
    assert buffers["scratch"][0][0] >= longest_row
    item = {"bfloat16": 2, "float32": 4, "float64": 8, "int32": 4, "int64": 8}
    assert buffer_bytes(buffers) == sum(math.prod(s) * item[d] for s, d in buffers.values())
    split = Rank(ParallelConfig(1, 2), 0, 0)
    assert "logits" not in plan_step_buffers(model, "bfloat16", split, step)


def test_the_scratch_holds_a_row_of_any_matrix() -> None:
    wide = dataclasses.replace(TINY, intermediate_size=3 << 20)
    buffers = plan_step_buffers(wide, "bfloat16", Rank(), StepShape(1, 1, 1, 1))
    assert buffers["scratch"][0] == (3 << 20,)


def plan(available: int, **options: Any) -> RankBudget:
    defaults: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 8}
    defaults["gpu_memory_utilization"] = 1.0
    return plan_rank(TINY, EngineConfig(**defaults | options), Rank(), {}, available)


def test_a_pool_is_never_larger_than_all_requests_need() -> None:
    budget = plan(1 << 40)
    assert budget.step.max_model_len == TINY.max_position
    assert budget.num_blocks == 4 * math.ceil(1000 / 16)
    assert budget.kv_bytes == budget.num_blocks * kv_block_bytes(TINY, "bfloat16", Rank(), 16)
    parts = budget.model.weight_bytes + budget.model.scale_bytes
    assert budget.total_bytes == parts + budget.kv_bytes + budget.activation_bytes


FULL = plan(1 << 40)
SMALLEST = plan(1 << 40, max_model_len=1, max_num_seqs=1, max_num_batched_tokens=1).total_bytes


@given(st.integers(SMALLEST - 9000, 2 * FULL.total_bytes), st.sampled_from([0.5, 1.0]))
def test_what_is_planned_stays_within_the_share_of_memory(available: int, share: float) -> None:
    try:
        budget = plan(available, gpu_memory_utilization=share)
    except CapacityError:
        return
    assert budget.total_bytes <= available * share
    assert budget.num_blocks >= budget.step.blocks_per_row
    spare = available * share - budget.total_bytes
    block_bytes = budget.kv_bytes // budget.num_blocks
    assert spare < block_bytes + 1 or budget.num_blocks == 4 * budget.step.blocks_per_row


@given(
    st.integers(SMALLEST - 9000, FULL.total_bytes),
    st.integers(1, TINY.max_position),
    st.sampled_from([1, 7, 16]),
)
@settings(max_examples=50)
def test_a_refused_context_names_the_largest_that_fits(
    available: int, asked: int, block_size: int
) -> None:
    def at(length: int) -> RankBudget:
        return plan(available, max_model_len=length, block_size=block_size)

    try:
        at(asked)
    except CapacityError as error:
        if "none fits" in error.message:
            with pytest.raises(CapacityError):
                at(1)
            return
        assert f"a context of {asked} tokens needs" in error.message
        largest = int(error.message.split("--max-model-len ")[1].split()[0])
        assert at(largest).step.max_model_len == largest
        with pytest.raises(CapacityError):
            at(largest + 1)


@given(st.integers(SMALLEST - 9000, FULL.total_bytes))
@settings(max_examples=50)
def test_an_automatic_context_is_the_largest_that_fits(available: int) -> None:
    try:
        length = plan(available).step.max_model_len
    except CapacityError:
        with pytest.raises(CapacityError):
            plan(available, max_model_len=1)
        return
    assert plan(available, max_model_len=length).step.max_model_len == length
    if length < TINY.max_position:
        with pytest.raises(CapacityError):
            plan(available, max_model_len=length + 1)


def test_a_pool_of_given_size_ignores_the_share_but_not_the_memory() -> None:
    block_bytes = kv_block_bytes(TINY, "bfloat16", Rank(), 16)
    given_pool = {"kv_cache_memory_bytes": 5 * block_bytes + 1, "gpu_memory_utilization": 0.01}
    budget = plan(1 << 30, **given_pool)
    assert (budget.num_blocks, budget.step.max_model_len) == (5, 80)
    with pytest.raises(CapacityError, match=r"81 tokens .*--max-model-len 80 .* --kv-cache-memory"):
        plan(1 << 30, max_model_len=81, **given_pool)
    with pytest.raises(CapacityError, match="are free; lower --kv-cache-memory-bytes"):
        plan(budget.total_bytes - 1, **given_pool)


def test_memory_too_small_for_the_weights_fits_no_context() -> None:
    with pytest.raises(
        CapacityError,
        match=r"0 are left .* none fits; lower --max-num-seqs or raise --gpu-memory-util",
    ):
        plan(1000)
