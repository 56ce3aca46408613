"""A GGUF file as a checkpoint: its config, and its tensors by canonical name.

What llama.cpp renames and reorders when it converts a model is undone here. No parsing of bytes
(that is `gguf` and `gguf_dequantize`) and no tokenizer rules.
"""

import functools
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from roofline.config import ModelConfig, RopeScaling
from roofline.errors import CheckpointError, RooflineError, UnsupportedError
from roofline.models.checkpoints.gguf import GGUFFile, Kind, Value, described, quoted
from roofline.models.checkpoints.gguf_dequantize import Q8_0_GROUP_SIZE, dequantize, q8_0_groups
from roofline.models.checkpoints.gguf_split import open_gguf
from roofline.models.checkpoints.rotary_order import half_split, rotary_heads
from roofline.models.checkpoints.tensors import tensor_shapes
from roofline.models.families import FAMILIES, gguf_architectures, gguf_family


class GGUFCheckpoint:
    """An open GGUF model; every tensor its config calls for is there, in the right shape."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._gguf = open_gguf(path)
        self.file: Path = self._gguf.path
        self.config: ModelConfig = read_config(self._gguf)
        self._sources = _sources(self.config)
        interleaved = FAMILIES[self.config.architecture].gguf_rotary == "interleaved"
        self._interleaved_heads = rotary_heads(self.config) if interleaved else {}
        _check_tensors(self._gguf, self._sources)
        self.native_groups: Mapping[str, int] = {
            name: Q8_0_GROUP_SIZE
            for name, source in self._sources.items()
            if len(source.shape) == 2 and self._gguf.tensors[source.gguf_name].type == "Q8_0"
        }

    @property
    def metadata(self) -> Mapping[str, Value]:
        """The file's metadata; the keys `tokenizer.*` describe its tokenizer."""
        return self._gguf.metadata

    @property
    def matrix_bytes(self) -> dict[str, int]:
        """Bytes of the file's matrices by ggml's type, the most first."""
        found = Counter[str]()
        for info in self._gguf.tensors.values():
            if len(info.shape) == 2:
                found[info.type] += info.nbytes
        return dict(found.most_common())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every tensor's shape by canonical name: [N, K], or [n] for a norm or a bias."""
        return {name: source.shape for name, source in self._sources.items()}

    def read(self, name: str) -> NDArray[np.float32]:
        """Return a tensor as float32 [N, K] or [n], in memory of its own."""
        source = self._sources[name]
        info = self._gguf.tensors[source.gguf_name]
        values = dequantize(self._gguf.raw(info.name), info.type, math.prod(info.shape))
        return self._half_split(name, values.reshape(info.shape))

    def read_int8(self, name: str) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """Return a tensor of `native_groups`: int8 [N, K] and float32 scales [N, K / 32]."""
        source = self._sources[name]
        rows, columns = source.shape
        try:
            values, scales = q8_0_groups(self._gguf.raw(source.gguf_name), rows, columns)
        except CheckpointError as error:
            raise CheckpointError(f"{self.file}: {source.gguf_name}: {error.message}") from None
        return self._half_split(name, values), self._half_split(name, scales)

    def close(self) -> None:
        """Let go of the file."""
        self._gguf.close()

    def _half_split(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Undo what llama.cpp's converter (`LlamaModel.permute`) does to the rows of Q and K."""
        heads = self._interleaved_heads.get(name)
        return rows if heads is None else half_split(rows, heads)


def read_config(file: GGUFFile) -> ModelConfig:
    """Return the model's config; what would change its answers unseen is refused by name."""
    keys = _Keys(file)
    _refuse_what_is_not_done(keys)
    heads = keys.require("attention.head_count", int)
    kv_heads = keys.get("attention.head_count_kv", int)
    head_dim = _head_dim(keys, heads)
    theta = keys.get("rope.freq_base", float)
    window = keys.get("attention.sliding_window", int) or None  # 0 is none
    family = gguf_family(keys.architecture, windowed=window is not None)
    if family is None:
        raise UnsupportedError(
            f"{file.path}: {keys.full('attention.sliding_window')} {window} is not supported; "
            "supported: 0, or no such key"
        )
    build = functools.partial(
        ModelConfig,
        hidden_size=keys.require("embedding_length", int),
        intermediate_size=keys.require("feed_forward_length", int),
        num_layers=keys.require("block_count", int),
        num_heads=heads,
        num_kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=head_dim,
        vocab_size=_vocab_size(keys),
        max_position=keys.require("context_length", int),
        rms_norm_eps=keys.require("attention.layer_norm_rms_epsilon", float),
        rope_theta=_DEFAULT_ROPE_THETA if theta is None else theta,
        tie_word_embeddings=_HEAD not in file.tensors,
        rope_scaling=_rope_scaling(keys),
        rope_factors=_rope_factors(file, head_dim),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        sliding_window=window,
        architecture=family.model_type,
        bos_token_id=file.get("tokenizer.ggml.bos_token_id", int),
        eos_token_ids=_eos_token_ids(file),
    )
    try:
        return build()
    except RooflineError as error:  # of a config that does not know its file
        raise type(error)(f"{file.path}: {error.message}") from None


class _Keys:
    """The metadata under the architecture's own name, `llama.` or `qwen2.`."""

    def __init__(self, file: GGUFFile) -> None:
        self.file, self.architecture = file, file.require("general.architecture", str)
        if self.architecture not in gguf_architectures():
            raise UnsupportedError(
                f"{file.path}: architecture {quoted(self.architecture)} is not supported; "
                f"supported: {', '.join(gguf_architectures())}"
            )

    def full(self, name: str) -> str:
        """The whole key."""
        return f"{self.architecture}.{name}"

    def get(self, name: str, kind: type[Kind]) -> Kind | None:
        """The value of a key, None where it is absent."""
        return self.file.get(self.full(name), kind)

    def require(self, name: str, kind: type[Kind]) -> Kind:
        """The value of a key that must be there."""
        return self.file.require(self.full(name), kind)


def _refuse_what_is_not_done(keys: _Keys) -> None:
    own = {keys.full(name): neutral for name, neutral in _NEUTRAL.items()}
    for key, neutral in (_NEUTRAL_OF_FILE | own).items():
        value = keys.file.metadata.get(key)
        scalar = isinstance(value, bool | int | float | str)
        if value is not None and not (scalar and value in neutral):
            raise UnsupportedError(
                f"{keys.file.path}: {key} is {described(value)}, which is not supported; "
                f"supported: {neutral[0]}, or no such key"
            )


def _head_dim(keys: _Keys, heads: int) -> int:
    head_dim = keys.get("attention.key_length", int)
    if head_dim is None:
        hidden = keys.require("embedding_length", int)
        if min(hidden, heads) < 1 or hidden % heads:
            raise CheckpointError(
                f"{keys.file.path}: {keys.full('embedding_length')} {hidden} is no positive "
                f"multiple of {keys.full('attention.head_count')} {heads}, "
                f"and {keys.full('attention.key_length')} is missing"
            )
        head_dim = hidden // heads
    for name in ("attention.value_length", "rope.dimension_count"):
        size = keys.get(name, int)
        if size is not None and size != head_dim:
            raise UnsupportedError(
                f"{keys.file.path}: {keys.full(name)} {size} is not supported; "
                f"supported: the head size, {head_dim}"
            )
    return head_dim


def _vocab_size(keys: _Keys) -> int:
    file, stated = keys.file, keys.get("vocab_size", int)
    tokens = file.get("tokenizer.ggml.tokens", list)
    if stated is not None and tokens is not None and stated != len(tokens):
        raise CheckpointError(
            f"{file.path}: {keys.full('vocab_size')} is {stated}, "
            f"but tokenizer.ggml.tokens has {len(tokens)} entries"
        )
    if stated is not None:
        return stated
    if tokens is not None:
        return len(tokens)
    embedding = file.tensors.get(_EMBEDDING)
    if embedding is None:
        raise CheckpointError(f"{file.path}: tensor {quoted(_EMBEDDING)} is missing")
    return embedding.shape[0]


def _rope_scaling(keys: _Keys) -> RopeScaling | None:
    """Return linear scaling or none; a factor without a type is linear, as in llama.cpp."""
    kind = keys.get("rope.scaling.type", str) or "linear"
    if kind not in ("none", "linear"):
        raise UnsupportedError(
            f"{keys.file.path}: {keys.full('rope.scaling.type')} {quoted(kind)} is not supported; "
            "supported: none, linear, and llama3 as a rope_freqs.weight tensor"
        )
    factor = keys.get("rope.scaling.factor", float)
    if factor is None:
        factor = keys.get("rope.scale_linear", float)
    if kind == "none" or factor is None or factor in (0.0, 1.0):
        return None
    return RopeScaling("linear", factor)


def _rope_factors(file: GGUFFile, head_dim: int) -> tuple[float, ...] | None:
    info = file.tensors.get(_ROPE_FACTORS)
    if info is None:
        return None
    _check_shape(file, _ROPE_FACTORS, (head_dim // 2,))
    return tuple(dequantize(file.raw(info.name), info.type, head_dim // 2).tolist())


def _eos_token_ids(file: GGUFFile) -> tuple[int, ...]:
    """Return every id that ends an answer: of the text, of a turn, of a message."""
    keys = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
    ids = (file.get(key, int) for key in keys)
    return tuple(dict.fromkeys(token for token in ids if token is not None))


@dataclass(frozen=True)
class _Source:
    """Where a canonical tensor comes from."""

    gguf_name: str
    shape: tuple[int, ...]


def _sources(config: ModelConfig) -> dict[str, _Source]:
    """Return every tensor the config calls for, by canonical name."""
    sources: dict[str, _Source] = {}
    for name, shape in tensor_shapes(config).items():
        if name in _OUTER:
            sources[name] = _Source(_OUTER[name], shape)
            continue
        _, _, layer, piece = name.split(".", 3)  # model.layers.<layer>.<piece>.<kind>
        piece, kind = piece.rsplit(".", 1)
        sources[name] = _Source(f"blk.{layer}.{_PIECES[piece]}.{kind}", shape)
    return sources


def _check_tensors(file: GGUFFile, sources: Mapping[str, _Source]) -> None:
    """Refuse a file whose tensors are not exactly those of its config."""
    expected = {source.gguf_name: source.shape for source in sources.values()}
    missing = [name for name in expected if name not in file.tensors]
    if missing:
        raise CheckpointError(f"{file.path}: {_listed(missing)} missing")
    extra = [name for name in file.tensors if name not in expected and name != _ROPE_FACTORS]
    biases = [name for name in extra if name.endswith(".bias")]
    if biases:
        raise UnsupportedError(
            f"{file.path}: {_listed(biases)} not supported; supported: {_BIASES}"
        )
    if extra:
        raise CheckpointError(f"{file.path}: {_listed(extra)} no part of the model it describes")
    for name, shape in expected.items():
        _check_shape(file, name, shape)


def _check_shape(file: GGUFFile, name: str, shape: tuple[int, ...]) -> None:
    found = file.tensors[name].shape
    if found != shape:
        raise CheckpointError(
            f"{file.path}: tensor {quoted(name)} has shape {list(found)}, "
            f"but its metadata makes that {list(shape)}"
        )


def _listed(names: list[str]) -> str:
    """Return "tensor 'a' is", or "tensors 'a', 'b', 'c' and 9 more are"."""
    shown = ", ".join(map(quoted, names[:3])) + (
        f" and {len(names) - 3} more" if len(names) > 3 else ""
    )
    return f"tensor {shown} is" if len(names) == 1 else f"tensors {shown} are"


_DEFAULT_ROPE_THETA = 10000.0
_EMBEDDING, _HEAD, _ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"

_OUTER = {
    "model.embed_tokens.weight": _EMBEDDING,
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": _HEAD,
}
_PIECES = {  # of a layer
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_BIASES = "linear layers without bias, and Qwen2's of Q, K and V"

# Keys that change the answer when they hold anything else: the file's, and the architecture's.
_NEUTRAL_OF_FILE: dict[str, tuple[Value, ...]] = {"general.type": ("model",)}
_NEUTRAL: dict[str, tuple[Value, ...]] = {
    "expert_count": (0,),
    "attention.causal": (True,),
    "attention.sliding_window_pattern": (0,),
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "embedding_scale": (1.0, 0.0),
    "residual_scale": (1.0, 0.0),
    "logit_scale": (1.0, 0.0),
    "rope.scaling.attn_factor": (1.0,),
}
