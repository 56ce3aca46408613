"""Bars on stderr: a model that loads, prompts that are answered. What they show is counted here.

Rich is imported where somebody may watch: it takes a while, and a pipe shows nothing.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator

from roofline.doors.outputs import RequestOutput


@contextlib.contextmanager
def loading_bar(
    verb: str, num_tensors: int, note: str | None = None
) -> Iterator[Callable[[str], None]]:
    """A line if there is one, and a bar advanced by each tensor's name; nothing off a terminal."""
    if not _may_be_watched():
        yield lambda name: None
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if note is not None:
        tell(note)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(verb, total=num_tensors)
        yield lambda name: bar.update(task, advance=1, description=f"{verb} {name}")


@contextlib.contextmanager
def warm_up_bar(num_steps: int) -> Iterator[Callable[[int], None]]:
    """A bar while a GPU's kernels are compiled, and how long it took where that was long."""
    started = time.monotonic()
    with loading_bar("Compiling kernels", num_steps) as advance:
        yield lambda tokens: advance(f"for {tokens} tokens")
    if (took := time.monotonic() - started) > _LONG_S:
        tell(f"compiling the GPU's kernels took {took:.0f} s, once: they are kept on disk")


_LONG_S = 3.0


def tell(line: str) -> None:
    """A line for whoever watches; nothing off a terminal."""
    if not _may_be_watched():
        return
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def prompts_bar(num_prompts: int, *, show: bool) -> Iterator[Callable[[RequestOutput], None]]:
    """Advanced by each finished answer: how many, and tokens a second in and out so far."""
    if not show:
        yield lambda output: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("Prompts"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(
            "input: {task.fields[read]:.1f} tok/s, output: {task.fields[written]:.1f} tok/s"
        ),
    )
    started, read, written = time.monotonic(), 0, 0

    def advance(output: RequestOutput) -> None:
        nonlocal read, written
        read += len(output.prompt_token_ids)
        written += sum(len(answer.token_ids) for answer in output.outputs)
        elapsed = time.monotonic() - started
        bar.update(task, advance=1, read=read / elapsed, written=written / elapsed)

    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=num_prompts, read=0.0, written=0.0)
        yield advance


def _may_be_watched() -> bool:
    """Whether rich, which has the last word, could take stderr for a terminal."""
    told = any(name in os.environ for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "JPY_PARENT_PID"))
    return told or (sys.stderr is not None and sys.stderr.isatty())
