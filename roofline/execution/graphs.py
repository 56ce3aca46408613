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

    def run(self, tokens: int, sampled: int) -> bool:
        """All three, where nothing is asked between them; whether the logits were finite."""
        ...

    def forward(self, tokens: int) -> None:
        """Run the layers on the step's tokens."""
        ...

    def head(self, sampled: int) -> None:
        """Compute logits of the first so many of the arena's `sampled` tokens."""
        ...

    def choose(self, sampled: int) -> None:
        """Truncate those rows of logits and pick a token from each."""
        ...


@dataclass(frozen=True)
class EagerProgram:
    """Op by op, on views of the right sizes."""

    decoder: Decoder
    ops: Ops
    kv_cache: KvCache
    arena: Arena

    def run(self, tokens: int, sampled: int) -> bool:
        """See `Program`."""
        self.forward(tokens)
        self.head(sampled)
        if not self.ops.all_finite(self.arena["logits"][:sampled]):
            return False
        self.choose(sampled)
        return True

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
        logits = self.arena["logits"][:sampled]
        limits = "min_p", "top_k", "top_p"
        self.ops.truncate(logits, *(self.arena[name][:sampled] for name in limits))
        names = "temperature", "seed", "choice_position", "chosen"
        self.ops.choose(logits, *(self.arena[name][:sampled] for name in names))

    def _buffers(self, tokens: int) -> Buffers:
        names = "residual", "delta", "query", "attended", "activated"
        return Buffers(*(self.arena[name][:tokens] for name in names), rope=self.arena["rope"])


class TapeProgram:
    """The same ops recorded by the native backend; a part is one call, and so are all three."""

    def __init__(self, eager: EagerProgram, ops: NativeOps) -> None:
        tokens, sampled = len(eager.arena["token_ids"]), len(eager.arena["sampled"])
        with ops.record(eager) as self._forward:
            eager.forward(tokens)
        with ops.record(eager) as self._head:
            eager.head(sampled)
        with ops.record(eager) as self._choose:
            eager.choose(sampled)
        with ops.record(eager) as self._whole:
            eager.forward(tokens)
            eager.head(sampled)
            eager.choose(sampled)
        self._ops, self._rows = ops, len(eager.arena["context_len"])
        self._logits = eager.arena["logits"]

    def run(self, tokens: int, sampled: int) -> bool:
        """See `Program`."""
        self._ops.set_sizes(tokens, sampled, self._rows)
        self._whole.play()
        return self._ops.all_finite(self._logits)

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
