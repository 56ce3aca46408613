import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
from cyclopts import App, CycloptsError

from roofline.cli import options
from roofline.config import EngineConfig
from roofline.errors import UsageError
from roofline.request import SamplingParams

NOT_OFFERED = {
    "n",  # a command prints one answer
    "seed",  # EngineConfig's serves both
    "logit_bias",  # a map
    "allowed_token_ids",  # too many for a line
    "logprobs",  # no figure of an answer
    "prompt_logprobs",
    "skip_special_tokens",
    "structured_outputs",  # an object
    "include_stop_str_in_output",
}

VALUES = {  # option: text, value
    "revision": ("v1.0", "v1.0"),
    "load_format": ("dummy", "dummy"),
    "tokenizer": ("a folder/1", "a folder/1"),
    "chat_template": ("{{ 1 }}", "{{ 1 }}"),
    "generation_config": ("none", "none"),
    "rotary_order": ("half-split", "half-split"),
    "device": ("cuda:1", "cuda:1"),
    "kv_cache_dtype": ("int8", "int8"),
    "prefill_weights": ("int8", "int8"),
    "group_size": ("64", 64),
    "max_model_len": ("auto", "auto"),
    "max_num_seqs": ("7", 7),
    "enable_prefix_caching": ("false", False),
    "gpu_memory_utilization": ("0.25", 0.25),
    "kv_cache_memory_bytes": ("1000000", 1_000_000),
    "seed": ("18446744073709551615", 2**64 - 1),
}

REFUSED = {
    "revision": "",
    "load_format": "pickle",
    "tokenizer": "",
    "generation_config": "",
    "rotary_order": "interleave",
    "dtype": "half",
    "device": "",
    "group_size": "many",
    "max_model_len": "0",
    "max_num_seqs": "1.5",
    "gpu_memory_utilization": "nan",
    "threads": "",
}


def given_on(command_line: list[str]) -> dict[str, Any]:
    """What a command with all options receives."""
    received: dict[str, Any] = {}

    @options.accepts(options.sampling_options({}), options.engine_options())
    def command(**given: Any) -> None:
        received.update(given)

    app = App(result_action="return_none", help_format="plaintext")
    app.default(command)
    app(command_line, exit_on_error=False, print_error=False)
    return received


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def test_options_not_given_are_absent() -> None:
    assert given_on([]) == {}


@pytest.mark.parametrize("name", VALUES)
def test_command_line_environment_and_python_agree(name: str) -> None:
    text, value = VALUES[name]
    python = EngineConfig.from_options({name: value}, {})
    assert EngineConfig.from_options({}, {f"ROOFLINE_{name.upper()}": text}) == python
    given = given_on(["--no-enable-prefix-caching"] if value is False else [flag(name), text])
    assert EngineConfig.from_options(given, {}) == python
    assert python != EngineConfig() or value == "auto"


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_value_has_the_same_refusal_at_every_door(name: str) -> None:
    with pytest.raises(UsageError) as from_python:
        EngineConfig.from_options({name: REFUSED[name]}, {})
    with pytest.raises(UsageError) as from_command_line:
        EngineConfig.from_options(given_on([flag(name), REFUSED[name]]), {})
    variable = f"ROOFLINE_{name.upper()}"
    with pytest.raises(UsageError) as from_environment:
        EngineConfig.from_options({}, {variable: REFUSED[name]})

    def wanted(caught: pytest.ExceptionInfo[UsageError]) -> str:
        return caught.value.message.partition("; ")[2]

    assert wanted(from_python) == wanted(from_command_line) == wanted(from_environment)
    assert wanted(from_python).startswith("it must be ")
    assert from_command_line.value.message.startswith(f"{name} is ")
    assert from_environment.value.message.startswith(f"{variable} is ")


def test_command_line_goes_before_environment_before_defaults() -> None:
    environ = {"ROOFLINE_MAX_NUM_SEQS": "2", "ROOFLINE_BLOCK_SIZE": "8"}
    own = {"max_num_seqs": 1, "block_size": 1, "threads": 1}
    config = EngineConfig.from_options(given_on(["--max-num-seqs", "3"]), environ, own)
    assert (config.max_num_seqs, config.block_size, config.threads) == (3, 8, 1)


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    """A file of engine and sampling options, of which a command has some."""
    path = tmp_path / "options.toml"
    path.write_text(
        "max-num-seqs = 4\nblock_size = 4\nthreads = 4\ndtype = 'float32'\n"
        "temperature = 0.5\ntop_k = 4\nmax_tokens = 4\n"
    )
    return str(path)


def test_flags_go_before_variables_before_the_file_before_the_built_in(
    config_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = {"ROOFLINE_MAX_NUM_SEQS": "2", "ROOFLINE_BLOCK_SIZE": "2"}
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    given = given_on(["--config", config_file, "--max-num-seqs", "3", "--top-k", "3"])
    sampling = SamplingParams.from_options(options.take_sampling(given))
    assert (sampling.temperature, sampling.top_k, sampling.max_tokens) == (0.5, 3, 4)
    config = EngineConfig.from_options(given, environ, {"threads": 1, "seed": 1})
    assert (config.max_num_seqs, config.block_size, config.threads) == (3, 2, 4)
    assert (config.dtype, config.seed, config.quantization) == ("float32", 1, "int8")


def test_a_command_takes_of_a_file_what_it_has(config_file: str) -> None:
    received: dict[str, Any] = {}

    @options.accepts(options.engine_options(only=("block_size", "seed")))
    def command(**given: Any) -> None:
        received.update(given)

    command(config=config_file, seed=1)
    assert received == {"block_size": 4, "seed": 1}


def test_greedy_on_the_line_leaves_out_the_files_truncation(config_file: str) -> None:
    given = given_on(["--config", config_file, "--temperature", "0"])
    assert options.take_sampling(given) == {"temperature": 0.0, "max_tokens": 4}


def test_a_file_that_cannot_be_meant_is_refused_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"tensor_parallel_size": 0}')
    with pytest.raises(UsageError, match=f"^{path}: tensor_parallel_size is 0; it must be"):
        given_on(["--config", str(path), "--tensor-parallel-size", "1"])


def test_every_engine_option_is_offered_with_its_default_and_variable(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    given_on(["--help"])
    lines = capsys.readouterr().out.splitlines()
    for field in dataclasses.fields(EngineConfig):
        (line,) = (line for line in lines if line.startswith(f"│ {flag(field.name)} "))
        assert f"[env: ROOFLINE_{field.name.upper()}]" in line
        assert field.metadata["help"] in line
        if field.default is not None:
            assert f"[default: {str(field.default).lower()}]" in line


def test_every_sampling_field_is_offered_or_left_out_on_purpose() -> None:
    offered = {parameter.name for parameter in options.sampling_options({})}
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    assert offered | NOT_OFFERED == fields
    assert not offered & NOT_OFFERED


def test_sampling_options_become_sampling_parameters() -> None:
    line = ["--temperature", "0.5", "--top-k", "-1", "--stop", "a", "--stop=--b", "--ignore-eos"]
    ids = ["--stop-token-ids", "5", "--stop-token-ids", "6"]
    given = given_on([*line, *ids, "--max-num-seqs", "4"])
    assert SamplingParams.from_options(options.take_sampling(given)) == SamplingParams(
        temperature=0.5, top_k=-1, stop=["a", "--b"], stop_token_ids=[5, 6], ignore_eos=True
    )
    assert given == {"max_num_seqs": 4}


def test_a_value_that_is_no_number_is_refused_by_the_parameters_own_words() -> None:
    with pytest.raises(UsageError, match="temperature is 'warm'; it must be a number from 0 to"):
        SamplingParams.from_options(given_on(["--temperature", "warm"]))
    with pytest.raises(UsageError, match=r"stop_token_ids\[0\] is 'x'; it must be an integer"):
        SamplingParams.from_options(given_on(["--stop-token-ids", "x"]))


def test_the_nearest_name_is_told_for_an_unknown_option() -> None:
    with pytest.raises(CycloptsError) as caught:
        given_on(["--max-modle-len", "5"])
    assert str(caught.value) == "Unknown option: --max-modle-len. Did you mean --max-model-len?"


def test_an_option_given_twice_is_refused() -> None:
    with pytest.raises(CycloptsError, match="--dtype specified multiple times"):
        given_on(["--dtype", "float32", "--dtype", "bfloat16"])


def test_a_command_keeps_its_own_parameters() -> None:
    @options.accepts(options.engine_options({"max_num_seqs": 1}, only=("max_num_seqs",)))
    def command(model: str, /, *, json: bool = False, **given: Any) -> None: ...

    assert list(inspect.signature(command).parameters) == [
        "model",
        "json",
        "config",
        "max_num_seqs",
    ]
