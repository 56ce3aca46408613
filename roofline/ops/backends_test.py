"""Which backend a model gets: native where it can, else the reference and a reason in one line."""

import dataclasses
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from roofline.budget import Rank, plan_model, usable_cores
from roofline.config import EngineConfig, ModelConfig
from roofline.errors import CapacityError, UsageError
from roofline.ops import backends
from roofline.ops.cpu import library
from roofline.ops.cpu.native import NativeOps, Pool
from roofline.ops.reference import ReferenceOps
from tests.native_library import open_native
from tests.threads import have_ended, thread_ids

MODEL = ModelConfig(
    hidden_size=64,
    intermediate_size=96,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=150,
    max_position=64,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    tie_word_embeddings=True,
)


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_candidates", lambda: iter(()))


def choose(model: ModelConfig = MODEL, **options: Any) -> backends.Backend:
    config = EngineConfig(**options)
    return backends.choose(config, model, plan_model(model, config.weights, Rank(), {}))


@pytest.mark.parametrize(
    ("maker", "options", "wanted"),
    [
        ("GenuineIntel", {}, "avx512"),
        ("GenuineIntel", {"activations": "int8"}, "avx512_bf16"),
        ("GenuineIntel", {"dtype": "float32"}, "avx512_bf16"),
        ("AuthenticAMD", {}, "avx512_bf16"),
    ],
)
def test_bfloat16_is_not_multiplied_as_such_where_float32_is_faster(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    maker: str,
    options: dict[str, Any],
    wanted: str,
) -> None:
    about = tmp_path / "cpuinfo"
    about.write_text(f"vendor_id\t: {maker}\n")
    monkeypatch.setattr(library, "_CPU_INFO", about)
    monkeypatch.setattr(
        library, "_isas", lambda functions: iter(("avx512_bf16", "avx512", "avx2", "portable"))
    )
    open_native()
    name, why = backends.survey(EngineConfig(device="cpu", **options))
    assert name == wanted and ("slow on this CPU" in why) == (wanted == "avx512")


def test_native_ops_are_the_choice_where_they_can_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "_CPU_INFO", tmp_path / "none")
    isas = open_native().isas
    for asked, name in (("auto", isas[0]), *((isa, isa) for isa in isas)):
        backend = choose(threads=2, cpu_isa=asked)
        arena = {"scratch": torch.zeros(9), "step": torch.zeros(4, dtype=torch.int64)}
        assert (backend.name, backend.reason) == (name, None)
        assert isinstance(backend.ops(torch.float32, arena), NativeOps)
        backend.close()


def test_the_default_is_a_thread_for_every_core_of_the_process() -> None:
    open_native()
    pools = [choose().pool, choose(threads=3).pool]
    assert [pool and pool.threads for pool in pools] == [usable_cores(), 3]


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        ({"head_dim": 8}, {}, "head_dim 8 is not a multiple of 16 up to 256"),
        ({"head_dim": 272}, {}, "head_dim 272 is not a multiple of 16 up to 256"),
        ({"num_heads": 66}, {}, "33 query heads share a KV head; at most 32 can"),
        ({}, {"block_size": 8}, "block_size 8 is not a multiple of 16"),
        ({"hidden_size": 66}, {}, "has 66 columns in groups of 128"),
        ({"intermediate_size": 72}, {}, "intermediate_size 72 is not a multiple of 16"),
        ({}, {"dtype": "float16"}, "they compute in bfloat16 and float32, not in float16"),
        (
            {},
            {"kv_cache_dtype": "int8"},
            "they keep the KV cache in the activations' dtype, not in int8",
        ),
    ],
)
def test_a_model_the_kernels_cannot_run_gets_the_reference_and_a_reason(
    change: dict[str, Any], options: dict[str, Any], reason: str
) -> None:
    isa = open_native().isa_name
    model = dataclasses.replace(MODEL, **change)
    backend = choose(model, **options)
    assert backend.name == "reference" and backend.pool is None
    assert backend.reason is not None and backend.reason.endswith(reason)
    with pytest.raises(UsageError, match=f"cpu_isa {isa} cannot be used: .*{reason}"):
        choose(model, cpu_isa=isa, **options)


def test_the_reference_asked_for_needs_no_reason(no_library: None) -> None:
    backend = choose(cpu_isa="reference")
    assert (backend.name, backend.reason) == ("reference", None)
    assert isinstance(backend.ops(torch.float32, {"scratch": torch.zeros(9)}), ReferenceOps)
    backend.close()


def test_without_a_library_the_reference_stands_in_and_nothing_else_can(no_library: None) -> None:
    backend = choose()
    assert backend.name == "reference"
    assert backend.reason is not None and "native kernels are not built" in backend.reason
    with pytest.raises(UsageError, match=r"cpu_isa avx2 cannot be used: the native kernels are"):
        choose(cpu_isa="avx2")
    assert backends.survey(EngineConfig()) == ("reference", backend.reason)


def test_an_isa_that_the_cpu_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    open_native()
    monkeypatch.setattr(library, "_isas", lambda functions: iter(["portable"]))
    with pytest.raises(UsageError, match=r"cpu_isa is 'avx512', .* cannot run; here: portable"):
        choose(cpu_isa="avx512")


@pytest.mark.parametrize("threads", [0, -1, 10_000])
def test_no_threads_and_too_many_are_refused(threads: int) -> None:
    with pytest.raises(UsageError, match=f"threads is {threads}; it must be an integer from 1 to"):
        EngineConfig(threads=threads)


@pytest.fixture
def little_address_space() -> Iterator[None]:
    """Too little for the stacks of many threads."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_threads_that_the_system_refuses_are_a_clear_error_and_leave_none_behind(
    little_address_space: None,
) -> None:
    opened, before = open_native(), thread_ids()
    with pytest.raises(CapacityError, match="cannot start 1000 threads; lower --threads"):
        Pool(opened, 1000)
    assert have_ended(thread_ids() - before)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_closed_backend_has_no_threads() -> None:
    open_native()
    before = thread_ids()
    backend = choose(threads=4)
    own = thread_ids() - before
    assert len(own) == 3
    backend.close()
    backend.close()
    assert have_ended(own)
