"""How a fetch shows on stderr: bars on a terminal that leave no trace, one line elsewhere."""

import sys
from collections.abc import Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


@contextmanager
def fetch_bar(announcement: str, *, bars: bool = True) -> Generator[Progress, None, None]:
    """A bar to add tasks to, their units bytes; off a terminal `announcement` stands for it."""
    console = Console(stderr=True)
    shown = bars and console.is_terminal
    if not shown:
        print(announcement, file=sys.stderr, flush=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        yield bar
