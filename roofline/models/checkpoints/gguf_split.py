"""A GGUF model split over files, as llama.cpp's gguf-split and gguf's writer name and number them.

The first part holds the metadata, and each its own tensors. The parts are untrusted, and so is that
they belong together. What one file holds is `gguf`'s business.
"""

import os
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from roofline.errors import CheckpointError
from roofline.models.checkpoints.gguf import GGUFFile, Value, described, quoted


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Open a GGUF file; a file named as a part of a split model opens all its parts."""
    path = Path(path)
    named = _PART_NAME.fullmatch(path.name)
    count = int(named["count"]) if named else 1
    if named is None or count < 2:
        file = GGUFFile(path)
        _check_whole(file)
        return file
    number = int(named["number"])
    if not 1 <= number <= count:
        raise CheckpointError(f"{path}: there is no part {number} of {count}")
    parts = [
        path.with_name(f"{named['name']}-{number:05}-of-{count:05}.gguf")
        for number in range(1, count + 1)
    ]
    missing = [part.name for part in parts if not part.exists()]
    if missing:
        shown = ", ".join(missing[:3]) + (" and more" if len(missing) > 3 else "")
        raise CheckpointError(f"{path}: {len(missing)} of {count} parts are missing: {shown}")
    return SplitGGUF(parts)


class SplitGGUF(GGUFFile):
    """All parts of a split model as one file: the first, and the tensors of the others."""

    def __init__(self, paths: list[Path]) -> None:
        super().__init__(paths[0])
        _check_numbers(self, 0, len(paths))
        self._others: dict[str, GGUFFile] = {}  # tensor name -> part that holds it
        for index, path in enumerate(paths[1:], 1):
            part = GGUFFile(path)
            _check_numbers(part, index, len(paths))
            _check_metadata(part, self)
            self._add(part)
        stated, found = self.require(_TENSORS, int), len(self.tensors)
        if stated != found:
            raise CheckpointError(
                f"{self.path}: {_TENSORS} is {stated}, but the {len(paths)} parts hold {found}"
            )

    def raw(self, name: str) -> NDArray[np.uint8]:
        """Return the bytes of a tensor, [nbytes], read-only and not copied."""
        part = self._others.get(name)
        return super().raw(name) if part is None else part.raw(name)

    def close(self) -> None:
        """Let go of all parts."""
        super().close()
        for part in self._others.values():
            part.close()

    def _add(self, part: GGUFFile) -> None:
        for name in part.tensors:
            if name in self.tensors:
                first = self._others.get(name, self).path.name
                raise CheckpointError(f"{part.path}: tensor {quoted(name)} is in {first} too")
            self._others[name] = part
        self.tensors |= part.tensors


def _check_whole(file: GGUFFile) -> None:
    """Refuse a part whose name does not say of what."""
    count = file.get(_COUNT, int) or 1
    if count != 1:
        raise CheckpointError(
            f"{file.path}: is one of {count} parts ({_COUNT}), but is not named like one; "
            f"name them NAME-00001-of-{count:05}.gguf and so on"
        )


def _check_numbers(part: GGUFFile, index: int, count: int) -> None:
    """Hold what a part says it is against what its name says."""
    found = (part.require(_NUMBER, int), part.require(_COUNT, int))
    if found != (index, count):
        raise CheckpointError(
            f"{part.path}: {_NUMBER} is {found[0]} and {_COUNT} is {found[1]}; "
            f"its name makes them {index} and {count}"
        )


def _check_metadata(part: GGUFFile, first: GGUFFile) -> None:
    """Refuse a part that says of the model what the first part does not."""
    for key, value in part.metadata.items():
        if key not in _OWN and not _same(value, first.metadata.get(key)):
            there = first.metadata.get(key)
            what = "lacks it" if there is None else f"says {described(there)}"
            raise CheckpointError(
                f"{part.path}: metadata key {quoted(key)} is {described(value)}, but "
                f"{first.path.name} {what}; they are parts of different models"
            )


def _same(one: Value, other: Value | None) -> bool:
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return np.array_equal(np.asarray(one), np.asarray(other))
    return one == other


_PART_NAME = re.compile(
    r"(?P<name>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL
)
_NUMBER, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"
_OWN = (_NUMBER, "general.alignment")  # each part has its own
