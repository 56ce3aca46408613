import math
import os
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from roofline.config import RopeScaling
from roofline.errors import CheckpointError, RooflineError, UnsupportedError
from roofline.models.checkpoints.gguf_checkpoint import GGUFCheckpoint
from roofline.models.families import FAMILIES

Array = NDArray[np.float32]
Metadata = dict[str, object]
Tensors = dict[str, tuple[Array, str]]  # values and the type they are stored as

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCAB = 64, 96, 4, 2, 16, 2, 40
SHAPES = {
    "attn_norm": (HIDDEN,),
    "attn_q": (HEADS * HEAD_DIM, HIDDEN),
    "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_output": (HIDDEN, HEADS * HEAD_DIM),
    "ffn_norm": (HIDDEN,),
    "ffn_gate": (FFN, HIDDEN),
    "ffn_up": (FFN, HIDDEN),
    "ffn_down": (HIDDEN, FFN),
}
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
K_PROJ = "model.layers.1.self_attn.k_proj.weight"


def metadata(**changes: object) -> Metadata:
    """A tiny model's metadata; a change of `a__b` is of key `llama.a.b`, None takes it away."""
    keys: Metadata = {
        "general.architecture": "llama",
        "llama.block_count": LAYERS,
        "llama.context_length": 512,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": FFN,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 50000.0,
        "llama.rope.dimension_count": HEAD_DIM,
        "llama.vocab_size": VOCAB,
    }
    keys |= {f"llama.{name.replace('__', '.')}": value for name, value in changes.items()}
    return {key: value for key, value in keys.items() if value is not None}


def tensors(type_name: str = "F32", seed: int = 0) -> Tensors:
    """A tiny tied model's tensors: matrices as `type_name`, norms as F32."""
    rng = np.random.default_rng(seed)
    shapes = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for i in range(LAYERS):
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in SHAPES.items()}
    return {
        name: (
            rng.standard_normal(shape).astype(np.float32),
            type_name if len(shape) == 2 else "F32",
        )
        for name, shape in shapes.items()
    }


def save(directory: Path, keys: Metadata, contents: Tensors) -> Path:
    path = directory / "tiny.gguf"
    writer = gguf.GGUFWriter(path, str(keys["general.architecture"]))
    for key, value in keys.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case list():
                writer.add_array(key, value)
            case str() if key != "general.architecture":  # the writer wrote that
                writer.add_string(key, value)
    for name, (values, type_name) in contents.items():
        kind = gguf.GGMLQuantizationType[type_name]
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def interleaved(rows: Array, heads: int) -> Array:
    """Reorder half-split rows as `LlamaModel.permute` of llama.cpp's converter does."""
    pairs = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def test_config_is_read_from_the_metadata(tmp_path: Path) -> None:
    config = GGUFCheckpoint(save(tmp_path, metadata(), tensors())).config
    assert (config.hidden_size, config.intermediate_size) == (HIDDEN, FFN)
    assert (config.num_layers, config.vocab_size) == (LAYERS, VOCAB)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (HEADS, KV_HEADS, HEAD_DIM)
    assert (config.max_position, config.rope_theta) == (512, 50000.0)
    assert config.rms_norm_eps == float(np.float32(1e-5))
    assert (config.rope_scaling, config.rope_factors) == (None, None)
    assert config.tie_word_embeddings
    assert (config.bos_token_id, config.eos_token_ids) == (None, ())


def test_config_defaults_are_those_of_the_format(tmp_path: Path) -> None:
    contents = tensors()
    for i in range(LAYERS):
        for name in ("attn_k", "attn_v"):
            contents[f"blk.{i}.{name}.weight"] = contents[f"blk.{i}.attn_q.weight"]
    keys = metadata(
        attention__head_count_kv=None,
        rope__freq_base=None,
        vocab_size=None,
        rope__dimension_count=None,
    )
    config = GGUFCheckpoint(save(tmp_path, keys, contents)).config
    assert (config.num_kv_heads, config.rope_theta, config.vocab_size) == (HEADS, 10000.0, VOCAB)


def test_heads_may_be_wider_than_the_hidden_size_deals_out(tmp_path: Path) -> None:
    keys = metadata(
        attention__head_count=2,
        attention__head_count_kv=1,
        attention__key_length=32,
        attention__value_length=32,
        rope__dimension_count=32,
    )
    assert GGUFCheckpoint(save(tmp_path, keys, tensors())).config.head_dim == 32


def test_every_eos_id_the_file_names_is_kept_once(tmp_path: Path) -> None:
    keys = metadata()
    for name, token in {"bos": 1, "eos": 7, "eot": 9, "eom": 7}.items():
        keys[f"tokenizer.ggml.{name}_token_id"] = token
    config = GGUFCheckpoint(save(tmp_path, keys, tensors())).config
    assert (config.bos_token_id, config.eos_token_ids) == (1, (7, 9))


def test_a_llama_file_with_a_window_is_a_mistral(tmp_path: Path) -> None:
    for window, found in ((4096, ("mistral", 4096)), (0, ("llama", None))):
        keys = metadata(attention__sliding_window=window)
        config = GGUFCheckpoint(save(tmp_path, keys, tensors())).config
        assert (config.architecture, config.sliding_window) == found


def test_a_window_is_refused_where_the_family_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = {name: family for name, family in FAMILIES.items() if name != "mistral"}
    monkeypatch.setattr("roofline.models.families.FAMILIES", others)
    path = save(tmp_path, metadata(attention__sliding_window=64), tensors())
    with pytest.raises(UnsupportedError, match=r"llama\.attention\.sliding_window 64 is not"):
        GGUFCheckpoint(path)


@pytest.mark.parametrize(
    ("changes", "scaling"),
    [
        ({"rope__scaling__type": "none", "rope__scaling__factor": 4.0}, None),
        ({"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}, 4.0),
        ({"rope__scaling__factor": 4.0}, 4.0),
        ({"rope__scale_linear": 2.0}, 2.0),
        ({"rope__scaling__type": "linear", "rope__scaling__factor": 1.0}, None),
        ({"rope__scaling__type": "linear"}, None),
    ],
)
def test_linear_rope_scaling_is_read(
    tmp_path: Path, changes: Metadata, scaling: float | None
) -> None:
    config = GGUFCheckpoint(save(tmp_path, metadata(**changes), tensors())).config
    assert config.rope_scaling == (None if scaling is None else RopeScaling("linear", scaling))


def test_rope_freqs_become_the_rope_factors(tmp_path: Path) -> None:
    contents = tensors()
    factors = np.linspace(1, 8, HEAD_DIM // 2, dtype=np.float32)
    contents["rope_freqs.weight"] = (factors, "F32")
    checkpoint = GGUFCheckpoint(save(tmp_path, metadata(), contents))
    assert checkpoint.config.rope_factors == tuple(factors.tolist())
    assert not any("rope" in name for name in checkpoint.shapes())


def test_tensors_have_canonical_names_and_half_split_rotary_rows(tmp_path: Path) -> None:
    contents = tensors()
    contents["output.weight"] = (contents["token_embd.weight"][0] + 1, "F32")
    checkpoint = GGUFCheckpoint(save(tmp_path, metadata(), contents))
    assert not checkpoint.config.tie_word_embeddings
    heads = {"q_proj": HEADS, "k_proj": KV_HEADS}
    for name, gguf_name in canonical_names().items():
        found, stored = checkpoint.read(name), contents[gguf_name][0]
        for rotary, count in heads.items():
            if rotary in name:
                found = interleaved(found, count)
        np.testing.assert_array_equal(found, stored, err_msg=name)
        assert checkpoint.shapes()[name] == stored.shape
    assert set(checkpoint.shapes()) == set(canonical_names())


def canonical_names() -> dict[str, str]:
    """Hugging Face's name of every tensor of the tiny untied model, written out."""
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    for i in range(LAYERS):
        layer, block = f"model.layers.{i}", f"blk.{i}"
        names |= {
            f"{layer}.input_layernorm.weight": f"{block}.attn_norm.weight",
            f"{layer}.self_attn.q_proj.weight": f"{block}.attn_q.weight",
            f"{layer}.self_attn.k_proj.weight": f"{block}.attn_k.weight",
            f"{layer}.self_attn.v_proj.weight": f"{block}.attn_v.weight",
            f"{layer}.self_attn.o_proj.weight": f"{block}.attn_output.weight",
            f"{layer}.post_attention_layernorm.weight": f"{block}.ffn_norm.weight",
            f"{layer}.mlp.gate_proj.weight": f"{block}.ffn_gate.weight",
            f"{layer}.mlp.up_proj.weight": f"{block}.ffn_up.weight",
            f"{layer}.mlp.down_proj.weight": f"{block}.ffn_down.weight",
        }
    return names


def test_attention_scores_are_those_of_interleaved_rotation_on_the_stored_rows(
    tmp_path: Path,
) -> None:
    contents = tensors()
    checkpoint = GGUFCheckpoint(save(tmp_path, metadata(), contents))
    x = np.random.default_rng(1).standard_normal(HIDDEN)
    angles = 50000.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)  # [head_dim / 2], radians a token

    def rotated(
        rows: NDArray[np.float64], position: int, *, half_split: bool
    ) -> NDArray[np.complex128]:
        heads = (rows @ x).reshape(-1, HEAD_DIM)
        halves = np.split(heads, 2, axis=1) if half_split else (heads[:, ::2], heads[:, 1::2])
        return (halves[0] + 1j * halves[1]) * np.exp(1j * position * angles)

    def scores(q: Array, k: Array, *, half_split: bool) -> NDArray[np.float64]:
        queries = rotated(q.astype(np.float64), 5, half_split=half_split)
        keys = rotated(k.astype(np.float64), 2, half_split=half_split)
        return (queries[:, None] * keys[None].conj()).real.sum(-1)  # [heads, kv_heads]

    stored = (contents["blk.1.attn_q.weight"][0], contents["blk.1.attn_k.weight"][0])
    expected = scores(*stored, half_split=False)
    found = scores(checkpoint.read(Q_PROJ), checkpoint.read(K_PROJ), half_split=True)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert not np.allclose(scores(*stored, half_split=True), expected)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", Q_PROJ, K_PROJ])
def test_int8_rows_and_scales_are_those_of_the_dequantised_tensor(
    tmp_path: Path, name: str
) -> None:
    checkpoint = GGUFCheckpoint(save(tmp_path, metadata(), tensors("Q8_0")))
    assert checkpoint.native_groups[name] == 32
    values, scales = checkpoint.read_int8(name)
    assert (values.dtype, scales.dtype) == (np.int8, np.float32)
    rows, columns = checkpoint.shapes()[name]
    assert (values.shape, scales.shape) == ((rows, columns), (rows, columns // 32))
    product = values.reshape(rows, -1, 32) * scales[:, :, None]
    np.testing.assert_array_equal(product.reshape(rows, columns), checkpoint.read(name))


def test_only_q8_0_matrices_keep_their_groups(tmp_path: Path) -> None:
    contents = tensors("Q4_0")
    for name in ("token_embd.weight", "blk.0.ffn_norm.weight"):
        contents[name] = (contents[name][0], "Q8_0")
    checkpoint = GGUFCheckpoint(save(tmp_path, metadata(), contents))
    assert checkpoint.native_groups == {"model.embed_tokens.weight": 32}


def test_read_arrays_outlive_the_file_and_can_be_written(tmp_path: Path) -> None:
    contents = tensors()
    checkpoint = GGUFCheckpoint(save(tmp_path, metadata(), contents))
    values = checkpoint.read("model.norm.weight")
    checkpoint.close()
    values += 1
    np.testing.assert_array_equal(values, contents["output_norm.weight"][0] + 1)


def test_bytes_of_matrices_are_counted_by_type(tmp_path: Path) -> None:
    contents = tensors("Q4_0")
    contents["token_embd.weight"] = (contents["token_embd.weight"][0], "Q8_0")
    weights = LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN // 2 + 3 * HIDDEN * FFN)
    expected = {"Q4_0": weights // 32 * 18, "Q8_0": VOCAB * HIDDEN // 32 * 34}
    found = GGUFCheckpoint(save(tmp_path, metadata(), contents)).matrix_bytes
    assert list(found.items()) == list(expected.items())


def test_the_metadata_is_that_of_the_file(tmp_path: Path) -> None:
    keys = metadata() | {"tokenizer.ggml.tokens": [f"t{i}" for i in range(VOCAB)]}
    path = save(tmp_path, keys, tensors())
    checkpoint = GGUFCheckpoint(path)
    assert checkpoint.file == path
    assert checkpoint.metadata["tokenizer.ggml.tokens"] == keys["tokenizer.ggml.tokens"]


BAD_METADATA: dict[str, tuple[Metadata, str]] = {
    "another architecture": (
        {"general.architecture": "gpt2"},
        "architecture 'gpt2' is not supported; supported: llama",
    ),
    "adapter": ({"general.type": "adapter"}, "general.type is the string 'adapter'"),
    "part by metadata only": ({"split.count": 3}, "is one of 3 parts (split.count), but is not"),
    "experts": ({"llama.expert_count": 8}, "llama.expert_count is the int 8, which is not"),
    "experts of Qwen": (
        {"general.architecture": "qwen3moe"},
        "architecture 'qwen3moe' is not supported; supported: llama, qwen2, qwen3",
    ),
    "window of some layers": (
        {"llama.attention.sliding_window_pattern": 6},
        "llama.attention.sliding_window_pattern is the int 6",
    ),
    "yarn": (
        {"llama.rope.scaling.type": "yarn"},
        "llama.rope.scaling.type 'yarn' is not supported",
    ),
    "partial rotation": ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count 8 is not"),
    "value heads": ({"llama.attention.value_length": 8}, "llama.attention.value_length 8 is not"),
    "no layers": ({"llama.block_count": 0}, "num_layers is 0"),
    "10^9 layers": ({"llama.block_count": 10**9}, "num_layers is 1000000000"),
    "no heads": ({"llama.attention.head_count": 0}, "llama.attention.head_count 0"),
    "no KV heads": ({"llama.attention.head_count_kv": 0}, "num_kv_heads is 0"),
    "uneven KV heads": ({"llama.attention.head_count_kv": 3}, "not a multiple of num_kv_heads 3"),
    "heads that do not divide": ({"llama.attention.head_count": 5}, "llama.attention.head_count 5"),
    "KV heads by layer": (
        {"llama.attention.head_count_kv": [2, 2]},
        "llama.attention.head_count_kv is an array of 2 int32 numbers; it must be an integer",
    ),
    "hidden size of 0": ({"llama.embedding_length": 0}, "llama.embedding_length 0 is no positive"),
    "hidden size as text": (
        {"llama.embedding_length": "64"},
        "llama.embedding_length is the string",
    ),
    "no context": ({"llama.context_length": 0}, "max_position is 0"),
    "epsilon NaN": ({"llama.attention.layer_norm_rms_epsilon": math.nan}, "rms_norm_eps is nan"),
    "epsilon 0": ({"llama.attention.layer_norm_rms_epsilon": 0.0}, "rms_norm_eps is 0.0"),
    "epsilon missing": (
        {"llama.attention.layer_norm_rms_epsilon": None},
        "metadata key llama.attention.layer_norm_rms_epsilon is missing",
    ),
    "rope base NaN": ({"llama.rope.freq_base": math.nan}, "rope_theta is nan"),
    "rope base inf": ({"llama.rope.freq_base": math.inf}, "rope_theta is inf"),
    "rope factor NaN": ({"llama.rope.scaling.factor": math.nan}, "needs finite factors"),
    "eos out of range": ({"tokenizer.ggml.eot_token_id": VOCAB}, f"id {VOCAB} is outside"),
    "eos as text": (
        {"tokenizer.ggml.eos_token_id": "2"},
        "tokenizer.ggml.eos_token_id is the string",
    ),
    "tokens and vocabulary": (
        {"tokenizer.ggml.tokens": ["a", "b"]},
        f"llama.vocab_size is {VOCAB}, but tokenizer.ggml.tokens has 2 entries",
    ),
    "vocabulary and embedding": (
        {"llama.vocab_size": VOCAB + 1},
        f"tensor 'token_embd.weight' has shape [{VOCAB}, {HIDDEN}], "
        f"but its metadata makes that [{VOCAB + 1}, {HIDDEN}]",
    ),
    "tokens as numbers": ({"tokenizer.ggml.tokens": [1]}, "it must be an array of strings"),
    "a layer more": ({"llama.block_count": 3}, "tensors 'blk.2.attn_q.weight', "),
    "a layer less": ({"llama.block_count": 1}, "and 6 more are no part of the model"),
}


@pytest.mark.parametrize(("changes", "problem"), BAD_METADATA.values(), ids=BAD_METADATA)
def test_metadata_that_cannot_be_run_is_refused_by_name(
    tmp_path: Path, changes: Metadata, problem: str
) -> None:
    keys = {key: value for key, value in (metadata() | changes).items() if value is not None}
    path = save(tmp_path, keys, tensors())
    with pytest.raises((CheckpointError, UnsupportedError)) as caught:
        GGUFCheckpoint(path)
    assert problem in caught.value.message
    assert caught.value.message.startswith(f"{path}: ")
    assert caught.value.message.count(str(path)) == 1


@pytest.mark.parametrize(
    ("name", "shape", "problem"),
    [
        ("blk.0.ffn_up.weight", None, "tensor 'blk.0.ffn_up.weight' is missing"),
        ("token_embd.weight", None, "tensor 'token_embd.weight' is missing"),
        (
            "blk.1.attn_k.weight",
            (HEADS * HEAD_DIM, HIDDEN),
            "tensor 'blk.1.attn_k.weight' has shape [64, 64], but its metadata makes that [32, 64]",
        ),
        ("output_norm.weight", (1, HIDDEN), "has shape [1, 64], but its metadata makes that [64]"),
        ("output.weight", (VOCAB - 1, HIDDEN), "tensor 'output.weight' has shape [39, 64]"),
        ("rope_freqs.weight", (HEAD_DIM,), "tensor 'rope_freqs.weight' has shape [16]"),
        ("blk.0.attn_q.bias", (HIDDEN,), "tensor 'blk.0.attn_q.bias' is not supported"),
        ("blk.0.odd\n.weight", (4,), r"tensor 'blk.0.odd\n.weight' is no part of the model"),
    ],
)
def test_tensors_that_are_not_those_of_the_config_are_refused_by_name(
    tmp_path: Path, name: str, shape: tuple[int, ...] | None, problem: str
) -> None:
    contents = tensors()
    contents.pop(name, None)
    if shape is not None:
        contents[name] = (np.ones(shape, np.float32), "F32")
    keys = metadata(vocab_size=None)
    path = save(tmp_path, keys, contents)
    with pytest.raises((CheckpointError, UnsupportedError)) as caught:
        GGUFCheckpoint(path)
    assert caught.value.message.startswith(f"{path}: ")
    assert problem in caught.value.message


def test_a_scale_that_is_no_number_is_refused_with_its_tensor(tmp_path: Path) -> None:
    contents = tensors("Q8_0")
    contents["blk.1.attn_q.weight"][0][3, 40] = np.inf
    with np.errstate(invalid="ignore"):
        path = save(tmp_path, metadata(), contents)
    with pytest.raises(
        CheckpointError, match=r"blk\.1\.attn_q\.weight: .*row 3, group 1"
    ) as caught:
        GGUFCheckpoint(path).read_int8(Q_PROJ)
    assert caught.value.message.startswith(f"{path}: ")


def test_random_damage_is_refused_or_read_without_a_crash(tmp_path: Path) -> None:
    path = save(tmp_path, metadata(rope__scaling__factor=2.0), tensors("Q8_0"))
    valid = np.frombuffer(path.read_bytes(), np.uint8)
    header_bytes = valid.size - sum(tensor.n_bytes for tensor in gguf.GGUFReader(path).tensors)
    rng = np.random.default_rng(7)
    deadline, refused = time.monotonic() + 10, 0
    for _ in range(300):
        damaged = valid.copy()
        end = header_bytes if rng.random() < 0.9 else valid.size
        places = rng.integers(0, end, rng.integers(1, 5))
        damaged[places] ^= rng.integers(1, 256, len(places), dtype=np.uint8)
        if rng.random() < 0.2:
            damaged = damaged[: rng.integers(0, damaged.size)]
        path.write_bytes(damaged.tobytes())
        try:
            checkpoint = GGUFCheckpoint(path)
            for name in checkpoint.shapes():
                checkpoint.read(name)
            for name in checkpoint.native_groups:
                checkpoint.read_int8(name)
        except RooflineError as error:
            refused += 1
            assert error.message.startswith(f"{path}: ")
            assert error.message.isprintable()
        if time.monotonic() > deadline:
            break
    assert refused > 30


@pytest.fixture
def real_file() -> Path:
    path = os.environ.get("ROOFLINE_TEST_GGUF")
    if not path:
        pytest.skip("ROOFLINE_TEST_GGUF does not name the SmolLM2-135M GGUF file")
    return Path(path)


def test_the_real_model_is_read_as_gguf_reads_it(real_file: Path) -> None:
    checkpoint = GGUFCheckpoint(real_file)
    config = checkpoint.config
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(real_file).tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_layers)
    rotary = {"self_attn.q_proj": config.num_heads, "self_attn.k_proj": config.num_kv_heads}
    for name in checkpoint.shapes():
        tensor = stored.pop(names.get_name(name, try_suffixes=(".weight",)) or name)
        found = checkpoint.read(name)
        for piece, heads in rotary.items():
            if piece in name:
                found = interleaved(found, heads)
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(found, expected, err_msg=name)
    assert not stored
    assert checkpoint.native_groups == {"model.embed_tokens.weight": 32}
    values, scales = checkpoint.read_int8("model.embed_tokens.weight")
    product = values.reshape(*scales.shape, 32) * scales[:, :, None]
    np.testing.assert_array_equal(
        product.reshape(values.shape), checkpoint.read("model.embed_tokens.weight")
    )
