"""What a model's files say of it: its shape, its size, its tokenizer; no weights are read.

For people and scripts that ask, as `roofline show` does; nothing is loaded by it. No torch.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from roofline.config import EngineConfig
from roofline.errors import CheckpointError
from roofline.models.checkpoints.gguf import GGUFFile
from roofline.models.checkpoints.gguf_split import open_gguf
from roofline.models.checkpoints.safetensors_folder import weight_files
from roofline.models.checkpoints.tensors import tensor_shapes
from roofline.models.opening import describe, open_model
from roofline.models.repository import gguf_models


def model_facts(path: Path) -> dict[str, Any]:
    """What there is to know of the model at `path`; None for what its files do not say."""
    _, native_groups = describe(str(path))
    opened = open_model(str(path), EngineConfig(load_format="dummy"))
    config, tokenizer = opened.config, opened.tokenizer
    files = _weight_files(path)
    values = Counter[str]()  # by the type they are kept in
    for file in files:
        for dtype, shape in _tensors(file, "I8" if native_groups else "F32"):
            values[dtype] += math.prod(shape)
    snapshot = next((p for p in (path, *path.parents) if p.parent.name == "snapshots"), None)
    return {
        "family": config.architecture,
        "parameters": sum(math.prod(shape) for shape in tensor_shapes(config).values()),
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "context": config.max_position,
        "sliding_window": config.sliding_window,
        "vocab_size": config.vocab_size,
        "tied_embeddings": config.tie_word_embeddings,
        "dtypes": [dtype for dtype, _ in values.most_common()],
        "bytes": sum(file.stat().st_size for file in files),
        "tokenizer": None if tokenizer is None else tokenizer.kind,
        "chat_template": tokenizer is not None and tokenizer.chat_template is not None,
        "eos_token_ids": list(config.eos_token_ids),
        "license": _license(path),
        "path": str(path),
        "revision": None if snapshot is None else snapshot.name,
    }


def _weight_files(path: Path) -> list[Path]:
    """All files of the model's weights; none for a folder that has only the rest."""
    if path.is_dir():
        try:
            return weight_files(path)
        except CheckpointError:
            return []
    whole = gguf_models([file.name for file in path.parent.glob("*.gguf")])
    parts = next((parts for parts in whole.values() if path.name in parts), (path.name,))
    return [path.with_name(part) for part in parts]


def _tensors(file: Path, of_bin: str) -> Iterator[tuple[str, Sequence[int]]]:
    """Type and shape of each tensor in a file; `of_bin` is the type where a header has no names."""
    if file.suffix == ".bin":
        yield of_bin, (1,)
    elif file.suffix == ".gguf":
        with GGUFFile(file) as gguf:
            yield from ((info.type, info.shape) for info in gguf.tensors.values())
    else:
        try:
            with safe_open(file, framework="np") as opened:
                slices = [opened.get_slice(name) for name in opened.keys()]  # noqa: SIM118
                yield from ((found.get_dtype(), found.get_shape()) for found in slices)
        except (SafetensorError, OSError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{file}: not a usable safetensors file ({reason})") from error


def _license(path: Path) -> str | None:
    """The licence as a GGUF file states it; a folder has nowhere to."""
    if path.suffix != ".gguf":
        return None
    with open_gguf(path) as file:  # of a split model, the first part says it
        return file.get("general.license", str)
