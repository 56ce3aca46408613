import os
from pathlib import Path

import pytest

from roofline.errors import CheckpointError
from roofline.models.checkpoints.mapping import map_file


def test_a_file_is_mapped_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    assert map_file(path, "a model")[:] == b"abc"


@pytest.mark.parametrize("kind", ["nothing", "empty", "directory", "fifo", "nul"])
def test_what_cannot_be_mapped_is_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / ("a\0b" if kind == "nul" else "a")
    if kind == "empty":
        path.touch()
    elif kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    problems = {
        "nothing": "no such file",
        "empty": "is empty; a model is needed",
        "directory": "is a directory; a model is needed",
        "fifo": "is not a regular file; a model is needed",
        "nul": "cannot be read: embedded null byte",
    }
    with pytest.raises(CheckpointError) as caught:
        map_file(path, "a model")
    assert caught.value.message == f"{path}: {problems[kind]}"
