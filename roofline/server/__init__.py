"""The OpenAI-compatible server, on `AsyncLLM`: what comes in by HTTP, and what goes out.

Submodules load on first use, so that the command line's help imports no web framework.
"""

import importlib
from types import ModuleType

_SUBMODULES = (
    "answers",
    "app",
    "body",
    "envelope",
    "listening",
    "openai",
    "response_format",
    "stream",
    "waiting",
)


def __getattr__(name: str) -> ModuleType:
    """Import a submodule when it is first named."""
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
