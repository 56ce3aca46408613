import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from roofline.errors import CheckpointError
from roofline.models.checkpoints.generation_config import (
    GenerationConfig,
    generation_config_json,
    gguf_generation_config,
    read_generation_config,
)
from roofline.request import SamplingParams

VOCAB = 100
FIELDS = {
    "temperature": 0.6,
    "top_p": 0.9,
    "top_k": 20,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
    "max_new_tokens": 50,
}
SAMPLING = {name: value for name, value in FIELDS.items() if name != "max_new_tokens"}


def read(folder: Path, fields: Any) -> GenerationConfig:
    path = folder / "generation_config.json"
    path.write_text(fields if isinstance(fields, str) else json.dumps(fields))
    return read_generation_config(path, VOCAB)


def test_sampling_fields_are_those_of_sampling_params(tmp_path: Path) -> None:
    more = {"eos_token_id": [7, 2, 7], "transformers_version": "5", "_from_model_config": True}
    found = read(tmp_path, FIELDS | more | {"do_sample": True, "pad_token_id": 0})
    assert found == GenerationConfig((7, 2), SAMPLING | {"max_tokens": 50})
    assert SamplingParams(**found.sampling).max_tokens == 50


def test_what_is_absent_or_null_says_nothing(tmp_path: Path) -> None:
    assert read(tmp_path, {}) == GenerationConfig()
    assert read(tmp_path, dict.fromkeys(FIELDS) | {"do_sample": None}) == GenerationConfig()
    assert read(tmp_path, {"eos_token_id": 3}) == GenerationConfig((3,))


@pytest.mark.parametrize("temperature", [{}, {"temperature": 0.7}])
def test_without_sampling_the_temperature_is_0(tmp_path: Path, temperature: dict[str, Any]) -> None:
    found = read(tmp_path, temperature | {"do_sample": False, "top_p": 0.5})
    assert found.sampling == {"temperature": 0.0, "top_p": 0.5}


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"temperature": -1}, "temperature is -1; it must be a number from 0 to 100"),
        ({"temperature": "hot"}, "temperature is 'hot'; it must be a number"),
        ({"temperature": True}, "temperature is True; it must be a number"),
        ('{"temperature": NaN}', "temperature is nan; it must be a number"),
        ('{"temperature": 1e-9}', "temperature is 1e-09; it must be 0 (greedy) or at least"),
        ({"top_p": 0}, "top_p is 0; it must be a number above 0"),
        ({"top_p": [0.9]}, "top_p is [0.9]; it must be a number from 0 to 1"),
        ({"top_k": 1.5}, "top_k is 1.5; it must be an integer from -1"),
        ({"min_p": 2}, "min_p is 2; it must be a number from 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; it must be a number"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be an integer from 1"),
        ({"do_sample": 1}, "do_sample is 1; it must be true or false"),
        ({"eos_token_id": VOCAB}, "eos_token_id is 100; it must be ids of the vocabulary, 0 to 99"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id is [1, '2']"),
        ("{", "not valid JSON"),
        ("[]", "holds a JSON list, not an object"),
        ('{"top_p": 1, "top_p": 0.5}', "duplicate key 'top_p'"),
    ],
    ids=str,
)
def test_a_bad_value_is_refused_with_file_and_field(
    tmp_path: Path, fields: Any, problem: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, fields)
    assert caught.value.message.startswith(f"{tmp_path / 'generation_config.json'}: ")
    assert problem in caught.value.message
    assert "\n" not in caught.value.message


def test_sampling_of_a_gguf_is_under_its_own_keys() -> None:
    metadata = {
        "general.sampling.temp": 0.5,
        "general.sampling.top_p": 0.75,
        "general.sampling.top_k": 20,
        "general.sampling.min_p": 0.0,
        "general.sampling.penalty_repeat": 1.5,
        "general.sampling.mirostat": 0,
        "general.name": "x",
        "tokenizer.ggml.eos_token_id": 5,
    }
    expected = dict(temperature=0.5, top_p=0.75, top_k=20, min_p=0.0, repetition_penalty=1.5)
    assert gguf_generation_config(metadata, "m.gguf") == GenerationConfig((), expected)
    assert gguf_generation_config({}, "m.gguf") == GenerationConfig()


@pytest.mark.parametrize("value", [-1.0, math.nan, "warm", True, np.zeros(3), ["a"]], ids=str)
def test_a_bad_value_of_a_gguf_is_refused_with_file_and_key(value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"^m.gguf: general\.sampling\.temp is .*; it must"):
        gguf_generation_config({"general.sampling.temp": value}, "m.gguf")


@pytest.mark.parametrize(
    "sampling",
    [{}, SAMPLING | {"max_tokens": 50}, {"temperature": 0.0}, {"temperature": 0.0, "top_k": 5}],
)
def test_what_is_written_is_read_again(tmp_path: Path, sampling: dict[str, Any]) -> None:
    assert read(tmp_path, generation_config_json(sampling)).sampling == sampling
