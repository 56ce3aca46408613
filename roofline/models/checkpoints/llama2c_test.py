"""The four layouts against transformers, and files that lie; `tests/llama2c_writer.py` writes."""

import os
import pickle
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from roofline.config import EngineConfig
from roofline.errors import CheckpointError, RooflineError, UnsupportedError
from roofline.models.checkpoints.llama2c import Llama2cCheckpoint
from roofline.models.checkpoints.rotary_order import RotaryOrder
from roofline.models.checkpoints.tensors import EMBEDDING, HEAD, NORM, tensor_shapes
from tests.llama2c_writer import LAYOUTS, random_llama, write_model
from tests.whole_model import WholeModel

SHAPES: dict[str, dict[str, Any]] = {
    "grouped heads, shared classifier": {"tie_word_embeddings": True},
    "classifier of its own": {"tie_word_embeddings": False},
    "one KV head": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "no grouping": {"num_key_value_heads": 4, "tie_word_embeddings": False},
    "wide FFN": {"intermediate_size": 128, "num_hidden_layers": 3},
    "heads of 6": {"hidden_size": 96, "num_attention_heads": 16, "num_key_value_heads": 8},
}
W2, W3 = (f"model.layers.1.mlp.{x}_proj.weight" for x in ("down", "up"))
Q_PROJ, K_PROJ, V_PROJ = (f"model.layers.1.self_attn.{x}_proj.weight" for x in "qkv")
SCALES_OF_W2 = 64 * 96 // 64


def written(folder: Path, layout: str, group: int = 64, **shape: Any) -> Path:
    return write_model(random_llama(**shape), folder / f"{layout}.bin", layout, group)


def refusal(path: Path) -> RooflineError:
    with pytest.raises(RooflineError) as caught:
        Llama2cCheckpoint(path)
    assert caught.value.message.startswith(f"{path}: ")
    assert "\n" not in caught.value.message
    return caught.value


def assert_same_answers(checkpoint: Llama2cCheckpoint, peer: Any, quantization: str) -> None:
    """Logits at each position, and ten tokens chosen greedily."""
    options: dict[str, Any] = {"quantization": quantization, "dtype": "float32"}
    ours = WholeModel(checkpoint, EngineConfig(max_model_len=64, max_num_seqs=1, **options))
    ids = torch.randint(0, peer.config.vocab_size, (20,)).tolist()
    for _ in range(10):
        logits = ours.logits(ids)
        expected = peer(torch.tensor([ids])).logits[0]
        assert (logits - expected).abs().max() < 1e-4
        assert logits[-1].argmax() == expected[-1].argmax()
        ids.append(int(logits[-1].argmax()))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@torch.inference_mode()
def test_logits_and_greedy_tokens_are_those_of_transformers(
    tmp_path: Path, layout: str, shape: dict[str, Any]
) -> None:
    peer = random_llama(**shape)
    path = write_model(peer, tmp_path / "model.bin", layout, 32)
    assert_same_answers(Llama2cCheckpoint(path), peer, "none")


@pytest.mark.parametrize("tied", [True, False])
@torch.inference_mode()
def test_int8_groups_of_the_file_are_computed_with_as_they_are(tmp_path: Path, tied: bool) -> None:
    peer = random_llama(intermediate_size=128, tie_word_embeddings=tied)
    checkpoint = Llama2cCheckpoint(write_model(peer, tmp_path / "model.bin", "v2", 64))
    matrices = {n for n, shape in tensor_shapes(checkpoint.config).items() if len(shape) == 2}
    assert checkpoint.native_groups == dict.fromkeys(matrices, 64)
    assert_same_answers(checkpoint, peer, "int8")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_config_is_the_headers_and_the_constants_of_llama2c(tmp_path: Path, layout: str) -> None:
    for tied in (True, False):
        config = Llama2cCheckpoint(written(tmp_path, layout, tie_word_embeddings=tied)).config
        assert (config.hidden_size, config.intermediate_size, config.num_layers) == (64, 96, 2)
        assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 16)
        assert (config.vocab_size, config.max_position) == (300, 64)
        assert (config.rms_norm_eps, config.rope_theta) == (1e-5, 10000.0)
        assert config.tie_word_embeddings == tied
        assert (config.rope_scaling, config.bos_token_id, config.eos_token_ids) == (None, None, ())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_is_the_writers_bit_for_bit(tmp_path: Path, layout: str) -> None:
    model = random_llama(tie_word_embeddings=False)
    checkpoint = Llama2cCheckpoint(write_model(model, tmp_path / "model.bin", layout))
    for name, shape in tensor_shapes(checkpoint.config).items():
        tensor = checkpoint.read(name)
        assert (tensor.shape, tensor.dtype) == (shape, np.float32)
        assert np.array_equal(tensor, model.get_parameter(name).numpy()), name
    checkpoint.close()


def test_rows_of_q_and_k_are_as_the_user_says(tmp_path: Path) -> None:
    model = random_llama()
    others: dict[str, RotaryOrder] = {"v0": "half-split", "kuiper": "interleaved"}
    for layout, other in others.items():
        path = write_model(model, tmp_path / "model.bin", layout)
        usual, as_told = Llama2cCheckpoint(path), Llama2cCheckpoint(path, rotary_order=other)
        for name in (Q_PROJ, K_PROJ):
            assert not np.array_equal(usual.read(name), as_told.read(name))
        for name in (V_PROJ, EMBEDDING, NORM):
            assert np.array_equal(usual.read(name), as_told.read(name))
    expected = model.get_parameter(Q_PROJ).reshape(4, 2, 8, 64).transpose(1, 2).reshape(64, 64)
    path = write_model(model, tmp_path / "model.bin", "v0")
    assert np.array_equal(Llama2cCheckpoint(path, rotary_order="half-split").read(Q_PROJ), expected)


@pytest.mark.parametrize(
    ("layout", "group", "native", "not_native"),
    [
        ("v2", 32, {EMBEDDING, HEAD, Q_PROJ, W2}, {NORM}),
        ("v2", 64, {EMBEDDING, HEAD, Q_PROJ}, {W2}),  # 96 columns: groups go on in the next row
        ("v2", 16, set(), {Q_PROJ, W2}),  # no group size of ours
        ("v2", 96, {W2}, {Q_PROJ}),  # whole rows of W2; three of Q's make two groups
        ("kuiper", 64, {HEAD, Q_PROJ}, {EMBEDDING, W2}),
        ("v1", 64, set(), {EMBEDDING, Q_PROJ}),
    ],
)
def test_groups_within_rows_are_native_and_the_others_dequantised(
    tmp_path: Path, layout: str, group: int, native: set[str], not_native: set[str]
) -> None:
    shape = {"vocab_size": 480, "tie_word_embeddings": False}
    if group == 96:
        shape |= {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 48}
    model = random_llama(**shape)
    checkpoint = Llama2cCheckpoint(write_model(model, tmp_path / "model.bin", layout, group))
    assert native <= checkpoint.native_groups.keys()
    assert not_native.isdisjoint(checkpoint.native_groups)
    for name, size in checkpoint.native_groups.items():
        assert size == group
        values, scales = checkpoint.read_int8(name)
        assert (values.dtype, scales.dtype) == (np.int8, np.float32)
        assert scales.shape == (values.shape[0], values.shape[1] // group)
        floats = values * scales.repeat(group, axis=1)
        assert np.array_equal(floats, checkpoint.read(name)), name
        assert np.array_equal(floats, model.get_parameter(name).numpy()), name


def int8_file(folder: Path, values: bytes, *scales: float) -> Path:
    """A v2 file whose tensors end in W3 of its last layer; its last groups are given."""
    path = written(folder, "v2", tie_word_embeddings=True)
    data = bytearray(path.read_bytes())
    data[len(data) - 4 * len(scales) :] = struct.pack(f"<{len(scales)}f", *scales)
    end_of_values = len(data) - 4 * SCALES_OF_W2
    data[end_of_values - len(values) : end_of_values] = values
    path.write_bytes(data)
    return path


def test_the_value_minus_128_is_kept(tmp_path: Path) -> None:
    checkpoint = Llama2cCheckpoint(int8_file(tmp_path, b"\x80" * 3, 0.5))
    values, scales = checkpoint.read_int8(W3)
    assert values[-1, -3:].tolist() == [-128] * 3
    assert scales[-1, -1] == 0.5
    assert checkpoint.read(W3)[-1, -3:].tolist() == [-64.0] * 3


def test_a_group_of_zeros_may_have_the_scale_0_that_the_exporters_give_it(tmp_path: Path) -> None:
    checkpoint = Llama2cCheckpoint(int8_file(tmp_path, bytes(64), 0.0))
    assert checkpoint.read_int8(W3)[1][-1, -1] == 1.0
    assert not checkpoint.read(W3)[-1].any()


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1.0, 0.0, -0.0])
def test_a_bad_scale_is_refused_by_tensor_and_group(tmp_path: Path, scale: float) -> None:
    path = int8_file(tmp_path, bytes(63) + b"\1", scale)
    for read in (Llama2cCheckpoint(path).read, Llama2cCheckpoint(path).read_int8):
        with pytest.raises(CheckpointError, match=rf"{path}: {W3}: the scale of group 95 is") as e:
            read(W3)
        assert "\n" not in e.value.message


def test_the_scales_of_straddling_groups_are_checked_too(tmp_path: Path) -> None:
    path = written(tmp_path, "v2")
    path.write_bytes(path.read_bytes()[:256] + b"\xff" * (path.stat().st_size - 256))  # NaN
    with pytest.raises(CheckpointError, match=rf"{W2}: the scale of group 0 is nan"):
        Llama2cCheckpoint(path).read(W2)


FIELDS = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", [-1, 0, -(2**31), 2**31 - 1])
def test_a_field_out_of_bounds_is_refused_by_name(
    tmp_path: Path, layout: str, field: str, value: int
) -> None:
    path = written(tmp_path, layout)
    data = bytearray(path.read_bytes())
    start = (8 if layout in ("v1", "v2") else 0) + 4 * FIELDS.index(field)
    data[start : start + 4] = struct.pack("<i", value)
    path.write_bytes(data)
    message = refusal(path).message
    if (field, value) == ("vocab_size", -1) and layout in ("v0", "kuiper"):
        assert "its header makes that" in message  # one token, and a classifier of its own
    else:
        assert f"header: {field} is " in message


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("change", [lambda n: n + 1, lambda n: n * 2, lambda n: n - 1])
def test_a_field_that_lies_is_refused(tmp_path: Path, layout: str, field: str, change: Any) -> None:
    path = written(tmp_path, layout, tie_word_embeddings=True)
    data = bytearray(path.read_bytes())
    start = (8 if layout in ("v1", "v2") else 0) + 4 * FIELDS.index(field)
    (value,) = struct.unpack_from("<i", data, start)
    struct.pack_into("<i", data, start, change(value))
    path.write_bytes(data)
    # Only v0 has tensors as long as the context; heads that split the same rows show nowhere.
    unseen = {("max_seq_len", lay) for lay in ("v1", "v2", "kuiper")}
    if (field, layout) in unseen:
        assert Llama2cCheckpoint(path).config.max_position == change(64)
    else:
        refusal(path)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("change", [-1, 1, -4, 4, 256])
def test_a_file_of_another_size_is_refused_with_the_sizes_it_could_have(
    tmp_path: Path, layout: str, change: int
) -> None:
    path = written(tmp_path, layout)
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + bytes(change))
    message = refusal(path).message
    assert f"has {len(data) + change:,} bytes; its header makes that " in message
    assert f"{len(data):,} as " in message
    assert ("KuiperLLama INT8" in message) == (layout == "kuiper")


def test_a_truncated_file_that_could_be_either_names_both_sizes(tmp_path: Path) -> None:
    path = written(tmp_path, "kuiper")
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    legacy = written(tmp_path, "v0").stat().st_size
    expected = f"{legacy:,} as llama2.c float32 (v0) or {size:,} as KuiperLLama INT8"
    assert expected in refusal(path).message


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_truncation_of_the_header_is_refused(tmp_path: Path, layout: str) -> None:
    data = written(tmp_path, layout).read_bytes()
    path = tmp_path / "short.bin"
    for end in range(1, 300):
        path.write_bytes(data[:end])
        assert isinstance(refusal(path), CheckpointError)


@pytest.mark.parametrize("group", [0, -1, -64, 7, 2**31 - 1, 1 << 20])
def test_a_group_size_that_cannot_be_is_refused(tmp_path: Path, group: int) -> None:
    path = written(tmp_path, "v2")
    data = bytearray(path.read_bytes())
    struct.pack_into("<i", data, 37, group)
    path.write_bytes(data)
    assert f"header: group_size is {group}; it must be above 0 and divide" in refusal(path).message
    path = written(tmp_path, "kuiper")
    data = bytearray(path.read_bytes())
    struct.pack_into("<i", data, 28, group)
    path.write_bytes(data)
    assert "its header makes that" in refusal(path).message


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (4, 0, "version 0 is not supported; supported: 0 (which has no version number), 1, 2"),
        (4, 3, "llama2.c version 3 is not supported"),
        (4, 0x7FFFFFFF, "llama2.c version 2147483647 is not supported"),
        (36, 2, "header: shared_classifier is 2; it must be 0 or 1"),
        (40, 1, "header: after byte 37 is more than version 1 has"),
        (252, 1 << 24, "header: after byte 37 is more than version 1 has"),
    ],
)
def test_what_version_1_cannot_hold_is_refused(
    tmp_path: Path, offset: int, value: int, message: str
) -> None:
    path = written(tmp_path, "v1")
    data = bytearray(path.read_bytes())
    struct.pack_into("<i", data, offset, value)
    path.write_bytes(data)
    assert message in refusal(path).message


@pytest.mark.parametrize("protocol", range(2, 6))
def test_a_pickle_is_never_loaded(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(pickle.dumps({"weights": list(range(1000))}, protocol))
    error = refusal(path)
    assert isinstance(error, UnsupportedError)
    assert "a pickle can run code" in error.message


def test_what_torch_saves_is_never_loaded(tmp_path: Path) -> None:
    for zipped in (True, False):
        path = tmp_path / "pytorch_model.bin"
        torch.save({"w": torch.ones(4)}, path, _use_new_zipfile_serialization=zipped)
        error = refusal(path)
        assert isinstance(error, UnsupportedError)
        assert "a pickle can run code" in error.message


def test_a_model_whose_first_field_looks_like_a_pickle_is_loaded(tmp_path: Path) -> None:
    path = written(tmp_path, "v0", hidden_size=640, num_hidden_layers=1)
    assert path.read_bytes().startswith(b"\x80\x02")
    assert Llama2cCheckpoint(path).config.hidden_size == 640


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"GGUF" + bytes(400), "is a GGUF file; rename it to end in .gguf"),
        (b"tjgg" + bytes(400), "is a GGML file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (b"<!DOCTYPE html>", "is a web page"),
        (b"hello, this is no model at all, but text", "header: dim is 1819043176"),
        (b"\x80\x04", "a pickle can run code"),
        (b"\x80\x04\0", "ends in its header, which takes 28 bytes"),
        (b"24ka", "ends in its header, which takes 256 bytes"),
        (b"(dp0\nS'a'\np1\nI1\ns." * 4, "header: dim is "),  # a pickle of protocol 0
    ],
)
def test_another_file_is_refused_for_what_it_is(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    assert message in refusal(path).message


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    assert "is a directory" in refusal(tmp_path).message
    assert "no such file" in refusal(tmp_path / "none.bin").message
    os.mkfifo(tmp_path / "fifo.bin")
    assert "is not a regular file" in refusal(tmp_path / "fifo.bin").message


def test_a_sparse_file_of_a_terabyte_that_lies_costs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "huge.bin"
    path.write_bytes(struct.pack("<8i", 1 << 20, 1 << 22, 4096, 4096, 4096, 1 << 24, 1 << 27, 64))

    def seconds() -> float:
        """Of the processor, at best."""
        found = []
        for _ in range(3):
            start = time.thread_time()
            assert "its header makes that" in refusal(path).message
            found.append(time.thread_time() - start)
        return min(found)

    of_32_bytes = seconds()
    os.truncate(path, 1 << 40)
    assert seconds() < 5 * of_32_bytes
