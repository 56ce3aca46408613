"""From what a user names to an opened model: its checkpoint, its tokenizer and how it generates.

Nothing of the weights is read here; describing a model imports no torch.
"""

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from roofline.budget import NativeGroups, Rank, plan_model
from roofline.config import PRESETS, EngineConfig, ModelConfig, WeightFormat, option_path
from roofline.errors import CheckpointError, UnsupportedError, UsageError
from roofline.models.checkpoints import Checkpoint
from roofline.models.checkpoints.dummy import DummyCheckpoint
from roofline.models.checkpoints.generation_config import (
    GENERATION_CONFIG,
    GenerationConfig,
    gguf_generation_config,
    read_generation_config,
)
from roofline.models.checkpoints.gguf_checkpoint import GGUFCheckpoint
from roofline.models.checkpoints.gguf_split import open_gguf
from roofline.models.checkpoints.hf_config import read_config
from roofline.models.checkpoints.llama2c import Llama2cCheckpoint, is_pickle
from roofline.models.checkpoints.safetensors_folder import INDEX, SINGLE, SafetensorsCheckpoint
from roofline.models.hub import resolve
from roofline.tokenizer import Tokenizer, read_chat_template


@dataclasses.dataclass(frozen=True)
class OpenedModel:
    """A model ready to load; whoever loads it closes the checkpoint."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer | None = None  # a shape alone may have none
    generation: GenerationConfig = dataclasses.field(default_factory=GenerationConfig)

    @property
    def config(self) -> ModelConfig:
        """The checkpoint's config, with every id that ends an answer, whichever file names it."""
        config, tokenizer = self.checkpoint.config, self.tokenizer
        ids = (*config.eos_token_ids, *self.generation.eos_token_ids)
        ids += tokenizer.eos_token_ids if tokenizer else ()
        return dataclasses.replace(config, eos_token_ids=tuple(dict.fromkeys(ids)))

    @property
    def sampling_defaults(self) -> Mapping[str, Any]:
        """Fields of SamplingParams, checked, that the model's files give values of their own."""
        return self.generation.sampling

    def growth(self, weights: WeightFormat) -> str | None:
        """One line where weights take less room in the file than INT8 does; else None."""
        checkpoint = self.checkpoint
        if weights.quantization != "int8" or not isinstance(checkpoint, GGUFCheckpoint):
            return None
        stored = checkpoint.matrix_bytes
        plan = plan_model(checkpoint.config, weights, Rank(), checkpoint.native_groups)
        if sum(stored.values()) >= sum(matrix.weight_bytes for matrix in plan.matrices()):
            return None
        held = sum(matrix.weight_bytes + matrix.scale_bytes for matrix in plan.matrices())
        return (
            f"{checkpoint.file.name}: {sum(stored.values()) / 1e6:,.1f} MB of weights in the file "
            f"({', '.join(stored)}) take {held / 1e6:,.1f} MB in memory: Roofline computes in INT8"
        )


def open_model(reference: str, config: EngineConfig) -> OpenedModel:
    """Open a path, a built-in name, a Hugging Face repository, or (dummy) a preset."""
    dummy = config.load_format == "dummy"
    path = None
    if not dummy or reference not in PRESETS or config.revision is not None:
        fetch = "config" if dummy else "model"
        path = resolve(reference, revision=config.revision, fetch=fetch)
    with contextlib.ExitStack() as unless_kept:
        source = _source(reference, path, config)
        unless_kept.callback(source.close)
        if config.rotary_order != "auto" and (dummy or not isinstance(source, Llama2cCheckpoint)):
            raise UsageError(
                f"rotary_order {config.rotary_order} is for the weights of a .bin file; "
                f"{reference} loads none, so drop it"
            )
        tokenizer = _tokenizer(path, source, config)
        generation = _generation(path, source, config)
        checkpoint = source
        if dummy:
            checkpoint = DummyCheckpoint(source.config, config.seed)
        elif path is not None and path.is_dir():
            checkpoint = _safetensors(path)
        else:
            unless_kept.pop_all()
        return OpenedModel(checkpoint, tokenizer, generation)


def describe(reference: str, revision: str | None = None) -> tuple[ModelConfig, NativeGroups]:
    """A model's shape and which of its tensors are INT8 on disk; no weights, no torch."""
    if reference in PRESETS and revision is None:
        return PRESETS[reference], {}
    path = resolve(reference, revision=revision, fetch="config")
    if path.is_dir():
        return _folder_config(path)
    with contextlib.closing(_checkpoint(path, EngineConfig())) as checkpoint:
        return checkpoint.config, checkpoint.native_groups


def _source(reference: str, path: Path | None, config: EngineConfig) -> Checkpoint:
    """A file as a checkpoint; the shape of a preset or a folder, without its weights yet."""
    if path is None:
        return DummyCheckpoint(PRESETS[reference], config.seed)
    if path.is_dir():
        return DummyCheckpoint(_folder_config(path)[0], config.seed)
    return _checkpoint(path, config)


def _safetensors(folder: Path) -> SafetensorsCheckpoint:
    if not any((folder / name).exists() for name in (SINGLE, INDEX)):
        _refuse_single_files(folder, f"neither {SINGLE} nor {INDEX}")
    return SafetensorsCheckpoint(folder)


def _folder_config(folder: Path) -> tuple[ModelConfig, NativeGroups]:
    """`read_config` of a folder; one that holds a model in one file is told to name that."""
    if not (folder / "config.json").exists():
        _refuse_single_files(folder, "no config.json")
    return read_config(folder)


def _refuse_single_files(folder: Path, lacks: str) -> None:
    """UsageError that names a file of the folder which is a whole model, if there is one."""
    files = sorted([*folder.glob("*.gguf"), *folder.glob("*.bin")])
    models = [file for file in files if file.name != "tokenizer.bin" and not is_pickle(file)]
    if models:
        kind = "GGUF" if models[0].suffix == ".gguf" else ".bin"
        raise UsageError(f"{folder}: {lacks}; to run a {kind} file, name it: {models[0]}")


def _checkpoint(path: Path, config: EngineConfig) -> GGUFCheckpoint | Llama2cCheckpoint:
    """The file as its name says; files that are known to be something else are told so."""
    if path.suffix == ".bin":
        order = None if config.rotary_order == "auto" else config.rotary_order
        return Llama2cCheckpoint(path, rotary_order=order)
    if path.suffix in (".safetensors", ".json"):
        raise UsageError(f"{path}: a part of a model; name the folder that holds it: {path.parent}")
    if path.suffix in (".pt", ".pth", ".ckpt", ".pkl"):
        raise UnsupportedError(
            f"{path}: not loaded: a pickle can run code; give a safetensors folder, "
            "a .gguf file or a .bin file of llama2.c"
        )
    return GGUFCheckpoint(path)


def _tokenizer(path: Path | None, source: Checkpoint, config: EngineConfig) -> Tokenizer | None:
    """The tokenizer and chat template that are asked for, or else the model's own."""
    if config.tokenizer is None:
        tokenizer = _own_tokenizer(path, source, dummy=config.load_format == "dummy")
    else:
        tokenizer = _read_tokenizer(config.tokenizer)
    where = path if config.tokenizer is None else f"tokenizer {config.tokenizer}"
    if tokenizer is not None and tokenizer.vocab_size > source.config.vocab_size:
        raise CheckpointError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} tokens, "
            f"but the embedding {source.config.vocab_size} rows"
        )
    if config.chat_template is None:
        return tokenizer
    if tokenizer is None:
        raise UsageError("chat_template needs a tokenizer, and this model has none; add tokenizer")
    return tokenizer.with_chat_template(read_chat_template(config.chat_template))


def _own_tokenizer(path: Path | None, source: Checkpoint, *, dummy: bool) -> Tokenizer | None:
    """The tokenizer in the model's file or beside it; a dummy may be without."""
    if isinstance(source, GGUFCheckpoint):
        return Tokenizer.from_gguf(source.metadata, str(source.file))
    if path is None:
        return None
    folder = path if path.is_dir() else path.parent
    if path != folder and (folder / "tokenizer.bin").exists():  # llama2.c's, of a .bin file
        return Tokenizer.from_llama2c(folder / "tokenizer.bin")
    if (folder / "tokenizer.json").exists() or (path == folder and not dummy):
        return Tokenizer.from_folder(folder)
    if dummy:
        return None
    raise UsageError(
        f"{path}: holds no tokenizer; put its tokenizer.bin (or tokenizer.json) into {folder}, "
        "or name one with --tokenizer"
    )


def _read_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a file or folder named for it alone."""
    path = option_path("tokenizer", name, _TOKENIZERS)
    if path.suffix == ".gguf":
        with open_gguf(path) as file:
            return Tokenizer.from_gguf(file.metadata, str(path))
    if path.suffix == ".bin":
        return Tokenizer.from_llama2c(path)
    if path.name == "tokenizer.json":
        return Tokenizer.from_folder(path.parent)
    if path.is_dir():
        return Tokenizer.from_folder(path)
    raise UsageError(f"tokenizer {name}: no file of that name is known; give {_TOKENIZERS}")


def _generation(path: Path | None, source: Checkpoint, config: EngineConfig) -> GenerationConfig:
    """How to generate, from the file that is asked for or else the model's own."""
    vocab_size, asked = source.config.vocab_size, config.generation_config
    if asked == "none":
        return GenerationConfig()
    if asked != "auto":
        named = option_path("generation_config", asked, "a file, a folder with one, auto or none")
        return read_generation_config(
            named / GENERATION_CONFIG if named.is_dir() else named, vocab_size
        )
    if isinstance(source, GGUFCheckpoint):
        return gguf_generation_config(source.metadata, str(source.file))
    if path is not None and path.is_dir() and (path / GENERATION_CONFIG).exists():
        return read_generation_config(path / GENERATION_CONFIG, vocab_size)
    return GenerationConfig()


_TOKENIZERS = "a folder with a tokenizer.json, a tokenizer.json, a tokenizer.bin or a .gguf file"
