import os
from pathlib import Path

import pytest

from roofline.errors import CheckpointError
from roofline.models.checkpoints.json_fields import parse_json, read_json


def test_folder_and_fifo_are_no_json_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(CheckpointError, match="not a regular file"):
            read_json(path)


def test_unreadable_json_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "config.json"
    path.write_text("{}")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=r"config.json: cannot be read: Permission denied"):
        read_json(path)


def test_parsed_json_says_where(tmp_path: Path) -> None:
    assert parse_json(b'{"a": {"b": 1}, "c": {"b": 2}}', "here") == {"a": {"b": 1}, "c": {"b": 2}}
    with pytest.raises(CheckpointError, match=r"^here: not valid JSON"):
        parse_json(b"{]", "here")


def test_a_git_lfs_pointer_is_told(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(CheckpointError, match="a Git LFS pointer, not JSON; run `git lfs pull`"):
        read_json(path)
