"""A checkpoint quantised to INT8 and written to disk: a safetensors folder of our own.

What a tensor becomes is `reading`'s, for loaders and for us, so the files hold the bits that
quantising at load gives. docs/int8_groups.md shows them.
"""

import contextlib
import dataclasses
import errno
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from roofline.config import WeightFormat
from roofline.errors import CapacityError, UsageError
from roofline.models.checkpoints import Checkpoint
from roofline.models.checkpoints.generation_config import (
    GENERATION_CONFIG,
    generation_config_json,
)
from roofline.models.checkpoints.hf_config import write_config
from roofline.models.checkpoints.reading import float_vector, int8_rows, tensor_groups
from roofline.models.checkpoints.safetensors_folder import (
    SINGLE,
    StoredTensor,
    refuse_bad_scales,
    scale_tensor,
    stored_tensors,
)
from roofline.models.checkpoints.tensors import vector_shapes
from roofline.models.opening import OpenedModel

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ITEM_BYTES = {"F32": 4, "I8": 1}


def write_quantized(
    opened: OpenedModel, folder: Path, weights: WeightFormat, progress: Callable[[str], None]
) -> None:
    """Quantise a model into a new safetensors folder; `progress` is told each tensor's name.

    All work is in a folder of its own beside `folder`, removed whatever happens; the last act is a
    rename. At any time one tensor is in memory, as floats and as INT8.
    """
    if weights.quantization != "int8":
        raise UsageError(f"quantization '{weights.quantization}' cannot be written; int8 can")
    if os.path.lexists(folder):
        raise UsageError(f"{folder}: exists already; name a folder to be made")
    checkpoint, config = opened.checkpoint, opened.config
    groups = tensor_groups(config, weights, checkpoint.native_groups)
    plan = _plan_file(stored_tensors(config, groups))
    with (
        _naming_the_disk(folder, plan.total_bytes),
        tempfile.TemporaryDirectory(prefix=".quantize-", dir=folder.parent) as scratch,
    ):
        partial = Path(scratch, folder.name)  # inside: the scratch folder is its owner's alone
        partial.mkdir()
        with (partial / SINGLE).open("xb") as file:
            _write_tensors(checkpoint, groups, plan, file, progress)
        text = write_config(config, weights, groups)
        (partial / "config.json").write_text(text, encoding="utf-8")
        if opened.sampling_defaults:
            text = generation_config_json(opened.sampling_defaults)
            (partial / GENERATION_CONFIG).write_text(text, encoding="utf-8")
        if opened.tokenizer is not None:
            opened.tokenizer.save(partial)
        partial.rename(folder)


@dataclasses.dataclass(frozen=True)
class _FilePlan:
    """A safetensors file whose shapes are known before its tensors are."""

    header: bytes  # with its length before it
    starts: dict[str, int]  # tensor name -> its first byte in the file
    total_bytes: int


def _plan_file(tensors: Mapping[str, StoredTensor]) -> _FilePlan:
    """Lay tensors out one after the other, the wider types first so that all are aligned.

    The safetensors package can only save what is in memory as a whole.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -_ITEM_BYTES[item[1].dtypes[0]]):
        start, dtype = end, tensor.dtypes[0]
        end += math.prod(tensor.shape) * _ITEM_BYTES[dtype]
        offsets[name] = start
        shape = list(tensor.shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    starts = {name: len(header) + offset for name, offset in offsets.items()}
    return _FilePlan(header, starts, len(header) + end)


def _write_tensors(
    checkpoint: Checkpoint,
    groups: Mapping[str, int],
    plan: _FilePlan,
    file: BinaryIO,
    progress: Callable[[str], None],
) -> None:
    def put(name: str, tensor: Tensor) -> None:
        file.seek(plan.starts[name])
        file.write(tensor.contiguous().numpy().data)

    file.write(plan.header)
    for name, group in groups.items():
        progress(name)
        weight = int8_rows(checkpoint, name, group, slice(None))
        refuse_bad_scales(f"tensor '{name}': its scales", weight.scales)
        put(name, weight.values)
        put(scale_tensor(name), weight.scales)
    for name in vector_shapes(checkpoint.config):
        progress(name)
        put(name, float_vector(checkpoint, name, slice(None)))
    file.flush()
    os.fsync(file.fileno())  # some disks say only now that they are full


@contextlib.contextmanager
def _naming_the_disk(folder: Path, needed_bytes: int) -> Generator[None, None, None]:
    """Refuse a disk without room for `needed_bytes`, and turn the system's errors into ours."""
    try:
        free = shutil.disk_usage(folder.parent).free
        if free < needed_bytes:
            raise _no_room(folder, needed_bytes, f"{free:,} are free")
        yield
    except OSError as error:
        if error.errno in _FULL_DISK:
            free = shutil.disk_usage(folder.parent).free
            why = f"it could not be written to the end ({error.strerror}; {free:,} are free)"
            raise _no_room(folder, needed_bytes, why) from error
        raise UsageError(f"{folder}: cannot be written: {error.strerror}") from error


def _no_room(folder: Path, needed_bytes: int, why: str) -> CapacityError:
    return CapacityError(
        f"{folder}: the quantised model takes {needed_bytes:,} bytes of disk, but {why}; "
        "make room or name a folder on another disk"
    )
