"""The group of one: what it allocates is what was planned, and decoding adds nothing to it."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from roofline.config import EngineConfig, ModelConfig
from roofline.errors import CapacityError, RooflineError
from roofline.execution.workers import InProcessWorkers
from roofline.models.checkpoints.dummy import DummyCheckpoint
from roofline.scheduling.plan import ON_DEVICE, RowStart, StepPlan

MODEL = ModelConfig(
    hidden_size=40,
    intermediate_size=72,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=130,
    max_position=1040,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    tie_word_embeddings=True,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Of torch: models this small only wait for a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def workers(model: ModelConfig = MODEL, **options: Any) -> InProcessWorkers:
    config = EngineConfig(load_format="dummy", max_num_seqs=2, **options)
    return InProcessWorkers(config, DummyCheckpoint(model, 0), lambda name: None)


@pytest.mark.parametrize(
    "change",
    [{}, {"tie_word_embeddings": False}, {"qkv_bias": True, "qk_norm": True, "sliding_window": 9}],
    ids=["tied", "untied", "flagged"],
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quantization": "none"},
        {"quantization": "none", "dtype": "float32"},
        {"group_size": 32, "max_num_batched_tokens": 7, "block_size": 5},
        {"group_size": "channel", "max_model_len": 100, "kv_cache_memory_bytes": 1 << 20},
    ],
    ids=str,
)
def test_storages_are_the_planned_bytes(options: dict[str, Any], change: dict[str, Any]) -> None:
    group = workers(dataclasses.replace(MODEL, **change), **options)
    budget, found = group.budget, group.storage_bytes()
    assert found == {
        "weights": budget.model.weight_bytes,
        "scales": budget.model.scale_bytes,
        "kv": budget.kv_bytes,
        "activations": budget.activation_bytes,
    }
    assert sum(found.values()) == budget.total_bytes


def test_progress_tells_every_tensor_once() -> None:
    told: list[str] = []
    InProcessWorkers(EngineConfig(), DummyCheckpoint(MODEL, 0), told.append)
    assert len(told) == len(set(told)) == 1 + 9 * 2 + 1  # embedding, layers, norm


def decode(group: InProcessWorkers, steps: int, prompt: list[int]) -> Iterator[int]:
    """Greedy tokens of one request in row 0, its blocks handed out one by one."""
    position, ids = 0, prompt
    for step in range(steps):
        plan = StepPlan(step)
        if step == 0:
            plan.starts.append(RowStart(row=0, num_prompt=len(prompt), seed=0, temperature=0.0))
        held, needed = -(-position // 16), -(-(position + len(ids)) // 16)
        plan.add(0, position, ids, 1, list(range(held, needed)))
        group.submit(plan)
        (token,) = group.collect().token_ids
        yield token
        position, ids = position + len(ids), [ON_DEVICE]


def test_a_thousand_decoding_steps_allocate_no_kv_memory() -> None:
    group = workers(max_num_batched_tokens=8)
    loaded = group._loaded
    assert loaded is not None
    pool, storages = loaded.kv_cache.values, group.storage_bytes()
    address = pool.data_ptr()
    owned = {
        name: t.data_ptr() for name, t in (loaded.arena | dict(loaded.decoder.tensors())).items()
    }
    assert len(list(decode(group, 1000, [1, 2, 3]))) == 1000
    assert group._loaded is loaded and loaded.kv_cache.values is pool
    assert pool.data_ptr() == address
    assert group.storage_bytes() == storages
    after = loaded.arena | dict(loaded.decoder.tensors())
    assert {name: tensor.data_ptr() for name, tensor in after.items()} == owned
    written = pool.abs().sum(dim=(0, 1, 3, 5)).flatten() > 0  # of every slot
    assert written[:1002].all() and not written[1002:].any(), "each token went to its own slot"


def test_results_come_back_in_the_order_of_plans() -> None:
    group = workers()
    for row, prompt in ((0, [1, 2, 3]), (1, [4, 5])):
        start = RowStart(row=row, num_prompt=len(prompt), seed=0, temperature=0.0)
        plan = StepPlan(row, [start])
        plan.add(row, 0, prompt, row, [row])
        group.submit(plan)
    assert [group.collect().counts for _ in range(2)] == [[0], [1]]


def test_weights_and_cache_that_do_not_fit_are_refused_before_anything_is_read() -> None:
    class Unread(DummyCheckpoint):
        def read(self, name: str) -> Any:
            raise AssertionError("read")

        read_int8 = read

    config = EngineConfig(kv_cache_memory_bytes=1, max_num_seqs=1)
    with pytest.raises(CapacityError, match=r"needs .* bytes of KV cache"):
        InProcessWorkers(config, Unread(MODEL, 0), lambda name: None)


def test_threads_are_as_asked() -> None:
    workers(threads=2)
    assert torch.get_num_threads() == 2


def test_a_closed_group_says_so_and_closes_again_quietly() -> None:
    group = workers()
    group.close()
    group.close()
    for use in (lambda: group.submit(StepPlan(0)), group.storage_bytes):
        with pytest.raises(RooflineError, match="the model is closed"):
            use()
