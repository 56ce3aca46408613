"""JSON objects of untrusted files, and typed access to their fields; no meaning of any field.

Whatever is wrong is a CheckpointError that names file and field.
"""

import collections
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from roofline.errors import CheckpointError, UnsupportedError, shown

MAX_JSON_BYTES = 8 << 20  # an index of 75,000 tensors; the worst such text is 250 MB parsed


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of sane size; CheckpointError names the file otherwise."""
    try:
        if not path.exists():
            raise CheckpointError(f"{path}: no such file")
        if not path.is_file():  # opening a FIFO would wait for its writer
            raise CheckpointError(f"{path}: not a regular file")
        with path.open("rb") as file:
            text = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if text.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: a Git LFS pointer, not JSON; run `git lfs pull`")
    if len(text) > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: too large for JSON; the limit is {MAX_JSON_BYTES:,} bytes")
    return parse_json(text, str(path))


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """A JSON object in UTF-8, no key of it twice; CheckpointError says `where` otherwise."""
    try:
        found = json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{where}: holds a JSON {type(found).__name__}, not an object")
    return found


class Fields:
    """Typed access to a JSON object; a wrong type or a missing field names file and field.

    A null counts as absent, as it does for Hugging Face.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def get(self, name: str) -> Any:
        """The raw value, None where absent."""
        return self.values.get(name)

    def integer(self, name: str, default: int | None = None) -> int:
        """An integer."""
        value = self._present(name, default)
        if type(value) is not int:
            raise self.wrong(name, "an integer")
        return value

    def optional_integer(self, name: str) -> int | None:
        """An integer, or None where absent."""
        return None if self.get(name) is None else self.integer(name)

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number, as float."""
        value = self._present(name, default)
        number = type(value) is int or type(value) is float
        if not number or not abs(value) <= sys.float_info.max:  # NaN compares false
            raise self.wrong(name, "a finite number")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self._present(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def section(self, name: str) -> dict[str, Any]:
        """The members of an object, none where absent."""
        value = self._present(name, {})
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return value

    def wrong(self, name: str, wanted: str) -> CheckpointError:
        """The error of a field that is not what is `wanted`."""
        return CheckpointError(
            f"{self.where}: {name} is {shown(self.get(name))}; it must be {wanted}"
        )

    def unsupported(self, name: str, supported: str) -> UnsupportedError:
        """The error of a field whose value we do not do."""
        value = shown(self.get(name))
        return UnsupportedError(
            f"{self.where}: {name} {value} is not supported; supported: {supported}"
        )

    def _present(self, name: str, default: Any) -> Any:
        value = self.get(name)
        value = default if value is None else value
        if value is None:
            raise CheckpointError(f"{self.where}: no field '{name}'")
        return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's members; ValueError for a key that comes twice, which readers take apart."""
    found = dict(pairs)
    if len(found) < len(pairs):
        key, _ = collections.Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"duplicate key {shown(key)}")
    return found
