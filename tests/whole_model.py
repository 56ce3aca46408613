"""A model's logits at every position, without scheduler or sampling: for comparing with peers."""

import dataclasses

import torch
from torch import Tensor

from roofline.budget import Rank, plan_rank, plan_step_buffers
from roofline.config import EngineConfig
from roofline.execution import arena, kv_cache
from roofline.models.checkpoints import Checkpoint
from roofline.models.decoder import Buffers, Decoder, rope_table
from roofline.models.layers import Source
from roofline.ops import StepInputs
from roofline.ops.reference import ReferenceOps
from roofline.parallel.mesh import Mesh


class WholeModel:
    """A decoder on one rank, run on one sequence at a time in one step."""

    def __init__(self, checkpoint: Checkpoint, config: EngineConfig) -> None:
        self._model, self._config = checkpoint.config, config
        budget = plan_rank(checkpoint.config, config, Rank(), checkpoint.native_groups, 1 << 34)
        source = Source(checkpoint, lambda name: None)
        self._decoder = Decoder(checkpoint.config, budget.model, Mesh.single(), source)
        self._arena = arena.allocate(
            plan_step_buffers(checkpoint.config, config.dtype, Rank(), budget.step)
        )
        rope_table(checkpoint.config, budget.step.max_model_len, out=self._arena["rope"])
        self._ops = ReferenceOps(getattr(torch, config.dtype), self._arena["scratch"])
        self._blocks = budget.num_blocks

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> Tensor:
        """Logits [T, V] float32 at every position of a sequence [T]."""
        tokens, size = len(token_ids), self._config.limits.block_size
        pool = kv_cache.allocate(self._model, self._config.dtype, Rank(), self._blocks, size)
        positions = torch.arange(tokens)
        inputs = StepInputs(
            token_ids=torch.tensor(token_ids),
            positions=positions,
            slots=positions,
            query_start=torch.tensor([0, tokens], dtype=torch.int32),
            context_len=torch.tensor([tokens], dtype=torch.int32),
            block_table=torch.arange(self._blocks, dtype=torch.int32).unsqueeze(0),
        )
        names = [field.name for field in dataclasses.fields(Buffers) if field.name != "rope"]
        views = {name: self._arena[name][:tokens] for name in names}
        buffers = Buffers(**views, rope=self._arena["rope"])
        self._decoder.forward(self._ops, inputs, pool, buffers)
        out = torch.empty(tokens, self._model.vocab_size)
        self._decoder.logits(self._ops, positions, buffers, out, out)
        return out
