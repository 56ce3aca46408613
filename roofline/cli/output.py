"""What commands print besides text: one JSON object, and progress where a person watches."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # it takes a while to import, and a single answer shows no bar
    from rich.progress import Progress


def print_json(document: Mapping[str, Any]) -> None:
    """Print one object on one line of ASCII, whatever the terminal's encoding."""
    print(json.dumps(document))


def progress() -> "Progress":
    """A bar on stderr that leaves no trace, and is nothing at all off a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)
