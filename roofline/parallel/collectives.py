"""What ranks say to each other: all_reduce, all_gather, send, recv. The identity at size 1.

Layers see only `Collectives`. Implementations: none needed (one rank), and threads of one process.
"""

import queue
import threading
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from roofline.errors import RooflineError


class Collectives(Protocol):
    """The calls of one rank; the peers of its tensor group make the same ones in the same order."""

    def all_reduce(self, x: Tensor) -> None:
        """Replace x by its sum over the tensor group, added in rank order."""
        ...

    def all_gather(self, shard: Tensor, outs: Sequence[Tensor]) -> None:
        """Write every tensor rank's shard into its place of `outs`; shapes may differ by rank."""
        ...

    def send(self, x: Tensor) -> None:
        """Hand x to the same tensor rank of the next stage."""
        ...

    def recv(self, out: Tensor) -> None:
        """Fill out from the same tensor rank of the stage before."""
        ...


class NoCollectives:
    """One rank: sums are what they were, and there is no stage to speak to."""

    def all_reduce(self, x: Tensor) -> None:
        """Leave x as it is."""

    def all_gather(self, shard: Tensor, outs: Sequence[Tensor]) -> None:
        """Copy the only shard."""
        outs[0].copy_(shard)

    def send(self, x: Tensor) -> None:
        """Nobody listens: a mistake of ours."""
        raise AssertionError("a single rank has no next stage")

    def recv(self, out: Tensor) -> None:
        """Nobody speaks: a mistake of ours."""
        raise AssertionError("a single rank has no stage before it")


class ThreadGroup:
    """The meeting place of ranks that are threads of this process."""

    def __init__(self, tensor_ranks: int, stages: int, timeout_s: float = 60.0) -> None:
        self.tensor_ranks, self.timeout_s = tensor_ranks, timeout_s
        self.barriers = [threading.Barrier(tensor_ranks, timeout=timeout_s) for _ in range(stages)]
        self.offered: list[list[Tensor | None]] = [[None] * tensor_ranks for _ in range(stages)]
        self.pipes: list[list[queue.Queue[Tensor]]] = [
            [queue.Queue() for _ in range(tensor_ranks)] for _ in range(stages)
        ]

    def rank(self, tp_rank: int, stage: int) -> "ThreadCollectives":
        """The calls of one thread."""
        return ThreadCollectives(self, tp_rank, stage)


class ThreadCollectives:
    """`Collectives` between the threads of a `ThreadGroup`."""

    def __init__(self, group: ThreadGroup, tp_rank: int, stage: int) -> None:
        self._group, self._tp_rank, self._stage = group, tp_rank, stage

    def all_reduce(self, x: Tensor) -> None:
        """See `Collectives.all_reduce`."""
        total, *others = self._exchange(x.clone())
        total = total.clone()  # the offered one is still being read by the other ranks
        for other in others:
            total += other
        x.copy_(total)

    def all_gather(self, shard: Tensor, outs: Sequence[Tensor]) -> None:
        """See `Collectives.all_gather`."""
        for out, peer in zip(outs, self._exchange(shard.clone()), strict=True):
            out.copy_(peer)

    def send(self, x: Tensor) -> None:
        """See `Collectives.send`."""
        self._group.pipes[self._stage + 1][self._tp_rank].put(x.clone())

    def recv(self, out: Tensor) -> None:
        """See `Collectives.recv`."""
        pipe = self._group.pipes[self._stage][self._tp_rank]
        try:
            out.copy_(pipe.get(timeout=self._group.timeout_s))
        except queue.Empty as error:
            raise self._left_waiting("the stage before") from error

    def _exchange(self, mine: Tensor) -> list[Tensor]:
        """Offer a tensor that will not change, and take what every rank offers."""
        barrier, offered = self._group.barriers[self._stage], self._group.offered[self._stage]
        offered[self._tp_rank] = mine
        try:
            barrier.wait()
            taken = [tensor for tensor in offered if tensor is not None]
            barrier.wait()
        except threading.BrokenBarrierError as error:
            raise self._left_waiting("its tensor group") from error
        return taken

    def _left_waiting(self, whom: str) -> RooflineError:
        return RooflineError(
            f"tensor rank {self._tp_rank} of stage {self._stage} waited in vain for {whom}; "
            f"the limit is {self._group.timeout_s:g} s"
        )
