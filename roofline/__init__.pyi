"""The names that `__init__.py` loads lazily, as types."""

from roofline.async_llm import AsyncLLM
from roofline.doors.outputs import CompletionOutput, RequestOutput
from roofline.llm import LLM
from roofline.request import SamplingParams
from roofline.structured_outputs import StructuredOutputsParams

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "__version__",
]

__version__: str
