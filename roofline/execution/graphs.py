"""A step captured once and replayed: on the CPU a tape of native ops (docs/cpu_performance.md).

The decoder knows nothing of this. Whatever is captured must be ops and views of the arena only.
"""

from collections.abc import Callable

from roofline.ops import Ops
from roofline.ops.cpu.native import NativeOps

Replay = Callable[[], None]


def capture(ops: Ops, run: Callable[[], None], kept: object) -> Replay | None:
    """Record what `run` computes at the largest sizes; None where the backend replays nothing.

    `kept` is what the recorded pointers point into. The live sizes are read from the step buffer.
    """
    if not isinstance(ops, NativeOps):
        return None
    with ops.record(kept) as tape:
        run()
    return tape.play
