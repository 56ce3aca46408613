"""From what a user names to an opened model: its checkpoint and its tokenizer, whatever the format."""

from dataclasses import dataclass
from pathlib import Path

from roofline.budget import NativeGroups
from roofline.config import PRESETS, ModelConfig
from roofline.errors import UnsupportedError, UsageError
from roofline.models.checkpoints import Checkpoint
from roofline.models.checkpoints.dummy import DummyCheckpoint
from roofline.models.checkpoints.gguf_checkpoint import GGUFCheckpoint
from roofline.models.checkpoints.hf_config import read_config
from roofline.models.checkpoints.safetensors_folder import SafetensorsCheckpoint
from roofline.models.hub import resolve
from roofline.tokenizer import Tokenizer


@dataclass(frozen=True)
class OpenedModel:
    """A model ready to load: nothing of its weights has been read."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer | None  # a preset has none


def open_model(reference: str, load_format: str, seed: int) -> OpenedModel:
    """Open a built-in name, a .gguf file, a safetensors folder, or (dummy) a preset's shape."""
    if load_format == "dummy" and reference in PRESETS:
        return OpenedModel(DummyCheckpoint(PRESETS[reference], seed), None)
    path = resolve(reference, presets=PRESETS)
    if path.is_dir():
        dummy = load_format == "dummy"
        tokenizer = Tokenizer.from_folder(path) if _has_tokenizer(path) or not dummy else None
        if dummy:
            return OpenedModel(DummyCheckpoint(read_config(path)[0], seed), tokenizer)
        opened = OpenedModel(SafetensorsCheckpoint(path), tokenizer)
    else:
        checkpoint = _open_file(path)
        tokenizer = Tokenizer.from_gguf(checkpoint.tokenizer_metadata, str(path))
        if load_format == "dummy":
            return OpenedModel(DummyCheckpoint(checkpoint.config, seed), tokenizer)
        opened = OpenedModel(checkpoint, tokenizer)
    _check_vocabulary(path, opened)
    return opened


def describe(reference: str) -> tuple[ModelConfig, NativeGroups]:
    """A model's shape and which of its tensors are INT8 on disk; no weights, no torch."""
    if reference in PRESETS:
        return PRESETS[reference], {}
    path = resolve(reference)
    if path.is_dir():
        return read_config(path)
    checkpoint = _open_file(path)
    try:
        return checkpoint.config, checkpoint.native_groups
    finally:
        checkpoint.close()


def _open_file(path: Path) -> GGUFCheckpoint:
    if path.suffix in (".safetensors", ".json"):
        raise UsageError(f"{path}: name the folder that holds it: {path.parent}")
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        raise UnsupportedError(
            f"{path}: not loaded: a pickle can run code; give a .gguf file or a safetensors folder"
        )
    return GGUFCheckpoint(path)


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file()


def _check_vocabulary(path: Path, model: OpenedModel) -> None:
    """A tokenizer must not name tokens the embedding lacks."""
    if model.tokenizer is None:
        return
    tokens, rows = model.tokenizer.vocab_size, model.checkpoint.config.vocab_size
    if tokens > rows:
        raise UsageError(f"{path}: the tokenizer has {tokens} tokens, but the embedding {rows} rows")
