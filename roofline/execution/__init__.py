"""Running plans: memory, inputs, sampling, the runner of one rank and the group of workers.

Submodules load on first use, so that a door can be imported without torch.
"""

import importlib
from types import ModuleType

_SUBMODULES = (
    "arena",
    "bandwidth",
    "device_runner",
    "devices",
    "host",
    "inputs",
    "kv_cache",
    "runner",
    "sampling",
    "workers",
)


def __getattr__(name: str) -> ModuleType:
    """Import a submodule when it is first named."""
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
