"""SmolLM2-135M's weights as peers read them: a Hugging Face folder in bfloat16 of our GGUF file.

It needs no more than Roofline does. What else a peer wants, it makes of these two.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from roofline.config import EngineConfig, WeightFormat
from roofline.models.builtin import cache_folder
from roofline.models.checkpoints.hf_config import write_config
from roofline.models.checkpoints.reading import tensor_groups
from roofline.models.checkpoints.tensors import tensor_shapes
from roofline.models.opening import open_model


def peers_folder() -> Path:
    """Where the peers' weights are kept."""
    return cache_folder() / "peers" / "smollm2-135m"


def write_safetensors(gguf: Path, folder: Path) -> None:
    """Write config.json, tokenizer and weights, dequantised and rounded to bfloat16, once."""
    if folder.exists():
        return
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    opened = open_model(str(gguf), EngineConfig())
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
