import dataclasses

import numpy as np
import pytest
import torch

from roofline.config import PRESETS, ModelConfig
from roofline.models.checkpoints.device_arrays import DeviceArrays
from roofline.models.checkpoints.dummy import DummyCheckpoint
from roofline.models.checkpoints.tensors import (
    EMBEDDING,
    HEAD,
    NORM,
    matrix_shapes,
    tensor_shapes,
)

SMALL = ModelConfig(
    hidden_size=200,
    intermediate_size=130,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=50,
    vocab_size=77,
    max_position=64,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    tie_word_embeddings=False,
)
DOWN = "model.layers.1.mlp.down_proj.weight"


def test_every_tensor_has_its_shape_and_type() -> None:
    checkpoint = DummyCheckpoint(SMALL, 0)
    assert checkpoint.native_groups == dict.fromkeys(matrix_shapes(SMALL), 128)
    for name, shape in tensor_shapes(SMALL).items():
        floats = checkpoint.read(name)
        assert (floats.shape, floats.dtype) == (shape, np.float32)
        if name in checkpoint.native_groups:
            values, scales = checkpoint.read_int8(name)
            assert (values.shape, values.dtype) == (shape, np.int8)
            assert (scales.shape, scales.dtype) == ((shape[0], -(-shape[1] // 128)), np.float32)


def test_floats_are_the_values_times_the_scales_of_their_groups() -> None:
    checkpoint = DummyCheckpoint(SMALL, 0)
    values, scales = checkpoint.read_int8(EMBEDDING)
    wanted = values * scales[:, np.arange(200) // 128]
    assert np.array_equal(checkpoint.read(EMBEDDING), wanted)


def test_values_fill_the_range_without_its_odd_end() -> None:
    values, scales = DummyCheckpoint(PRESETS["llama-110m"], 0).read_int8(EMBEDDING)
    assert (values.min(), values.max()) == (-127, 127)
    assert len(np.unique(values)) == 255
    assert (scales > 0).all()


@pytest.mark.parametrize("name", [EMBEDDING, HEAD, DOWN])
def test_weights_keep_activations_near_one(name: str) -> None:
    weights = DummyCheckpoint(SMALL, 0).read(name)
    assert weights.std() * weights.shape[1] ** 0.5 == pytest.approx(1, abs=0.15)


def test_matrices_are_as_random_as_they_look() -> None:
    values, _ = DummyCheckpoint(PRESETS["llama-110m"], 0).read_int8(EMBEDDING)
    square = values[:512, :512].astype(np.float64)
    largest = np.linalg.svd(square, compute_uv=False)[0]  # Marchenko and Pastur 1967
    assert largest == pytest.approx(2 * 512**0.5 * square.std(), rel=0.02)
    for byte in range(8):  # of a word
        mean = values.reshape(-1)[byte::8].astype(np.float64).mean()
        assert mean == pytest.approx(-0.5, abs=0.2)


def test_norms_are_ones() -> None:
    assert (DummyCheckpoint(SMALL, 0).read(NORM) == 1).all()


def test_biases_are_small_and_differ() -> None:
    checkpoint = DummyCheckpoint(dataclasses.replace(SMALL, qkv_bias=True, qk_norm=True), 0)
    query, key = (checkpoint.read(f"model.layers.0.self_attn.{x}_proj.bias") for x in "qk")
    assert (query.shape, key.shape, query.dtype) == ((200,), (100,), np.float32)
    assert 0.1 < query.std() < 0.5 and not np.array_equal(query[:100], key)
    assert (checkpoint.read("model.layers.1.self_attn.k_norm.weight") == np.ones(50)).all()


def test_tensors_depend_on_seed_and_name_and_nothing_else() -> None:
    first, again = DummyCheckpoint(SMALL, 3), DummyCheckpoint(SMALL, 3)
    again.read_int8(EMBEDDING)
    assert all(map(np.array_equal, first.read_int8(DOWN), again.read_int8(DOWN)))
    other = DummyCheckpoint(SMALL, 4).read_int8(DOWN)[0]
    twin = first.read_int8(DOWN.replace("layers.1", "layers.0"))[0]
    values = first.read_int8(DOWN)[0]
    assert not np.array_equal(values, other)
    assert not np.array_equal(values, twin)


def test_a_device_makes_the_bits_of_the_host() -> None:
    config = dataclasses.replace(SMALL, qkv_bias=True)
    host = DummyCheckpoint(config, 9)
    device = host.made_of(DeviceArrays(torch.device("cpu")))
    for name in tensor_shapes(config):
        assert np.array_equal(host.read(name), device.read(name).numpy())
    for one, other in zip(host.read_int8(DOWN), device.read_int8(DOWN), strict=True):
        assert np.array_equal(one, other.numpy()) and other.dtype == torch.from_numpy(one).dtype


def test_bits_of_a_seed_are_those_of_every_release() -> None:
    values, scales = DummyCheckpoint(SMALL, 0).read_int8(DOWN)
    assert values[0, :4].tolist() == [-97, -115, -106, 51]
    assert scales[0, 0].item() == pytest.approx(0.001004114, rel=1e-5)


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS)
def test_presets_open_without_making_their_weights(config: ModelConfig) -> None:
    checkpoint = DummyCheckpoint(config, 0)
    layer = "model.layers.0.self_attn.k_proj.weight"
    assert checkpoint.read_int8(layer)[0].shape == (config.kv_size, config.hidden_size)
    checkpoint.close()


def test_name_that_no_model_has_is_our_mistake() -> None:
    with pytest.raises(KeyError):
        DummyCheckpoint(SMALL, 0).read("model.layers.9.mlp.down_proj.weight")
