import json
import os
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from roofline.errors import CheckpointError, RooflineError, UnsupportedError
from roofline.models.checkpoints.safetensors_folder import INDEX, SINGLE, SafetensorsCheckpoint
from roofline.models.checkpoints.tensors import tensor_shapes

SMALL: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "vocab_size": 40,
}
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def save_llama(folder: Path, **how: Any) -> LlamaForCausalLM:
    """A random model, saved by transformers."""
    shape = {key: how.pop(key) for key in list(how) if key not in ("dtype", "max_shard_size")}
    torch.manual_seed(5)
    model = LlamaForCausalLM(LlamaConfig(**{**SMALL, **shape})).to(how.pop("dtype", torch.float32))
    model.save_pretrained(folder, **how)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good folder, for spoiling."""
    save_llama(tmp_path)
    return tmp_path


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = SafetensorsCheckpoint(folder)
    return {name: checkpoint.read(name).clone() for name in tensor_shapes(checkpoint.config)}


def refusal(folder: Path) -> RooflineError:
    """What opening says, in one line, for little time and memory."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.thread_time()
    with pytest.raises(RooflineError) as caught:
        SafetensorsCheckpoint(folder)
    assert time.thread_time() - started < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - kilobytes < 300_000
    assert str(folder) in caught.value.message and "\n" not in caught.value.message
    return caught.value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_what_transformers_saves_reads_back_exactly(
    tmp_path: Path, tied: bool, dtype: torch.dtype
) -> None:
    model = save_llama(tmp_path, tie_word_embeddings=tied, dtype=dtype)
    found, originals = tensors_of(tmp_path), model.state_dict()
    assert ("lm_head.weight" in found) is not tied
    for name, tensor in found.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, originals[name]), name


def test_shards_of_transformers_read_back_exactly(tmp_path: Path) -> None:
    model = save_llama(tmp_path, max_shard_size="20KB", num_key_value_heads=3, head_dim=24)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    originals = model.state_dict()
    for name, tensor in tensors_of(tmp_path).items():
        assert torch.equal(tensor, originals[name]), name


def test_rope_of_transformers_is_read(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    }
    model = save_llama(tmp_path, rope_parameters=rope, max_position_embeddings=8192)
    config = SafetensorsCheckpoint(tmp_path).config
    ours = torch.tensor(config.rope_frequencies())
    assert torch.allclose(ours, model.model.rotary_emb.inv_freq, rtol=1e-6, atol=0)


def test_reading_maps_the_file_and_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    save_llama(tmp_path, vocab_size=1 << 18, tie_word_embeddings=True)  # 50 MB of embedding
    checkpoint = SafetensorsCheckpoint(tmp_path)
    before = own_bytes()
    embedding = checkpoint.read("model.embed_tokens.weight")
    assert embedding.nbytes > 50e6
    assert own_bytes() - before < 10e6


def own_bytes() -> int:
    """Memory of this process that is no file's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    pytest.skip("this system does not tell anonymous memory from mapped files")


def test_links_to_the_blobs_of_a_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots"
    blobs.mkdir()
    snapshot.mkdir()
    for name in ("config.json", SINGLE):
        (folder / name).rename(blobs / f"{name}-hash")
        (snapshot / name).symlink_to(f"../blobs/{name}-hash")
    assert len(tensors_of(snapshot)) == len(tensor_shapes(SafetensorsCheckpoint(snapshot).config))


def test_single_file_wins_over_an_index_as_in_transformers(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {"x": "absent.safetensors"}}')
    SafetensorsCheckpoint(folder)


def test_header_that_begins_like_a_pickle_is_still_a_header(folder: Path) -> None:
    for length in (0x1280, 0x1480, 0x4B50):  # little-endian: 80 12, 80 14, "PK"
        raw = (folder / SINGLE).read_bytes()
        start = int.from_bytes(raw[:8], "little") + 8
        header = raw[8:start].rstrip().ljust(length)
        (folder / SINGLE).write_bytes(length.to_bytes(8, "little") + header + raw[start:])
        SafetensorsCheckpoint(folder)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "truncated: a file of 0 bytes"),
        (b"1234567", "truncated: a file of 7 bytes"),
        (bytes(8), "EOF while parsing"),
        ((2).to_bytes(8, "little") + b"[]", "invalid type: sequence"),
        ((1 << 63).to_bytes(8, "little") + b"{}", "header takes 9,223,372,036,854,775,808"),
        ((1000).to_bytes(8, "little") + b"{}", "truncated: a file of 10 bytes"),
        ((9 << 20).to_bytes(8, "little") + b"{".ljust(9 << 20), "the limit is 8,388,608"),
        ((4).to_bytes(8, "little") + b'{"\xff"', "invalid UTF-8"),
        ((5).to_bytes(8, "little") + b'{"a":', "invalid JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "Git LFS pointer"),
    ],
)
def test_file_without_a_header_is_refused(folder: Path, raw: bytes, says: str) -> None:
    (folder / SINGLE).write_bytes(raw)
    error = refusal(folder)
    assert isinstance(error, CheckpointError)
    assert SINGLE in error.message and says in error.message


def entry(start: int, end: int, shape: object = (4,), dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("entries", "data_bytes", "says"),
    [
        ({"a": entry(0, 16), "b": entry(8, 24)}, 24, "invalid offset for tensor `b`"),
        ({"a": entry(0, 16), "b": entry(0, 16)}, 16, "invalid offset"),
        ({"a": entry(0, 16), "b": entry(32, 48)}, 48, "invalid offset for tensor `b`"),
        ({"a": entry(16, 0)}, 16, "invalid offset for tensor `a`"),
        ({"a": entry(0, 16)}, 8, "file not fully covered"),
        ({"a": entry(0, 16)}, 24, "file not fully covered"),
        ({"a": entry(0, 16, [1 << 62, 1 << 62])}, 16, "overflow"),
        ({"a": entry(0, 16, [-4])}, 16, "invalid value: integer `-4`"),
        ({"a": entry(0, 16, [4.0])}, 16, "floating point `4.0`"),
        ({"a": entry(0, 16, dtype="Q9")}, 16, "unknown variant `Q9`"),
        ({"a": entry(0, 16, [5])}, 16, "invalid shape, data type, or offset"),
        ({"a": {"dtype": "F32", "shape": [4]}}, 16, "missing field `data_offsets`"),
        ({"__metadata__": {"a": 1}}, 0, "expected a string"),
    ],
)
def test_lying_header_is_refused(
    folder: Path, entries: dict[str, object], data_bytes: int, says: str
) -> None:
    header = json.dumps(entries).encode()
    raw = len(header).to_bytes(8, "little") + header + bytes(data_bytes)
    (folder / SINGLE).write_bytes(raw)
    error = refusal(folder)
    assert isinstance(error, CheckpointError)
    assert f"{SINGLE}: not a usable safetensors file" in error.message and says in error.message


def test_tensor_named_twice_in_a_header_is_refused(folder: Path) -> None:
    raw = (folder / SINGLE).read_bytes()
    start = int.from_bytes(raw[:8], "little") + 8
    entries = json.loads(raw[8:start])
    twin = json.dumps({Q_PROJ: entries[Q_PROJ]})[1:]
    header = (json.dumps(entries)[:-1] + ", " + twin).encode()
    (folder / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + raw[start:])
    assert f"header: not valid JSON (duplicate key '{Q_PROJ}')" in refusal(folder).message


def resave(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Save the folder's tensors again, some of them changed, added or (None) left out."""
    tensors: dict[str, torch.Tensor | None] = {**tensors_of(folder), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / SINGLE)


@pytest.mark.parametrize(
    ("changes", "kind", "says"),
    [
        ({Q_PROJ: None}, CheckpointError, f"tensor '{Q_PROJ}' is missing"),
        (
            {Q_PROJ: None, "lm_head.weight": None},
            CheckpointError,
            f"tensor '{Q_PROJ}' is missing, and 1 more",
        ),
        ({"x\n\x1b": torch.ones(1)}, CheckpointError, r"tensor 'x\n\x1b' is no part of the model"),
        (
            {Q_PROJ.replace("weight", "bias"): torch.ones(48)},
            UnsupportedError,
            "supported: linear layers without bias",
        ),
        (
            {Q_PROJ.replace("layers.0", "layers.1"): torch.ones(48, 48)},
            CheckpointError,
            "'model.layers.1.self_attn.q_proj.weight' is no part of the model",
        ),
        ({Q_PROJ: torch.ones(48, 49)}, CheckpointError, "has shape [48, 49], but config.json"),
        ({Q_PROJ: torch.ones(48 * 48)}, CheckpointError, "has shape [2304], but config.json"),
        (
            {Q_PROJ: torch.ones(48, 48, dtype=torch.float64)},
            UnsupportedError,
            f"tensor '{Q_PROJ}' is F64; supported here: F32, F16, BF16",
        ),
        ({Q_PROJ: torch.ones(48, 48, dtype=torch.int8)}, UnsupportedError, "is I8; supported"),
        (
            {Q_PROJ: torch.ones(48, 48).to(torch.float8_e4m3fn)},
            UnsupportedError,
            "is F8_E4M3; supported",
        ),
    ],
)
def test_tensors_that_disagree_with_the_config_are_named(
    folder: Path, changes: dict[str, torch.Tensor | None], kind: type[RooflineError], says: str
) -> None:
    resave(folder, changes)
    error = refusal(folder)
    assert type(error) is kind
    assert says in error.message


def test_leftovers_that_change_no_answer_are_let_be(tmp_path: Path) -> None:
    save_llama(tmp_path, tie_word_embeddings=True)
    leftover = "model.layers.0.self_attn.rotary_emb.inv_freq"
    resave(tmp_path, {leftover: torch.ones(8), "lm_head.weight": torch.ones(40, 48)})
    SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ({}, "weight_map is not an object"),
        ({"weight_map": []}, "weight_map is not an object"),
        ({"weight_map": {"a": 7}}, "7 is not a safetensors file of this folder"),
        ({"weight_map": {"a": "../x.safetensors"}}, "'../x.safetensors' is not"),
        ({"weight_map": {"a": "/x.safetensors"}}, "'/x.safetensors' is not"),
        ({"weight_map": {"a": "model.bin"}}, "'model.bin' is not"),
        ({"weight_map": {"a": INDEX}}, f"'{INDEX}' is not"),
        ({"weight_map": {"a": "\ud800.safetensors"}}, r"'\ud800.safetensors' is not"),
        ({"weight_map": {"a": "absent.safetensors"}}, "absent.safetensors: no such file"),
        ({"weight_map": {"a": "x" * 300 + ".safetensors"}}, "not a usable safetensors file"),
    ],
)
def test_index_that_misleads_is_refused(folder: Path, index: dict[str, Any], says: str) -> None:
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text(json.dumps(index))
    (folder.parent / "x.safetensors").write_bytes(b"")
    error = refusal(folder)
    assert isinstance(error, CheckpointError)
    assert says in error.message


def test_tensor_in_two_shards_is_refused(folder: Path) -> None:
    raw = (folder / SINGLE).read_bytes()
    for name in ("a.safetensors", "b.safetensors"):
        (folder / name).write_bytes(raw)
    (folder / SINGLE).unlink()
    shards = {"x": "a.safetensors", "y": "b.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": shards}))
    assert "is in another file too" in refusal(folder).message


def test_what_is_no_regular_file_is_never_opened(folder: Path) -> None:
    weights = folder / SINGLE
    weights.unlink()
    os.mkfifo(weights)
    assert "not a regular file" in refusal(folder).message
    for target in ("/dev/zero", str(folder), str(weights)):
        weights.unlink()
        weights.symlink_to(target)
        loop = target == str(weights)
        assert ("no such file" if loop else "not a regular file") in refusal(folder).message


def test_pickles_are_never_loaded(folder: Path) -> None:
    marker = folder / "was_loaded"
    bomb = b"\x80\x04cposix\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR."
    (folder / SINGLE).write_bytes(bomb)
    assert isinstance(refusal(folder), UnsupportedError)
    torch.save({"weight": torch.ones(2)}, folder / SINGLE)
    assert "a pickle, which can run code" in refusal(folder).message
    (folder / SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(bomb)
    assert "'pytorch_model.bin' is a pickle" in refusal(folder).message
    assert not marker.exists()


def test_folder_without_weights_says_what_it_looked_for(folder: Path) -> None:
    (folder / SINGLE).unlink()
    assert f"neither {SINGLE} nor {INDEX}" in refusal(folder).message


def test_file_cut_at_any_byte_of_its_header_is_refused(folder: Path) -> None:
    raw = (folder / SINGLE).read_bytes()
    header_bytes = int.from_bytes(raw[:8], "little") + 8
    for size in [*range(0, header_bytes, 97), header_bytes, len(raw) - 1]:
        (folder / SINGLE).write_bytes(raw[:size])
        with pytest.raises(CheckpointError):
            SafetensorsCheckpoint(folder)


def save_int8(folder: Path, scale: float) -> None:
    """The folder's q_proj and its like as INT8 in groups of 32, every scale but one of them 0.5."""
    config = json.loads((folder / "config.json").read_text())
    quantization = {"quant_method": "roofline", "bits": 8, "group_size": 32, "symmetric": True}
    config["quantization_config"] = quantization
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in tensors_of(folder).items():
        tensors[name] = tensor.float()
        if tensor.dim() == 2:
            tensors[name] = torch.full(tensor.shape, -128, dtype=torch.int8)
            scales = torch.full((tensor.shape[0], -(-tensor.shape[1] // 32)), 0.5)
            if name == Q_PROJ:
                scales[3, 1] = scale
            tensors[f"{name}_scale"] = scales
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / SINGLE)


def test_int8_groups_are_read_and_dequantised_past_the_last_whole_group(folder: Path) -> None:
    save_int8(folder, 0.25)
    checkpoint = SafetensorsCheckpoint(folder)
    assert checkpoint.native_groups[Q_PROJ] == 32
    values, scales = checkpoint.read_int8(Q_PROJ)
    assert values.dtype == torch.int8 and scales.shape == (48, 2)
    floats = checkpoint.read(Q_PROJ)
    assert floats.dtype == torch.float32
    wanted = torch.full((48, 48), -64.0)
    wanted[3, 32:] = -32.0
    assert torch.equal(floats, wanted)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf"), 0.0, -1.0])
def test_scale_that_is_none_is_refused_when_read(folder: Path, scale: float) -> None:
    save_int8(folder, scale)
    checkpoint = SafetensorsCheckpoint(folder)
    for read in (checkpoint.read, checkpoint.read_int8):
        with pytest.raises(CheckpointError, match=rf"{Q_PROJ}_scale' holds {scale}; scales are"):
            read(Q_PROJ)


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        (Q_PROJ, torch.ones(48, 48), "is F32; supported here: I8"),
        (f"{Q_PROJ}_scale", torch.ones(48, 3), "has shape [48, 3]"),
        (f"{Q_PROJ}_scale", torch.ones(48, 2).half(), "is F16; supported here: F32"),
        (f"{Q_PROJ}_scale", None, f"tensor '{Q_PROJ}_scale' is missing"),
    ],
)
def test_int8_folder_must_hold_what_its_config_says(
    folder: Path, name: str, tensor: torch.Tensor | None, says: str
) -> None:
    save_int8(folder, 0.5)
    checkpoint = SafetensorsCheckpoint(folder)
    tensors = {key: checkpoint._files[key].get_tensor(key).clone() for key in checkpoint._files}
    changed: dict[str, torch.Tensor | None] = {**tensors, name: tensor}
    save_file({key: t for key, t in changed.items() if t is not None}, folder / SINGLE)
    assert says in refusal(folder).message


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_of_header_or_config_is_an_error_of_ours_or_none(
    folder: Path, data: st.DataObject
) -> None:
    path = folder / data.draw(st.sampled_from([SINGLE, "config.json"]))
    good = path.read_bytes()
    spoilt = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, min(len(good), 1800) - 1))
        spoilt[place] = data.draw(st.sampled_from(b'0179{}[]",:.-eEnx \x00\x80\xff'))
    path.write_bytes(spoilt)
    try:
        checkpoint = SafetensorsCheckpoint(folder)
        for name in tensor_shapes(checkpoint.config):
            checkpoint.read(name)
    except RooflineError as error:
        assert str(folder) in error.message and "\n" not in error.message
    finally:
        path.write_bytes(good)
