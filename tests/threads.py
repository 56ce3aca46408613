"""The threads of this process, as the system counts them."""

import time
from pathlib import Path

TASKS = Path("/proc/self/task")


def thread_ids() -> set[str]:
    """Of every thread, native ones too."""
    return {task.name for task in TASKS.iterdir()}


def have_ended(threads: set[str], within_s: float = 20.0) -> bool:
    """Whether threads end: the system lists one for a moment after it was joined."""
    deadline = time.monotonic() + within_s
    while threads & thread_ids():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True
