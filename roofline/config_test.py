import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from roofline.config import (
    PRESETS,
    ModelConfig,
    ParallelConfig,
    RopeScaling,
    WeightFormat,
)
from roofline.errors import CheckpointError, UnsupportedError, UsageError

SMOLLM2 = ModelConfig(
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    vocab_size=49152,
    max_position=8192,
    rms_norm_eps=1e-5,
    rope_theta=100000.0,
    tie_word_embeddings=True,
)


@st.composite
def split_models(draw: st.DrawFn) -> tuple[ModelConfig, ParallelConfig]:
    """A model, and numbers of ranks it can be split over."""
    kv_heads = draw(st.integers(1, 8))
    model = dataclasses.replace(
        SMOLLM2,
        num_kv_heads=kv_heads,
        num_heads=kv_heads * draw(st.integers(1, 8)),
        intermediate_size=draw(st.integers(1, 3000)),
        vocab_size=draw(st.integers(1, 3000)),
    )
    most = ParallelConfig.most_tensor_ranks(model)
    parallel = ParallelConfig(draw(st.integers(1, most)), draw(st.integers(1, model.num_layers)))
    parallel.check(model)
    return model, parallel


Dealing = Callable[[ModelConfig, int], range]


def shards(dealing: Dealing, model: ModelConfig, parallel: ParallelConfig) -> list[range]:
    return [dealing(model, rank) for rank in range(parallel.tensor_parallel_size)]


@given(split_models())
def test_heads_channels_and_vocabulary_are_each_dealt_once_and_to_every_rank(
    case: tuple[ModelConfig, ParallelConfig],
) -> None:
    model, parallel = case
    for dealing, total in (
        (parallel.query_heads, model.num_heads),
        (parallel.ffn_channels, model.intermediate_size),
        (parallel.vocabulary, model.vocab_size),
    ):
        dealt = shards(dealing, model, parallel)
        assert [item for shard in dealt for item in shard] == list(range(total))
        assert all(dealt), "a rank has no work"
    for dealing in (parallel.ffn_channels, parallel.vocabulary):
        dealt = shards(dealing, model, parallel)
        assert all(shard.start % 64 == 0 for shard in dealt)
        assert max(map(len, dealt)) - min(map(len, dealt[:-1]), default=0) <= 64 or len(dealt) == 1


@given(split_models())
def test_a_rank_holds_the_kv_heads_of_its_query_heads_and_no_other(
    case: tuple[ModelConfig, ParallelConfig],
) -> None:
    model, parallel = case
    for rank in range(parallel.tensor_parallel_size):
        needed = {head // model.group_query for head in parallel.query_heads(model, rank)}
        held = parallel.kv_heads(model, rank)
        assert set(held) == needed
        assert len(parallel.query_heads(model, rank)) % len(held) == 0, "groups must be even"


@given(split_models())
def test_layers_are_dealt_once_and_to_every_stage(case: tuple[ModelConfig, ParallelConfig]) -> None:
    model, parallel = case
    stages = [parallel.layers(model, s) for s in range(parallel.pipeline_parallel_size)]
    assert [layer for stage in stages for layer in stage] == list(range(model.num_layers))
    assert all(stages)


def test_smollm2_on_four_ranks_splits_the_first_kv_head() -> None:
    parallel = ParallelConfig(4)
    assert [len(s) for s in shards(parallel.query_heads, SMOLLM2, parallel)] == [2, 1, 3, 3]
    assert [list(s) for s in shards(parallel.kv_heads, SMOLLM2, parallel)] == [[0], [0], [1], [2]]


def test_too_many_ranks_are_refused_with_the_most_that_work() -> None:
    with pytest.raises(UsageError, match=r"tensor_parallel_size 10 is too many.* the most is 9"):
        ParallelConfig(10).check(SMOLLM2)
    narrow = dataclasses.replace(SMOLLM2, intermediate_size=65)
    with pytest.raises(UsageError, match="the most is 2"):
        ParallelConfig(3).check(narrow)
    with pytest.raises(UsageError, match=r"pipeline_parallel_size 31 is more than .* 30 layers"):
        ParallelConfig(1, 31).check(SMOLLM2)


@pytest.mark.parametrize("value", [0, -1, 1025, True, 2.0, "2", None, math.nan])
@pytest.mark.parametrize("name", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_a_number_of_ranks_out_of_bounds_is_refused(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"{name} is .* integer from 1 to 1024"):
        ParallelConfig(**{name: value})


SCALINGS = [
    None,
    RopeScaling("linear", 4.0),
    RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
    RopeScaling("llama3", 32.0, 1.0, 4.0, 8192),
    RopeScaling("llama3", 3.5, 2.0, 9.0, 512),
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize(("theta", "dim"), [(10000.0, 64), (500000.0, 128), (100000.0, 80)])
def test_rope_frequencies_are_those_of_transformers_in_double_precision(
    scaling: RopeScaling | None, theta: float, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of factor 1, linear scaling is none.
    rope: dict[str, Any] = {"rope_type": "linear", "factor": 1.0, "rope_theta": theta}
    if scaling is not None:
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling is not None and scaling.kind == "llama3":
        rope |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position,
        }
    peer = LlamaConfig(head_dim=dim, max_position_embeddings=1 << 20, rope_parameters=rope)
    monkeypatch.setattr(torch, "float", torch.float64)  # the dtype they compute in
    wanted, attention_factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](peer, torch.device("cpu"))
    model = dataclasses.replace(SMOLLM2, head_dim=dim, rope_theta=theta, rope_scaling=scaling)
    assert attention_factor == 1.0
    assert model.rope_frequencies() == pytest.approx(wanted.tolist(), rel=1e-12)


def test_rope_factors_divide_frequencies_before_scaling() -> None:
    plain = dataclasses.replace(SMOLLM2, head_dim=4)
    stretched = dataclasses.replace(
        plain, rope_factors=(1.0, 8.0), rope_scaling=RopeScaling("linear", 2.0)
    )
    first, second = plain.rope_frequencies()
    assert stretched.rope_frequencies() == [first / 2, second / 16]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 0}, "sliding_window is 0; .* from 1 to"),
        ({"sliding_window": True}, "sliding_window is True"),
        ({"qkv_bias": 1}, "qkv_bias is 1; it must be true or false"),
        ({"qk_norm": None}, "qk_norm is None; it must be true or false"),
        ({"hidden_size": 0}, "hidden_size is 0; .* from 1 to"),
        ({"num_layers": 10**9}, "num_layers is 1000000000"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"intermediate_size": 2.0}, "intermediate_size is 2.0"),
        ({"num_heads": 8}, "num_heads 8 is not a multiple of num_kv_heads 3"),
        ({"head_dim": 63}, "head_dim 63 is odd"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0"),
        ({"rope_theta": math.inf}, "rope_theta is inf"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"rope_scaling": RopeScaling("linear", 0.0)}, "finite factors above 0"),
        ({"rope_scaling": RopeScaling("llama3", 8.0, 4.0, 4.0)}, "high_freq_factor above"),
        ({"rope_scaling": RopeScaling("llama3", math.nan)}, "finite factors above 0"),
        ({"rope_factors": (1.0,) * 31}, "31 rope factors for head_dim 64; it needs 32"),
        ({"rope_factors": (0.0,) * 32}, "rope factors must be finite numbers above 0"),
        ({"eos_token_ids": (49152,)}, "special token id 49152 is outside the vocabulary of 49152"),
        ({"bos_token_id": -1}, "special token id -1"),
        ({"bos_token_id": True}, "special token id True"),
    ],
)
def test_a_model_config_that_cannot_be_is_refused_by_field(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises((CheckpointError, UnsupportedError), match=message):
        dataclasses.replace(SMOLLM2, **changes)


def test_groups_of_a_weight_format() -> None:
    assert WeightFormat().group(576, None) == 128
    assert WeightFormat().group(576, 32) == 32
    assert WeightFormat(group_size=64).group(576, 32) == 64
    assert WeightFormat(group_size="channel").group(576, 32) == 576
    assert WeightFormat("none", 64).group(576, 32) == 0


def test_presets_have_the_published_numbers_of_parameters() -> None:
    billions = {"llama-110m": 0.110, "llama-3.2-1b": 1.236, "llama-3.1-8b": 8.030}
    for name, expected in (billions | {"llama-3.1-70b": 70.554}).items():
        m = PRESETS[name]
        attention = 2 * m.hidden_size * (m.query_size + m.kv_size)
        layer = attention + 3 * m.hidden_size * m.intermediate_size + 2 * m.hidden_size
        tables = m.vocab_size * m.hidden_size * (1 if m.tie_word_embeddings else 2)
        total = m.num_layers * layer + tables + m.hidden_size
        assert total / 1e9 == pytest.approx(expected, abs=0.001), name
