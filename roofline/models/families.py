"""The models Roofline runs: one line for each family that has the decoder's data flow.

What a family's files call it and what their config leaves unsaid; what changes in the arithmetic
is a flag of ModelConfig. No reading of files here, and no code of a single family anywhere.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Family:
    """Models built alike: their names in files, their flags, and the fields they may leave out."""

    model_type: str  # in config.json
    gguf: str | None = None  # general.architecture; None: no such files
    gguf_rotary: Literal["half-split", "interleaved"] = "half-split"  # order of Q and K rows there
    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm of every query and key head before RoPE
    # Whether `sliding_window` is refused, holds as it is stated, or once `use_sliding_window` says.
    window: Literal["never", "stated", "switched"] = "never"
    # What config.json means where it lacks a key; one that is there, even as null, speaks itself.
    defaults: Mapping[str, int] = field(default_factory=dict[str, int])

    @property
    def transformers_class(self) -> str:
        """The name of the family's language model in `transformers`, such as LlamaForCausalLM."""
        words = self.model_type.split("_")
        return "".join(word.capitalize() for word in words) + "ForCausalLM"


_MISTRAL = {"num_key_value_heads": 8, "max_position_embeddings": 1 << 17, "sliding_window": 4096}
_QWEN2 = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 1 << 15,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_QWEN3 = _QWEN2 | {"head_dim": 128}

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", "llama", "interleaved"),
        Family("mistral", "llama", "interleaved", window="stated", defaults=_MISTRAL),
        Family("qwen2", "qwen2", qkv_bias=True, window="switched", defaults=_QWEN2),
        Family("qwen3", "qwen3", qk_norm=True, window="switched", defaults=_QWEN3),
    )
}


def gguf_architectures() -> list[str]:
    """Every `general.architecture` that is supported."""
    return list(dict.fromkeys(f.gguf for f in FAMILIES.values() if f.gguf is not None))


def gguf_family(architecture: str, windowed: bool) -> Family | None:
    """The family of a GGUF file, None where none of that name has a window and the file does.

    Mistral's files are called llama; those that state their window are told apart by it.
    """
    named = [family for family in FAMILIES.values() if family.gguf == architecture]
    fitting = [family for family in named if not windowed or family.window != "never"]
    return fitting[0] if fitting else None
