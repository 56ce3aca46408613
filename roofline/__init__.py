"""Roofline: an LLM inference engine that says how close it came to the memory roofline.

The public names live in the modules named here and load when first used, so that `import roofline`
costs nothing and imports no torch. No code lives here; `__init__.pyi` has the names as types.
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "AsyncLLM": "roofline.async_llm",
    "CompletionOutput": "roofline.doors.outputs",
    "LLM": "roofline.llm",
    "RequestOutput": "roofline.doors.outputs",
    "SamplingParams": "roofline.request",
    "StructuredOutputsParams": "roofline.structured_outputs",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "__version__",
]


def __getattr__(name: str) -> object:
    """Import a public name from its module (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'roofline' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
