import json
from pathlib import Path
from typing import Any

import pytest

from roofline import LLM
from roofline.budget import plan_rank
from roofline.cli.fit import Plan, fit
from roofline.config import PRESETS, EngineConfig, ParallelConfig
from roofline.errors import CapacityError, UnsupportedError, UsageError
from tests.tiny_model import CONTEXT, write_tiny_model

SIZES = ("weights", "scales", "kv", "activations")


def fit_json(capsys: pytest.CaptureFixture[str], model: str, **options: Any) -> dict[str, Any]:
    fit(model, json=True, **options)
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and err == ""
    return json.loads(out)


def plan(name: str, tensor: int = 1, pipeline: int = 1, **options: Any) -> Plan:
    parallel = ParallelConfig(tensor, pipeline)
    return Plan.of(PRESETS[name], {}, EngineConfig(**options), parallel)


def assert_equals_the_engine(
    capsys: pytest.CaptureFixture[str], model: str, load_format: str, **options: Any
) -> None:
    (rank,) = fit_json(capsys, model, **options)["ranks"]
    defaults = {"max_num_seqs": 1}
    with LLM(model, load_format=load_format, **{**defaults, **options}) as llm:
        assert {name: rank[name] for name in SIZES} == llm.storage_bytes()
    assert rank["total"] == sum(rank[name] for name in SIZES)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_seqs": 3, "max_model_len": 100, "block_size": 7, "max_num_batched_tokens": 64},
        {"quantization": "none", "dtype": "float32"},
        {"group_size": 32},
        {"group_size": "channel"},
    ],
)
def test_fit_is_byte_for_byte_the_engines_storages(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_tiny_model(tmp_path)
    assert_equals_the_engine(capsys, str(model), "auto", **options)


def test_fit_takes_the_sizes_of_a_file_of_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "serving.json"
    path.write_text('{"max_num_seqs": 5, "tensor_parallel_size": 2, "temperature": 0.7}')
    found = fit_json(capsys, "llama-110m", config=str(path))
    assert found == fit_json(capsys, "llama-110m", max_num_seqs=5, tensor_parallel_size=2)


def test_fit_is_byte_for_byte_a_dummy_llama_110m(capsys: pytest.CaptureFixture[str]) -> None:
    assert_equals_the_engine(capsys, "llama-110m", "dummy", max_num_seqs=4)


def test_llama_8b_in_int8_is_as_large_as_promised(capsys: pytest.CaptureFixture[str]) -> None:
    report = fit_json(capsys, "llama-3.1-8b")
    (rank,) = report["ranks"]
    assert report["parameters"] == 8_030_261_248
    assert report["max_model_len"] == 131_072
    assert rank["weights"] + rank["scales"] == pytest.approx(8.03e9 * (1 + 4 / 128), rel=1e-3)
    (floats,) = fit_json(capsys, "llama-3.1-8b", quantization="none")["ranks"]
    assert floats["weights"] == pytest.approx(16.06e9, rel=1e-3)
    assert floats["scales"] == 0


@pytest.mark.parametrize(
    ("tensor", "pipeline"), [(2, 1), (3, 2), (8, 1), (12, 3), (32, 16), (5, 7)]
)
def test_ranks_of_any_number_hold_the_whole_model_between_them(tensor: int, pipeline: int) -> None:
    model = PRESETS["llama-3.2-1b"]
    ranks = plan("llama-3.2-1b", tensor, pipeline, max_model_len=4096, max_num_seqs=4).ranks
    assert len(ranks) == tensor * pipeline
    matrices = sum(m.rows * m.columns for _, b in ranks for m in b.model.matrices())
    embedding = model.vocab_size * model.hidden_size
    whole = sum(m.rows * m.columns for m in plan("llama-3.2-1b").ranks[0][1].model.matrices())
    shared = tensor - model.num_kv_heads  # ranks beyond the KV heads hold a second copy of one
    copies = max(0, shared) * 2 * model.head_dim * model.hidden_size * model.num_layers
    assert matrices == whole + copies + (embedding if pipeline > 1 else 0)


def test_more_ranks_than_work_is_refused_with_the_most(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=r"tensor_parallel_size 33 is too many.*the most is 32"):
        fit("llama-3.2-1b", tensor_parallel_size=33)
    with pytest.raises(UsageError, match="pipeline_parallel_size 17 is more than the model's 16"):
        fit("llama-3.2-1b", pipeline_parallel_size=17)
    ranks = fit_json(capsys, "llama-3.2-1b", pipeline_parallel_size=16)["ranks"]
    assert [rank["pipeline_stage"] for rank in ranks] == list(range(16))


@pytest.mark.parametrize("memory_gib", [2, 3, 6, 24])
def test_what_fits_is_the_largest_that_does(memory_gib: int) -> None:
    memory = memory_gib << 30
    planned = plan("llama-3.2-1b", max_num_seqs=2, max_model_len=20_000)

    def total(length: int, sequences: int) -> int:
        tokens = max(512, sequences)
        options = {"max_model_len": length, "max_num_batched_tokens": tokens}
        config = EngineConfig(max_num_seqs=sequences, **options)
        return plan_rank(planned.model, config, planned.ranks[0][0], {}, 1 << 62).total_bytes

    found = planned.fitting(memory)
    length, sequences = found["max_model_len"], found["max_num_seqs"]
    assert found["fits"] == (total(20_000, 2) <= memory)
    assert total(length, 2) <= memory
    assert length == planned.model.max_position or total(length + 1, 2) > memory
    assert total(20_000, sequences) <= memory if sequences else total(20_000, 1) > memory
    assert total(20_000, sequences + 1) > memory


def test_nothing_fits_into_too_little(capsys: pytest.CaptureFixture[str]) -> None:
    memory = fit_json(capsys, "llama-3.1-8b", memory="1GB")["memory"]
    assert memory == {"bytes": 10**9, "fits": False, "max_model_len": 0, "max_num_seqs": 0}


@pytest.mark.parametrize(
    ("text", "size"),
    [("24", 24 << 30), ("1.5", 3 << 29), ("80GB", 80 * 10**9), ("500 MiB", 500 << 20), ("7b", 7)],
)
def test_memory_is_read_with_its_unit(
    text: str, size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit_json(capsys, "llama-110m", memory=text)["memory"]["bytes"] == size


@pytest.mark.parametrize("text", ["", "many", "5q", "-1", "0", "1..2", "nan", "GB", "1e9"])
def test_memory_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"--memory is"):
        fit("llama-110m", memory=text)


@pytest.mark.parametrize("text", ["", "fast", "-1", "0", "nan", "inf"])
def test_bandwidth_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"--bandwidth is .* above 0, in GB/s"):
        fit("llama-110m", bandwidth=text)


def test_speed_is_bandwidth_over_the_bytes_of_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    report = fit_json(capsys, "llama-110m", bandwidth="100", max_num_seqs=4, max_model_len=512)
    (rank,) = report["ranks"]
    read = rank["weights"] + rank["scales"] + rank["kv"] / 2  # tied: the embedding is the head
    assert report["speed"]["bytes_per_step"] == read
    assert report["speed"]["tokens_per_s"] == pytest.approx(4 * 100e9 / read)


def test_an_embedding_that_is_only_looked_up_costs_no_bandwidth() -> None:
    model = PRESETS["llama-3.1-8b"]
    table = model.vocab_size * model.hidden_size
    table += table // 128 * 4  # scales
    one, two = plan("llama-3.1-8b"), plan("llama-3.1-8b", pipeline=2)
    (rank,) = one.report()["ranks"]
    assert (
        one.speed(1)["bytes_per_step"] == rank["weights"] + rank["scales"] - table + rank["kv"] / 2
    )
    assert two.speed(1)["bytes_per_step"] == one.speed(1)["bytes_per_step"]  # stages add up
    tied = plan("llama-3.2-1b").speed(1)["bytes_per_step"]
    assert plan("llama-3.2-1b", pipeline=2).speed(1)["bytes_per_step"] == tied


def test_tensor_parallel_ranks_read_at_the_same_time() -> None:
    alone, eight = plan("llama-3.1-8b").speed(800), plan("llama-3.1-8b", 8).speed(800)
    assert 7.5 < eight["tokens_per_s"] / alone["tokens_per_s"] <= 8


def test_the_context_of_a_folder_is_its_models_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit_json(capsys, str(write_tiny_model(tmp_path)))["max_model_len"] == CONTEXT


def test_the_environment_is_heard(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ROOFLINE_TENSOR_PARALLEL_SIZE", "2")
    monkeypatch.setenv("ROOFLINE_MAX_NUM_SEQS", "5")
    report = fit_json(capsys, "llama-110m", max_num_seqs=6)
    assert (len(report["ranks"]), report["max_num_seqs"]) == (2, 6)
    assert fit_json(capsys, "llama-110m")["max_num_seqs"] == 5


def test_bad_options_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"group_size 48 is not supported"):
        fit("llama-110m", group_size=48)
    with pytest.raises(UsageError, match="unknown option 'max_modle_len'"):
        fit("llama-110m", max_modle_len=1)
    with pytest.raises(UsageError, match=r"did you mean 'llama-3.1-8b'"):
        fit("llama-3.1-8")
    with pytest.raises(CapacityError, match="KV cache"):
        fit("llama-110m", kv_cache_memory_bytes=1000)


def test_a_person_gets_a_table_and_two_answers(capsys: pytest.CaptureFixture[str]) -> None:
    fit("llama-3.1-70b", memory="80", bandwidth="3350", tensor_parallel_size=2)
    out = capsys.readouterr().out
    assert "70,553,706,496 parameters, 1 x 131,072 tokens of context" in out
    assert "0/0" in out and "0/1" in out and "35.3 GB" in out
    assert "a rank: fits; the most is" in out
    assert "3350 GB/s a rank: up to" in out
    assert max(map(len, out.splitlines()[1:6])) <= 80


def test_a_pool_of_given_size_and_the_question_what_fits_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="drop --kv-cache-memory-bytes"):
        fit("llama-110m", memory="1", kv_cache_memory_bytes=1_000_000_000)
