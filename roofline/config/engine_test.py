"""The engine's options: their bounds, their names, and how the environment gives them."""

import dataclasses
import math
from typing import Any

import pytest

from roofline.config import EngineConfig, WeightFormat, environment_options
from roofline.errors import RooflineError, UnsupportedError, UsageError

BOUNDS = {
    field.name: (field.metadata["low"], field.metadata["high"])
    for field in dataclasses.fields(EngineConfig)
    if field.metadata["low"] is not None
}
ONE_RANK = "tensor_parallel_size", "pipeline_parallel_size"


@pytest.mark.parametrize("name", BOUNDS)
def test_numbers_are_accepted_up_to_their_bounds_and_refused_beyond(name: str) -> None:
    low, high = BOUNDS[name]
    step = 1 if isinstance(low, int) else 1e-3
    for good in (low, high):
        if name in ONE_RANK and good != 1:
            continue  # planned for, but not run yet
        room: dict[str, Any] = {"max_num_seqs": 1, "max_num_batched_tokens": 4096}
        assert getattr(EngineConfig(**room | {name: good}), name) == good
    refused: list[Any] = [low - step, high + step, math.nan, math.inf, "1", True, []]
    if getattr(EngineConfig(), name) is not None:
        refused.append(None)
    for bad in refused:
        with pytest.raises(UsageError, match=f"{name} is .*; it must be .* from {low} to {high}"):
            EngineConfig(**{name: bad})


@pytest.mark.parametrize("bad", [0, 1, 100, 129, -32])
def test_an_unsupported_group_size_names_those_supported(bad: int) -> None:
    message = f"group_size {bad} is not supported; supported: 32, 64, 128, 256, channel"
    with pytest.raises(UnsupportedError, match=message):
        EngineConfig(group_size=bad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "int4"}, "quantization is 'int4'; it must be 'int8' or 'none'"),
        ({"quantization": "none", "group_size": 64}, "group_size 64 does nothing"),
        ({"quantization": "none", "activations": "int8"}, "activations .int8. does nothing"),
        ({"dtype": "half"}, "dtype is 'half'; it must be 'bfloat16' or 'float16' or 'float32'"),
        ({"device": "gpu"}, "device is 'gpu'; it must be 'auto', 'cpu', 'cuda' or 'cuda:N'"),
        ({"device": "cuda:x"}, "device is 'cuda:x'"),
        ({"device": "cuda", "cpu_isa": "avx2"}, "cpu_isa 'avx2' does nothing on device cuda"),
        ({"prefill_weights": "bfloat16", "device": "cpu"}, "does nothing on device cpu"),
        ({"prefill_weights": "bfloat16", "quantization": "none"}, "with quantization 'none'"),
        ({"prefill_weights": "bfloat16", "activations": "int8"}, "with activations 'int8'"),
        ({"prefill_weights": "bfloat16", "dtype": "float16"}, "not go with dtype float16"),
        ({"prefill_weights": "bfloat16", "deterministic": True}, "not go with deterministic"),
        ({"kv_cache_dtype": "int4"}, "kv_cache_dtype is 'int4'"),
        ({"group_size": "chanel"}, "group_size is 'chanel'; .* 'auto' or 'channel'"),
        ({"group_size": True}, "group_size is True"),
        ({"group_size": 64.0}, "group_size is 64.0"),
        ({"max_model_len": "all"}, "max_model_len is 'all'; it must be 'auto' or an integer"),
        ({"enable_prefix_caching": 1}, "enable_prefix_caching is 1; it must be true or false"),
        ({"seed": -1}, "seed is -1"),
        ({"max_num_seqs": 10**5000}, "max_num_seqs is "),
        (
            {"max_num_seqs": 9, "max_num_batched_tokens": 8},
            "8; it must be at least max_num_seqs, 9",
        ),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size 2: this version runs one rank"),
    ],
)
def test_an_option_that_cannot_be_meant_says_what_can(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        EngineConfig(**options)
    assert len(caught.value.message) < 300 and "\n" not in caught.value.message


def test_unknown_option_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"'max_num_seq'; did you mean 'max_num_seqs'\?"):
        EngineConfig.from_options({"max_num_seq": 1}, {})
    with pytest.raises(UsageError, match=r"unknown option 'zzz'; options: .*load_format, "):
        EngineConfig.from_options({"zzz": 1}, {})


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        ("GROUP_SIZE", "channel", "channel"),
        ("GROUP_SIZE", "64", 64),
        ("MAX_MODEL_LEN", "auto", "auto"),
        ("MAX_MODEL_LEN", "4096", 4096),
        ("THREADS", "2", 2),
        ("GPU_MEMORY_UTILIZATION", "0.25", 0.25),
        ("GPU_MEMORY_UTILIZATION", "1", 1.0),
        ("ENABLE_PREFIX_CACHING", "false", False),
        ("ENABLE_PREFIX_CACHING", "1", True),
        ("DTYPE", "float32", "float32"),
        ("SEED", str(2**64 - 1), 2**64 - 1),
    ],
)
def test_environment_is_read_as_the_options_type(variable: str, text: str, value: Any) -> None:
    found = EngineConfig.from_options({}, {f"ROOFLINE_{variable}": text})
    read = getattr(found, variable.lower())
    assert (read, type(read)) == (value, type(value))


def test_options_given_by_name_win_over_the_environment() -> None:
    environ = {"ROOFLINE_MAX_NUM_SEQS": "3", "ROOFLINE_SEED": "4", "ROOFLINE_TEST_DATA": "x"}
    config = EngineConfig.from_options({"max_num_seqs": 5}, environ)
    assert (config.max_num_seqs, config.seed) == (5, 4)
    assert environment_options(environ) == {"max_num_seqs": 3, "seed": 4}


@pytest.mark.parametrize(
    ("variable", "text", "wanted"),
    [
        ("MAX_NUM_SEQS", "many", "an integer from 1 to 4096"),
        ("MAX_NUM_SEQS", "1.5", "an integer from 1 to 4096"),
        ("MAX_NUM_SEQS", "0", "an integer from 1 to 4096"),
        ("MAX_NUM_SEQS", "", "an integer from 1 to 4096"),
        ("MAX_NUM_SEQS", "9" * 5000, "an integer from 1 to 4096"),
        ("GPU_MEMORY_UTILIZATION", "nan", "a number from 0.01 to 1.0"),
        ("ENABLE_PREFIX_CACHING", "maybe", "true or false"),
        ("DTYPE", "half", "'bfloat16' or 'float16' or 'float32'"),
        ("GROUP_SIZE", "33", "supported: 32, 64, 128, 256, channel"),
    ],
)
def test_a_bad_variable_is_refused_in_one_short_line(variable: str, text: str, wanted: str) -> None:
    with pytest.raises(RooflineError, match=f"(?i){variable}") as caught:
        EngineConfig.from_options({}, {f"ROOFLINE_{variable}": text})
    assert wanted in caught.value.message
    assert len(caught.value.message) < 200


def test_groups_of_a_weight_format() -> None:
    assert WeightFormat().group(576, None) == 128
    assert WeightFormat().group(576, 32) == 32
    assert WeightFormat(group_size=64).group(576, 32) == 64
    assert WeightFormat(group_size="channel").group(576, 32) == 576
    assert WeightFormat("none", 64).group(576, 32) == 0


def test_sizes_that_are_not_given_are_the_devices_own() -> None:
    def limits(**options: Any) -> tuple[float, ...]:
        return dataclasses.astuple(EngineConfig(**options).limits)

    assert limits() == limits(device="cpu") == (32, 512, 16, 0.5)
    assert limits(device="cuda:1") == limits(device="cuda") == (256, 8192, 64, 0.9)
    given = {"max_num_seqs": 3, "max_num_batched_tokens": 70, "block_size": 32}
    assert limits(device="cuda", gpu_memory_utilization=0.25, **given) == (3, 70, 32, 0.25)
    assert limits(max_num_seqs=600)[:2] == (600, 600), "there is a token for every row"


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, "bfloat16"),
        ({"dtype": "float16"}, "float16"),
        ({"kv_cache_dtype": "int8"}, "int8"),
        ({"kv_cache_dtype": "fp8", "dtype": "float32"}, "float8_e4m3fn"),
    ],
    ids=str,
)
def test_the_cache_has_the_dtype_of_the_activations_or_its_own(
    options: dict[str, Any], wanted: str
) -> None:
    assert EngineConfig(**options).kv_dtype == wanted
