"""A transformers model of Llama's architecture as llama.cpp's converter writes it, for tests."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
from transformers import LlamaForCausalLM

from tests.llama2c_writer import interleave
from tests.sentencepiece_model import gguf_metadata


def write_gguf(
    model: LlamaForCausalLM,
    path: Path,
    *,
    matrices: str = "F32",
    floats: Mapping[str, float] | None = None,
    **split: Any,
) -> Path:
    """Write the model with the tokenizer of the tests; `split` is the writer's, for parts."""
    writer, config = gguf.GGUFWriter(path, "llama", **split), model.config
    heads: dict[str, int] = {"attn_q": config.num_attention_heads, "attn_k": 2}
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads["attn_q"])
    writer.add_head_count_kv(heads["attn_k"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for key, value in (floats or {}).items():
        writer.add_float32(key, value)
    metadata = gguf_metadata()
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(metadata["tokenizer.ggml.tokens"])
    writer.add_token_scores(metadata["tokenizer.ggml.scores"].tolist())
    writer.add_token_types(metadata["tokenizer.ggml.token_type"].tolist())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        stored = names.get_name(name, try_suffixes=(".weight",)) or name
        ordered = interleave(weight, heads.get(stored.split(".")[-2], 0)).contiguous().numpy()
        kind = gguf.GGMLQuantizationType[matrices if ordered.ndim == 2 else "F32"]
        writer.add_tensor(stored, gguf.quants.quantize(ordered, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
