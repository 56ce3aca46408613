"""The workers that run plans: loading a model onto a rank, and the group that is this process."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from roofline.budget import available_host_bytes, plan_rank, plan_step_buffers
from roofline.config import EngineConfig
from roofline.errors import RooflineError
from roofline.execution import arena, kv_cache
from roofline.execution.runner import ModelRunner
from roofline.models.checkpoints import Checkpoint
from roofline.models.decoder import Decoder
from roofline.models.layers import Source
from roofline.ops import KvCache, backends
from roofline.parallel.mesh import Mesh
from roofline.scheduling.plan import StepPlan, StepResult


@dataclass(frozen=True)
class _Loaded:
    """A rank's share of the model, and the memory it runs in."""

    decoder: Decoder
    kv_cache: KvCache
    arena: arena.Arena
    runner: ModelRunner


class InProcessWorkers:
    """One rank in this process; a submitted plan runs at once."""

    max_in_flight = 1

    def __init__(
        self, config: EngineConfig, checkpoint: Checkpoint, progress: Callable[[str], None]
    ) -> None:
        model, mesh = checkpoint.config, Mesh.single()
        native, available = checkpoint.native_groups, available_host_bytes()
        self.budget = budget = plan_rank(model, config, mesh.rank, native, available)
        self.backend = backend = backends.choose(config, model, budget.model)
        if config.threads is not None and backend.pool is None:
            torch.set_num_threads(config.threads)
        decoder = Decoder(model, budget.model, mesh, Source(checkpoint, progress, backend.pack))
        cache = kv_cache.allocate(
            model, config.dtype, mesh.rank, budget.num_blocks, config.block_size
        )
        buffers = arena.allocate(plan_step_buffers(model, config.dtype, mesh.rank, budget.step))
        ops = backend.ops(getattr(torch, config.dtype), buffers)
        runner = ModelRunner(decoder, ops, cache, buffers, eager=config.enforce_eager)
        self._loaded: _Loaded | None = _Loaded(decoder, cache, buffers, runner)
        self._results: deque[StepResult] = deque()

    def submit(self, plan: StepPlan) -> None:
        """Run a plan."""
        self._results.append(self._rank().runner.run(plan))

    def collect(self) -> StepResult:
        """The result of the oldest plan not yet collected."""
        return self._results.popleft()

    def reset(self) -> None:
        """Drop the results that were not collected."""
        self._results.clear()

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
        self.backend.close()

    def _rank(self) -> _Loaded:
        if self._loaded is None:
            raise RooflineError("the model is closed; load it again to use it")
        return self._loaded
