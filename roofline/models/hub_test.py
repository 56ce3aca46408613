import os
from pathlib import Path

import pytest

from roofline.errors import CheckpointError, DownloadError, UsageError
from roofline.models import hub
from roofline.models.repository import RepoReference
from tests.hub_server import Hub


def test_existing_path_is_returned_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert hub.resolve(str(file)) == file
    assert hub.resolve(str(tmp_path)) == tmp_path


def test_existing_path_wins_over_a_builtin_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("smollm2-135m").write_bytes(b"mine")
    assert hub.resolve("smollm2-135m") == Path("smollm2-135m")


def test_empty_file_and_folder_are_refused_by_name(tmp_path: Path) -> None:
    file, folder = tmp_path / "empty.gguf", tmp_path / "folder"
    file.touch()
    folder.mkdir()
    with pytest.raises(CheckpointError, match=r"empty\.gguf' is empty"):
        hub.resolve(str(file))
    with pytest.raises(CheckpointError, match="folder' is empty"):
        hub.resolve(str(folder))


@pytest.mark.skipif(not Path("/dev/null").is_char_device(), reason="needs device files")
def test_fifo_and_device_are_refused_and_never_opened(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo.gguf"
    os.mkfifo(fifo)
    for path in (fifo, Path("/dev/null")):
        with pytest.raises(UsageError, match="is neither a file nor a folder"):
            hub.resolve(str(path))


@pytest.mark.parametrize("reference", ["smollm-135m", "SmolLM2-135M", "smollm2"])
def test_unknown_name_is_answered_with_the_nearest(reference: str) -> None:
    with pytest.raises(UsageError) as raised:
        hub.resolve(reference)
    assert f"model '{reference}' is not an existing path" in raised.value.message
    assert "did you mean 'smollm2-135m'?" in raised.value.message
    assert "safetensors folder" in raised.value.message


@pytest.mark.parametrize(
    "reference", ["", "nowhere/model.gguf", "a\0b", "x" * 100_000, "two\nlines", "\udc80"]
)
def test_senseless_reference_is_one_short_line_of_what_works(reference: str) -> None:
    with pytest.raises(UsageError) as raised:
        hub.resolve(reference)
    assert "give the path of a .gguf file" in raised.value.message
    assert "\n" not in raised.value.message
    assert len(raised.value.message) < 500


def test_preset_is_told_from_a_model_with_weights() -> None:
    with pytest.raises(UsageError, match="runs with --load-format dummy"):
        hub.resolve("llama-3.2-1b")
    with pytest.raises(UsageError, match=r"did you mean 'llama-3\.1-8b'"):
        hub.resolve("llama-3.1-8")


def test_a_path_of_two_parts_wins_over_a_repository(
    hub_server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_server.add("org/model", {"m.gguf": b"GGUF"})
    assert hub.parse("org/model") == RepoReference("org/model")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    (tmp_path / "org" / "model" / "config.json").touch()
    assert hub.resolve("org/model") == Path("org/model")
    assert hub_server.requests == []


def test_a_revision_is_for_repositories(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for reference in (str(tmp_path), "smollm2-135m", "llama-3.1-8b", "nothing"):
        with pytest.raises(UsageError, match=r"revision 'v1' does nothing: .* is no Hugging Face"):
            hub.resolve(reference, revision="v1")
    with pytest.raises(UsageError, match="it must be a branch, a tag or a commit hash"):
        hub.resolve("org/model", revision="../../etc")


def test_a_builtin_model_that_is_not_here_is_fetched_only_when_it_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROOFLINE_CACHE", str(tmp_path))
    with pytest.raises(DownloadError, match="absent; `roofline pull smollm2-135m` fetches it"):
        hub.resolve("smollm2-135m", fetch="nothing")


@pytest.mark.parametrize("reference", ["a/../b", "org/repo:", "../../etc/passwd", "a/b/c", "a//b"])
def test_a_name_that_leads_elsewhere_asks_no_hub(
    hub_server: Hub, reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where no such file is, whatever folder the tests run in
    with pytest.raises(UsageError, match="is not an existing path nor a built-in name"):
        hub.resolve(reference)
    assert hub_server.requests == []
