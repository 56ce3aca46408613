"""A folder of safetensors files with a config.json: floats, or INT8 groups written by us.

Parsing is the safetensors package's; here names, shapes and types are held against the config.
Opening reads headers only; torch comes in with the first tensor.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from roofline.config import ModelConfig
from roofline.errors import CheckpointError, UnsupportedError
from roofline.models.checkpoints.hf_config import read_config, read_json
from roofline.models.checkpoints.tensors import HEAD, matrix_shapes, tensor_shapes

FLOATS = ("F32", "F16", "BF16")
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class SafetensorsCheckpoint:
    """`Checkpoint` over a folder, its tensors checked against the config when opened."""

    def __init__(self, folder: Path) -> None:
        self.config, self.native_groups = read_config(folder)
        self._folder = folder
        self._files: dict[str, Any] = {}  # tensor name -> open file that holds it
        for path in _weight_files(folder):
            self._add_file(path)
        self._check_tensors()

    def read(self, name: str) -> Any:
        """The tensor as floats, dequantised where it is INT8: torch [N, K] or [H]."""
        if name not in self.native_groups:
            return self._files[name].get_tensor(name)
        values, scales = self.read_int8(name)
        group = self.native_groups[name]
        return values.float() * scales.repeat_interleave(group, dim=1)[:, : values.shape[1]]

    def read_int8(self, name: str) -> tuple[Any, Any]:
        """Values [N, K] int8 and scales [N, groups] float32, torch."""
        scale_name = _scale_name(name)
        return self._files[name].get_tensor(name), self._files[scale_name].get_tensor(scale_name)

    def close(self) -> None:
        """Let go of the files."""
        self._files.clear()

    def _add_file(self, path: Path) -> None:
        _refuse_unusable(path)
        try:
            opened = safe_open(path, framework="pt")
            names = list(opened.keys())
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path}: not a usable safetensors file ({error})") from error
        for name in names:
            if name in self._files:
                raise CheckpointError(f"{path}: tensor '{name}' is in another file too")
            self._files[name] = opened

    def _check_tensors(self) -> None:
        """Every tensor the config implies is there with its shape and type, and no other is."""
        wanted = dict(_expected(self.config, self.native_groups))
        missing = [name for name in wanted if name not in self._files]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise CheckpointError(f"{self._folder}: tensor '{missing[0]}'{more} is missing")
        for name, opened in self._files.items():
            if name not in wanted:
                self._refuse_extra(name)
                continue
            shape, types = wanted[name]
            found = opened.get_slice(name)
            if found.get_dtype() not in types:
                raise UnsupportedError(
                    f"{self._folder}: tensor '{name}' is {found.get_dtype()}; "
                    f"supported here: {', '.join(types)}"
                )
            if tuple(found.get_shape()) != shape:
                raise CheckpointError(
                    f"{self._folder}: tensor '{name}' has shape {list(found.get_shape())}, "
                    f"but config.json implies {list(shape)}"
                )

    def _refuse_extra(self, name: str) -> None:
        """Allow leftovers that cannot change an answer; refuse the rest."""
        tied_copy = name == HEAD and self.config.tie_word_embeddings
        if not tied_copy and not name.endswith("rotary_emb.inv_freq"):
            raise UnsupportedError(
                f"{self._folder}: tensor '{name}' has no place in a {self.config.architecture} model"
            )


def _expected(
    config: ModelConfig, groups: Mapping[str, int]
) -> Iterator[tuple[str, tuple[tuple[int, ...], tuple[str, ...]]]]:
    """(name, (shape, allowed types)) of every tensor, scales included."""
    matrices = matrix_shapes(config)
    for name, shape in tensor_shapes(config).items():
        if name not in groups:
            yield name, (shape, FLOATS)
            continue
        yield name, (shape, ("I8",))
        rows, columns = matrices[name]
        yield _scale_name(name), ((rows, -(-columns // groups[name])), ("F32",))


def _scale_name(name: str) -> str:
    return f"{name}_scale"


def _weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: those of the index, or the single one."""
    index = folder / INDEX
    if index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise CheckpointError(f"{index}: weight_map is not an object that names files")
        names = sorted({str(name) for name in shards.values()})
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise CheckpointError(f"{index}: {name!r} is not a safetensors file of this folder")
        return [folder / name for name in names]
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        raise UnsupportedError(
            f"{folder}: {pickles[0]} is a pickle, which can run code and is never loaded; "
            "save the model as safetensors"
        )
    raise CheckpointError(f"{folder}: neither {SINGLE} nor {INDEX} is in this folder")


def _refuse_unusable(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file (a regular one is needed)")
    with path.open("rb") as file:
        head = file.read(24)
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: a Git LFS pointer, not the weights; run `git lfs pull`")
    if head[:2] in (b"\x80\x02", b"\x80\x04", b"PK"):
        raise UnsupportedError(f"{path}: a pickle, which is never loaded; save it as safetensors")


