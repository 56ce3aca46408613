"""The workers that run plans: loading a model onto a rank, and the group that is this process."""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from roofline.budget import available_host_bytes, plan_buffers, plan_rank
from roofline.config import EngineConfig
from roofline.errors import RooflineError
from roofline.execution import arena, kv_cache
from roofline.execution.device_runner import MAX_IN_FLIGHT, DeviceRunner
from roofline.execution.runner import ModelRunner
from roofline.models.checkpoints import Checkpoint
from roofline.models.checkpoints.device_arrays import DeviceArrays
from roofline.models.checkpoints.dummy import DummyCheckpoint
from roofline.models.decoder import Decoder
from roofline.models.layers import Source
from roofline.ops import KvCache, Ops, backends
from roofline.ops.cpu.huge_pages import collapse
from roofline.ops.cuda import Graphs, Uploader, free_bytes, give_up_unused, on
from roofline.parallel.mesh import Mesh
from roofline.quantization.int8_groups import quantize_groups
from roofline.scheduling.plan import StepPlan, StepResult


@dataclass(frozen=True)
class _Loaded:
    """A rank's share of the model, and the memory it runs in."""

    decoder: Decoder
    kv_cache: KvCache
    arena: arena.Arena
    runner: ModelRunner | DeviceRunner


class InProcessWorkers:
    """One rank in this process; on a CPU a submitted plan runs at once.

    `config.device` is resolved (`execution.devices`).
    """

    def __init__(
        self, config: EngineConfig, checkpoint: Checkpoint, progress: Callable[[str], None]
    ) -> None:
        model, mesh = checkpoint.config, Mesh.single()
        self._device = device = torch.device(config.device if config.is_on_gpu else "cpu")
        available = free_bytes(device) if config.is_on_gpu else available_host_bytes()
        native = checkpoint.native_groups
        self.budget = budget = plan_rank(model, config, mesh.rank, native, available)
        self.backend = backend = backends.choose(config, model, budget.model)
        if config.threads is not None and backend.pool is None:
            torch.set_num_threads(config.threads)
        if config.is_on_gpu and isinstance(checkpoint, DummyCheckpoint):
            checkpoint = checkpoint.made_of(DeviceArrays(device))
        with on(device):
            quantize = backend.quantize or quantize_groups
            source = Source(checkpoint, progress, backend.pack, device, Uploader(device), quantize)
            decoder = Decoder(model, budget.model, mesh, source)
            self._collapsing: threading.Thread | None = None
            if backend.pool is not None:  # while the first prompt comes in
                weights = list(decoder.tensors().values())
                self._collapsing = threading.Thread(target=collapse, args=(weights,))
                self._collapsing.start()
            give_up_unused(device)  # what loading took on its way
            cache = kv_cache.allocate(
                model, config.kv_dtype, mesh.rank, budget.num_blocks, budget.step.block_size, device
            )
            planned = plan_buffers(model, config, mesh.rank, budget.step, budget.model)
            buffers = arena.allocate(planned, device)
            ops = backend.ops(getattr(torch, config.dtype), buffers)
            runner = _make_runner(config, decoder, ops, cache, buffers)
        self.max_in_flight = MAX_IN_FLIGHT if isinstance(runner, DeviceRunner) else 1
        self._loaded: _Loaded | None = _Loaded(decoder, cache, buffers, runner)
        self._results: deque[StepResult] = deque()

    def warm_up(self, progress: Callable[[int], None]) -> None:
        """Have a GPU's kernels compiled; `progress` is told of each of `WARM_UP_TOKENS`."""
        runner = self._rank().runner
        if isinstance(runner, DeviceRunner):
            runner.warm_up(progress)

    def submit(self, plan: StepPlan) -> None:
        """Run a plan, or have a device that runs ahead start it."""
        runner = self._rank().runner
        if isinstance(runner, DeviceRunner):
            runner.submit(plan)
        else:
            self._results.append(runner.run(plan))

    def collect(self) -> StepResult:
        """The result of the oldest plan not yet collected."""
        runner = self._rank().runner
        return runner.collect() if isinstance(runner, DeviceRunner) else self._results.popleft()

    def reset(self) -> None:
        """Drop the results that were not collected."""
        self._results.clear()
        if self._loaded is not None and isinstance(self._loaded.runner, DeviceRunner):
            self._loaded.runner.reset()

    def replay_s(self) -> float | None:
        """Seconds in native replays so far: the rest of a step is Python's. None: op by op."""
        pool = self.backend.pool
        return None if pool is None or not pool.replay_s else pool.replay_s

    def storage_bytes(self) -> dict[str, int]:
        """Bytes of the storages this rank owns, counted from the tensors themselves."""
        rank = self._rank()
        weights = rank.decoder.tensors()
        scales = [tensor for name, tensor in weights.items() if name.endswith(".scales")]
        values = [tensor for name, tensor in weights.items() if not name.endswith(".scales")]
        return {
            "weights": arena.storage_bytes(values),
            "scales": arena.storage_bytes(scales),
            "kv": arena.storage_bytes(kv_cache.tensors(rank.kv_cache)),
            "activations": arena.storage_bytes(rank.arena.values()),
        }

    def close(self) -> None:
        """Drop weights, pool and buffers; closing again does nothing."""
        self._loaded = None
        if self._collapsing is not None:
            self._collapsing.join()
        self.backend.close()
        give_up_unused(self._device)

    def _rank(self) -> _Loaded:
        if self._loaded is None:
            raise RooflineError("the model is closed; load it again to use it")
        return self._loaded


def _make_runner(
    config: EngineConfig, decoder: Decoder, ops: Ops, cache: KvCache, buffers: arena.Arena
) -> ModelRunner | DeviceRunner:
    """On a CPU a step is done when `run` returns; a GPU runs ahead of its host."""
    if not config.is_on_gpu:
        return ModelRunner(decoder, ops, cache, buffers, eager=config.enforce_eager)
    graphs = None if config.enforce_eager else Graphs()
    return DeviceRunner(decoder, ops, cache, buffers, graphs=graphs)
