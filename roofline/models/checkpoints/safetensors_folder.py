"""A folder of safetensors files with a config.json: floats, or INT8 groups written by us.

Parsing is the safetensors package's, which maps the files; here names, shapes and types are held
against the config. torch comes in when the first file is opened, not with this module.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from roofline.config import ModelConfig
from roofline.errors import CheckpointError, UnsupportedError
from roofline.models.checkpoints.hf_config import read_config
from roofline.models.checkpoints.json_fields import parse_json, read_json
from roofline.models.checkpoints.tensors import HEAD, matrix_shapes, tensor_shapes

FLOATS = ("F32", "F16", "BF16")
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_MAX_HEADER_BYTES = 8 << 20  # of one file: 75,000 tensors; real ones have some hundreds
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class SafetensorsCheckpoint:
    """`Checkpoint` over a folder, its tensors checked against the config when opened."""

    def __init__(self, folder: Path) -> None:
        self.config, self.native_groups = read_config(folder)
        self._folder = folder
        self._files: dict[str, Any] = {}  # tensor name -> open file that holds it
        for path in weight_files(folder):
            self._add_file(path)
        self._check_tensors()

    def read(self, name: str) -> Any:
        """The tensor as floats, dequantised where it is INT8: torch [N, K] or [n]."""
        if name not in self.native_groups:
            return self._files[name].get_tensor(name)
        values, scales = self.read_int8(name)
        return _dequantize(values, scales, self.native_groups[name])

    def read_int8(self, name: str) -> tuple[Any, Any]:
        """Values [N, K] int8 and scales [N, groups] float32, torch."""
        scale_name = scale_tensor(name)
        scales = self._files[scale_name].get_tensor(scale_name)
        refuse_bad_scales(f"{self._folder}: tensor '{scale_name}'", scales)
        return self._files[name].get_tensor(name), scales

    def close(self) -> None:
        """Let go of the files; tensors already read keep theirs mapped."""
        self._files.clear()

    def _add_file(self, path: Path) -> None:
        try:
            header = _read_header(path)
            opened = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{path}: not a usable safetensors file ({reason})") from error
        parse_json(header, f"{path}: header")  # the package lets a name that comes twice pass
        for name in opened.keys():  # noqa: SIM118 (not a mapping)
            if name in self._files:
                raise CheckpointError(f"{path}: tensor {name!r} is in another file too")
            self._files[name] = opened

    def _check_tensors(self) -> None:
        """Every tensor the config implies is there with its shape and type, and no other is."""
        wanted = stored_tensors(self.config, self.native_groups)
        missing = [name for name in wanted if name not in self._files]
        if missing:
            more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise CheckpointError(f"{self._folder}: tensor '{missing[0]}' is missing{more}")
        for name in self._files.keys() - wanted.keys():
            self._refuse_extra(name)
        for name, tensor in wanted.items():
            self._check_tensor(name, tensor)

    def _check_tensor(self, name: str, wanted: "StoredTensor") -> None:
        found = self._files[name].get_slice(name)
        dtype, shape = found.get_dtype(), tuple(found.get_shape())
        if dtype not in wanted.dtypes:
            raise UnsupportedError(
                f"{self._folder}: tensor '{name}' is {dtype}; "
                f"supported here: {', '.join(wanted.dtypes)}"
            )
        if shape != wanted.shape:
            raise CheckpointError(
                f"{self._folder}: tensor '{name}' has shape {list(shape)}, "
                f"but config.json implies {list(wanted.shape)}"
            )

    def _refuse_extra(self, name: str) -> None:
        """Allow leftovers that cannot change an answer; refuse the rest."""
        tied_copy = name == HEAD and self.config.tie_word_embeddings
        if tied_copy or name.endswith("rotary_emb.inv_freq"):
            return
        if name.endswith(".bias"):
            raise UnsupportedError(
                f"{self._folder}: tensor {name!r} is not supported; "
                "supported: linear layers without bias, and Qwen2's of Q, K and V"
            )
        raise CheckpointError(
            f"{self._folder}: tensor {name!r} is no part of the model config.json describes"
        )


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a safetensors file holds it."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]  # those it may have; the first is what we write


def stored_tensors(config: ModelConfig, groups: Mapping[str, int]) -> dict[str, StoredTensor]:
    """Every tensor in a folder's files, scales included; `groups` are those of INT8 matrices."""
    stored = {name: StoredTensor(shape, FLOATS) for name, shape in tensor_shapes(config).items()}
    matrices = matrix_shapes(config)
    for name, group in groups.items():
        rows, columns = matrices[name]
        stored[name] = StoredTensor((rows, columns), ("I8",))
        stored[scale_tensor(name)] = StoredTensor((rows, -(-columns // group)), ("F32",))
    return stored


def scale_tensor(name: str) -> str:
    """The name of a matrix's scales on disk."""
    return f"{name}_scale"


def refuse_bad_scales(where: str, scales: Any) -> None:
    """CheckpointError unless every scale (torch or numpy, any shape) is finite and above 0."""
    good = (scales > 0) & (scales < math.inf)  # NaN compares false
    if not bool(good.all()):
        raise CheckpointError(f"{where} holds {scales[~good][0]}; scales are finite and above 0")


def _dequantize(values: Any, scales: Any, group: int) -> Any:
    """Torch values [N, K] int8 times their scales [N, groups]: float32, one tensor in all."""
    floats = values.float()
    whole = floats.shape[1] // group
    floats[:, : whole * group].unflatten(1, (whole, group)).mul_(scales[:, :whole].unsqueeze(2))
    floats[:, whole * group :].mul_(scales[:, -1:])
    return floats


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: the single one, or else those of the index."""
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror}") from error
    if SINGLE in names:
        return [folder / SINGLE]
    if INDEX in names:
        return [folder / name for name in _shards(folder / INDEX)]
    others = set(names) - {"tokenizer.bin"}  # llama2.c's
    pickles = sorted(name for name in others if name.endswith(_PICKLES))
    if pickles:
        raise UnsupportedError(
            f"{folder}: {pickles[0]!r} is a pickle, which can run code and is never loaded; "
            "save the model as safetensors"
        )
    raise CheckpointError(f"{folder}: neither {SINGLE} nor {INDEX} is in this folder")


def _shards(index: Path) -> list[str]:
    """The names of the files an index lists, each of them a plain name."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"{index}: weight_map is not an object that names files")
    for name in shards.values():
        plain = isinstance(name, str) and name.isprintable() and Path(name).name == name
        if not plain or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: {name!r:.60} is not a safetensors file of this folder")
    return sorted(set(shards.values()))


def _read_header(path: Path) -> bytes:
    """The JSON header's bytes, from a file that can be one of weights."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such file")
    if not path.is_file():  # links are followed: a Hugging Face cache is made of them
        raise CheckpointError(f"{path}: not a regular file")
    with path.open("rb") as file:
        head = file.read(64)
        length, size = int.from_bytes(head[:8], "little"), path.stat().st_size
        if head.startswith(b"version https://git-lfs"):
            raise CheckpointError(f"{path}: a Git LFS pointer, not weights; run `git lfs pull`")
        if head[8:9] != b"{" and head.startswith((b"\x80", b"PK")):
            raise UnsupportedError(
                f"{path}: a pickle, which can run code and is never loaded; save it as safetensors"
            )
        if len(head) < 8 or length > size - 8:
            raise CheckpointError(
                f"{path}: truncated: a file of {size:,} bytes whose header takes {length:,}"
            )
        if length > _MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{path}: a header of {length:,} bytes; the limit is {_MAX_HEADER_BYTES:,}"
            )
        file.seek(8)
        return file.read(length)
