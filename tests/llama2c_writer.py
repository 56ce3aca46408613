"""llama2.c's .bin files as its exporters lay them out, for tests: the model and the tokenizer."""

import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

LAYOUTS = ("v0", "v1", "v2", "kuiper")
FILE_GROUP_SIZE = 64  # the exporters' own


def random_llama(seed: int = 0, **shape: Any) -> LlamaForCausalLM:
    """A model of llama2.c's constants; weights large enough that its logits differ."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,  # of groups of 64, some straddle two rows of w2
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 300,
        "max_position_embeddings": 64,
    }
    config = LlamaConfig(
        **(sizes | shape),
        rms_norm_eps=1e-5,
        initializer_range=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight += torch.randn(weight.shape) * 0.1
    return model


def write_model(
    model: LlamaForCausalLM, path: Path, layout: str, group: int = FILE_GROUP_SIZE
) -> Path:
    """Write a checkpoint; the model then holds the weights of the file, INT8 ones dequantised."""
    writer = _Writer(model, group)
    with path.open("wb") as file:
        getattr(writer, f"write_{layout}")(file)
    return path


def write_tokenizer(path: Path, pieces: Iterable[tuple[bytes, float]]) -> Path:
    """Write a tokenizer.bin of (bytes, score)."""
    listed = list(pieces)
    entries = [struct.pack("<fi", score, len(text)) + text for text, score in listed]
    path.write_bytes(struct.pack("<i", max(len(text) for text, _ in listed)) + b"".join(entries))
    return path


class _Writer:
    """One exporter's view of a transformers model: rows of Q and K in the order llama2.c rotates.

    KuiperLLama's exporter leaves them in the order of Hugging Face.
    """

    def __init__(self, model: LlamaForCausalLM, group: int) -> None:
        self._model, self._config, self._group = model, model.config, group
        self._tied = model.config.tie_word_embeddings
        self._head_dim: int = self._config.hidden_size // self._config.num_attention_heads

    def write_v0(self, file: BinaryIO) -> None:
        file.write(self._fields(signed=True))
        self._floats(file, self._embedding, *self._layers("input_layernorm"))
        for part in ("q", "k", "v", "o"):
            self._floats(file, *self._layers(f"self_attn.{part}_proj"))
        self._floats(file, *self._layers("post_attention_layernorm"))
        for part in ("gate", "down", "up"):
            self._floats(file, *self._layers(f"mlp.{part}_proj"))
        self._floats(file, self._model.model.norm.weight)
        positions = torch.arange(self._config.max_position_embeddings)
        dim = self._head_dim
        angles = torch.outer(positions, 10000.0 ** (-torch.arange(0, dim, 2) / dim))
        self._floats(file, angles.cos(), angles.sin())
        if not self._tied:
            self._floats(file, self._model.lm_head.weight)

    def write_v1(self, file: BinaryIO) -> None:
        self._write_versioned(file, 1, b"", self._floats)

    def write_v2(self, file: BinaryIO) -> None:
        self._write_versioned(file, 2, struct.pack("<i", self._group), self._int8)

    def write_kuiper(self, file: BinaryIO) -> None:
        file.write(self._fields(signed=True) + struct.pack("<i", self._group))
        for part in ("q", "k", "v", "o"):
            self._int8(file, *self._layers(f"self_attn.{part}_proj"), interleaved=False)
        for part in ("gate", "down", "up"):
            self._int8(file, *self._layers(f"mlp.{part}_proj"))
        if not self._tied:
            self._int8(file, self._model.lm_head.weight)
        self._floats(file, self._embedding, *self._layers("input_layernorm"))
        self._floats(file, *self._layers("post_attention_layernorm"))
        self._floats(file, self._model.model.norm.weight)

    def _write_versioned(
        self, file: BinaryIO, version: int, flags: bytes, matrices: Callable[..., None]
    ) -> None:
        header = struct.pack("<Ii", 0x616B3432, version) + self._fields(signed=False)
        file.write((header + struct.pack("<B", self._tied) + flags).ljust(256, b"\0"))
        self._floats(file, *self._layers("input_layernorm"))
        self._floats(file, *self._layers("post_attention_layernorm"))
        self._floats(file, self._model.model.norm.weight)
        matrices(file, self._embedding)
        for part in ("q", "k", "v", "o"):
            matrices(file, *self._layers(f"self_attn.{part}_proj"))
        for part in ("gate", "down", "up"):
            matrices(file, *self._layers(f"mlp.{part}_proj"))
        if not self._tied:
            matrices(file, self._model.lm_head.weight)

    @property
    def _embedding(self) -> Tensor:
        return self._model.model.embed_tokens.weight

    def _fields(self, *, signed: bool) -> bytes:
        c = self._config
        vocabulary = -c.vocab_size if signed and not self._tied else c.vocab_size
        heads = (c.num_attention_heads, c.num_key_value_heads)
        sizes = (c.hidden_size, c.intermediate_size, c.num_hidden_layers, *heads, vocabulary)
        return struct.pack("<7i", *sizes, c.max_position_embeddings)

    def _layers(self, part: str) -> list[Tensor]:
        return [layer.get_submodule(part).weight for layer in self._model.model.layers]

    def _heads(self, weight: Tensor) -> int:
        """How many heads the rows of Q or K are of; 0 for another tensor."""
        for layer in self._model.model.layers:
            attention = layer.self_attn
            if weight is attention.q_proj.weight or weight is attention.k_proj.weight:
                return len(weight) // self._head_dim
        return 0

    def _floats(self, file: BinaryIO, *weights: Tensor) -> None:
        for weight in weights:
            file.write(interleave(weight, self._heads(weight)).contiguous().numpy().tobytes())

    def _int8(self, file: BinaryIO, *weights: Tensor, interleaved: bool = True) -> None:
        for weight in weights:
            heads = self._heads(weight) if interleaved else 0
            flat = interleave(weight, heads).reshape(-1, self._group)
            scales = flat.abs().amax(1) / 127
            values = torch.where(scales[:, None] > 0, flat / scales[:, None], 0).round()
            file.write(values.to(torch.int8).numpy().tobytes() + scales.numpy().tobytes())
            as_read = (values * scales[:, None]).reshape(weight.shape)
            weight.copy_(_half_split(as_read, heads))


def interleave(rows: Tensor, heads: int) -> Tensor:
    """From the order of Hugging Face to that in which rows 2i and 2i + 1 of a head rotate."""
    if not heads:
        return rows
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _half_split(rows: Tensor, heads: int) -> Tensor:
    """And back."""
    if not heads:
        return rows
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
