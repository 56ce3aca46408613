import dataclasses
import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from roofline.config import CHANNEL, PRESETS, ModelConfig, RopeScaling, WeightFormat
from roofline.errors import CheckpointError, RooflineError, UnsupportedError
from roofline.models.checkpoints.hf_config import read_config, write_config
from roofline.models.checkpoints.tensors import matrix_shapes
from roofline.models.families import FAMILIES

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 200,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
}
OURS = {"quant_method": "roofline", "bits": 8, "group_size": 64, "symmetric": True}
FULL, SLIDING = "full_attention", "sliding_attention"
QWEN2: dict[str, Any] = {
    "model_type": "qwen2",
    "use_sliding_window": True,
    "sliding_window": 64,
    "max_window_layers": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.fixture
def cheaply() -> Iterator[None]:
    """Whatever a file says, refusing it takes no time and no memory to speak of."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.thread_time()
    yield
    assert time.thread_time() - started < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - kilobytes < 300_000


def written(folder: Path, text: str | bytes) -> Path:
    (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def config_of(folder: Path, **changes: Any) -> ModelConfig:
    return read_config(written(folder, json.dumps(LLAMA | changes)))[0]


def refusal(folder: Path, text: str | bytes) -> RooflineError:
    with pytest.raises(RooflineError) as caught:
        read_config(written(folder, text))
    message = caught.value.message
    assert str(folder / "config.json") in message and "\n" not in message
    return caught.value


def test_fields_land_where_they_belong(tmp_path: Path) -> None:
    assert config_of(tmp_path) == ModelConfig(
        hidden_size=96,
        intermediate_size=160,
        num_layers=2,
        num_heads=6,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=200,
        max_position=512,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        eos_token_ids=(2,),
    )


def test_stated_head_dim_wins_over_the_hidden_size(tmp_path: Path) -> None:
    assert config_of(tmp_path, head_dim=32).head_dim == 32
    assert config_of(tmp_path, head_dim=32, num_attention_heads=10).query_size == 320


def test_null_fields_count_as_absent(tmp_path: Path) -> None:
    nulls = dict.fromkeys(
        ["head_dim", "num_key_value_heads", "rope_scaling", "sliding_window", "bos_token_id"]
    )
    found = config_of(tmp_path, **nulls, attention_bias=None, quantization_config=None)
    assert (found.head_dim, found.num_kv_heads, found.rope_scaling) == (16, 6, None)


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"model_type": "mistral", "sliding_window": 64}, 64),
        ({"model_type": "mistral", "sliding_window": 64, "layer_types": [SLIDING] * 2}, 64),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "mistral"}, 4096),
        ({"layer_types": [FULL, FULL]}, None),
        (QWEN2, 64),
        (QWEN2 | {"max_window_layers": 2}, None),
        (QWEN2 | {"max_window_layers": 28, "layer_types": [SLIDING] * 2}, 64),
        (QWEN2 | {"layer_types": [FULL] * 2}, None),
        (QWEN2 | {"use_sliding_window": False, "layer_types": [FULL] * 2}, None),
        ({"model_type": "qwen2", "sliding_window": 64, "max_window_layers": 1}, None),
        ({"model_type": "qwen3", "use_sliding_window": True}, None),  # 28 layers without one
    ],
)
def test_sliding_window_is_that_of_all_layers(
    tmp_path: Path, changes: dict[str, Any], window: int | None
) -> None:
    assert config_of(tmp_path, **changes).sliding_window == window


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_config_leaves_out_is_what_transformers_makes_of_it(
    tmp_path: Path, family: str
) -> None:
    theirs: Any = AutoConfig.for_model(family, **SHORT)
    ours = read_config(written(tmp_path, json.dumps(SHORT | {"model_type": family})))[0]
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert (ours.num_kv_heads, ours.head_dim) == (theirs.num_key_value_heads, head_dim)
    assert ours.max_position == theirs.max_position_embeddings
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert (ours.rms_norm_eps, ours.architecture) == (theirs.rms_norm_eps, family)


SHORT = {
    "hidden_size": 1024,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "vocab_size": 200,
}


def test_a_bias_that_the_family_has_may_be_stated(tmp_path: Path) -> None:
    assert config_of(tmp_path, model_type="qwen2", attention_bias=True).qkv_bias


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_theta": 1.0, "rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
        {"rope_theta": 500000, "rope_scaling": {**LLAMA3, "type": "ignored beside rope_type"}},
    ],
)
def test_llama3_rope_is_read_as_old_and_new_transformers_write_it(
    tmp_path: Path, rope: dict[str, Any]
) -> None:
    found = config_of(tmp_path, **rope)
    assert found.rope_theta == 5e5
    assert found.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize("name", ["rope_type", "type"])
def test_linear_rope_is_read_under_both_its_names(tmp_path: Path, name: str) -> None:
    found = config_of(tmp_path, rope_scaling={name: "linear", "factor": 4})
    assert found.rope_scaling == RopeScaling("linear", 4.0)


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope", "proportional", None, 7, ["x"]])
def test_unknown_rope_type_is_named(tmp_path: Path, kind: Any) -> None:
    text = json.dumps(LLAMA | {"rope_scaling": {"rope_type": kind, "factor": 2.0}})
    error = refusal(tmp_path, text)
    assert isinstance(error, UnsupportedError)
    assert f"rope_type {kind!r} is not supported; supported: default, linear" in error.message


def test_remote_code_is_neither_imported_nor_minded(tmp_path: Path) -> None:
    marker = tmp_path / "was_imported"
    (tmp_path / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w')")
    config_of(tmp_path, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    assert not marker.exists()
    assert "modeling_evil" not in sys.modules


@pytest.mark.usefixtures("cheaply")
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": -96}, "hidden_size is -96"),
        ({"hidden_size": 96.0}, "hidden_size is 96.0; it must be an integer"),
        ({"hidden_size": True}, "hidden_size is True; it must be an integer"),
        ({"hidden_size": "96"}, "hidden_size is '96'; it must be an integer"),
        ({"hidden_size": None}, "no field 'hidden_size'"),
        ({"hidden_size": 6 * 10**30}, "hidden_size is 6000"),
        ({"hidden_size": 100}, "hidden_size 100 is not a multiple of num_attention_heads 6"),
        ({"num_hidden_layers": 10**9}, "num_layers is 1000000000; it must be an integer from 1"),
        ({"num_hidden_layers": 0}, "num_layers is 0"),
        ({"num_attention_heads": 0}, "num_attention_heads 0"),
        ({"num_attention_heads": 0, "head_dim": 16}, "num_heads is 0"),
        ({"num_key_value_heads": 4}, "num_heads 6 is not a multiple of num_kv_heads 4"),
        ({"num_key_value_heads": 0}, "num_kv_heads is 0"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"vocab_size": 1 << 60}, "vocab_size is 1152921504606846976"),
        ({"max_position_embeddings": []}, "max_position_embeddings is []"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; it must be a finite number"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is an integer of"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0.0; it must be a finite number above 0"),
        ({"rope_theta": float("inf")}, "rope_theta is inf; it must be a finite number"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0; it must be a finite number above 0"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; it must be an object"),
        ({"rope_scaling": {"type": "linear"}}, "no field 'factor'"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "finite factors above 0"),
        ({"rope_scaling": LLAMA3 | {"factor": float("nan")}}, "factor is nan"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor above"),
        ({"rope_parameters": {"rope_type": "factors"}}, "factors is None; it must be a list"),
        ({"rope_parameters": {"rope_type": "factors", "factors": [1, "x"]}}, "factors[1] is 'x'"),
        ({"rope_parameters": {"rope_type": "factors", "factors": [1.0]}}, "1 rope factors"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; it must be true or false"),
        ({"eos_token_id": 200}, "eos_token_id is 200; it must be ids of the vocabulary, 0 to 199"),
        ({"eos_token_id": [2, -1]}, "eos_token_id is [2, -1]"),
        ({"eos_token_id": [True]}, "eos_token_id is [True]"),
        ({"eos_token_id": [2] * 2000}, "eos_token_id is [2, 2, 2"),
        ({"bos_token_id": 200}, "special token id 200 is outside the vocabulary of 200"),
        ({"quantization_config": []}, "quantization_config is []; it must be an object"),
        ({"quantization_config": OURS | {"group_sizes": 3}}, "group_sizes is 3"),
        ({"quantization_config": OURS | {"group_sizes": {"x": 32}}}, "the model has no matrix 'x'"),
    ],
)
def test_config_that_cannot_be_is_refused_by_field(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    error = refusal(tmp_path, json.dumps(LLAMA | changes))
    assert isinstance(error, CheckpointError)
    assert says in error.message


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported; supported: llama, mistral"),
        ({"model_type": "qwen3_moe"}, "model_type 'qwen3_moe' is not supported; supported: llama"),
        ({"model_type": "mixtral"}, "model_type 'mixtral' is not supported; supported: llama"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias True is not supported"),
        (QWEN2 | {"max_window_layers": 1}, "max_window_layers 1 is not supported; supported: 0 "),
        (QWEN2 | {"layer_types": [FULL, SLIDING]}, f"layer_types ['{FULL}', '{SLIDING}'] is not"),
        (QWEN2 | {"layer_types": [SLIDING]}, f"supported: '{SLIDING}' for each of the 2 layers"),
        (QWEN2 | {"layer_types": "x"}, "layer_types 'x' is not supported"),
        (QWEN2 | {"layer_types": [SLIDING, ["x"]]}, "layer_types ['sliding_attention', ['x']]"),
        ({"model_type": "mistral", "layer_types": [FULL, FULL]}, "layer_types ['full_attention'"),
        ({"layer_types": [SLIDING, SLIDING]}, "layer_types ['sliding_attention', 'sliding_"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"model_type": ["llama"]}, "model_type ['llama'] is not supported"),
        ({"attention_bias": True}, "attention_bias True is not supported; supported: false"),
        ({"attention_bias": 0}, "attention_bias 0 is not supported"),
        ({"mlp_bias": True}, "mlp_bias True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported: \"silu\""),
        ({"sliding_window": 4096}, "sliding_window 4096 is not supported; supported: null"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method 'gptq' is not supported"),
        ({"quantization_config": {}}, "quant_method None is not supported"),
        ({"quantization_config": OURS | {"bits": 4}}, "bits 4 is not supported; supported: 8"),
        ({"quantization_config": OURS | {"bits": 8.0}}, "bits 8.0 is not supported"),
        ({"quantization_config": OURS | {"symmetric": 1}}, "symmetric 1 is not supported"),
        ({"quantization_config": OURS | {"group_size": 48}}, "group_size 48 is not supported"),
        ({"quantization_config": OURS | {"group_size": 128.0}}, "group_size 128.0 is not"),
        ({"quantization_config": OURS | {"group_size": None}}, "group_size None is not supported"),
    ],
)
def test_what_is_not_done_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    error = refusal(tmp_path, json.dumps(LLAMA | changes))
    assert isinstance(error, UnsupportedError)
    assert says in error.message


@pytest.mark.usefixtures("cheaply")
@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1, 2]", "holds a JSON list, not an object"),
        (b"\xff\xfe{}", "not valid JSON ('utf-8' codec"),
        (b'{"a": 1, "a": 2}', "duplicate key 'a'"),
        (b'{"a": [{"b": 1, "b": 1}]}', "duplicate key 'b'"),
        (b"[" * 200_000, "maximum recursion depth"),
        (b'{"a": ' + b"9" * 5000 + b"}", "4300 digits"),
        (b'{"a": 1} x', "Extra data"),
        (b" " * ((8 << 20) + 1), "too large for JSON; the limit is 8,388,608 bytes"),
        (b'{"a": [' + b"{}," * (2_700_000) + b"{}]}", "model_type None"),
        (b'{"model_type": ' + b"[" * 900 + b"]" * 900 + b"}", "model_type [[[[["),
    ],
)
def test_json_that_is_none_names_its_file(tmp_path: Path, text: bytes, says: str) -> None:
    assert says in refusal(tmp_path, text).message


def test_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json: no such file"):
        read_config(tmp_path)


CONFIGS = [
    *PRESETS.values(),
    dataclasses.replace(PRESETS["llama-110m"], rope_scaling=RopeScaling("linear", 2.5)),
    dataclasses.replace(PRESETS["llama-110m"], rope_factors=(1.5, 2.0) * 16),
    dataclasses.replace(
        PRESETS["llama-110m"], head_dim=80, bos_token_id=0, eos_token_ids=(0, 31999)
    ),
    *(
        dataclasses.replace(
            PRESETS["llama-110m"],
            architecture=family.model_type,
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            sliding_window=window,
        )
        for family in FAMILIES.values()
        for window in ([None] if family.window == "never" else [None, 77])
    ),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_written_config_reads_back_as_it_was(tmp_path: Path, config: ModelConfig) -> None:
    groups = dict.fromkeys(matrix_shapes(config), 128)
    written(tmp_path, write_config(config, WeightFormat(), groups))
    assert read_config(tmp_path) == (config, groups)


def test_written_factors_and_scaling_give_the_same_frequencies(tmp_path: Path) -> None:
    both = dataclasses.replace(
        PRESETS["llama-110m"],
        rope_factors=(1.5, 2.0) * 16,
        rope_scaling=RopeScaling("linear", 4.0),
    )
    groups = dict.fromkeys(matrix_shapes(both), 128)
    written(tmp_path, write_config(both, WeightFormat(), groups))
    read, _ = read_config(tmp_path)
    assert read.rope_frequencies() == pytest.approx(both.rope_frequencies(), rel=1e-15)


def written_quantization(folder: Path, size: Any, groups: dict[str, int]) -> dict[str, Any]:
    """What is written for groups of the 110M preset, having checked that it reads back."""
    config = PRESETS["llama-110m"]
    text = write_config(config, WeightFormat(group_size=size), groups)
    assert read_config(written(folder, text)) == (config, groups)
    return json.loads(text)["quantization_config"]


def test_exceptions_are_written_only_where_a_matrix_keeps_its_own_groups(tmp_path: Path) -> None:
    shapes = matrix_shapes(PRESETS["llama-110m"])
    mixed = dict.fromkeys(shapes, 128) | {"model.embed_tokens.weight": 32}
    assert written_quantization(tmp_path, "auto", mixed) == OURS | {
        "group_size": 128,
        "group_sizes": {"model.embed_tokens.weight": 32},
    }
    all_native = dict.fromkeys(shapes, 32)
    assert written_quantization(tmp_path, "auto", all_native) == OURS | {"group_size": 32}
    channels = {name: columns for name, (_, columns) in shapes.items()}
    for size in (CHANNEL, "auto"):
        found = written_quantization(tmp_path, size, channels)
        assert found == OURS | {"group_size": CHANNEL}
