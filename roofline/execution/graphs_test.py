"""A recorded step replays at every size as it would run; a closed engine leaves nothing behind."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from roofline.config import EngineConfig, ModelConfig
from roofline.execution.graphs import EagerProgram, TapeProgram
from roofline.execution.workers import InProcessWorkers
from roofline.models.checkpoints.dummy import DummyCheckpoint
from roofline.scheduling.plan import ON_DEVICE, RowStart, StepPlan, StepResult
from tests.native_library import open_native
from tests.threads import have_ended, thread_ids

MODEL = ModelConfig(
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=150,
    max_position=512,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    tie_word_embeddings=False,
    qkv_bias=True,
    qk_norm=True,
)
ROWS, BLOCKS_A_ROW, MOST_TOKENS = 4, 8, 96


def workers(**options: Any) -> InProcessWorkers:
    open_native()
    sizes: dict[str, Any] = {
        "max_num_seqs": ROWS,
        "max_num_batched_tokens": MOST_TOKENS,
        "max_model_len": BLOCKS_A_ROW * 16,
        "threads": 2,
    }
    config = EngineConfig(**sizes | options)
    return InProcessWorkers(config, DummyCheckpoint(MODEL, 3), lambda name: None)


class Driver:
    """Feeds random tokens to rows in one step after another."""

    def __init__(self, **options: Any) -> None:
        self.group = workers(**options)
        self.lengths = [0] * ROWS
        self._random = torch.Generator().manual_seed(1)

    def step(self, *counts: int) -> StepResult:
        """So many more tokens for each row; a single one is the one last sampled."""
        plan = StepPlan(
            0, [self._start(row) for row, n in enumerate(counts) if self._is_new(row, n)]
        )
        for row, count in enumerate(counts):
            first = self.lengths[row]
            if count == 0:
                continue
            drawn = torch.randint(0, 150, (count,), generator=self._random).tolist()
            ids = [ON_DEVICE] if count == 1 and first else drawn
            blocks = range(-(-first // 16), -(-(first + count) // 16))
            plan.add(row, first, ids, 1, [row * BLOCKS_A_ROW + block for block in blocks])
            self.lengths[row] += count
        self.group.submit(plan)
        return self.group.collect()

    def _is_new(self, row: int, count: int) -> bool:
        return count > 0 and self.lengths[row] == 0

    def _start(self, row: int) -> RowStart:
        return RowStart(row=row, num_prompt=1, seed=row, temperature=float(row % 2), logprobs=5)

    def memory(self) -> list[Tensor]:
        """All that steps have written and later ones read."""
        loaded = self.group._rank()
        names = "residual", "delta", "last_token"
        return [loaded.kv_cache.values, *(loaded.arena[name] for name in names)]


STEPS = [  # tokens of each row: a prompt alone, the smallest, the largest, chunks beside decodes
    (7, 0, 0, 0), (1, 0, 0, 0), (1, 0, 90, 5), (1, 3, 0, 1), (1, 17, 1, 1), (0, 0, 1, 0),
    (1, 1, 1, 1), (40, 30, 0, 26), (1, 0, 0, 1), (0, 33, 2, 1), (1, 1, 1, 1),
]  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "float32"},
        {"activations": "int8"},
        {"quantization": "none"},
        {"block_size": 16, "cpu_isa": "portable", "threads": 3},
    ],
    ids=str,
)
def test_a_tape_of_the_largest_step_replays_every_smaller_one_bit_for_bit(
    options: dict[str, Any],
) -> None:
    taped, eager = Driver(**options), Driver(**options, enforce_eager=True)
    assert isinstance(taped.group._rank().runner._program, TapeProgram)
    assert isinstance(eager.group._rank().runner._program, EagerProgram)
    for counts in STEPS:
        mine, theirs = taped.step(*counts), eager.step(*counts)
        assert mine == theirs, counts
        total = sum(counts)
        for one, other in zip(taped.memory(), eager.memory(), strict=True):
            part = slice(None) if one.ndim != 2 else slice(total)  # beyond are older steps
            assert torch.equal(one[part], other[part]), counts
    for driver in (taped, eager):
        driver.group.close()


def test_the_reference_runs_op_by_op() -> None:
    assert isinstance(workers(cpu_isa="reference")._rank().runner._program, EagerProgram)


def test_recording_computes_nothing() -> None:
    loaded = workers(threads=1)._rank()
    assert not loaded.kv_cache.values.any() and not loaded.arena["residual"].any()


@pytest.fixture
def quiet() -> Iterator[None]:
    """No garbage of other tests in between."""
    gc.collect()
    yield


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_closed_engine_leaves_no_thread_and_no_mapping(quiet: None) -> None:
    def cycle() -> tuple[int, list[str]]:
        """A run from start to end; then mapped bytes and mapped files."""
        before = thread_ids()
        driver = Driver(
            threads=3, max_num_seqs=1024, max_num_batched_tokens=1024, max_model_len=512
        )
        own = thread_ids() - before
        assert len(own) == 2
        assert driver.group.storage_bytes()["kv"] > 64 << 20
        driver.step(5, 0, 0, 0)
        driver.group.close()
        assert have_ended(own)
        return mapped_bytes(), mapped_files()

    first, *others = (cycle() for _ in range(4))  # the first leaves the library, and free lists
    for other in others:
        assert other[1] == first[1]
        assert other[0] <= first[0] + (8 << 20), "the pool or a stack is still mapped"


def mapped_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * 4096


def mapped_files() -> list[str]:
    """With their number of mappings."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sorted(line.split(maxsplit=5)[5] for line in lines if "/" in line)
