"""From what a user names to an opened model: its checkpoint and its tokenizer, whatever the format.

Nothing of the weights is read here; describing a model imports no torch.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from roofline.budget import NativeGroups
from roofline.config import PRESETS, ModelConfig
from roofline.errors import CheckpointError, UnsupportedError, UsageError
from roofline.models.checkpoints import Checkpoint
from roofline.models.checkpoints.dummy import DummyCheckpoint
from roofline.models.checkpoints.gguf_checkpoint import GGUFCheckpoint
from roofline.models.checkpoints.hf_config import read_config
from roofline.models.checkpoints.llama2c import Llama2cCheckpoint
from roofline.models.checkpoints.safetensors_folder import SafetensorsCheckpoint
from roofline.models.hub import resolve
from roofline.tokenizer import Tokenizer


@dataclass(frozen=True)
class OpenedModel:
    """A model ready to load; whoever loads it closes the checkpoint."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer | None  # a shape alone may have none


def open_model(
    reference: str, load_format: str, seed: int, revision: str | None = None
) -> OpenedModel:
    """Open a path, a built-in name, a Hugging Face repository, or (dummy) a preset."""
    dummy = load_format == "dummy"
    if dummy and reference in PRESETS and revision is None:
        return OpenedModel(DummyCheckpoint(PRESETS[reference], seed), None)
    path = resolve(reference, revision=revision, fetch="config" if dummy else "model")
    return _open_folder(path, dummy, seed) if path.is_dir() else _open_file(path, dummy, seed)


def describe(reference: str, revision: str | None = None) -> tuple[ModelConfig, NativeGroups]:
    """A model's shape and which of its tensors are INT8 on disk; no weights, no torch."""
    if reference in PRESETS and revision is None:
        return PRESETS[reference], {}
    path = resolve(reference, revision=revision, fetch="config")
    if path.is_dir():
        return _folder_config(path)
    with contextlib.closing(_checkpoint(path)) as checkpoint:
        return checkpoint.config, checkpoint.native_groups


def _open_folder(folder: Path, dummy: bool, seed: int) -> OpenedModel:
    config, _ = _folder_config(folder)
    has_tokenizer = (folder / "tokenizer.json").exists()
    tokenizer = Tokenizer.from_folder(folder) if has_tokenizer or not dummy else None
    _check_vocabulary(folder, config, tokenizer)
    checkpoint = DummyCheckpoint(config, seed) if dummy else SafetensorsCheckpoint(folder)
    return OpenedModel(checkpoint, tokenizer)


def _open_file(path: Path, dummy: bool, seed: int) -> OpenedModel:
    with contextlib.ExitStack() as unless_kept:
        checkpoint = _checkpoint(path)
        unless_kept.callback(checkpoint.close)
        if isinstance(checkpoint, GGUFCheckpoint):
            tokenizer = Tokenizer.from_gguf(checkpoint.tokenizer_metadata, str(path))
        else:
            tokenizer = _tokenizer_beside(path, dummy)
        _check_vocabulary(path, checkpoint.config, tokenizer)
        if dummy:
            return OpenedModel(DummyCheckpoint(checkpoint.config, seed), tokenizer)
        unless_kept.pop_all()
        return OpenedModel(checkpoint, tokenizer)


def _folder_config(folder: Path) -> tuple[ModelConfig, NativeGroups]:
    """`read_config` of a folder; one that holds a model in one file is told to name that."""
    files = sorted([*folder.glob("*.gguf"), *folder.glob("*.bin")])
    models = [file for file in files if file.name != "tokenizer.bin"]
    if models and not (folder / "config.json").exists():
        kind = "GGUF" if models[0].suffix == ".gguf" else ".bin"
        raise UsageError(f"{folder}: no config.json; to run a {kind} file, name it: {models[0]}")
    return read_config(folder)


def _checkpoint(path: Path) -> GGUFCheckpoint | Llama2cCheckpoint:
    """The file as its name says; files that are known to be something else are told so."""
    if path.suffix == ".bin":
        return Llama2cCheckpoint(path)
    if path.suffix in (".safetensors", ".json"):
        raise UsageError(f"{path}: a part of a model; name the folder that holds it: {path.parent}")
    if path.suffix in (".pt", ".pth", ".ckpt", ".pkl"):
        raise UnsupportedError(
            f"{path}: not loaded: a pickle can run code; give a safetensors folder, "
            "a .gguf file or a .bin file of llama2.c"
        )
    return GGUFCheckpoint(path)


def _tokenizer_beside(path: Path, dummy: bool) -> Tokenizer | None:
    """The tokenizer in a .bin file's folder: llama2.c's, or else Hugging Face's."""
    own = path.with_name("tokenizer.bin")
    if own.exists():
        return Tokenizer.from_llama2c(own)
    if path.with_name("tokenizer.json").exists():
        return Tokenizer.from_folder(path.parent)
    if dummy:
        return None
    raise UsageError(
        f"{path}: holds no tokenizer; put its tokenizer.bin (or tokenizer.json) into {path.parent}"
    )


def _check_vocabulary(path: Path, config: ModelConfig, tokenizer: Tokenizer | None) -> None:
    """A tokenizer must not name tokens the embedding lacks."""
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, "
            f"but the embedding {config.vocab_size} rows"
        )
