"""Model files: names and bytes. No slicing rules, no devices, no parallelism here.

Tensor names are Hugging Face's (`model.layers.0.self_attn.q_proj.weight`) whatever the file;
query and key rows are in half-split rotary order.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from roofline.config import ModelConfig


class Checkpoint(Protocol):
    """A model file opened: its shape, and its tensors one at a time.

    Arrays are numpy or torch; the loader takes either.
    """

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""

    @property
    def native_groups(self) -> Mapping[str, int]:
        """Group size of each tensor that is group-wise INT8 in the file."""

    def read(self, name: str) -> Any:
        """The tensor as floats: [N, K], or [H] for a norm."""

    def read_int8(self, name: str) -> tuple[Any, Any]:
        """Values [N, K] int8 and scales [N, groups] float32 of a tensor in `native_groups`."""

    def close(self) -> None:
        """Unmap the files."""
