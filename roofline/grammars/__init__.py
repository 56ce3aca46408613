"""Grammars that answers keep to, by llguidance: tried in a child process, compiled, followed.

No engine and no sampling here. Submodules load on first use, and the library with them.
"""

import importlib
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    """Import a submodule when it is first named."""
    if name in ("compiler", "matching", "trial"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
