"""A decoding step allocates nothing, and a closed engine leaves nothing behind."""

import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from roofline.config import EngineConfig, ModelConfig
from roofline.engine import Engine
from roofline.execution.workers import InProcessWorkers
from roofline.models.checkpoints.dummy import DummyCheckpoint
from roofline.request import Request, SamplingParams
from roofline.scheduling.scheduler import Scheduler, SchedulerConfig
from tests.native_library import open_native

MODEL = ModelConfig(
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=200,  # small integers are objects that Python has anyway
    max_position=1200,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    tie_word_embeddings=True,
)
MALLOCS = r"""
#include <dlfcn.h>
#include <stdlib.h>
#include <atomic>
static std::atomic<long> calls{0};
extern "C" {
void* __libc_malloc(size_t); void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t); void* __libc_memalign(size_t, size_t);
long count_of_mallocs() { return calls; }
void* malloc(size_t n) { ++calls; return __libc_malloc(n); }
void* calloc(size_t n, size_t m) { ++calls; return __libc_calloc(n, m); }
void* realloc(void* p, size_t n) { ++calls; return __libc_realloc(p, n); }
void* aligned_alloc(size_t a, size_t n) { ++calls; return __libc_memalign(a, n); }
}
"""
REPLAY = """
import ctypes
from tests.test_allocations import open_engine, start
engine, workers = open_engine()
start(engine, 40)
for _ in range(20):
    engine.step()
program = workers._rank().runner._program
tape, pool = program._whole, workers.backend.pool
count, play = ctypes.CDLL(None).count_of_mallocs, pool.library.functions.roofline_tape_play
before = count()
assert before > 1000, "the counter is not in place"
for _ in range(100):
    play(pool.handle, tape.handle)
print("mallocs", count() - before)
workers.close()
"""


@pytest.fixture(autouse=True, scope="module")
def native() -> None:
    open_native()


def open_engine(**options: Any) -> tuple[Engine, InProcessWorkers]:
    config = EngineConfig(load_format="dummy", max_num_seqs=2, threads=2, **options)
    workers = InProcessWorkers(config, DummyCheckpoint(MODEL, 0), lambda name: None)
    assert workers.backend.pool is not None
    scheduler = SchedulerConfig(
        num_blocks=workers.budget.num_blocks,
        block_tokens=config.limits.block_size,
        max_num_seqs=config.limits.max_num_seqs,
        max_num_batched_tokens=config.limits.max_num_batched_tokens,
        max_model_len=workers.budget.step.max_model_len,
        vocab_size=MODEL.vocab_size,
        enable_prefix_caching=False,
    )
    return Engine(Scheduler(scheduler), workers), workers


def start(engine: Engine, tokens: int, **params: Any) -> None:
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True, **params)
    engine.add(Request("0", [1, 2, 3], sampling, seed=1))


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": 0.9}], ids=str)
def test_a_hundred_steps_allocate_no_tensor(params: dict[str, float]) -> None:
    engine, workers = open_engine()
    start(engine, 150, **params)
    for _ in range(20):
        engine.step()

    def allocations(steps: int, tensors: int) -> int:
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            for _ in range(steps):
                engine.step()
            for _ in range(tensors):
                torch.empty(100)
        assert profile.profiler is not None
        assert profile.profiler.kineto_results is not None
        events: list[Any] = profile.profiler.kineto_results.events()
        return sum(event.name() == "[memory]" and event.nbytes() > 0 for event in events)

    assert allocations(0, 3) == 3  # it would be seen
    assert allocations(100, 0) == 0
    workers.close()


def test_a_replay_never_calls_malloc(tmp_path: Path) -> None:
    compiler = shutil.which("c++")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C++ compiler")
    source, shim = tmp_path / "mallocs.cpp", tmp_path / "mallocs.so"
    source.write_text(MALLOCS, encoding="utf-8")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", source, "-o", shim], check=True)
    done = subprocess.run(
        [sys.executable, "-c", REPLAY],
        env=os.environ | {"LD_PRELOAD": str(shim)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.stdout == "mallocs 0\n", done.stderr


def test_the_python_heap_does_not_grow_over_a_thousand_steps() -> None:
    engine, workers = open_engine()
    start(engine, 500, temperature=0.9)
    while engine.has_unfinished:  # what Python keeps once it has run something often
        engine.step()
    start(engine, 1150, temperature=0.9)

    def blocks_after(steps: int) -> int:
        for _ in range(steps):
            engine.step()
        gc.collect()
        return sys.getallocatedblocks()

    blocks_after(100)
    before = blocks_after(10)
    # The ids of 63 blocks of KV are among them; a number a step would be a thousand.
    assert blocks_after(1000) - before < 200
    workers.close()
