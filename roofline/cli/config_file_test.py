"""What --config reads: the same options in TOML and JSON, and what it refuses."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from roofline.cli.config_file import read_config_file
from roofline.errors import UsageError

SAMPLING = ("temperature", "top_k", "stop", "stop_token_ids", "max_tokens")


def refusal(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        read_config_file(str(path), SAMPLING)
    message = caught.value.message
    assert message.isprintable() and len(message) < len(str(path)) + 300
    return message


def test_toml_and_json_give_the_same_options_whichever_way_keys_are_written(tmp_path: Path) -> None:
    toml, document = tmp_path / "a.toml", tmp_path / "a.json"
    toml.write_text(
        'tokenizer = "tok"\nmax-model-len = "auto"\ngroup_size = 64\ngpu-memory-utilization = 1\n'
        "enable-prefix-caching = false\ntemperature = 0.5\nstop = ['a', 'b']\n"
    )
    expected = {
        "tokenizer": "tok",
        "max_model_len": "auto",
        "group_size": 64,
        "gpu_memory_utilization": 1,
        "enable_prefix_caching": False,
        "temperature": 0.5,
        "stop": ["a", "b"],
    }
    document.write_text(json.dumps(expected | {"threads": None}))
    assert read_config_file(str(toml), SAMPLING) == expected
    assert read_config_file(str(document), SAMPLING) == expected | {"threads": None}


def test_an_empty_file_gives_no_option(tmp_path: Path) -> None:
    (tmp_path / "a.toml").touch()
    assert read_config_file(str(tmp_path / "a.toml"), SAMPLING) == {}


REFUSED = {
    "a wrong type": ('max_num_seqs = "3"', "max_num_seqs is '3'; it must be an integer from 1"),
    "a float": ("max-num-seqs = 3.0", "max_num_seqs is 3.0; it must be an integer"),
    "out of bounds": ("max_num_seqs = 0", "max_num_seqs is 0; it must be an integer from 1"),
    "no choice": (
        'dtype = "half"',
        "dtype is 'half'; it must be 'bfloat16' or 'float16' or 'float32'",
    ),
    "an integer for true": ("enable_prefix_caching = 1", "is 1; it must be true or false"),
    "a number for a text": ("tokenizer = 1", "tokenizer is 1; it must be a text"),
    "an empty text": ('generation_config = ""', "generation_config is ''; it must be a text"),
    "nan": ("gpu_memory_utilization = nan", "gpu_memory_utilization is nan; it must be a number"),
    "a date": ("seed = 2020-01-01", "seed is datetime.date(2020, 1, 1); it must be an integer"),
    "a list": ("seed = [1]", "seed is [1]; it must be an integer"),
    "sampling": ('temperature = "warm"', "temperature is 'warm'; it must be a number from 0"),
    "sampling's bounds": ("top_k = -2", "top_k is -2; it must be an integer from -1"),
    "sampling's lists": ("stop_token_ids = ['x']", "stop_token_ids[0] is 'x'; it must be an"),
    "unknown": ("max_num_seq = 1", "unknown option 'max_num_seq'; did you mean 'max_num_seqs'?"),
    "unknown, dashed": ("max-tokns = 1", "unknown option 'max-tokns'; did you mean 'max_tokens'?"),
    "a table": ("[engine]\nseed = 1", "unknown option 'engine'; `roofline run --help` lists them"),
    "not offered": ("logprobs = 1", "unknown option 'logprobs'; "),
    "unprintable": ('"a\\u0007\\n" = 1', r"unknown option 'a\x07\n'; "),
    "twice": ("max-num-seqs = 1\nmax_num_seqs = 2", "gives max_num_seqs twice, as 'max_num_seqs'"),
    "twice in TOML": ("seed = 1\nseed = 2", "not valid TOML (Cannot overwrite a value"),
    "no TOML": ("seed: 1", "not valid TOML ("),
    "deep": ("seed = " + "[" * 100_000, "not valid TOML ("),
    "a long number": ("seed = " + "9" * 9999, "not valid TOML ("),
    "large": ("# " + "x" * (1 << 20), "more than 1,048,576 bytes"),
}


@pytest.mark.parametrize(("text", "problem"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_meant_is_refused_with_file_and_key(
    tmp_path: Path, text: str, problem: str
) -> None:
    path = tmp_path / "a.toml"
    path.write_text(text)
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert problem in message


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b'{"seed": 1, "seed": 2}', "not valid JSON (duplicate key 'seed')"),
        (b"[1]", "holds a JSON list, not an object"),
        (b'{"seed": 1e999}', "seed is inf; it must be an integer"),
        (b"\xff", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_bad_json_is_refused_in_one_line(tmp_path: Path, data: bytes, problem: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(data)
    message = refusal(path)
    assert message.startswith(f"{path}: ") and problem in message


def test_what_is_no_file_of_options_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "a.yaml").touch()
    (tmp_path / "a.toml").write_bytes(b"\xff")
    os.mkfifo(tmp_path / "fifo.toml")
    problems: dict[Any, str] = {
        "absent.toml": "absent.toml': no such file or folder; give a file that ends in .toml or",
        "folder.toml": "not a regular file",
        "fifo.toml": "not a regular file",
        "a.yaml": "is neither TOML nor JSON by its name; give a file that ends in .toml or .json",
        "a.toml": "not valid TOML ('utf-8' codec can't decode",
        "x" * 300: "cannot be read: File name too long",
    }
    for name, problem in problems.items():
        assert problem in refusal(tmp_path / name)
