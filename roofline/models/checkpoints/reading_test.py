from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import pytest
import torch

from roofline.config import ModelConfig, WeightFormat
from roofline.errors import CheckpointError
from roofline.models.checkpoints.dummy import DummyCheckpoint
from roofline.models.checkpoints.reading import float_norm, int8_rows, tensor_groups
from roofline.models.checkpoints.tensors import EMBEDDING, HEAD, NORM, matrix_shapes
from roofline.quantization.int8_groups import quantize

CONFIG = ModelConfig(
    hidden_size=192,
    intermediate_size=320,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=48,
    vocab_size=130,
    max_position=64,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    tie_word_embeddings=False,
)
Q, K, V, OUT = (f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkvo")
GATE, UP, DOWN = (f"model.layers.1.mlp.{x}_proj.weight" for x in ("gate", "up", "down"))


class OneTensor:
    """`Checkpoint` that gives the same array whatever is asked for."""

    config = CONFIG
    native_groups: Mapping[str, int] = MappingProxyType({})

    def __init__(self, array: np.ndarray | torch.Tensor) -> None:
        self._array = array

    def read(self, name: str) -> np.ndarray | torch.Tensor:
        return self._array

    def read_int8(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        raise AssertionError("nothing is INT8 here")

    def close(self) -> None:
        pass


def test_every_matrix_has_a_group_and_nothing_else_has() -> None:
    groups = tensor_groups(CONFIG, WeightFormat(), {})
    assert groups == dict.fromkeys(matrix_shapes(CONFIG), 128)


def test_channel_is_the_width_of_each_matrix() -> None:
    groups = tensor_groups(CONFIG, WeightFormat(group_size="channel"), {OUT: 32})
    assert groups == {name: shape[1] for name, shape in matrix_shapes(CONFIG).items()}


def test_auto_keeps_the_groups_of_the_file() -> None:
    native = {EMBEDDING: 32, HEAD: 64, OUT: 32, DOWN: 256, Q: 32, K: 32, V: 32}
    groups = tensor_groups(CONFIG, WeightFormat(), native)
    assert {name: group for name, group in groups.items() if group != 128} == native


@pytest.mark.parametrize("native", [{Q: 32}, {Q: 32, K: 32, V: 64}, {GATE: 32}, {GATE: 32, UP: 64}])
def test_fused_matrices_keep_a_group_only_together(native: dict[str, int]) -> None:
    groups = tensor_groups(CONFIG, WeightFormat(), native)
    assert set(groups.values()) == {128}


def test_stated_group_size_is_for_all() -> None:
    native = dict.fromkeys(matrix_shapes(CONFIG), 32)
    assert set(tensor_groups(CONFIG, WeightFormat(group_size=64), native).values()) == {64}


def test_native_groups_are_taken_as_they_are() -> None:
    checkpoint = DummyCheckpoint(CONFIG, 0)
    values, scales = checkpoint.read_int8(DOWN)
    weight = int8_rows(checkpoint, DOWN, 128, slice(3, 50))
    assert np.array_equal(weight.values.numpy(), values[3:50])
    assert np.array_equal(weight.scales.numpy(), scales[3:50])
    assert (weight.group, weight.offset) == (128, 0)


@pytest.mark.parametrize("group", [32, 64, 256, 320])
def test_other_groups_are_quantised_from_floats(group: int) -> None:
    checkpoint = DummyCheckpoint(CONFIG, 0)
    weight = int8_rows(checkpoint, DOWN, group, slice(None))
    wanted = quantize(torch.as_tensor(checkpoint.read(DOWN)), group, DOWN)
    assert torch.equal(weight.values, wanted.values)
    assert torch.equal(weight.scales, wanted.scales)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_rows_are_those_of_the_whole_matrix(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    checkpoint = OneTensor(torch.randn(70, 200).to(dtype))
    whole = int8_rows(checkpoint, "x", 64, slice(None))
    part = int8_rows(checkpoint, "x", 64, slice(13, 41))
    assert torch.equal(part.values, whole.values[13:41])
    assert torch.equal(part.scales, whole.scales[13:41])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weight_that_is_no_number_is_named(bad: float) -> None:
    array = np.ones((4, 200), np.float32)
    array[3, 199] = bad
    with pytest.raises(CheckpointError, match=f"tensor '{DOWN}' holds NaN or infinity"):
        int8_rows(OneTensor(array), DOWN, 64, slice(None))
    with pytest.raises(CheckpointError, match=f"tensor '{NORM}' holds NaN or infinity"):
        float_norm(OneTensor(array[3]), NORM)


def test_norm_is_float32_in_memory_of_its_own() -> None:
    stored = torch.tensor([1.5, -2.0], dtype=torch.bfloat16)
    norm = float_norm(OneTensor(stored), NORM)
    assert norm.dtype == torch.float32 and norm.tolist() == [1.5, -2.0]
    array = np.array([1.0, 2.0], np.float32)
    float_norm(OneTensor(array), NORM).zero_()
    assert array.tolist() == [1.0, 2.0]
