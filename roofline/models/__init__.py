"""What turns a model's name into a decoder: references, downloads, checkpoints, layers.

No scheduling and no sampling here; a model knows neither requests nor graphs. Submodules load on
first use, so that a door opens without the libraries of every format.
"""

import importlib
from types import ModuleType

_SUBMODULES = (
    *("builtin", "cached", "checkpoints", "decoder", "facts", "families", "hub", "huggingface"),
    *("layers", "opening"),
)


def __getattr__(name: str) -> ModuleType:
    """Import a submodule when it is first named."""
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
