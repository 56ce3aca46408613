import dataclasses

import pytest
import transformers

from roofline.budget import Rank, plan_model
from roofline.config import PRESETS, ModelConfig, WeightFormat
from roofline.models.checkpoints.tensors import (
    HEAD,
    matrix_shapes,
    tensor_shapes,
    vector_shapes,
)
from roofline.models.families import FAMILIES, Family

SMALL = ModelConfig(
    hidden_size=48,
    intermediate_size=80,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=20,
    vocab_size=33,
    max_position=64,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    tie_word_embeddings=False,
)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_names_and_shapes_are_those_of_transformers(family: Family, tied: bool) -> None:
    config = dataclasses.replace(
        SMALL, tie_word_embeddings=tied, qkv_bias=family.qkv_bias, qk_norm=family.qk_norm
    )
    theirs = getattr(transformers, family.transformers_class)(
        transformers.AutoConfig.for_model(
            family.model_type,
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=20,
            vocab_size=33,
            tie_word_embeddings=tied,
        )
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    if tied:
        del shapes[HEAD]
    assert tensor_shapes(config) == shapes


FLAGGED = dataclasses.replace(SMALL, qkv_bias=True, qk_norm=True)


@pytest.mark.parametrize("config", [*PRESETS.values(), FLAGGED], ids=[*PRESETS, "flagged"])
def test_tensors_add_up_to_the_parameters_of_the_plan(config: ModelConfig) -> None:
    parameters = sum(rows * columns for rows, columns in matrix_shapes(config).values())
    parameters += sum(size for (size,) in vector_shapes(config).values())
    assert parameters == plan_model(config, WeightFormat(), Rank(), {}).parameters
