"""The engine on a real GPU: bytes, bits, graphs, and what a decoding step allocates."""

from typing import Any

import pytest
import torch

from roofline.config import EngineConfig, ModelConfig
from roofline.engine import Engine
from roofline.execution.device_runner import DeviceRunner
from roofline.execution.devices import resolve
from roofline.execution.workers import InProcessWorkers
from roofline.models.checkpoints.device_arrays import DeviceArrays
from roofline.models.checkpoints.dummy import DummyCheckpoint
from roofline.models.checkpoints.tensors import EMBEDDING
from roofline.ops.cuda import Uploader
from roofline.quantization.int8_groups import quantize
from roofline.request import Request, SamplingParams
from roofline.scheduling.limits import SchedulerConfig
from roofline.scheduling.scheduler import Scheduler

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
MODEL = ModelConfig(
    hidden_size=512,
    intermediate_size=1536,
    num_layers=4,
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    vocab_size=4000,
    max_position=4096,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    tie_word_embeddings=False,
)


def workers(**options: Any) -> InProcessWorkers:
    given: dict[str, Any] = {"device": "cuda", "max_num_seqs": 12, "max_model_len": 2048}
    config, _ = resolve(EngineConfig(**given | options))
    return InProcessWorkers(config, DummyCheckpoint(MODEL, 0), lambda name: None)


def engine_of(group: InProcessWorkers) -> Engine:
    step = group.budget.step
    return Engine(
        Scheduler(
            SchedulerConfig(
                num_blocks=group.budget.num_blocks,
                block_tokens=step.block_size,
                max_num_seqs=step.max_num_seqs,
                max_num_batched_tokens=step.max_num_batched_tokens,
                max_model_len=step.max_model_len,
                vocab_size=MODEL.vocab_size,
            )
        ),
        group,
    )


def answers(group: InProcessWorkers, **params: Any) -> dict[str, list[int]]:
    """Tokens of 12 requests whose prompts and lengths differ."""
    engine, found = engine_of(group), dict[str, list[int]]()
    for number in range(12):
        prompt = [(7 * number + 31 * i) % MODEL.vocab_size for i in range(1 + 17 * number)]
        wanted = SamplingParams(max_tokens=20 + number, ignore_eos=True, **params)
        engine.add(Request(str(number), prompt, wanted, seed=number))
    while engine.has_unfinished:
        for output in engine.step():
            found.setdefault(output.request_id, []).extend(output.token_ids)
    return found


@pytest.mark.parametrize(
    "options",
    [{}, {"kv_cache_dtype": "int8"}, {"prefill_weights": "bfloat16"}, {"quantization": "none"}],
    ids=str,
)
def test_storages_are_the_planned_bytes(options: dict[str, Any]) -> None:
    group = workers(**options)
    budget = group.budget
    assert group.storage_bytes() == {
        "weights": budget.model.weight_bytes,
        "scales": budget.model.scale_bytes,
        "kv": budget.kv_bytes,
        "activations": budget.activation_bytes,
    }
    group.close()


@pytest.mark.parametrize(
    "params",
    [{"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9}, {"repetition_penalty": 1.3}],
    ids=str,
)
def test_captured_steps_give_the_tokens_of_steps_op_by_op(params: dict[str, Any]) -> None:
    options = {"deterministic": True, "dtype": "float32"}
    captured, eager = workers(**options), workers(**options, enforce_eager=True)
    assert answers(captured, **params) == answers(eager, **params)
    assert len(next(iter(answers(captured, logprobs=2).values()))) == 20
    for group in (captured, eager):
        group.close()


def test_a_thousand_decoding_steps_allocate_nothing() -> None:
    group = workers(enable_prefix_caching=False)
    engine = engine_of(group)
    params = SamplingParams(max_tokens=1100, ignore_eos=True)
    engine.add(Request("a", [1, 2, 3], params, seed=0))
    for _ in range(20):
        engine.step()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(1000):
        engine.step()
    extended = 1 + 1000 // group.budget.step.block_size
    after = torch.cuda.memory_stats()["allocation.all.allocated"]
    assert after - before <= extended, "beyond what extends the block table"
    runner = group._rank().runner
    assert isinstance(runner, DeviceRunner)
    group.close()


def test_weights_are_the_bits_of_the_host() -> None:
    device = torch.device("cuda:0")
    host = DummyCheckpoint(MODEL, 5)
    there = host.made_of(DeviceArrays(device))
    for one, other in zip(host.read_int8(EMBEDDING), there.read_int8(EMBEDDING), strict=True):
        assert torch.equal(torch.from_numpy(one), other.cpu())
    torch.manual_seed(0)
    floats = torch.randn(999, 700) * torch.rand(999, 1) ** 8
    wanted = quantize(floats, 128, "x")
    found = quantize(Uploader(device)(floats), 128, "x")
    assert torch.equal(found.values.cpu(), wanted.values)
    assert torch.equal(found.scales.cpu(), wanted.scales)


def test_large_tensors_go_up_in_chunks() -> None:
    tensor = torch.arange(30_000_001, dtype=torch.int32)
    assert torch.equal(Uploader(torch.device("cuda:0"))(tensor).cpu(), tensor)
