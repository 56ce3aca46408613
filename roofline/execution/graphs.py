"""A step's computation: op by op, or captured once and replayed (on the CPU a tape of native ops).

The decoder knows nothing of this. What is captured must be ops and views of the arena only. It is
captured at the largest sizes; the live ones are read from the arena's `step` when it is replayed.
"""

from dataclasses import dataclass
from typing import Protocol

from roofline.execution.arena import Arena
from roofline.execution.inputs import step_inputs
from roofline.models.decoder import Buffers, Decoder
from roofline.ops import KvCache, Ops
from roofline.ops.cpu.native import NativeOps


class Program(Protocol):
    """The three parts of a step, on what the arena holds."""

    def forward(self, tokens: int) -> None:
        """Run the layers on the step's tokens."""
        ...

    def head(self, sampled: int) -> None:
        """Compute logits of the first so many of the arena's `sampled` tokens."""
        ...

    def choose(self, sampled: int) -> None:
        """Pick a token from each of those rows of logits."""
        ...


@dataclass(frozen=True)
class EagerProgram:
    """Op by op, on views of the right sizes."""

    decoder: Decoder
    ops: Ops
    kv_cache: KvCache
    arena: Arena

    def forward(self, tokens: int) -> None:
        """See `Program`."""
        inputs = step_inputs(self.arena, tokens)
        self.decoder.forward(self.ops, inputs, self.kv_cache, self._buffers(tokens))

    def head(self, sampled: int) -> None:
        """See `Program`."""
        arena = self.arena
        out = arena["logits"][:sampled]
        shard = arena["logits_shard"][:sampled] if "logits_shard" in arena else out
        buffers = self._buffers(len(arena["residual"]))
        self.decoder.logits(self.ops, arena["sampled"][:sampled], buffers, shard, out)

    def choose(self, sampled: int) -> None:
        """See `Program`."""
        names = "logits", "temperature", "seed", "choice_position", "chosen"
        self.ops.choose(*(self.arena[name][:sampled] for name in names))

    def _buffers(self, tokens: int) -> Buffers:
        names = "residual", "delta", "query", "attended", "activated"
        return Buffers(*(self.arena[name][:tokens] for name in names), rope=self.arena["rope"])


class TapeProgram:
    """The same ops recorded by the native backend; a part is one call."""

    def __init__(self, eager: EagerProgram, ops: NativeOps) -> None:
        arena = eager.arena
        with ops.record(eager) as self._forward:
            eager.forward(len(arena["token_ids"]))
        with ops.record(eager) as self._head:
            eager.head(len(arena["sampled"]))
        with ops.record(eager) as self._choose:
            eager.choose(len(arena["sampled"]))
        self._ops, self._rows = ops, len(arena["context_len"])

    def forward(self, tokens: int) -> None:
        """See `Program`."""
        self._ops.set_sizes(tokens, 0, self._rows)
        self._forward.play()

    def head(self, sampled: int) -> None:
        """See `Program`."""
        self._ops.set_sizes(0, sampled, self._rows)
        self._head.play()

    def choose(self, sampled: int) -> None:
        """See `Program`."""
        self._choose.play()


def capture(eager: EagerProgram) -> Program:
    """The program to run: replayed where the backend can and one rank needs no other."""
    alone = eager.decoder.mesh.rank.parallel.size == 1
    if isinstance(eager.ops, NativeOps) and alone:
        return TapeProgram(eager, eager.ops)
    return eager
