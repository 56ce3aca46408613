"""`roofline rm`: remove what was fetched; asks before it does."""

import sys
from typing import Annotated

from cyclopts import Parameter

from roofline import models
from roofline.cli import options
from roofline.errors import UsageError


def rm(
    model: Annotated[str, Parameter(help="as `roofline ls` names it; org/repo is all of it")],
    /,
    *,
    revision: options.Revision = None,
    yes: Annotated[bool, Parameter(help="do not ask")] = False,
) -> None:
    """Remove a model that was fetched; other programs' use of the Hugging Face cache sees it go."""
    removal = models.cached.plan_removal(model, revision)
    size = f"{removal.size_bytes / 1e6:,.1f} MB"
    if not yes and not _agreed(f"Remove {model} ({size})? [y/N] "):
        print("nothing removed")
        return
    removal.execute()
    print(f"removed {model}: {size} freed")


def _agreed(question: str) -> bool:
    if sys.stdin is None or not sys.stdin.isatty():
        raise UsageError("nobody to ask on this terminal; --yes removes without asking")
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        return False
