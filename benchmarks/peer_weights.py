"""SmolLM2-135M's weights as peers read them, made once of our GGUF file: both are kept.

The INT8 file is written with the `gguf` package, by whose definition it is Q8_0.
"""

import json
import shutil
from pathlib import Path

import gguf
import torch
from safetensors.torch import save_file

from roofline.config import EngineConfig, WeightFormat
from roofline.models.builtin import cache_folder
from roofline.models.checkpoints.hf_config import write_config
from roofline.models.checkpoints.reading import tensor_groups
from roofline.models.checkpoints.tensors import tensor_shapes
from roofline.models.opening import open_model

_WRITTEN_ANEW = ("general.architecture", "general.file_type", "general.quantization_version")


def peers_folder() -> Path:
    """Where the peers' weights are kept."""
    return cache_folder() / "peers" / "smollm2-135m"


def write_q8_0(source: Path, target: Path) -> None:
    """Write the same file with every matrix in Q8_0."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(partial, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in _WRITTEN_ANEW:
            item = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], item)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    kind = gguf.GGMLQuantizationType.Q8_0
    for tensor in reader.tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(tensor.name, tensor.data)
            continue
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(target)


def write_safetensors(source: Path, folder: Path) -> None:
    """Write config.json, tokenizer and weights, dequantised and rounded to bfloat16."""
    if folder.exists():
        return
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    opened = open_model(str(source), EngineConfig())
    checkpoint = opened.checkpoint
    try:
        tensors = {
            name: torch.as_tensor(checkpoint.read(name)).bfloat16()
            for name in tensor_shapes(checkpoint.config)
        }
    finally:
        checkpoint.close()
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    groups = tensor_groups(checkpoint.config, WeightFormat(), {})
    config = json.loads(write_config(checkpoint.config, WeightFormat(), groups))
    del config["quantization_config"]
    config["dtype"] = "bfloat16"
    (partial / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    assert opened.tokenizer is not None
    opened.tokenizer.save(partial)
    partial.rename(folder)
