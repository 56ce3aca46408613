import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roofline.config import ModelConfig, ParallelConfig
from roofline.config.model_test import SMOLLM2
from roofline.errors import UsageError


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
