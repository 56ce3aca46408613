"""The names that `__init__.py` loads lazily, as types."""

from roofline.llm import LLM as LLM
from roofline.llm import CompletionOutput as CompletionOutput
from roofline.llm import RequestOutput as RequestOutput
from roofline.request import SamplingParams as SamplingParams

__version__: str
